"""The loop and the stack give the same numbers where the oracle is silent: scoring, measurements, mixed precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth import precision
from esper.growth.executors.base import Executor
from esper.growth.executors.coalitions import Room, room_for
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.seating import as_table, enlarged
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from growth.test_executors_against_oracle import batches, grown

CPU = torch.device("cpu")


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def cast(growth: TensorDict, dtype: torch.dtype) -> TensorDict:
    """A float64 growth state in another precision; learning rates stay."""
    result = growth.apply(lambda t: t.to(dtype) if t.dtype is torch.float64 else t)
    result["rates"] = growth["rates"]
    return result


def data(topology: str, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batches(topology, n)]


def trained(executor: Executor, spec: GrowthSpec, growth: TensorDict, stream: list[tuple[Tensor, Tensor]]):
    carry = executor.begin(growth, make_plan(growth["slots"], spec))
    rates = growth["rates"]
    for t, (x, y) in enumerate(stream):
        last = t == len(stream) - 1
        carry = executor.train_step(carry, x, y, rates["host"], rates["seed"], growth["key"], last)
    return executor.finish(carry, growth), executor.measured(carry)


def scored(executor: Executor, spec: GrowthSpec, growth: TensorDict, x: Tensor, y: Tensor, calibration: Tensor | None):
    """Two batches, the second one smaller; every host has its own targets."""
    carry = executor.begin_evaluation(growth, make_plan(growth["slots"], spec), calibration)
    carry = executor.evaluate_step(carry, x[0], y)
    carry = executor.evaluate_step(carry, x[1, :5], y[:, :5])
    return executor.finish_evaluation(carry)


def flat(tree: TensorDict) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in tree.values(True, True)])


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("incubation", ["straight_through", "shadow"])
@pytest.mark.parametrize("blend", ["linear", "gated"])
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_every_coalition_is_scored_alike(topology: str, blend: str, incubation: str, calibrated: bool) -> None:
    spec, growth = grown(topology, incubation, blend)
    x, y = data(topology, growth.batch_size[0], torch.float64)[0]
    calibration = x[2] if calibrated else None
    loop = scored(LoopExecutor(spec), spec, growth, x, y, calibration)
    stack = scored(StackedExecutor(spec, CPU), spec, growth, x, y, calibration)
    assert torch.equal(loop["correct"], stack["correct"])
    assert torch.equal(loop["differ"], stack["differ"])
    assert torch.equal(loop["seen"], stack["seen"])
    assert apart(stack["loss"], loop["loss"]) <= 1e-12
    assert loop["differ"].sum() > 0


@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_measurements_agree(topology: str) -> None:
    spec, growth = grown(topology, "straight_through", "gated")
    stream = data(topology, growth.batch_size[0], torch.float64)
    (_, loop), (_, stack) = (trained(e, spec, growth, stream) for e in (LoopExecutor(spec), StackedExecutor(spec, CPU)))
    for name in ("loss", "host_norm", "seed_norm", "seed_health"):
        assert torch.equal(loop[name].isnan(), stack[name].isnan())
        assert apart(stack[name].nan_to_num(), loop[name].nan_to_num()) <= 1e-12
    assert torch.equal(loop["correct"], stack["correct"])
    assert bool((loop["seen"] == stack["seen"]).all())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("executor", [LoopExecutor, lambda spec: StackedExecutor(spec, CPU)], ids=["loop", "stacked"])
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_mixed_precision_trains_everything(topology: str, executor, amp: str) -> None:
    spec, growth = grown(topology, "straight_through", "gated")
    n = growth.batch_size[0]
    exact, exact_norms = trained(LoopExecutor(spec), spec, growth, data(topology, n, torch.float64)[:1])
    mixed = replace(spec, amp=amp)
    state = cast(growth, torch.float32).update(precision.fresh_scale(amp, n))
    result, measured = trained(executor(mixed), mixed, state, data(topology, n, torch.float32)[:1])
    for name, leaf in result["host"].items(True, True):
        assert leaf.dtype is torch.float32, name
        assert leaf.isfinite().all(), name
    # One step from equal weights, so the norms are those of the same gradients: unscaled, and none of them silenced.
    planted = exact_norms["seed_norm"] > 1e-9
    assert bool((measured["host_norm"] > 0).all())
    assert bool((measured["seed_norm"][planted] > 0).all())
    assert apart(measured["host_norm"], exact_norms["host_norm"]) < 3e-2
    assert apart(measured["seed_norm"][planted], exact_norms["seed_norm"][planted]) < 5e-2
    assert apart(flat(result["host", "params"]), flat(exact["host", "params"])) < 1e-2


@pytest.mark.parametrize("executor", [LoopExecutor, lambda spec: StackedExecutor(spec, CPU)], ids=["loop", "stacked"])
def test_an_overflow_skips_one_host_alone(executor) -> None:
    spec, growth = grown("cnn", "straight_through", "linear")
    n, sick = growth.batch_size[0], 3
    mixed = replace(spec, amp="fp16")
    state = cast(growth, torch.float32).update(precision.fresh_scale("fp16", n))
    stream = data("cnn", n, torch.float32)[:1]
    well, _ = trained(executor(mixed), mixed, state, stream)
    hot = state.clone()
    hot["loss_scale"][sick] = precision.LARGEST_SCALE * 2.0**40
    skipped, _ = trained(executor(mixed), mixed, hot, stream)
    others = torch.arange(n) != sick
    assert float(skipped["loss_scale"][sick]) == precision.LARGEST_SCALE
    assert int(skipped["scale_age"][sick]) == 0
    assert torch.equal(skipped["loss_scale"][others], well["loss_scale"][others])
    assert bool((well["scale_age"][others] == 1).all())
    for name in ("params", "moments", "statistics"):
        pairs = zip(skipped["host", name].values(True, True), well["host", name].values(True, True), strict=True)
        assert all(torch.equal(a[others], b[others]) for a, b in pairs)
        pairs = zip(skipped["host", name].values(True, True), state["host", name].values(True, True), strict=True)
        assert all(torch.equal(a[sick], b[sick]) for a, b in pairs)


def test_scales_halve_and_grow() -> None:
    scale, age = torch.tensor([8.0, 8.0, 1.0]), torch.tensor([3, precision.GROWTH_INTERVAL - 1, 5])
    scale, age = precision.adapt(scale, age, torch.tensor([False, True, False]))
    assert scale.tolist() == [4.0, 16.0, precision.SMALLEST_SCALE]
    assert age.tolist() == [0, 0, 0]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8"):
        precision.autocast("fp8", CPU)


def roomier(capacity: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(seats + 1 + j % 2 for j, seats in enumerate(row)) for row in capacity)


@pytest.mark.parametrize("incubation", ["straight_through", "shadow"])
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_free_seats_change_nothing(topology: str, incubation: str) -> None:
    spec, growth = grown(topology, incubation, "gated")
    stream = data(topology, growth.batch_size[0], torch.float64)
    runner, plan = StackedExecutor(spec, CPU), make_plan(growth["slots"], spec)
    table = as_table(plan, spec)
    capacity = runner.seats_for(table)
    results = []
    for seats in (capacity, roomier(capacity)):
        carry = runner.start(growth, table, seats)
        for x, y in stream:
            carry = runner.train_step(
                carry, x, y, growth["rates", "host"], growth["rates", "seed"], growth["key"], True
            )
        state, measured = runner.finish(carry, growth), runner.measured(carry)
        live = table.only_live()
        room = room_for(spec, live)
        if seats is not capacity:
            room = Room(roomier(room.seeds), roomier(room.branches))
        scoring = runner.prepare(runner.start_evaluation(state, live, room), stream[0][0][1])
        scores = runner.finish_evaluation(runner.evaluate_step(scoring, stream[0][0][0], stream[0][1]))
        results.append((state, measured, scores))
    (exact, norms, right), (spare, other_norms, other_right) = results
    for part in ("host", "seeds"):
        assert apart(flat(spare[part]), flat(exact[part])) <= 1e-13
    assert apart(other_norms["seed_norm"].nan_to_num(), norms["seed_norm"].nan_to_num()) <= 1e-12
    assert torch.equal(other_norms["seed_norm"].isnan(), norms["seed_norm"].isnan())
    assert torch.equal(other_right["correct"], right["correct"])
    assert torch.equal(other_right["differ"], right["differ"])


def test_free_seats_write_nothing_and_carry_nothing_broken_on() -> None:
    """Free seats are filled from host 0, whose own seeds are all broken here."""
    spec, growth = grown("cnn", "straight_through", "gated")
    spec = replace(spec, seed_weight_decay=0.1)
    stream = data("cnn", growth.batch_size[0], torch.float64)
    growth["seeds", "params"][0] = float("nan")
    runner, plan = StackedExecutor(spec, CPU), make_plan(growth["slots"], spec)
    table = as_table(plan, spec)
    capacity, banks = runner.seats_for(table), []
    for seats in (capacity, roomier(capacity)):
        carry = runner.start(growth, table, seats)
        for x, y in stream:
            carry = runner.train_step(
                carry, x, y, growth["rates", "host"], growth["rates", "seed"], growth["key"], True
            )
        banks.append(runner.finish(carry, growth)["seeds"])
    exact, spare = banks
    for name in ("params", "moments"):
        assert spare[name].shape == growth["seeds", name].shape
        assert spare[name][1:].isfinite().all()
        assert torch.equal(spare[name][0].isnan(), exact[name][0].isnan())
        assert apart(spare[name][1:], exact[name][1:]) <= 1e-13
    own = table.blueprint[0] >= 0
    for j, slot in enumerate(spec.slots):
        for b, name in enumerate(spec.blueprints):
            columns = spec.bank.kinds[slot, name].columns
            here = own[j] & (table.blueprint[0, j] == b)
            assert bool(spare["moments"][0, columns].any()) == bool(here)


def test_programs_grow_with_room_to_spare() -> None:
    assert enlarged(((0, 0), (3, 5)), None, (8, 8)) == ((0, 0), (4, 8))
    assert enlarged(((2, 0), (1, 5)), ((1, 3), (4, 8)), (8, 8)) == ((4, 3), (4, 8))
    assert enlarged(((8, 0),), ((4, 1),), (8,)) == ((8, 4),)
    assert enlarged(((3, 0), (1, 5)), ((1, 1), (4, 4)), None) == ((3, 1), (4, 5))
    assert enlarged(((1, 0), (1, 3)), ((1, 1), (4, 4)), None) == ((1, 1), (4, 4))
