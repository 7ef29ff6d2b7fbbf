"""Laws of the reward, over whole episodes of a toy world and over single steps of any kind."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from esper.control.simple import Controller, random_legal
from esper.environment.potentials import MAX_POTENTIAL, stage_potential
from esper.environment.rewards import COMPONENTS, LossSettings, RewardSettings, reward
from esper.environment.signals import SignalTracker
from esper.seeds.actions import Op
from esper.seeds.slots import empty_records
from esper.seeds.stages import GATE_OF, TRANSITIONS, Stage
from records import RULES, play
from strategies import seeds, to_records

GAMMA = 0.995
LOSS = LossSettings(baseline=2.3, target=0.3, typical_delta=0.05, rent_weight=0.05)
FAMILIES = [
    RewardSettings(GAMMA, 25, 1000, 4000),
    RewardSettings(GAMMA, 25, 1000, 4000, family="loss", loss=LOSS),
    RewardSettings(GAMMA, 25, 1000, 4000, mode="sparse"),
    RewardSettings(GAMMA, 25, 1000, 4000, mode="minimal"),
]
EPISODES = settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # too slow to shrink
PERCENT = st.floats(0.0, 100.0, width=32)


@st.composite
def results(draw: st.DrawFn) -> TensorDict:
    """A step of one host with three slots in which anything may have happened."""
    before, lived, after = (to_records(draw(st.lists(seeds(), min_size=3, max_size=3))) for _ in range(3))
    op, slot = draw(st.sampled_from(list(Op))), draw(st.integers(-1, 2))
    success = op == Op.WAIT or (slot >= 0 and draw(st.booleans()))
    target = torch.tensor([[success and j == slot for j in range(3)]])
    outcome = {"op": torch.tensor([int(op)]), "slot": torch.tensor([slot]), "success": torch.tensor([success])}
    for name, kind in (("germinated", Op.GERMINATE), ("culled", Op.CULL), ("fossilized", Op.FOSSILIZE)):
        outcome[name] = target & (op == kind)
    tracker = SignalTracker().init(1)
    tracker["val_accuracy"] = torch.tensor([draw(PERCENT)])
    tracker["previous_val_accuracy"] = torch.tensor([draw(PERCENT)])
    tracker["loss_delta"] = torch.tensor([draw(st.floats(-1e6, 1e6, width=32))])
    tracker["val_loss"] = torch.tensor([draw(st.floats(width=32))])
    result = {"before": before, "lived": lived, "after": after, "tracker": tracker}
    result["outcome"] = TensorDict(outcome, batch_size=[1])
    result |= {name: torch.tensor([draw(st.booleans())]) for name in ("panic", "restarted")}
    return TensorDict(result, batch_size=[1])


@given(results(), st.sampled_from(FAMILIES), st.booleans())
def test_components_sum_to_a_total_that_is_bounded(result, family, terminal):
    parts = reward(result, family, terminal=terminal)
    exact = sum(float(parts[name]) for name in COMPONENTS)
    total = float(parts["total"])
    assert abs(exact - total) <= 1e-6 * max(1.0, abs(total) / 8)
    growth = abs(float(result["after", "parameters"].sum() - result["before", "parameters"].sum()))
    price = 10.0 * growth / family.param_budget
    bounds = {
        "objective": 0.1 * (100.0 + price) if family.mode == "shaped" else 1.0,
        "shaping": (0.1 if family.family == "loss" else family.shaping_weight) * 3 * MAX_POTENTIAL,
        "attribution": family.contribution_weight * 3 * 10.0,
        "harm": family.contribution_weight * 3 * 10.0 / 25,
        "blending_warning": family.warning * 3 * 4.0 / 25,
        "indecision": 3 * family.max_indecision,
        "rent": 5.0 if family.family == "loss" else family.max_rent / 25,
        "action": 1.01,
        "fossils": 3 * family.fossil_bonus,
        "loss": 26.0,
        "panic": family.panic,
    }
    for name in COMPONENTS:
        assert abs(float(parts[name])) <= bounds[name] + 1e-5, name


@given(st.sampled_from(list(Stage)), st.integers(0, 100), st.integers(1, 200))
def test_advancing_raises_the_potential_whenever_it_comes(stage, epochs, max_epochs):
    def potential(stage: Stage, epochs: int) -> float:
        return float(stage_potential(to_records([{"stage": stage, "epochs_in_stage": epochs}]), max_epochs))

    assert potential(stage, epochs + 1) >= potential(stage, epochs)
    for successor in TRANSITIONS[stage]:
        if successor in GATE_OF:
            assert potential(successor, 0) > potential(stage, epochs)
        else:
            assert potential(successor, epochs) == 0.0


@EPISODES
@given(st.integers(0, 10**6), st.lists(st.floats(-8, 8), min_size=5, max_size=5))
def test_episodes_of_random_growing(seed, worth):
    """Shaping and attribution telescope to zero, the objective to the objective, and totals are the sums of their
    parts."""
    family = FAMILIES[0]
    worths = torch.tensor(worth)
    steps, total, reached = play(random_legal(), family, value=worths, removal=worths * 2, n_hosts=8, seed=seed)
    last = len(steps) - 1
    parts = [reward(step, family, terminal=t == last) for t, step in enumerate(steps)]
    for name in ("shaping", "attribution"):
        discounted = sum(GAMMA**t * part[name].double() for t, part in enumerate(parts))
        assert float(discounted.abs().max()) <= 1e-6, name
        assert max(float(part[name].abs().max()) for part in parts) > 0 or name == "attribution"
    objective = sum(part["objective"].double() for part in parts)
    assert torch.allclose(objective, 0.1 * (reached.double() - 10.0), atol=1e-5)
    assert torch.allclose(total, sum(part["total"] for part in parts), atol=1e-5)


@given(
    st.lists(st.lists(seeds(), min_size=3, max_size=3), min_size=5, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.sampled_from(FAMILIES[:2]),
)
def test_every_segment_of_an_episode_telescopes(states, panics, family):
    """Also one that a host which was taken back begins with fossils, whatever the seeds do."""
    records = [empty_records(1, 3), *map(to_records, states)]
    discounted = {"shaping": 0.0, "attribution": 0.0}
    start = 0
    for t, panic in enumerate(panics):
        tracker, no = SignalTracker().init(1), torch.tensor([False])
        outcome = {"op": torch.tensor([0]), "slot": torch.tensor([-1]), "success": torch.tensor([True])}
        outcome |= dict.fromkeys(("germinated", "culled", "fossilized"), torch.zeros(1, 3, dtype=torch.bool))
        step = {"before": records[t], "lived": records[t + 1], "after": records[t + 1], "tracker": tracker}
        step |= {"outcome": TensorDict(outcome, [1]), "panic": no | panic, "restarted": no | (t > 0 and t == start)}
        parts = reward(TensorDict(step, [1]), family, terminal=t == len(panics) - 1)
        for name in discounted:
            discounted[name] += GAMMA ** (t - start) * float(parts[name])
        if panic:
            assert max(map(abs, discounted.values())) <= 1e-6
            discounted, start = dict.fromkeys(discounted, 0.0), t + 1
    assert max(map(abs, discounted.values())) <= 1e-6


@EPISODES
@given(st.integers(0, 4), st.floats(-40, 40), st.integers(0, 10**6))
def test_planting_and_culling_over_and_over_never_pays(blueprint, worth, seed):
    """Apart from what it did to accuracy, a loop costs, however long seeds are held and whatever they were worth."""
    hold = torch.arange(1, 13)

    def act(td: TensorDict, carry: TensorDict) -> tuple[torch.Tensor, TensorDict]:
        held = carry["held"]
        plant, cull = td["mask_slot"][:, Op.GERMINATE, 0], td["mask_slot"][:, Op.CULL, 0] & (held >= hold)
        op = torch.where(plant, int(Op.GERMINATE), torch.where(cull, int(Op.CULL), 0))
        nothing = torch.zeros_like(op)
        action = torch.stack([nothing, torch.where(plant, blueprint, 0), nothing, op], dim=1)
        return action, TensorDict({"held": torch.where(plant, 1, held + 1)}, [len(hold)])

    controller = Controller(lambda n: TensorDict({"held": torch.zeros(n, dtype=torch.int64)}, [n]), act)
    family, value = FAMILIES[0], torch.full((5,), worth)
    steps, _, _ = play(controller, family, value=value, removal=value, n_hosts=len(hold), seed=seed)
    assert int(sum(step["outcome", "germinated"].sum() for step in steps)) > 2 * len(hold)
    nets = torch.zeros(2, len(hold), dtype=torch.float64)
    for t, step in enumerate(steps):
        parts = reward(step, family, terminal=t == len(steps) - 1)
        earned = (parts["total"] - parts["objective"]).double()
        nets += torch.stack([earned, GAMMA**t * earned])
    assert float(nets.max()) < 0.0


@EPISODES
@given(st.integers(0, 4), st.floats(-40, -0.01), st.integers(0, 10**6))
def test_harm_that_is_culled_never_pays(blueprint, harm, seed):
    """Apart from what it did to accuracy, a harmful seed's whole life costs, however long it was kept."""
    held = torch.arange(1, 21)

    def act(td: TensorDict, carry: TensorDict) -> tuple[torch.Tensor, TensorDict]:
        epoch = (td["observation"][:, 0] * RULES.max_epochs).round().to(torch.int64)
        plant, cull = epoch == 1, (epoch == 1 + held) & td["mask_slot"][:, Op.CULL, 0]
        op = torch.where(plant, int(Op.GERMINATE), torch.where(cull, int(Op.CULL), 0))
        nothing = torch.zeros_like(op)
        return torch.stack([nothing, torch.where(plant, blueprint, 0), nothing, op], dim=1), carry

    controller = Controller(lambda n: TensorDict({}, [n]), act)
    family = FAMILIES[0]
    worth = torch.full((5,), harm)
    steps, _, _ = play(controller, family, value=worth, removal=worth, n_hosts=len(held), seed=seed)
    nets = torch.zeros(2, len(held), dtype=torch.float64)
    for t, step in enumerate(steps):
        parts = reward(step, family, terminal=t == len(steps) - 1)
        earned = (parts["total"] - parts["objective"]).double()
        nets += torch.stack([earned, GAMMA**t * earned])
    assert float(nets.max()) < 0.0
