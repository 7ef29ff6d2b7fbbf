"""The analytic count of operations against torch's own counter, and what a ledger adds up."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.growth.executors.loop import LoopExecutor
from esper.growth.flops import FLOPS, TRAINING, Costs, Ledger, embedded, seed_macs
from esper.growth.forward import coalition_logits, forward
from esper.growth.plan import Mode, SlotPlan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tree
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds.bank import fresh_seed
from esper.seeds.blueprints import registry
from esper.seeds.blueprints.registry import Blueprint
from esper.seeds.lifecycle import LifecycleRules
from tiny import Run, germinate

HOSTS = {
    "cnn": (CNNHost(3, 7, 4, n_blocks=4, pool_layers=3), (3, 16, 16)),
    "transformer": (TransformerHost(11, 8, 2, 4, 6, dropout=0.0), (6,)),
}
SLOTS = ("early", "mid", "late")
NONE = (None, None, None)


def spec_of(topology: str) -> GrowthSpec:
    return GrowthSpec(HOSTS[topology][0], SLOTS, registry.names(topology), LifecycleRules(max_epochs=25))


def costs(topology: str, **sizes: int) -> Costs:
    return Costs(spec_of(topology), HOSTS[topology][1], **{"trained": 1, "scored": 1, "calibrating": 0, **sizes})


def parts_of(topology: str, row):
    """The host, its parameters and statistics, the seeds of `row`, and one sample."""
    host, inputs = HOSTS[topology]
    key = torch.zeros(1, dtype=torch.int64)
    params, statistics = (as_tree(part[0]) for part in host.init(key))
    seeds = [
        None if entry is None else as_tree(fresh_seed(host, slot, entry.blueprint, key, torch.float32)[0])
        for slot, entry in zip(SLOTS, row, strict=True)
    ]
    x = torch.zeros(1, *inputs, dtype=torch.int64 if topology == "transformer" else torch.float32)
    return host, params, statistics, seeds, x


def counted_forward(topology: str, row) -> int:
    _, params, statistics, seeds, x = parts_of(topology, row)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(spec_of(topology), row, params, statistics, seeds, torch.ones(3), x, momentum=None)
    return counter.get_total_flops()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("topology", "blueprint"), [(t, name) for t in HOSTS for name in registry.names(t)], ids=lambda value: str(value)
)
def test_a_forward_pass_counts_as_torch_counts(topology: str, blueprint: str, gated: bool) -> None:
    entry = SlotPlan(blueprint, Mode.BLEND, gated)
    hidden, shadow = (SlotPlan(blueprint, mode, gated) for mode in (Mode.STRAIGHT_THROUGH, Mode.SHADOW))
    for row in (NONE, (entry, None, None), (None, entry, entry), (entry, entry, entry), (hidden, shadow, entry)):
        assert FLOPS * costs(topology).forward(row) == counted_forward(topology, row)


@pytest.mark.parametrize("topology", HOSTS)
def test_coalitions_count_as_torch_counts(topology: str) -> None:
    entry = SlotPlan("attention", Mode.BLEND)
    asleep = SlotPlan("attention", Mode.STRAIGHT_THROUGH)
    for row in (NONE, (entry, asleep, entry), (entry, entry, entry)):
        host, params, statistics, seeds, x = parts_of(topology, row)

        def segment(level, members, h, start, stop, host=host, params=params, statistics=statistics):
            return host.run_blocks(params, statistics, h, start, stop, momentum=None)[0]

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            coalition_logits(spec_of(topology), row, params, seeds, torch.ones(3), x, segment)
        assert costs(topology, scored=5, calibrating=2).evaluation(row) == 7 * counter.get_total_flops()


def test_training_is_three_forward_passes_of_the_whole_network() -> None:
    """On the transformer, whose input needs no gradient but is no multiply-add either."""
    row = (SlotPlan("mlp", Mode.BLEND), None, SlotPlan("lora", Mode.BLEND))
    _, params, statistics, seeds, x = parts_of("transformer", row)

    def grown(tree):
        return {n: grown(v) if isinstance(v, dict) else v.clone().requires_grad_() for n, v in tree.items()}

    with FlopCounterMode(display=False) as counter:
        seeds = [None if seed is None else grown(seed) for seed in seeds]
        alpha = torch.ones(3)
        logits, _ = forward(spec_of("transformer"), row, grown(params), statistics, seeds, alpha, x, momentum=0.1)
        logits.sum().backward()
    assert costs("transformer", trained=9).training(row) == 9 * counter.get_total_flops()


def test_a_shadowed_seed_costs_a_second_pass() -> None:
    shadow, inserted = SlotPlan("conv_light", Mode.SHADOW), SlotPlan("conv_light", Mode.BLEND)
    one = costs("cnn")
    assert one.training((shadow, None, None)) == one.training(NONE) + one.training((inserted, None, None))


def test_a_blueprint_of_ones_own_is_counted() -> None:
    own = Blueprint("own", "cnn", registry.get("cnn", "conv_heavy").init, registry.get("cnn", "conv_heavy").apply, "")
    registry.register(own)
    try:
        assert seed_macs("cnn", "own", (4, 6, 6)) == seed_macs("cnn", "conv_heavy", (4, 6, 6))
    finally:
        registry.unregister("cnn", "own")
    assert embedded(HOSTS["transformer"][0], (6,)) == (6, 8)


def test_the_ledger_counts_what_ran_seeds_that_were_culled_too() -> None:
    run = Run(n=2, executor=None)
    assert isinstance(run.shards[0].executor, LoopExecutor)
    cost = Costs(run.spec, (1, 8, 8), trained=32, scored=40, calibrating=32)
    ledger = Ledger(cost, 2)
    ledger.reset(run.growth["slots"], run.growth["key"])
    ledger.add(run.step({0: germinate(0)}))
    ledger.add(run.step({0: (2, 0)}))
    entry = SlotPlan("conv_light", Mode.STRAIGHT_THROUGH)
    assert ledger.training.tolist() == [
        cost.training((entry, None, None)) + cost.training(NONE),
        2 * cost.training(NONE),
    ]
    assert ledger.evaluation.tolist() == [3 * cost.evaluation(NONE)] * 2
    assert ledger.total.tolist() == (ledger.training + ledger.evaluation).tolist()
    seed = seed_macs("cnn", "conv_light", (2, 4, 4))
    assert ledger.training[0] - ledger.training[1] == FLOPS * TRAINING * 32 * seed
