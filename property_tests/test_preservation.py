"""What growing must not change: outputs, gradients and moments of everything the action is not about, to the bit."""

from functools import cache
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from esper import keys as k
from esper.growth.forward import forward, mean_loss
from esper.growth.governor import rollback
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.growth.step import act
from esper.growth.trees import as_tree, leaves, like
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds import blending, blueprints  # noqa: F401  (importing blueprints registers them)
from esper.seeds.actions import Op
from esper.seeds.blueprints import registry
from esper.seeds.lifecycle import LifecycleRules, put
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS, INCUBATIONS, Stage
from esper.values import changed
from tiny import action, differing, opened, same

HOSTS = {
    "cnn": (CNNHost(1, 5, 2, pool_layers=2), ("norm", "attention", "depthwise", "conv_light", "conv_expand")),
    "transformer": (TransformerHost(11, 8, 2, 3, 6, dropout=0.2), ("norm", "lora", "attention", "mlp")),
}
STAGES = (Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY, Stage.FOSSILIZED)


class Case:
    """Two hosts that already hold a seed in one slot; the test acts on host 0 in another slot."""

    def __init__(self, spec: GrowthSpec, growth: TensorDict, slot: int, key: torch.Tensor) -> None:
        self.spec, self.growth, self.slot, self.key = spec, growth, slot, key
        images = spec.host.topology == "cnn"
        self.x = k.normal(k.fold(key, 2), 3, 1, 8, 8) if images else k.integers(k.fold(key, 2), 11, 3, 6)
        self.y = k.integers(k.fold(key, 3), 5, 3) if images else k.integers(k.fold(key, 3), 11, 3, 6)

    def __repr__(self) -> str:
        stages = self.growth["slots", "stage"][0].tolist()
        return f"Case({self.spec.host}, stages {stages}, slot {self.slot}, key {self.key})"

    def act(self, op, blueprint=0, blend=0):
        """The state after one action on host 0; the action must succeed."""
        asked = action(2, {0: (op, self.slot, blueprint % len(self.spec.blueprints), blend)})
        growth, outcome = act(self.spec, self.growth, asked, torch.full((2,), 50.0))
        assert outcome["success"].all()
        return growth

    def kind(self, blueprint):
        return self.spec.blueprints[blueprint % len(self.spec.blueprints)]

    def seed(self, matrix, blueprint):
        """Views of the seeds that a matrix of the bank has in the slot, a tree."""
        return self.spec.bank.kinds[LAYOUT[self.slot], self.kind(blueprint)].open(matrix)

    def record(self, growth, **values):
        """`growth` with other values in the record of the slot of host 0."""
        mask = torch.zeros(2, len(LAYOUT), dtype=torch.bool)
        mask[0, self.slot] = True
        return changed(growth, slots=put(growth["slots"], mask, **values))

    def run(self, growth, training) -> tuple[torch.Tensor, list[torch.Tensor], dict[int, list[torch.Tensor]]]:
        """Logits of host 0, its gradients and the gradients of its seeds by slot."""
        plan = make_plan(growth["slots"], self.spec)[0]
        wanted: list[torch.Tensor] = []

        def watch(tree: dict[str, Any]) -> dict[str, Any]:
            own = [leaf.clone().requires_grad_() for leaf in leaves(tree)]
            wanted.extend(own)
            return like(tree, iter(own))

        params = watch(as_tree(growth["host", "params"][0]))
        n_host, seeds, spans = len(wanted), [], {}
        for j, (slot, entry) in enumerate(zip(LAYOUT, plan, strict=True)):
            start = len(wanted)
            bank = growth["seeds", "params"][0]
            seeds.append(entry and watch(self.spec.bank.kinds[slot, entry.blueprint].open(bank)))
            spans[j] = slice(start, len(wanted))
        logits, _ = forward(
            self.spec,
            plan,
            params,
            as_tree(growth["host", "statistics"][0]),
            seeds,
            growth["slots", "alpha"][0],
            self.x,
            momentum=0.1 if training else None,
            key=self.key if training else None,
        )
        grads = torch.autograd.grad(mean_loss(logits, self.y), wanted, materialize_grads=True)
        return logits.detach(), list(grads[:n_host]), {j: list(grads[span]) for j, span in spans.items()}


@cache
def fresh(topology: str) -> TensorDict:
    host, kinds = HOSTS[topology]
    spec = GrowthSpec(host, LAYOUT, kinds, LifecycleRules(25))
    return fresh_growth(spec, k.host_keys(k.root(0), 2), torch.full((2,), 0.1), torch.full((2,), 0.1))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology = draw(st.sampled_from(sorted(HOSTS)))
    host, kinds = HOSTS[topology]
    rules = LifecycleRules(25, strict_gates=False, incubation=draw(st.sampled_from(INCUBATIONS[:2])))
    spec = GrowthSpec(host, LAYOUT, kinds, rules)
    key = k.root(draw(st.integers(0, 2**31)))
    slot, other = draw(st.permutations(range(3)))[:2]
    kind, blend = draw(st.integers(0, len(kinds) - 1)), draw(st.integers(0, 2))
    neighbour = action(2, dict.fromkeys(range(2), (Op.GERMINATE, other, kind, blend)))
    growth, _ = act(spec, fresh(topology).exclude("snapshot"), neighbour, torch.full((2,), 50.0))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[:, other] = True
    stage = draw(st.sampled_from(STAGES))
    alpha = {Stage.TRAINING: 0.0, Stage.BLENDING: draw(st.floats(0.125, 0.875, width=32))}.get(stage, 1.0)
    growth = changed(
        growth,
        slots=put(growth["slots"], mask, stage=stage, alpha=alpha, age=4, contribution=3.0),
        host=stirred(growth["host"], k.fold(key, 1)),
        seeds=stirred_seeds(growth["seeds"], spec.bank.kinds[LAYOUT[other], kinds[kind]].columns, k.fold(key, 5)),
    )
    return Case(spec, growth, slot, key)


def noise(key: torch.Tensor, leaf: torch.Tensor, which: int) -> torch.Tensor:
    return 0.1 * k.normal(k.fold(key, leaf.numel(), which), *leaf.shape, dtype=leaf.dtype)


def stirred(trained: TensorDict, key: torch.Tensor) -> TensorDict:
    """Parameters away from their initial values, with moments, as if they had been trained."""
    return changed(
        trained,
        params=trained["params"].apply(lambda leaf: leaf + noise(key, leaf, 0)),
        moments=trained["moments"].apply(lambda leaf: noise(key, leaf, 1)),
    )


def stirred_seeds(seeds: TensorDict, columns: slice, key: torch.Tensor) -> TensorDict:
    """The bank with the same done to the seeds in `columns`."""
    params, moments = seeds["params"].clone(), seeds["moments"].clone()
    params[:, columns] += noise(key, params[:, columns], 0)
    moments[:, columns] = noise(key, moments[:, columns], 1)
    return changed(seeds, params=params, moments=moments)


planting = {"blueprint": st.integers(0, 4), "blend": st.integers(0, len(BLENDS) - 1)}


@given(case=cases(), training=st.booleans(), **planting)
def test_germinating_changes_no_output_and_no_gradient(case, training, blueprint, blend):
    logits, grads, seeds = case.run(case.growth, training)
    growth = case.act(Op.GERMINATE, blueprint, blend)
    body = case.seed(growth["seeds", "params"], blueprint)["body"]
    if "down" in body and case.spec.host.topology == "cnn":
        body["down"].abs_()  # features are not negative, so no hidden unit of this blueprint is dead
    after, host, grown = case.run(growth, training)
    assert torch.equal(after, logits)
    assert all(torch.equal(a, b) for a, b in zip(host, grads, strict=True))
    assert all(torch.equal(a, b) for j in seeds if j != case.slot for a, b in zip(grown[j], seeds[j], strict=True))
    if case.spec.rules.incubation == "straight_through":
        assert any(bool((g != 0).any()) for g in grown[case.slot]), "while the seed itself learns"
    else:
        assert not grown[case.slot] or not any(bool(g.any()) for g in grown[case.slot])


@given(case=cases(), training=st.booleans(), **planting)
def test_culling_a_seed_in_training_changes_no_output_and_no_gradient(case, training, blueprint, blend):
    case.growth = case.record(case.act(Op.GERMINATE, blueprint, blend), age=3)
    logits, grads, _ = case.run(case.growth, training)
    after, host, _ = case.run(case.act(Op.CULL), training)
    assert torch.equal(after, logits)
    assert all(torch.equal(a, b) for a, b in zip(host, grads, strict=True))


@given(case=cases(), training=st.booleans(), **planting)
def test_fossilising_at_full_alpha_changes_no_output_and_no_gradient(case, training, blueprint, blend):
    ripe = {"stage": Stage.PROBATIONARY, "alpha": 1.0, "contribution": 2.0, "age": 9}
    case.growth = case.record(case.act(Op.GERMINATE, blueprint, blend), **ripe)
    logits, grads, seeds = case.run(case.growth, training)
    after, host, grown = case.run(case.act(Op.FOSSILIZE), training)
    assert torch.equal(after, logits)
    assert all(torch.equal(a, b) for a, b in zip(host, grads, strict=True))
    assert all(torch.equal(a, b) for j in seeds for a, b in zip(grown[j], seeds[j], strict=True))


@given(
    case=cases(),
    training=st.booleans(),
    poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]),
    **planting,
)
def test_a_seed_that_is_not_finite_is_not_felt_while_it_trains(case, training, poison, blueprint, blend):
    logits, grads, _ = case.run(case.growth, training)
    growth = case.act(Op.GERMINATE, blueprint, blend)
    for leaf in leaves(case.seed(growth["seeds", "params"], blueprint)):
        leaf[0] = poison
    after, host, _ = case.run(growth, training)
    assert torch.equal(after, logits)
    assert all(torch.equal(a, b) for a, b in zip(host, grads, strict=True))


def untouched(case: Case, after: TensorDict) -> list[tuple[str, ...]]:
    """Host 1 keeps every bit; host 0 keeps every parameter and moment that is not of the slot."""
    before, after = opened(case.spec, case.growth), opened(case.spec, after)
    changes = differing(before, after)
    assert {(path[0], path[2]) for path in changes if path[0] != "slots"} <= {("seeds", LAYOUT[case.slot])}
    assert all(same(before[path][1], after[path][1]) for path in changes)
    return changes


@given(case=cases(), **planting)
def test_moments_move_with_the_topology(case, blueprint, blend):
    germinated = case.act(Op.GERMINATE, blueprint, blend)
    columns = case.spec.bank.kinds[LAYOUT[case.slot], case.kind(blueprint)].columns
    assert untouched(case, germinated)
    assert not germinated["seeds", "moments"][:, columns].any(), "new parameters start at zero moments"

    seeds = germinated["seeds"].clone()
    seeds["moments"][0, columns] = 0.5
    case.growth = case.record(
        changed(germinated, seeds=seeds), stage=Stage.PROBATIONARY, alpha=1.0, contribution=2.0, age=9
    )
    fossilised = case.act(Op.FOSSILIZE)
    assert not any(path[0] in ("host", "seeds") for path in untouched(case, fossilised))

    culled = case.act(Op.CULL)
    untouched(case, culled)
    gone, whole = culled["seeds"][0].values(), case.spec.bank.columns(LAYOUT[case.slot])
    assert not any(matrix[whole].any() for matrix in gone), "a slot's moments vanish with its seed"


@given(case=cases(), **planting)
def test_a_rollback_moves_one_host_to_its_snapshot_and_no_other_bit(case, blueprint, blend):
    grown = changed(case.act(Op.GERMINATE, blueprint, blend), snapshot=fresh(case.spec.host.topology)["snapshot"])
    assert rollback(grown, torch.zeros(2, dtype=torch.bool)) is grown
    back = rollback(grown, torch.tensor([True, False]))
    parts = ("host", "seeds", "slots", "governor")
    assert not differing(back.select(*parts)[1], grown.select(*parts)[1])
    assert not differing(back["host"][0], grown["snapshot", "host"][0])
    assert not any(leaf[0].any() for leaf in back["seeds"].values(True, True))
    assert differing(back["host", "moments"][0], grown["host", "moments"][0])
    assert same(back["slots", "planted"], grown["slots", "planted"])
    assert not same(back["slots", "stage"], grown["slots", "stage"])


def test_the_cases_cover_every_blueprint_a_run_can_plant():
    for topology, (_, kinds) in HOSTS.items():
        assert set(kinds) | {"noop", "conv_heavy"} >= set(registry.names(topology))
    assert blending.GATED in range(len(BLENDS))
