"""What an incubating seed reports and what its faults can reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esper.growth import precision
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.growth.trees import leaves
from esper.seeds.stages import Stage
from esper.values import changed
from growth.test_executors_against_oracle import batches, grown

EXECUTORS = {"loop": LoopExecutor, "stacked": lambda spec: StackedExecutor(spec, torch.device("cpu"))}


def epoch(executor, spec, growth):
    carry = executor.begin(growth, make_plan(growth["slots"], spec))
    for x, y in batches("cnn", growth.batch_size[0]):
        rates = growth["rates", "host"], growth["rates", "seed"]
        carry = executor.train_step(carry, x.float(), y, *rates, growth["key"], True)
    return executor.finish(carry, growth), executor.measured(carry)


def single(growth):
    """The state in float32."""
    result = growth.apply(lambda t: t.float() if t.dtype is torch.float64 else t)
    result["rates"] = growth["rates"]
    return result


@pytest.mark.parametrize("blend", ["linear", "gated"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_gate_that_takes_no_part_does_not_count_as_vanishing(executor: str, blend: str) -> None:
    spec, growth = grown("cnn", "straight_through", blend)
    _, measured = epoch(EXECUTORS[executor](spec), spec, single(growth))
    kinds = growth["slots", "blueprint"] == spec.blueprints.index("conv_light")
    assert int(kinds.sum()) >= 4
    assert measured["seed_health"][kinds].tolist() == [1.0] * int(kinds.sum())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_broken_incubating_seed_does_not_stop_its_host_in_fp16(executor: str) -> None:
    spec, growth = grown("cnn", "straight_through", "linear")
    spec, growth = replace(spec, amp="fp16"), single(growth)
    growth = changed(growth, **precision.fresh_scale("fp16", growth.batch_size[0]))
    stage = growth["slots", "stage"]
    hosts = ((stage == Stage.TRAINING).any(1) & ~(stage > Stage.TRAINING).any(1)).nonzero().squeeze(1)
    broken = growth.clone()
    for i in hosts.tolist():
        j = int((stage[i] == Stage.TRAINING).nonzero()[0])
        name = spec.blueprints[int(growth["slots", "blueprint"][i, j])]
        for leaf in leaves(spec.bank.kinds[spec.slots[j], name].open(broken["seeds", "params"])["body"]):
            leaf[i] = float("nan")
    sound, _ = epoch(EXECUTORS[executor](spec), spec, growth)
    after, _ = epoch(EXECUTORS[executor](spec), spec, broken)
    assert hosts.numel() >= 4
    for name, leaf in after["host", "params"].flatten_keys(".").items():
        assert torch.equal(leaf[hosts], sound["host", "params"].flatten_keys(".")[name][hosts]), name
    assert torch.equal(after["loss_scale"][hosts], sound["loss_scale"][hosts])
