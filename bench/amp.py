"""Half precision against float32: the same hosts grown for three epochs with seeds of every blueprint.

    python bench/amp.py            # on a GPU: captured and stacked program; prints a table, writes bench-amp.json
    python bench/amp.py --smoke    # small; on a CPU the loop and the stacked program

Every run seed gives one host per blueprint and blend. A host blends that seed in over the three epochs, a second seed
incubates (straight through), a third one is a fossil. All run the epochs of a real run: training, coalitions, governor,
lifecycle. Pairs of hosts differ in precision alone. Limits; exit code 1 if one is broken:

- Nothing is NaN or infinite, and no governor panics.
- Gradient ratio as G2 takes it, of the first batch of each epoch and at the weights of the float32 run: the median slot
  is within 5 % of float32, and so is the mean over the slots of each blueprint (or within the noise). Single slots
  differ more where a batch's gradients nearly cancel; the 95th percentile is shown. The ratio that the run itself
  recorded, along weights that have parted by then, is within 5 % or the noise in the geometric mean over hosts; ratios
  below G2's threshold count as the threshold.
- Final validation accuracy and loss: the mean paired difference from float32 is within the noise, or within 0.5
  percentage points and 1 %. The noise of the accuracy must be small enough to tell: at most 3 points.

Noise is three standard errors of the paired difference over hosts; with two, some of the fifty comparisons would fail
by chance. The few hosts of `--smoke` are given six.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.data.batches import SharedBatchIterator, calibration_batch
from esper.data.splits import Split, Splits
from esper.growth import precision
from esper.growth.executors.base import Executor
from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth, placed
from esper.growth.step import EpochSettings, Shard, begin, run_epoch
from esper.seeds import bank
from esper.seeds.blending import ramp
from esper.seeds.blueprints import registry
from esper.seeds.lifecycle import LifecycleRules, seed_parameters
from esper.seeds.stages import BLENDS, MIN_GRADIENT_RATIO, Stage
from esper.tasks import Task, get_task
from esper.values import changed

SLOTS = ("early", "mid", "late")
TASKS = {"cnn": "digits", "transformer": "pydocs"}
HALVES = ("bf16", "fp16")
EPOCHS = 3
RATIO_LIMIT, POINTS_LIMIT, LOSS_LIMIT = 0.05, 0.5, 0.01


@dataclass(frozen=True)
class Size:
    """How much of a task: run seeds, training samples (and at most as many for validation), samples of a batch, blends,
    the standard errors that are noise, and the points of accuracy that the noise must not exceed."""

    seeds: int
    samples: int
    batch: int
    blends: tuple[int, ...] = tuple(range(len(BLENDS)))
    noise: float = 3.0
    resolution: float = 3.0


FULL = {"cnn": Size(3, 1024, 64), "transformer": Size(3, 2048, 16)}
SMALL = {"cnn": Size(2, 128, 32, (2,), 6.0, 12.0), "transformer": Size(1, 32, 16, (2,), 6.0, 12.0)}


def make_spec(task: Task, amp: str = "off") -> GrowthSpec:
    """The task's own host with every registered blueprint that does something."""
    kinds = tuple(name for name in registry.names(task.topology) if name != "noop")
    rules = LifecycleRules(EPOCHS, EPOCHS, strict_gates=False)
    return GrowthSpec(task.host(), SLOTS, kinds, rules, amp=amp, momentum=task.momentum)


def make_growth(task: Task, spec: GrowthSpec, size: Size) -> TensorDict:
    """Grown hosts `[seeds * blueprints * blends]`: one seed about to blend, one incubating, one fossil in each."""
    cells = [(b, blend) for b in range(len(spec.blueprints)) for blend in size.blends]
    keys = torch.cat([k.host_keys(k.root(seed), len(cells)) for seed in range(size.seeds)])
    rates = [torch.full(keys.shape, rate, dtype=torch.float64) for rate in (task.host_lr, task.seed_lr)]
    growth = fresh_growth(spec, keys, *rates)
    table = seed_parameters(
        tuple(site.channels for site in spec.sites),
        lambda c: [registry.parameter_count(kind, c) for kind in spec.kinds],
    )
    records = growth["slots"].clone()
    for i, (b, blend) in enumerate(cells * size.seeds):
        for step, stage in enumerate((Stage.BLENDING, Stage.TRAINING, Stage.FOSSILIZED)):
            j = (b + step) % len(SLOTS)
            kind, f = (b + step) % len(spec.blueprints), blend if stage is Stage.BLENDING else 0
            records["stage"][i, j], records["blueprint"][i, j], records["blend"][i, j] = stage, kind, f
            records["parameters"][i, j] = table[j, kind, f]
            records["ramp_step"][i, j] = int(stage is Stage.BLENDING)
            records["alpha"][i, j] = float(stage is Stage.FOSSILIZED)
    first = ramp(records["ramp_step"], EPOCHS, records["blend"])
    records["alpha"] = torch.where(records["stage"] == Stage.BLENDING, first, records["alpha"])
    everywhere = torch.ones_like(records["healthy"])
    seeds = bank.plant(growth["seeds"], spec.bank, everywhere, records, keys)
    return changed(growth, slots=records, seeds=seeds)


@dataclass(frozen=True)
class Outcome:
    """One run of three epochs: the state before each epoch, the last epoch's result, panics of all epochs."""

    states: list[TensorDict]
    result: TensorDict
    panics: int

    @property
    def finite(self) -> bool:
        """Whether weights, losses and accuracies all are."""
        last, metrics = self.states[-1], self.result["metrics"]
        parts = [last["host", "params"], last["host", "statistics"], last["seeds"], metrics]
        return all(bool(leaf.isfinite().all()) for part in parts for leaf in part.values(True, True))


def grow(executor: Executor, spec: GrowthSpec, growth: TensorDict, splits: Splits, batch: int) -> Outcome:
    """Three epochs in which no controller interferes."""
    n = growth.batch_size[0]
    calibration = calibration_batch(splits, k.root(0), batch) if spec.has_statistics else None
    shards = [Shard(splits.device, 0, n, executor, splits, calibration)]
    settings = EpochSettings(batch, evaluation_batch=64)
    states, metrics = begin(spec, shards, settings, [growth])
    waiting = torch.zeros(n, 4, dtype=torch.int64)
    history, panics = [states[0]], 0
    for epoch in range(EPOCHS):
        states, result = run_epoch(spec, shards, settings, states, waiting, metrics["val_accuracy"], epoch)
        metrics, panics = result["metrics"], panics + int(result["panic"].sum())
        history.append(states[0])
    return Outcome(history, result, panics)


def gradient_ratios(
    executor: Executor, spec: GrowthSpec, states: Sequence[TensorDict], splits: Splits, batch: int
) -> Tensor:
    """Parameter-normalised seed/host gradient ratios of the first batch of each epoch, `[EPOCHS, N, S]`."""
    found = []
    for epoch, growth in enumerate(states[:EPOCHS]):
        keys = growth["key"].to(splits.device)
        x, y = next(iter(SharedBatchIterator([splits], [keys], batch, epoch)))[0]
        carry = executor.begin(growth, make_plan(growth["slots"], spec))
        rates = growth["rates"]
        carry = executor.train_step(carry, x, y, rates["host"], rates["seed"], keys, True)
        executor.finish(carry, growth)
        measured = executor.measured(carry).cpu()
        size = growth["slots", "parameters"] / spec.host_parameters
        found.append(measured["seed_norm"] / measured["host_norm"][:, None] / size.sqrt())
    return torch.stack(found)


def paired(values: Tensor) -> tuple[float, float]:
    """Mean of paired differences and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(values.numel())


def within(mean: float, error: float, floor: float, noise: float) -> bool:
    """Whether a mean difference is within `noise` standard errors or a fixed limit; not for nan."""
    return abs(mean) <= max(noise * error, floor)


def compare(
    half: Outcome, full: Outcome, ratios: Tensor, exact: Tensor, spec: GrowthSpec, size: Size
) -> dict[str, Any]:
    """One row of the table: what half precision changed, and which limits it broke."""
    # A dead seed has no gradient to compare.
    felt = exact > 1e-6
    apart = ((ratios - exact).abs() / exact)[felt]
    kinds = full.states[0]["slots", "blueprint"].cpu().expand_as(exact)
    biased = []
    for b, name in enumerate(spec.blueprints):
        chosen = felt & (kinds == b)
        if not within(*paired(ratios[chosen] - exact[chosen]), RATIO_LIMIT * float(exact[chosen].mean()), size.noise):
            biased.append(f"ratio of {name}")
    recorded = (run.result["lived", "gradient_ratio"].clamp(min=MIN_GRADIENT_RATIO) for run in (half, full))
    along = torch.sub(*(ratio.log() for ratio in recorded))
    # The slots of a host share its gradient, so hosts are what is counted.
    drift, drift_error = paired(along.where(felt.all(0), torch.nan).nanmean(1))
    (points, points_error), (loss, loss_error) = (
        paired((half.result["metrics", name] - full.result["metrics", name]).double())
        for name in ("val_accuracy", "val_loss")
    )
    level = float(full.result["metrics", "val_loss"].mean())
    limits = {
        "finite": half.finite and bool(ratios.isfinite().all()),
        "no panic": half.panics == 0,
        "ratio of the median slot": float(apart.median()) <= RATIO_LIMIT,
        "ratio along the run": within(drift, drift_error, math.log1p(RATIO_LIMIT), size.noise),
        "accuracy": within(points, points_error, POINTS_LIMIT, size.noise),
        "loss": within(loss, loss_error, LOSS_LIMIT * level, size.noise),
        "resolution": size.noise * points_error <= size.resolution,
    }
    return {
        "ratio_median": float(apart.median()),
        "ratio_95": float(apart.quantile(0.95)),
        "ratio_drift": math.expm1(drift),
        "ratio_drift_error": drift_error,
        "accuracy_change": points,
        "accuracy_change_error": points_error,
        "loss_change": loss,
        "loss_change_error": loss_error,
        "broken": [name for name, kept in limits.items() if not kept] + biased,
    }


def level(outcome: Outcome, size: Size) -> dict[str, Any]:
    """Final accuracy and loss, each seed's mean over its hosts; what became of the loss scales."""
    row: dict[str, Any] = {"finite": outcome.finite, "panics": outcome.panics}
    for name in ("val_accuracy", "val_loss"):
        row[name] = outcome.result["metrics", name].unflatten(0, (size.seeds, -1)).mean(1).tolist()
    if "loss_scale" in outcome.states[-1]:
        halvings = (precision.INITIAL_SCALE / outcome.states[-1]["loss_scale"]).log2().cpu()
        row["scale_halvings"] = {"hosts": int((halvings > 0).sum()), "most": float(halvings.max())}
    return row


def measure(task: Task, size: Size, kind: str, precisions: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """All precisions of one task under one executor, float32 first."""
    splits = task.load(k.root(0), Path()).limited(size.samples)
    scored = Split(splits.validation.inputs[: size.samples], splits.validation.targets[: size.samples])
    splits = replace(splits, validation=scored).to(device)
    rows: list[dict[str, Any]] = []
    full = exact = None
    for amp in ("off", *precisions):
        start = time.perf_counter()
        spec = make_spec(task, amp)
        executor = EXECUTORS[kind](spec, device)
        outcome = grow(executor, spec, placed(make_growth(task, spec, size), device), splits, size.batch)
        states = (full or outcome).states
        scales = {name: value.to(device) for name, value in precision.fresh_scale(amp, len(states[0])).items()}
        ratios = gradient_ratios(executor, spec, [changed(s, **scales) for s in states], splits, size.batch)
        row = {"task": task.name, "executor": kind, "amp": amp, "hosts": len(states[0]), **level(outcome, size)}
        if full is None or exact is None:
            full, exact = outcome, ratios
            row["broken"] = [] if outcome.finite and outcome.panics == 0 else ["float32 itself"]
        else:
            row |= compare(outcome, full, ratios, exact, spec, size)
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        print(show(row), flush=True)
    return rows


EXECUTORS: dict[str, Callable[[GrowthSpec, torch.device], Executor]] = {
    "loop": lambda spec, device: LoopExecutor(spec, workers=2),
    "stacked": StackedExecutor,
    "captured": CapturedExecutor,
}


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    accuracy, loss = (torch.tensor(row[name]) for name in ("val_accuracy", "val_loss"))
    text = (
        f"{row['task']:8s} {row['executor']:9s} {row['amp']:5s} {row['hosts']:3d} hosts {row['seconds']:5.1f} s: "
        f"accuracy {accuracy.mean():5.2f} (seeds {accuracy.min():.2f}-{accuracy.max():.2f}) loss {loss.mean():.4f}"
    )
    if "ratio_median" in row:
        text += (
            f" | change {row['accuracy_change']:+.2f} +-{row['accuracy_change_error']:.2f} points, loss "
            f"{row['loss_change']:+.4f} +-{row['loss_change_error']:.4f} | gradient ratio: median "
            f"{row['ratio_median']:.2%}, 95th percentile {row['ratio_95']:.2%}; along the run "
            f"{row['ratio_drift']:+.2%} +-{row['ratio_drift_error']:.2%}"
        )
    if "scale_halvings" in row:
        text += f" | loss scale fell in {row['scale_halvings']['hosts']} hosts"
    return text + (f" | BROKEN: {', '.join(row['broken'])}" if row["broken"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few hosts and samples")
    parser.add_argument("--topologies", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--executors", nargs="+", choices=list(EXECUTORS))
    parser.add_argument("--amp", nargs="+", choices=HALVES, default=HALVES)
    parser.add_argument("--out", type=Path, default=Path("bench-amp.json"))
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN would round float32 convolutions to tf32, and the reference is float32.
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kinds = given.executors or (["captured", "stacked"] if device.type == "cuda" else ["loop", "stacked"])
    sizes = SMALL if given.smoke else FULL
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": []}
    print(f"{name}, torch {torch.__version__}", flush=True)
    for topology in given.topologies:
        for kind in kinds:
            result["rows"] += measure(get_task(TASKS[topology]), sizes[topology], kind, given.amp, device)
            given.out.write_text(json.dumps(result, indent=2) + "\n")
    failed = [
        f"{row['task']} {row['executor']} {row['amp']}: {', '.join(row['broken'])}"
        for row in result["rows"]
        if row["broken"]
    ]
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
