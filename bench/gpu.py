"""How fast stacks of hosts grow on a GPU: first checked against the loop over hosts, then timed against plain modules.

    python bench/gpu.py                      # everything; prints tables, writes bench-gpu.json and bench-gpu.png
    python bench/gpu.py --smoke              # small sizes, on a CPU if there is no GPU (the stacked program, no graphs)
    python bench/gpu.py --only check steps --hosts 32 --amp bf16

"mixed" hosts have seeds of five kinds blended into half of their three slots, behind the pooling. A step is forward,
backward and SGD of all hosts on one batch each; an epoch is a training pass over 10,240 images per host and the scoring
of every coalition on 2,048, with re-estimated statistics, through the same functions as a real run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.data.batches import calibration_batch
from esper.data.synthetic import load_synthetic
from esper.growth.executors.base import Executor
from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.growth.precision import autocast
from esper.growth.spec import GrowthSpec
from esper.growth.step import EpochSettings, Shard, evaluate, train
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from grown import PlainCNN, PlainTransformer, make_growth, make_spec

HOSTS = {
    "base8": CNNHost(3, 10, 8),
    "base32": CNNHost(3, 10, 32),
    "transformer": TransformerHost(256, 128, 4, 4, 128, 0.0),
}
BATCH = {"base8": 512, "base32": 128, "transformer": 32}
BOUNDS = {"fp64": 1e-12, "fp32": 1e-5}


@dataclass(frozen=True)
class Bench:
    """Where and how large: device, images per host and epoch, repetitions."""

    device: torch.device
    images: int
    repeat: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def executor(self, spec: GrowthSpec) -> Executor:
        return CapturedExecutor(spec, self.device) if self.cuda else StackedExecutor(spec, self.device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> list[float]:
        """Wall seconds of each call, the device waited for."""
        times = []
        for _ in range(self.repeat):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return times


def inputs(host: str, n: int, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One random batch for every host."""
    generator = torch.Generator().manual_seed(7)
    if host == "transformer":
        tokens = torch.randint(0, 256, (n, batch, 129), generator=generator).to(device)
        return tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
    pool = torch.randn(batch + n, 3, 32, 32, generator=generator, dtype=dtype).to(device)
    x = torch.stack([pool[i : i + batch] for i in range(n)])
    return x, torch.randint(0, 10, (n, batch), generator=generator).to(device)


def run(
    executor: Executor, growth: TensorDict, spec: GrowthSpec, x: Tensor, y: Tensor, steps: int
) -> dict[str, Tensor]:
    """Train a few steps and score; every number that came out."""
    plan = make_plan(growth["slots"], spec)
    carry = executor.begin(growth, plan)
    rates = growth["rates"].cpu()
    for t in range(steps):
        carry = executor.train_step(carry, x, y, rates["host"], rates["seed"], growth["key"], t == steps - 1)
    trained, measured = executor.finish(carry, growth)
    scoring = executor.begin_evaluation(trained, plan, x[0])
    scores = executor.finish_evaluation(executor.evaluate_step(scoring, x[-1], y))
    parts: dict[str, Tensor] = {
        "loss": measured["loss"],
        "scores": scores["loss"],
        "correct": scores["correct"].double(),
    }
    for name in ("params", "statistics", "moments"):
        found = [leaf.double().flatten() for leaf in trained["host", name].values(True, True)]
        parts[f"host {name}"] = torch.cat(found) if found else torch.zeros(1)
    parts["seeds"] = torch.cat([leaf.double().flatten() for leaf in trained["seeds"].values(True, True)])
    parts["gradients"] = torch.cat([measured["host_norm"], measured["seed_norm"].nan_to_num().flatten()])
    return {name: value.cpu().double() for name, value in parts.items()}


def check(bench: Bench, hosts: list[str]) -> list[dict[str, Any]]:
    """Relative distance from the loop over hosts, by part, after five steps: float64, float32, and bf16 as it is."""
    rows = []
    for host in hosts:
        for name, dtype, amp in (
            ("fp64", torch.float64, "off"),
            ("fp32", torch.float32, "off"),
            ("bf16", torch.float32, "bf16"),
        ):
            spec = make_spec(HOSTS[host], amp)
            # The oracle of float32 is float64 rounded at the end; against another float32 run both would err.
            exact = make_growth(make_spec(HOSTS[host]), 6, "half", dtype=torch.float64)
            growth = exact.apply(lambda t, d=dtype: t.to(d) if t.dtype is torch.float64 else t)
            growth["rates"] = exact["rates"]
            x, y = inputs(host, 6, 16, torch.device("cpu"), torch.float64)
            wanted = run(LoopExecutor(make_spec(HOSTS[host])), exact, make_spec(HOSTS[host]), x, y, 5)
            there = x.to(bench.device), y.to(bench.device)
            cast = there[0].to(dtype) if there[0].is_floating_point() else there[0]
            found = run(bench.executor(spec), growth.to(bench.device), spec, cast, there[1], 5)
            distance = {
                part: float((found[part] - wanted[part]).norm() / wanted[part].norm().clamp(min=1e-30))
                for part in wanted
            }
            worst = max(distance.values())
            row = {"host": host, "precision": name, "distance": distance, "bound": BOUNDS.get(name), "worst": worst}
            row["ok"] = name not in BOUNDS or worst <= BOUNDS[name]
            rows.append(row)
            shown = ", ".join(f"{part} {value:.1e}" for part, value in distance.items())
            print(
                f"check {host:11s} {name}: worst {worst:.1e} {'ok' if row['ok'] else 'TOO FAR'} ({shown})", flush=True
            )
    return rows


def step_times(bench: Bench, spec: GrowthSpec, host: str, n: int, cells: str) -> dict[str, float]:
    """Milliseconds per step of the fastest executor, by events on the device, and the peak of its memory in GB."""
    growth = make_growth(spec, n, cells, device=str(bench.device))
    x, y = inputs(host, n, BATCH[host] if bench.cuda else 8, bench.device, torch.float32)
    executor = bench.executor(spec)
    rates = growth["rates"].cpu()
    carry = executor.begin(growth, make_plan(growth["slots"], spec))

    def step() -> None:
        executor.train_step(carry, x, y, rates["host"], rates["seed"], growth["key"], False)

    for _ in range(3):
        step()
    bench.wait()
    count = 10 * bench.repeat
    if not bench.cuda:
        times = bench.seconds(step)
    else:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        bench.wait()
        times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    times.sort()
    middle = statistics.median(times)
    return {
        "ms": 1e3 * middle,
        "p95_over_p50": times[int(0.95 * (len(times) - 1))] / middle,
        "images_per_second": n * x.shape[1] / middle,
        "peak_gb": torch.cuda.max_memory_allocated(bench.device) / 1e9 if bench.cuda else 0.0,
    }


def plain_times(bench: Bench, spec: GrowthSpec, host: str, n: int, cells: str, streams: bool) -> dict[str, float]:
    """Milliseconds per step of ordinary modules, one host after the other, or each on a CUDA stream of its own."""
    records = make_growth(spec, n, cells)["slots"]
    names = [[spec.blueprints[b] if b >= 0 else None for b in row] for row in records["blueprint"].tolist()]
    x, y = inputs(host, n, BATCH[host] if bench.cuda else 8, bench.device, torch.float32)
    config = HOSTS[host]
    networks = [
        (PlainCNN(config, row) if isinstance(config, CNNHost) else PlainTransformer(config)).to(bench.device)
        for row in names
    ]
    optimisers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4) for net in networks]
    lanes = [torch.cuda.Stream(bench.device) if streams else None for _ in networks]

    def step() -> None:
        for i, (net, optimiser, lane) in enumerate(zip(networks, optimisers, lanes, strict=True)):
            with torch.cuda.stream(lane) if lane is not None else nullcontext():
                optimiser.zero_grad(set_to_none=True)
                with autocast(spec.amp, bench.device):
                    loss = F.cross_entropy(net(x[i]).float().flatten(0, -2), y[i].flatten())
                loss.backward()
                optimiser.step()

    step()
    step()
    middle = statistics.median(bench.seconds(step))
    return {"ms": 1e3 * middle, "images_per_second": n * x.shape[1] / middle}


def steps(bench: Bench, hosts: list[str], sizes: list[int], amps: list[str]) -> list[dict[str, Any]]:
    """Steps of the fastest executor against plain modules."""
    rows = []
    for host in hosts:
        for n in sizes:
            for amp in amps:
                for cells in ("none", "half"):
                    if host == "transformer" and cells == "half":
                        continue
                    spec = make_spec(HOSTS[host], amp)
                    row: dict[str, Any] = {"host": host, "n": n, "amp": amp, "cells": cells}
                    if bench.cuda:
                        torch.cuda.reset_peak_memory_stats(bench.device)
                    row |= step_times(bench, spec, host, n, cells)
                    if n <= 64:
                        row["plain"] = plain_times(bench, spec, host, n, cells, False)
                        row["ratio"] = row["plain"]["ms"] / row["ms"]
                    if bench.cuda and n in (8, 32) and amp == "off":
                        row["streams"] = plain_times(bench, spec, host, n, cells, True)
                    rows.append(row)
                    plain = f", plain {row['plain']['ms']:8.2f} ms, ratio {row['ratio']:5.2f}" if "plain" in row else ""
                    lanes = f", streams {row['streams']['ms']:8.2f} ms" if "streams" in row else ""
                    print(
                        f"step {host:11s} N={n:3d} {amp:4s} {cells:4s}: {row['ms']:8.2f} ms, "
                        f"{row['images_per_second'] / 1e6:6.3f} M/s, p95/p50 {row['p95_over_p50']:.2f}, "
                        f"{row['peak_gb']:.1f} GB{plain}{lanes}",
                        flush=True,
                    )
                    if bench.cuda:
                        torch.cuda.empty_cache()
    return rows


def epochs(bench: Bench, sizes: list[int], amps: list[str]) -> list[dict[str, Any]]:
    """Whole epochs of the base-8 host: training, and scoring of all coalitions; the same plan again, and a new one each
    time."""
    rows = []
    host = "base8"
    splits = load_synthetic(k.root(0), bench.images, bench.images // 5, 64).to(bench.device)
    batch = BATCH[host] if bench.cuda else 8
    calibration = calibration_batch(splits, k.root(0), batch)
    for n in sizes:
        for amp in amps:
            spec = make_spec(HOSTS[host], amp)
            executor = bench.executor(spec)
            shards = [Shard(bench.device, 0, n, executor, splits, calibration)]
            settings = EpochSettings(batch)
            grown = {
                turn: make_growth(spec, n, "half", turn, device=str(bench.device)) for turn in range(bench.repeat + 2)
            }

            def epoch(growth: TensorDict) -> tuple[float, float]:
                plans = [make_plan(growth["slots"], spec)]  # noqa: B023
                bench.wait()
                start = time.perf_counter()
                states, _ = train(spec, shards, settings, [growth], plans, 0)  # noqa: B023
                middle = time.perf_counter()
                evaluate(shards, states, plans, settings, "validation")  # noqa: B023
                bench.wait()
                return middle - start, time.perf_counter() - middle

            for turn in (0, 1):
                epoch(grown[turn])
            held = torch.cuda.memory_allocated(bench.device) if bench.cuda else 0
            same = [epoch(grown[0]) for _ in range(bench.repeat)]
            other = [epoch(grown[turn]) for turn in range(2, bench.repeat + 2)]
            row: dict[str, Any] = {"n": n, "amp": amp}
            for name, times in (("same plan", same), ("new plan", other)):
                total = statistics.median(a + b for a, b in times)
                row[name] = {
                    "seconds": total,
                    "scoring_share": statistics.median(b / (a + b) for a, b in times),
                    "images_per_second": n * (bench.images // batch * batch) / total,
                }
            row["memory_growth"] = torch.cuda.memory_allocated(bench.device) / max(1, held) if bench.cuda else 1.0
            row["recorded"] = executor.recorded if isinstance(executor, CapturedExecutor) else 0
            rows.append(row)
            print(
                f"epoch N={n:3d} {amp:4s}: same plan {row['same plan']['images_per_second'] / 1e6:.3f} M/s "
                f"(scoring {100 * row['same plan']['scoring_share']:.0f} %), new plan each epoch "
                f"{row['new plan']['images_per_second'] / 1e6:.3f} M/s, {row['recorded']} recordings",
                flush=True,
            )
    return rows


def scoring(bench: Bench, sizes: list[int], amps: list[str]) -> list[dict[str, Any]]:
    """All eight coalitions of three live slots, statistics re-estimated, against one validation pass without seeds."""
    rows = []
    splits = load_synthetic(k.root(0), max(512, bench.images // 4), bench.images // 5, 64).to(bench.device)
    calibration = calibration_batch(splits, k.root(0), 512)
    for n in sizes:
        for amp in amps:
            spec = make_spec(HOSTS["base8"], amp)
            shards = [Shard(bench.device, 0, n, bench.executor(spec), splits, None)]
            calibrated = [Shard(bench.device, 0, n, bench.executor(spec), splits, calibration)]
            times = {}
            for cells, group in (("none", shards), ("all", calibrated)):
                growth = make_growth(spec, n, cells, device=str(bench.device))
                plans = [make_plan(growth["slots"], spec)]

                def work() -> None:
                    evaluate(group, [growth], plans, EpochSettings(512), "validation")  # noqa: B023

                work()
                work()
                times[cells] = statistics.median(bench.seconds(work))
            row = {"n": n, "amp": amp, "one_ms": 1e3 * times["none"], "eight_ms": 1e3 * times["all"]}
            row["ratio"] = times["all"] / times["none"]
            rows.append(row)
            print(
                f"scoring N={n:3d} {amp:4s}: one pass {row['one_ms']:.2f} ms, eight coalitions "
                f"{row['eight_ms']:.2f} ms, ratio {row['ratio']:.2f}",
                flush=True,
            )
    return rows


def profile(bench: Bench, n: int, amp: str) -> list[dict[str, Any]]:
    """Where a step's time goes, by kernel, and the share of the wall time in which the device is busy."""
    from torch.profiler import ProfilerActivity

    host = "base8"
    spec = make_spec(HOSTS[host], amp)
    growth = make_growth(spec, n, "half", device=str(bench.device))
    x, y = inputs(host, n, BATCH[host] if bench.cuda else 8, bench.device, torch.float32)
    executor = bench.executor(spec)
    rates = growth["rates"].cpu()
    carry = executor.begin(growth, make_plan(growth["slots"], spec))
    activities = [ProfilerActivity.CUDA] if bench.cuda else [ProfilerActivity.CPU]
    rounds = 5
    for _ in range(3):
        executor.train_step(carry, x, y, rates["host"], rates["seed"], growth["key"], False)
    bench.wait()
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(rounds):
            executor.train_step(carry, x, y, rates["host"], rates["seed"], growth["key"], False)
        bench.wait()
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type.name != "CPU" or not bench.cuda
    )
    busy, reach = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    whole = spans[-1][1] - spans[0][0] if spans else 1.0
    found = [
        {
            "kernel": e.key[:90],
            "ms": (e.self_device_time_total if bench.cuda else e.self_cpu_time_total) / 1e3 / rounds,
            "calls": e.count / rounds,
        }
        for e in trace.key_averages()
    ]
    found.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in found)
    print(
        f"profile N={n} {amp}: kernels {total:.2f} ms per step, {sum(r['calls'] for r in found):.0f} launches, "
        f"busy {100 * busy / whole:.1f} %"
    )
    for row in found[:22]:
        print(f"  {row['ms']:7.3f} ms {row['calls']:6.1f} x {row['kernel']}", flush=True)
    return [{"n": n, "amp": amp, "busy": busy / whole, "ms": total, "kernels": found[:40]}]


def floor(bench: Bench) -> dict[str, float]:
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
    if not bench.cuda:
        return {"bytes_fp32": 4.0 * values, "flops": float(flops)}
    big = torch.randn(2**28, device=bench.device)
    target = torch.empty_like(big)
    copies = statistics.median(bench.seconds(lambda: target.copy_(big)))
    left, right = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    left @ right
    product = statistics.median(bench.seconds(lambda: left @ right))
    bandwidth, rate = 2 * 4 * 2**28 / copies, 2 * 8192**3 / product
    result = {"bytes_fp32": 4.0 * values, "flops": float(flops), "bandwidth": bandwidth, "bf16_rate": rate}
    result |= {"floor_fp32": bandwidth / (4 * values), "floor_bf16": bandwidth / (2 * values)}
    print(
        f"floor: {4 * values / 1e3:.0f} KB and {flops / 1e6:.1f} MFLOP per image; {bandwidth / 1e12:.2f} TB/s and "
        f"{rate / 1e12:.0f} TFLOP/s here; at most {result['floor_fp32'] / 1e6:.1f} M/s fp32, "
        f"{result['floor_bf16'] / 1e6:.1f} M/s bf16",
        flush=True,
    )
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Images per second over hosts, one line per kind of step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result.get("steps") or []:
        label = f"{row['host']} {row['amp']} {row['cells']}"
        lines.setdefault(label, []).append((row["n"], row["images_per_second"]))
        if "plain" in row:
            lines.setdefault(f"{label}, plain loop", []).append((row["n"], row["plain"]["images_per_second"]))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), "--" if "plain" in label else "-", marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="hosts", ylabel="samples per second", title=result["device"])
    if lines:
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sections(bench: Bench, given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "floor", lambda: floor(bench)
    yield "check", lambda: check(bench, given.models)
    yield "steps", lambda: steps(bench, given.models, given.hosts, given.amp)
    yield "epochs", lambda: epochs(bench, given.hosts, given.amp)
    yield "scoring", lambda: scoring(bench, given.hosts[-1:], given.amp)
    yield "profile", lambda: [row for amp in given.amp for row in profile(bench, given.hosts[-1], amp)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 8, 32, 64, 256])
    parser.add_argument("--models", nargs="+", choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument("--amp", nargs="+", default=["off", "bf16"])
    parser.add_argument("--only", nargs="+", help="sections to run: floor check steps epochs scoring profile")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="two hosts, few images, one repetition")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, 10_240, given.repeat)
    if given.smoke:
        bench = Bench(device, 320 if device.type == "cpu" else 1024, 1)
        given.hosts, given.models = [2], ["base8"]
    name = torch.cuda.get_device_name(device) if bench.cuda else "CPU"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    print(f"{name}, torch {torch.__version__}", flush=True)
    failed = []
    for title, work in sections(bench, given):
        if given.only and title not in given.only:
            continue
        try:
            result[title] = work()
        except Exception:
            # One section's failure must not lose the numbers of the others; the exit code tells.
            traceback.print_exc()
            failed.append(title)
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    draw(result, given.out.with_suffix(".png"))
    failed += [f"check {row['host']} {row['precision']}" for row in result.get("check", []) if not row["ok"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
