"""Coalitions: scored together as they would be one by one, and what follows from their scores."""

import pytest
import torch

from esper import keys as k
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.forward import correct, forward, mean_loss
from esper.growth.plan import coalitions, live_slots, make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.growth.step import Shard, act, contributions, evaluate
from esper.growth.trees import as_tree
from esper.hosts.transformer import TransformerHost
from esper.seeds.actions import Op
from esper.seeds.attribution import interactions, shapley
from esper.seeds.gates import in_stage
from esper.seeds.lifecycle import LifecycleRules, put
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDED, Stage
from esper.values import changed
from tiny import Run, action, differing, flat, images, tiny_spec

CPU = torch.device("cpu")
N = 4
EXECUTORS = {"loop": LoopExecutor, "stacked": lambda spec: StackedExecutor(spec, CPU)}
ALPHAS = {Stage.TRAINING: 0.0, Stage.BLENDING: 0.4, Stage.PROBATIONARY: 1.0, Stage.FOSSILIZED: 1.0}
HELD = (
    (Stage.BLENDING, Stage.PROBATIONARY, Stage.FOSSILIZED),
    (Stage.DORMANT, Stage.BLENDING, Stage.TRAINING),
    (Stage.FOSSILIZED, Stage.DORMANT, Stage.BLENDING),
    (Stage.DORMANT, Stage.DORMANT, Stage.DORMANT),
)


def transformer_spec() -> GrowthSpec:
    host = TransformerHost(13, 8, 2, 3, 6, dropout=0.1)
    return GrowthSpec(host, LAYOUT, ("norm", "attention", "mlp"), LifecycleRules(25), coalition_statistics="running")


SPECS = {
    "recalibrated": tiny_spec(blueprints=("conv_light", "norm", "depthwise")),
    "running": tiny_spec(blueprints=("conv_light", "norm", "depthwise"), coalition_statistics="running"),
    "transformer": transformer_spec(),
}


def grown(spec):
    """Four hosts in float64 with seeds of every stage and blend, all parameters and statistics stirred."""
    key = k.root(5)
    rate = torch.full((N,), 0.1)
    growth = fresh_growth(spec, k.host_keys(key, N), rate, rate, torch.float64)
    for slot in range(3):
        asked = {i: (Op.GERMINATE, slot, (slot + i) % 3, slot) for i in range(N) if HELD[i][slot] != Stage.DORMANT}
        growth, _ = act(spec, growth, action(N, asked), torch.zeros(N))
    stage = torch.tensor([[int(s) for s in row] for row in HELD])
    alpha = torch.tensor([[ALPHAS.get(s, 0.0) for s in row] for row in HELD])
    everything = torch.ones(N, 3, dtype=torch.bool)
    growth["slots"] = put(growth["slots"], everything, stage=stage, alpha=alpha)

    def stir(leaf):
        return leaf + k.normal(k.fold(key, leaf.numel()), *leaf.shape, dtype=leaf.dtype)

    host = growth["host"].apply(stir, filter_empty=False)
    for path, leaf in flat(host).items():
        if path[-1] == "var":
            host[path] = leaf.abs()
    return changed(growth, host=host, seeds=growth["seeds"].apply(stir))


def calibration(spec):
    return None if spec.coalition_statistics == "running" else k.normal(k.root(7), 40, 1, 8, 8, dtype=torch.float64)


def network(spec, growth, host, members):
    """One coalition as a network of its own: a function from inputs to logits."""
    plan = make_plan(growth["slots"], spec)[host]
    plan = tuple(entry if members >> j & 1 else None for j, entry in enumerate(plan))
    seeds = [
        None if entry is None else spec.bank.kinds[slot, entry.blueprint].open(growth["seeds", "params"][host])
        for slot, entry in zip(spec.slots, plan, strict=True)
    ]
    params, alpha = as_tree(growth["host", "params"][host]), growth["slots", "alpha"][host].double()
    statistics, fixed = as_tree(growth["host", "statistics"][host]), calibration(spec)
    if fixed is not None:
        _, statistics = forward(spec, plan, params, statistics, seeds, alpha, fixed, momentum=1.0)
    return lambda x: forward(spec, plan, params, statistics, seeds, alpha, x, momentum=None)[0]


def batches(spec, growth):
    """Two batches, labelled by what host 0 says without its middle seed, so that its coalitions score differently."""
    teacher = network(spec, growth, 0, 0b101)
    for i, size in enumerate((80, 50)):
        key = k.fold(k.root(6), i)
        images = spec.host.topology == "cnn"
        x = k.normal(key, size, 1, 8, 8, dtype=torch.float64) if images else k.integers(key, 13, size, 6)
        yield x, teacher(x).argmax(-1)


def score(spec, growth, name):
    executor, plan = EXECUTORS[name](spec), make_plan(growth["slots"], spec)
    carry = executor.begin_evaluation(growth, plan, calibration(spec))
    for x, y in batches(spec, growth):
        carry = executor.evaluate_step(carry, x, y.expand(len(plan), *y.shape))
    return executor.finish_evaluation(carry).cpu()


def alone(spec, growth, host, members):
    """Whether each sample is right, and the summed loss, of one coalition by itself."""
    run, hits, loss = network(spec, growth, host, members), [], 0.0
    for x, y in batches(spec, growth):
        hits.append(correct(run(x), y).flatten())
        loss += mean_loss(run(x), y).item() * y.numel()
    return torch.cat(hits), loss


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", SPECS)
def test_coalitions_score_as_they_do_one_by_one(name, executor):
    spec = SPECS[name]
    growth = grown(spec)
    scores = score(spec, growth, executor)
    plan = make_plan(growth["slots"], spec)
    assert [len(coalitions(row)) for row in plan] == [8, 2, 4, 1]
    for i in range(N):
        live = sum(1 << j for j in live_slots(plan[i]))
        for members in range(8):
            hits, loss = alone(spec, growth, i, members & live)
            assert scores["correct"][i, members] == hits.sum()
            if members == live:
                assert scores["loss"][i].item() == pytest.approx(loss, rel=1e-10)
        assert scores["seen"][i] == len(hits)
    assert len(set(scores["correct"][0].tolist())) > 2, "coalitions differ, so the comparison means something"


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", SPECS)
def test_contributions_and_their_standard_errors(name, executor):
    spec = SPECS[name]
    growth = grown(spec)
    plan = make_plan(growth["slots"], spec)
    value, error = contributions(in_stage(growth["slots"], BLENDED), score(spec, growth, executor))
    for i in range(N):
        live = live_slots(plan[i])
        everyone = sum(1 << j for j in live)
        with_all, _ = alone(spec, growth, i, everyone)
        for j in range(3):
            if j not in live:
                assert value[i, j].isnan()
                assert error[i, j].isnan()
                continue
            without, _ = alone(spec, growth, i, everyone & ~(1 << j))
            difference = 100.0 * (with_all.double() - without.double())
            assert value[i, j].item() == pytest.approx(difference.mean().item(), rel=1e-5, abs=1e-6)
            expected = difference.std(correction=0).item() / len(difference) ** 0.5
            assert error[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (error[~error.isnan()] > 0).any()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", SPECS)
def test_evaluation_changes_nothing(name, executor):
    spec = SPECS[name]
    growth = grown(spec)
    before = growth.clone()
    score(spec, growth, executor)
    assert not differing(growth, before)


def test_recalibration_is_felt_and_a_run_uses_it():
    growth = grown(SPECS["recalibrated"])
    assert differing(score(SPECS["recalibrated"], growth, "loop"), score(SPECS["running"], growth, "loop"))
    for spec in (SPECS["recalibrated"], SPECS["running"]):
        run = Run(spec)
        assert (run.shards[0].calibration is None) == (spec.coalition_statistics == "running")


def test_a_slot_that_is_not_live_counts_as_left_out_and_splits_are_scored_whole():
    spec = SPECS["recalibrated"]
    splits = images(n_validation=600)
    run = Run(spec, splits=splits)
    run.step({0: (Op.GERMINATE, 0, 0, 0)})
    shards = [Shard(CPU, 0, 3, LoopExecutor(spec), splits, None)]
    plans = [make_plan(run.growth["slots"], spec)]
    scores = evaluate(shards, [run.growth], plans, run.settings, "validation")
    assert (scores["seen"] == 600).all()
    assert all(len(set(row)) == 1 for row in scores["correct"].tolist())


def test_golden_shapley_values_and_interactions():
    accuracies = torch.tensor([40.0, 42.0, 41.0, 45.0, 40.0, 42.0, 41.0, 45.0])
    assert shapley(accuracies).tolist() == pytest.approx([3.0, 2.0, 0.0])
    pair = interactions(accuracies)
    assert pair[0, 1].item() == pair[1, 0].item() == 2.0
    assert pair[0, 2].item() == pair[1, 2].item() == 0.0
