"""How fast stacks of hosts grow on a GPU: first checked against the loop over hosts, then timed against plain modules.

    python bench/gpu.py                      # everything; prints tables, writes bench-gpu.json and bench-gpu.png
    python bench/gpu.py --smoke              # small sizes, on a CPU if there is no GPU (the stacked program, no graphs)
    python bench/gpu.py --only steps whole --hosts 256 --models base8 --amp bf16 --budget 300
    python bench/gpu.py --resume             # the rows that bench-gpu.json lacks

| section | rows |
|---|---|
| floor | what bandwidth and arithmetic of this device allow |
| check | distance from the loop over hosts after three steps and scoring, by part |
| steps | forward, backward and SGD of all hosts on one batch each, without seeds and with mixed ones |
| coalitions | all eight coalitions of three live slots against one pass of the same hosts, and of hosts without seeds |
| whole | whole runs in a steady state (`whole.py`), and an epoch of the plain loop |
| telemetry | whole runs without the events of their steps and with them |
| scaling | whole runs with 64 hosts a device, on one device and on two |
| profile | kernels of a mixed step |

"mixed" hosts have seeds of all kinds blended into half of their three slots. The plain loop (`plain.py`) is the same
networks as ordinary modules. Every row is saved as soon as it is there; one that fails loses no other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

import plain
import whole as runs
from esper import keys as k
from esper.data.batches import calibration_batch
from esper.data.splits import Splits
from esper.growth.executors import coalitions as tree
from esper.growth.executors.base import Executor
from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.forward import correct, mean_loss
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import placed
from esper.growth.step import EpochSettings, Shard, evaluate
from esper.hosts.base import Tree
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from grown import make_growth, make_spec, register

HOSTS = {
    "base8": CNNHost(3, 10, 8),
    "base32": CNNHost(3, 10, 32),
    "transformer": TransformerHost(256, 128, 4, 4, 128, 0.0),
}
BATCH = {"base8": 512, "base32": 128, "transformer": 32}
BOUNDS = {"fp64": 1e-12, "fp32": 1e-5}
TASK = "bench_synthetic"
PLAIN_HOSTS = 32
"""The plain loop takes as long for every host, so no more of them are timed."""

GROUPS = {
    "convolution, weight gradient": r"_conv_weight|wgrad|grad_weight",
    "convolution": r"_conv|conv2d|fprop|dgrad|cudnn",
    "norm": r"_moments|_merge|_activate|norm",
    "matrix product": r"gemm|cutlass|cublas|nvjet|gemv|splitK",
    "graft": r"_take_|_combine_",
    "copy": r"memcpy|memset|copy|catarray|index|gather|scatter|fill",
    "elementwise": r"elementwise|foreach|multi_tensor|softmax|nll",
    "sum": r"reduce",
}
"""Kernels by what is in their names, the first group that fits."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how large."""

    device: torch.device
    smoke: bool
    epochs: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def repeat(self) -> int:
        return 1 if self.smoke else 5

    def batch(self, host: str) -> int:
        return 4 if self.smoke else BATCH[host]

    @cached_property
    def splits(self) -> Splits:
        """10,240 training and 2,048 validation images."""
        images = 32 if self.smoke else 10_240
        return register(TASK, images, images // 5, self.batch("base8")).to(self.device)

    def executor(self, spec: GrowthSpec) -> Executor:
        torch.backends.cudnn.allow_tf32 = False
        return CapturedExecutor(spec, self.device) if self.cuda else StackedExecutor(spec, self.device)

    def growth(self, spec: GrowthSpec, n: int, cells: str) -> TensorDict:
        return make_growth(spec, n, cells, device=str(self.device))

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median wall seconds of a call, the device waited for; the first two do not count."""
        times = []
        for _ in range(self.repeat + 2):
            runs.wait(self.device)
            start = time.perf_counter()
            work()
            runs.wait(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])


def inputs(
    host: str, n: int, batch: int, device: torch.device, dtype: torch.dtype, seed: int = 7
) -> tuple[Tensor, Tensor]:
    """One random batch for every host."""
    generator = torch.Generator().manual_seed(seed)
    if host == "transformer":
        tokens = torch.randint(0, 256, (n, batch, 129), generator=generator).to(device)
        return tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
    pool = torch.randn(batch + n, 3, 32, 32, generator=generator, dtype=dtype).to(device)
    x = torch.stack([pool[i : i + batch] for i in range(n)])
    return x, torch.randint(0, 10, (n, batch), generator=generator).to(device)


def floor(bench: Bench, row: Row) -> None:
    """Images per second that bandwidth and arithmetic allow an ungrown base-8 host, from counted bytes and operations
    and from the rates this device reaches in a large copy and a large product."""
    c, area, values, flops = 3, 1024, 3 * 1024, 0
    for i in range(3):
        o = 8 * 2**i
        out, pooled, before = o * area, o * area // 4, c * area
        # forward: read, write; normalise: read, write pooled; backward: two passes over (values, gradient), one write,
        # then both convolution gradients read it, and one reads the input, the other writes its gradient.
        values += before + out + out + pooled + 2 * (out + pooled) + out + 2 * out + before + (before if i else 0)
        flops += 2 * 9 * c * o * area * (3 if i else 2)
        c, area = o, area // 4
    row |= {"bytes_fp32": 4 * values, "flops": flops}
    if not bench.cuda:
        return
    big = torch.randn(2**28, device=bench.device)
    target = torch.empty_like(big)
    left, right = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bandwidth = 2 * 4 * 2**28 / bench.seconds(lambda: target.copy_(big))
    row |= {"bandwidth": bandwidth, "bf16_rate": 2 * 8192**3 / bench.seconds(lambda: left @ right)}
    row |= {"floor_fp32": bandwidth / (4 * values), "floor_bf16": bandwidth / (2 * values)}


def check(bench: Bench, row: Row) -> None:
    """Relative distance from the loop over hosts, by part, after three steps: float64, float32, and bf16 as it is."""
    name = row["precision"]
    dtype = torch.float64 if name == "fp64" else torch.float32
    spec = make_spec(HOSTS[row["host"]], "bf16" if name == "bf16" else "off")
    exact, (x, y), wanted = _oracle(row["host"])
    growth = exact.apply(lambda t: t.to(dtype) if t.dtype is torch.float64 else t)
    growth["rates"] = exact["rates"]
    cast = x.to(dtype) if x.is_floating_point() else x
    there = [value.to(bench.device) for value in (cast, y)]
    found = _outcome(bench.executor(spec), placed(growth, bench.device), spec, *there)
    row["distance"] = _distance(found, wanted)
    row["worst"] = max(row["distance"].values())
    row["ok"] = row["worst"] <= BOUNDS.get(name, float("inf"))


@cache
def _oracle(host: str) -> tuple[TensorDict, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Mixed hosts and a batch in float64, and what the loop makes of them. Against another float32 run both would
    err.

    Where a ReLU is within rounding of zero, two programs that are both right may end 1 % apart. So the first batch is
    taken on which the loop agrees with itself, to the bound of float32, although all its numbers are off by 1e-6.
    """
    spec = make_spec(HOSTS[host])
    growth = make_growth(spec, 6, "half", dtype=torch.float64)
    for seed in range(100):
        x, y = inputs(host, 6, 2, torch.device("cpu"), torch.float64, seed)
        wanted = _outcome(LoopExecutor(spec), growth, spec, x, y)
        if all(_stable(spec, growth, x, y, wanted, draw) for draw in range(4)):
            return growth, (x, y), wanted
    raise RuntimeError(f"{host}: none of 100 batches can be compared in float32")


def _stable(spec: GrowthSpec, growth: TensorDict, x: Tensor, y: Tensor, wanted: dict[str, Tensor], draw: int) -> bool:
    """Whether the loop comes to what is `wanted` from numbers that are off by 1e-6."""
    generator = torch.Generator().manual_seed(draw)

    def off(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return t * (1 + 1e-6 * noise) if t.is_floating_point() else t

    near = growth.clone()
    near["host"], near["seeds"] = near["host"].apply(off), near["seeds"].apply(off)
    found = _outcome(LoopExecutor(spec), near, spec, off(x), y)
    return max(_distance(found, wanted).values()) <= BOUNDS["fp32"]


def _distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {p: float((found[p] - wanted[p]).norm() / wanted[p].norm().clamp(min=1e-30)) for p in wanted}


def _outcome(executor: Executor, growth: TensorDict, spec: GrowthSpec, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Train three steps and score; every number that came out."""
    plan = make_plan(growth["slots"], spec)
    carry = executor.begin(growth, plan)
    rates, keys = growth["rates"], growth["key"].to(x.device)
    for t in range(3):
        carry = executor.train_step(carry, x, y, rates["host"], rates["seed"], keys, t == 2)
    trained, measured = executor.finish(carry, growth), executor.measured(carry)
    scoring = executor.begin_evaluation(trained, plan, x[0])
    scores = executor.finish_evaluation(executor.evaluate_step(scoring, x[-1], y))
    parts = {"loss": measured["loss"], "scores": scores["loss"], "correct": scores["correct"].double()}
    for name in ("params", "statistics", "moments"):
        found = [leaf.double().flatten() for leaf in trained["host", name].values(True, True)]
        parts[f"host {name}"] = torch.cat(found) if found else torch.zeros(1)
    parts["seeds"] = torch.cat([leaf.double().flatten() for leaf in trained["seeds"].values(True, True)])
    parts["gradients"] = torch.cat([measured["host_norm"], measured["seed_norm"].nan_to_num().flatten()])
    return {name: value.cpu().double() for name, value in parts.items()}


def steps(bench: Bench, row: Row) -> None:
    """Milliseconds per step by events on the device, and of the plain loop."""
    host, n, amp = row["host"], row["n"], row["amp"]
    spec = make_spec(HOSTS[host], amp)
    step, records, x, y = _step(bench, spec, host, n, row["cells"])
    for _ in range(3):
        step()
    if bench.cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(10 * bench.repeat + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        runs.wait(bench.device)
        times = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
        row["p95_over_p50"] = times[int(0.95 * (len(times) - 1))] / statistics.median(times)
    else:
        times = [1e3 * bench.seconds(step)]
    row |= {"ms": statistics.median(times), "images_per_second": 1e3 * n * x.shape[1] / statistics.median(times)}
    del step
    nets = plain.networks(spec, records[:PLAIN_HOSTS], bench.device)

    def loop() -> None:
        for i, net in enumerate(nets):
            plain.step(net, x[i], y[i], amp)

    _beside(row, len(nets) * x.shape[1] / bench.seconds(loop))


def _step(
    bench: Bench, spec: GrowthSpec, host: str, n: int, cells: str
) -> tuple[Callable[[], None], TensorDict, Tensor, Tensor]:
    """A training step of all hosts on random data, their slot records, and the data."""
    growth, executor = bench.growth(spec, n, cells), bench.executor(spec)
    x, y = inputs(host, n, bench.batch(host), bench.device, torch.float32)
    rates, keys = growth["rates"], growth["key"].to(bench.device)
    carry = executor.begin(growth, make_plan(growth["slots"], spec))

    def step() -> None:
        executor.train_step(carry, x, y, rates["host"], rates["seed"], keys, False)

    return step, growth["slots"], x, y


def _beside(row: Row, images_per_second: float) -> None:
    """Note what the plain loop does, and how many times as much we do."""
    row["plain_images_per_second"] = images_per_second
    row["ratio"] = row["images_per_second"] / images_per_second


def coalitions(bench: Bench, row: Row) -> None:
    """Validation with all coalitions, statistics re-estimated for each, against single passes."""
    n, amp = row["n"], row["amp"]
    spec, settings = make_spec(HOSTS["base8"], amp), EpochSettings(512)
    calibration = calibration_batch(bench.splits, k.root(0), 512)

    def ms(cells: str, calibration: Tensor | None) -> float:
        growth = bench.growth(spec, n, cells)
        shards = [Shard(bench.device, 0, n, bench.executor(spec), bench.splits, calibration)]
        plans = [make_plan(growth["slots"], spec)]
        return 1e3 * bench.seconds(lambda: evaluate(shards, [growth], plans, settings, "validation"))

    row["bare_ms"] = ms("none", None)
    row["eight_ms"] = ms("all", calibration)
    row["over_bare"] = row["eight_ms"] / row["bare_ms"]
    with patch.multiple(tree, score=score_once, calibrated=estimate_once):
        row["one_ms"], row["one_estimated_ms"] = ms("all", None), ms("all", calibration)
    row["over_one"] = row["eight_ms"] / row["one_ms"]
    row["over_one_estimated"] = row["eight_ms"] / row["one_estimated_ms"]


@dataclass(frozen=True)
class _Pass(StackedExecutor):
    """The stacked forward of whole hosts; with `momentum` None by running statistics."""

    momentum: float | None = None

    def _blocks(
        self, params: Tree, statistics: Tree, h: Tensor, keys: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tree]:
        def run(p: Tree, s: Tree, features: Tensor) -> tuple[Tensor, Tree]:
            return self.spec.host.run_blocks(p, s, features, start, stop, momentum=self.momentum)

        return vmap(run)(params, statistics, h)


def _once(spec: GrowthSpec, scoring: tree.Scoring, x: Tensor, momentum: float | None) -> tuple[Tensor, Tree]:
    """Logits and statistics of every host with all its live seeds."""
    n, seats = scoring.loss.shape[0], scoring.seating.slots(scoring.seats)
    parts = {"host": scoring.params, "slots": scoring.layout.open(scoring.seeds)}
    keys = torch.zeros(n, dtype=torch.int64, device=x.device)
    statistics = scoring.levels[0]["statistics"]
    return _Pass(spec, x.device, momentum=momentum)._forward(
        parts, statistics, seats, scoring.alpha, x.expand(n, *x.shape), keys
    )


def estimate_once(spec: GrowthSpec, scoring: tree.Scoring, x: Tensor) -> list[Tree]:
    """In place of `coalitions.calibrated`: the statistics of every host with all its live seeds."""
    first, *others = scoring.levels
    return [{**first, "statistics": _once(spec, scoring, x, 1.0)[1]}, *others]


def score_once(spec: GrowthSpec, scoring: tree.Scoring, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of `coalitions.score`: every host once, with all its live seeds. Counts lie in the first rows."""
    logits, _ = _once(spec, scoring, x, None)
    right = correct(logits, y).flatten(1).sum(1)
    losses = vmap(mean_loss)(logits, y).double() * y[0].numel()
    return F.pad(right, (0, scoring.correct.shape[0] - y.shape[0])), torch.zeros_like(scoring.differ), losses


def whole(bench: Bench, row: Row) -> None:
    """A whole run in a steady state, and epochs of the plain loop: training and one validation pass."""
    n, amp = row["n"], row["amp"]
    _run(bench, row, n, amp, [str(bench.device)])
    spec = make_spec(HOSTS["base8"], amp)
    records = make_growth(spec, min(n, PLAIN_HOSTS), "half")["slots"]
    hosts = plain.networks(spec, records, bench.device)
    plain.train(hosts[:1], bench.splits, bench.batch("base8"), amp)
    runs.wait(bench.device)
    start = time.perf_counter()
    plain.train(hosts, bench.splits, bench.batch("base8"), amp)
    plain.validate([net for net, _ in hosts], bench.splits, amp)
    _beside(row, len(hosts) * _images(bench) / (time.perf_counter() - start))


def telemetry(bench: Bench, row: Row) -> None:
    """Whole runs that tell nothing of their steps, runs that do, and the share of the wall time that this takes."""
    for name, told in (("silent", False), ("told", True)):
        row[name] = {}
        _run(bench, row[name], row["n"], row["amp"], [str(bench.device)], told)
    row["events_share"] = 1.0 - row["told"]["images_per_second"] / row["silent"]["images_per_second"]


def scaling(bench: Bench, row: Row) -> None:
    """Whole runs with as many hosts on every device, on one device and on two."""
    for count in (1, 2):
        row[f"on_{count}"] = {}
        devices = [f"cuda:{i}" if bench.cuda else "cpu" for i in range(count)]
        _run(bench, row[f"on_{count}"], count * (2 if bench.smoke else 64), row["amp"], devices)
    row["ratio"] = row["on_2"]["images_per_second"] / row["on_1"]["images_per_second"]


def _run(bench: Bench, row: Row, n: int, amp: str, devices: list[str], told: bool = True) -> None:
    assert len(bench.splits.train)  # registers the task
    runs.measure(row, TASK, n, amp, devices, bench.epochs, told)
    row["images_per_second"] = _images(bench) * row["env_epochs_per_second"]


def _images(bench: Bench) -> int:
    """Images a host trains on in an epoch."""
    batch = bench.batch("base8")
    return len(bench.splits.train) // batch * batch


def profile(bench: Bench, row: Row) -> None:
    """Where a step's time goes, by kernel, and the share of the wall time in which the device is busy."""
    from torch.profiler import ProfilerActivity

    step, *_ = _step(bench, make_spec(HOSTS["base8"], row["amp"]), "base8", row["n"], "half")
    rounds = bench.repeat
    for _ in range(3):
        step()
    runs.wait(bench.device)
    activities = [ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as trace:
        for _ in range(rounds):
            step()
        runs.wait(bench.device)
    events = [e for e in trace.events() if e.device_type.name != "CPU" or not bench.cuda]
    busy, reach = 0.0, 0.0
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    row["busy"] = busy / (reach - min(e.time_range.start for e in events))
    kernels = []
    for e in trace.key_averages():
        ms = (e.self_device_time_total if bench.cuda else e.self_cpu_time_total) / 1e3 / rounds
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, e.key, re.IGNORECASE)), "other")
        kernels.append({"ms": ms, "calls": e.count / rounds, "group": group, "kernel": e.key[:160]})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    row |= {"ms": sum(kernel["ms"] for kernel in kernels), "launches": sum(kernel["calls"] for kernel in kernels)}
    row["group_ms"] = {g: sum(e["ms"] for e in kernels if e["group"] == g) for g in (*GROUPS, "other")}
    row["kernels"] = kernels[:40]
    for kernel in kernels[:25]:
        print(f"  {kernel['ms']:8.3f} ms {kernel['calls']:6.1f} x {kernel['group']:28s} {kernel['kernel'][:90]}")


SECTIONS: dict[str, tuple[Callable[[Bench, Row], None], tuple[str, ...]]] = {
    "floor": (floor, ()),
    "check": (check, ("host", "precision")),
    "steps": (steps, ("host", "n", "amp", "cells")),
    "coalitions": (coalitions, ("n", "amp")),
    "whole": (whole, ("n", "amp")),
    "telemetry": (telemetry, ("n", "amp")),
    "scaling": (scaling, ("amp",)),
    "profile": (profile, ("n", "amp")),
}
"""What a section does with a row, and the fields that tell its rows apart."""


def planned(given: argparse.Namespace) -> Iterator[Row]:
    """The rows that were asked for."""
    choices = {
        "host": given.models,
        "n": given.hosts,
        "amp": given.amp,
        "cells": ["none", "half"],
        "precision": ["fp64", "fp32", "bf16"],
    }
    for section in given.only:
        if section == "scaling" and torch.cuda.device_count() == 1:
            print("scaling: left out, it takes two GPUs")
            continue
        fields = SECTIONS[section][1]
        for values in product(*(choices[field] for field in fields)):
            yield {"section": section, **dict(zip(fields, values, strict=True))}


def attempt(bench: Bench, row: Row) -> None:
    """Fill a row; what it has when it fails, it keeps."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    start = time.perf_counter()
    try:
        SECTIONS[row["section"]][0](bench, row)
        if bench.cuda:
            row["peak_gb"] = torch.cuda.max_memory_allocated(bench.device) / 1e9
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["took_seconds"] = time.perf_counter() - start
    gc.collect()


def usable(bench: Bench) -> bool:
    """Whether the device still works; after an illegal access nothing does in this process."""
    try:
        runs.wait(bench.device)
        if bench.cuda:
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def flat(row: Row) -> dict[str, str]:
    """The numbers and words of a row, as text."""
    cells: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{name} {inner}": text for inner, text in flat(value).items()}
        elif not isinstance(value, list):
            cells[name] = f"{value:,.0f}" if isinstance(value, float) and value >= 1e4 else _short(value)
    return cells


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def tables(rows: list[Row]) -> str:
    """A Markdown table for each section, on its side where it is wide."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        cells = [flat(row) for row in rows if row["section"] == section]
        names = list(dict.fromkeys(name for row in cells for name in row))
        table = [names, *([row.get(name, "") for name in names] for row in cells)]
        if len(names) > 12:
            table = [list(line) for line in zip(*table, strict=True)]
        table.insert(1, ["---"] * len(table[0]))
        lines += ["", *(f"| {' | '.join(line)} |" for line in table)]
    return "\n".join(lines)


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Images per second of every row that has them, beside the plain loop's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if "images_per_second" in row][::-1]
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.35 * len(shown)))
    labels = [" ".join(str(row[name]) for name in ("section", *SECTIONS[row["section"]][1])) for row in shown]
    places = range(len(shown))
    for shift, name, label in ((0.2, "images_per_second", "esper"), (-0.2, "plain_images_per_second", "plain loop")):
        axes.barh([at + shift for at in places], [row.get(name, 0.0) for row in shown], 0.4, label=label)
    axes.set(yticks=places, yticklabels=labels, xlabel="samples per second", title=title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument("--hosts", type=int, nargs="+", default=[32])
    parser.add_argument("--models", nargs="+", choices=list(HOSTS), default=list(HOSTS), help="for check and steps")
    parser.add_argument("--amp", nargs="+", default=["off", "bf16"])
    parser.add_argument("--epochs", type=int, default=25, help="epochs of an episode of whole runs")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the file")
    parser.add_argument("--smoke", action="store_true", help="two hosts, few images, one repetition")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    given = parser.parse_args()
    if given.smoke:
        given.hosts, given.epochs = [2], 3
    bench = Bench(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), given.smoke, given.epochs)
    result: Row = {
        "device": torch.cuda.get_device_name(bench.device) if bench.cuda else "CPU",
        "torch": torch.__version__,
        "rows": json.loads(given.out.read_text())["rows"] if given.resume else [],
    }
    rows: list[Row] = result["rows"]

    def save() -> None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")

    save()
    print(f"{result['device']}, torch {result['torch']}", flush=True)
    for row in planned(given):
        if any(done | row == done for done in rows):
            continue
        if sum(done["took_seconds"] for done in rows) > given.budget:
            print(f"no time for {' '.join(map(str, row.values()))}")
            continue
        attempt(bench, row)
        print(", ".join(f"{name} {value}" for name, value in flat(row).items()), flush=True)
        rows.append(row)
        save()
        if not usable(bench):
            os.execv(sys.executable, [sys.executable, *sys.argv, "--resume"])
    print(tables(rows))
    draw(rows, result["device"], given.out.with_suffix(".png"))
    failed = [row for row in rows if "error" in row or not row.get("ok", True)]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} rows failed")


if __name__ == "__main__":
    main()
