"""Hosts of several widths in one stack: dead channels stay dead, and a narrow host is a narrow host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esper import keys as k
from esper.export import as_module
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.flops import FLOPS, TRAINING, Costs, Ledger, seed_macs
from esper.growth.forward import forward
from esper.growth.plan import make_plan
from esper.growth.trees import as_tree
from esper.hosts.cnn import CNNHost
from esper.hosts.padded import PaddedHost, shapes
from esper.seeds import blending
from esper.seeds.actions import Op
from esper.seeds.bank import fresh_seed
from esper.seeds.blueprints import registry
from esper.seeds.lifecycle import LifecycleRules
from tiny import CPU, Run, flat, germinate, opened, tiny_spec

BASE = CNNHost(1, 10, 4, pool_layers=2)
KINDS = ("conv_light", "attention", "norm", "depthwise", "conv_expand")
SPEC = tiny_spec(host=PaddedHost(BASE, (1, 2, 4)), blueprints=KINDS)
N = 6


def dead(run: Run) -> list[tuple[tuple[str, ...], int, torch.Tensor]]:
    """Path, host and entries of every leaf outside the host's own shape: parameters and moments of hosts and seeds."""
    found = []
    which = run.spec.shape_of(run.growth["key"])
    grown = opened(run.spec, run.growth)
    for i, host in enumerate(shapes(run.spec.host)):
        key = torch.zeros(1, dtype=torch.int64)
        small = {
            ("host", name, *path): leaf
            for name in ("params", "moments")
            for path, leaf in flat(host.init(key)[0]).items()
        }
        for slot in run.spec.slots:
            for kind in run.spec.blueprints:
                seed = flat(fresh_seed(host, slot, kind, key, torch.float32))
                small |= {("seeds", n, slot, kind, *p): leaf for n in ("params", "moments") for p, leaf in seed.items()}
        for path, leaf in small.items():
            large = grown[path]
            outside = torch.ones(large.shape[1:], dtype=torch.bool)
            outside[tuple(slice(size) for size in leaf.shape[1:])] = False
            found += [(path, int(row), large[row][outside]) for row in (which == i).nonzero().flatten()]
    return found


def test_widths_are_drawn_by_the_key_alone() -> None:
    keys = k.host_keys(k.root(5), 3000)
    drawn = SPEC.shape_of(keys)
    assert torch.equal(SPEC.shape_of(keys[7:9]), drawn[7:9])
    assert (drawn.bincount() / 3000 - 1 / 3).abs().max() < 0.04
    twice = replace(SPEC, host=PaddedHost(BASE, (2, 2, 4)))
    assert float((twice.parameters_of(keys) == twice.shapes[0].host_parameters).double().mean()) > 0.6


def test_sizes_are_those_of_the_host_alone() -> None:
    keys = k.host_keys(k.root(5), 50)
    own = [replace(SPEC, host=host).host_parameters for host in SPEC.host.shapes]
    assert own == [163, 496, 1702]
    assert SPEC.parameters_of(keys).tolist() == [own[i] for i in SPEC.shape_of(keys).tolist()]


def test_the_widest_is_the_base() -> None:
    with pytest.raises(ValueError, match=r"widths: \(1, 2\); the greatest must be base's, 4"):
        PaddedHost(BASE, (1, 2))


@pytest.mark.parametrize("executor", [LoopExecutor, lambda spec: StackedExecutor(spec, CPU)])
@pytest.mark.parametrize("incubation", ["straight_through", "shadow", "none"])
def test_dead_channels_stay_exactly_zero_under_every_seed(executor, incubation: str) -> None:
    """All blueprints in every slot, incubating and blended, gated too: dead weights and moments are zero."""
    # Nothing is culled after the fourth epoch, the last one.
    rules = LifecycleRules(max_epochs=4, strict_gates=False, incubation=incubation)
    spec = replace(SPEC, rules=rules, seed_weight_decay=1e-3)
    run = Run(spec=spec, n=N, executor=executor(spec))
    assert set(spec.shape_of(run.growth["key"]).tolist()) == {0, 1, 2}
    for slot in range(3):
        run.step({i: germinate(slot, (i + slot) % len(KINDS), blending.GATED if i % 2 else 0) for i in range(N)})
    for i in range(N):
        for j in range(3):
            run.ripen(i, j)
    run.step()
    values = dead(run)
    assert sum(part.numel() for *_, part in values) > 10_000
    assert [(path, host) for path, host, part in values if part.any()] == []
    moved = [path for path, leaf in flat(spec.bank.open(run.growth["seeds", "moments"])).items() if leaf.any()]
    assert {path[1] for path in moved} == set(KINDS)


@pytest.mark.parametrize("width", [1, 2])
def test_a_narrow_host_trains_like_one_alone(width: int) -> None:
    keys = k.host_keys(k.root(0), 30)
    keys = keys[SPEC.shape_of(keys) == SPEC.host.widths.index(width)][:3]
    padded = Run(spec=SPEC, host_keys=keys)
    alone = Run(spec=replace(SPEC, host=replace(BASE, base_channels=width)), host_keys=keys)
    for epoch in range(3):
        torch.testing.assert_close(padded.metrics, alone.metrics, rtol=1e-4, atol=1e-5)
        # Seeds without averages over channels are the same, too.
        chosen = {0: germinate(1, KINDS.index("attention"))} if epoch == 0 else {}
        padded.step(chosen)
        alone.step(chosen)
    assert padded.growth["slots", "parameters"].tolist() == alone.growth["slots", "parameters"].tolist()
    assert torch.equal(padded.growth["slots", "stage"], alone.growth["slots", "stage"])
    torch.testing.assert_close(
        padded.growth["slots", "gradient_ratio"],
        alone.growth["slots", "gradient_ratio"],
        rtol=1e-3,
        atol=1e-5,
        equal_nan=True,
    )


def test_a_seed_is_charged_what_it_has_in_its_host() -> None:
    run = Run(spec=SPEC, n=N)
    which = SPEC.shape_of(run.growth["key"]).tolist()
    run.step({i: germinate(2, KINDS.index("conv_expand"), blending.GATED) for i in range(N)})
    kind = registry.get("cnn", "conv_expand")
    for i, shape in enumerate(which):
        c = SPEC.host.shapes[shape].sites[2].channels
        size = registry.parameter_count(kind, c) + blending.gate_parameter_count(c)
        assert int(run.growth["slots", "parameters"][i, 2]) == size


def test_costs_are_those_of_the_living_channels() -> None:
    run = Run(spec=SPEC, n=N)
    whole = Costs(SPEC, (1, 8, 8), trained=32, scored=40, calibrating=32)
    ledger = Ledger(whole, N)
    ledger.reset(run.growth["slots"], run.growth["key"])
    ledger.add(run.step({0: germinate(0)}))
    own = [replace(whole, spec=SPEC.shapes[i]) for i in SPEC.shape_of(run.growth["key"]).tolist()]
    nothing = (None, None, None)
    assert ledger.evaluation.tolist() == [2 * costs.evaluation(nothing) for costs in own]
    assert ledger.training[1:].tolist() == [costs.training(nothing) for costs in own[1:]]
    seed = seed_macs("cnn", "conv_light", (own[0].spec.sites[0].channels, 4, 4))
    assert int(ledger.training[0]) == own[0].training(nothing) + FLOPS * TRAINING * 32 * seed
    assert len(set(ledger.training[1:].tolist())) == len(SPEC.shapes)


def test_a_narrow_host_is_exported_as_it_is() -> None:
    """In the shape of the widest, and with the same logits."""
    spec = replace(SPEC, rules=LifecycleRules(max_epochs=2, strict_gates=False, incubation="none"))
    run = Run(spec=spec, n=N)
    row = spec.shape_of(run.growth["key"]).tolist().index(0)
    run.step({row: germinate(1, KINDS.index("conv_expand"))})
    run.ripen(row, 1)
    run.step({row: (Op.FOSSILIZE, 1)})
    architecture, network = as_module(spec, run.growth, row)
    assert architecture["host"]["base_channels"] == BASE.base_channels
    x = run.splits.prepare(run.splits.validation.inputs, torch.float32)
    plan = make_plan(run.growth["slots"], spec)[row]
    assert plan[1] is not None
    seeds = [
        e and spec.bank.kinds[s, e.blueprint].open(run.growth["seeds", "params"][row])
        for s, e in zip(spec.slots, plan, strict=True)
    ]
    params, statistics = (as_tree(run.growth["host", name][row]) for name in ("params", "statistics"))
    expected, _ = forward(spec, plan, params, statistics, seeds, run.growth["slots", "alpha"][row], x, momentum=None)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_executors_agree_on_hosts_of_different_widths() -> None:
    runs = [Run(spec=SPEC, n=N, executor=e) for e in (LoopExecutor(SPEC), StackedExecutor(SPEC, CPU))]
    for slot in (0, 2):
        for run in runs:
            run.step({i: germinate(slot, (i + slot) % len(KINDS)) for i in range(N)})
    for name in ("host", "seeds"):
        for path, leaf in flat(runs[0].growth[name]).items():
            torch.testing.assert_close(leaf, runs[1].growth[(name, *path)], rtol=1e-3, atol=1e-4)
