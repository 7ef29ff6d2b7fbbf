"""How fast whole runs are: training, coalitions, lifecycle, controller, learner and telemetry together.

    python bench/whole.py                                     # synthetic task (base-8 host), N = 32 and 256, one GPU
    python bench/whole.py --devices cuda:0 cuda:1 --hosts 128
    python bench/whole.py --task digits --hosts 512 --rollouts 4
    python bench/whole.py --smoke                             # seconds, on a CPU

Every line is one ordinary run, `esper.run.train` with its event log and checkpoints, of `--rollouts` rollouts with the
PPO controller. The first rollout warms up: programs are recorded until they have room for every plan. The rest is
measured: medians of epochs; shares of wall time; recordings; how full the slots were; load and memory of the first GPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esper.config import TrainingConfig
from esper.events import EventLog
from esper.growth import step
from esper.growth.executors.captured import CapturedExecutor
from esper.run import train


class Clock:
    """Progress and observer of a run that notes when epochs end and what they were spent on."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.spent: dict[str, list[tuple[float, float]]] = {"train": [], "evaluate": []}
        self.filled: list[float] = []
        self.learned: list[float] = []
        self.recorded: list[int] = []
        self.executors: set[Any] = set()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.spent[name].append((start, time.perf_counter() - start))
            shards = args[1] if name == "train" else args[0]
            self.executors.update(s.executor for s in shards)
            return result

        return run

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
        self.ends.append(time.perf_counter())
        self.recorded.append(sum(e.recorded for e in self.executors if isinstance(e, CapturedExecutor)))

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
        self.learned.append(time.perf_counter())

    def watch(self, result: Any) -> None:
        self.filled.append(float((result["lived", "blueprint"] >= 0).double().mean()))


def busy(stop: threading.Event, found: list[int]) -> None:
    while not stop.wait(0.05):
        found.append(torch.cuda.utilization())


def measure(config: TrainingConfig, warm: int) -> dict[str, Any]:
    """One run; the first `warm` rollouts do not count."""
    clock = Clock()
    originals = step.train, step.evaluate
    step.train, step.evaluate = clock.wrap("train", step.train), clock.wrap("evaluate", step.evaluate)
    stop, load = threading.Event(), []
    cuda = config.devices[0].startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        threading.Thread(target=busy, args=(stop, load), daemon=True).start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            with EventLog(run_dir, config.to_dict(), config.telemetry_level) as events:
                fields = config.to_train_kwargs()
                summary = train(run_dir=run_dir, events=events, progress=clock, watch=clock.watch, **fields)
    finally:
        stop.set()
        step.train, step.evaluate = originals
    rollouts = len(clock.learned)
    t = len(clock.ends) // rollouts
    first = warm * t
    wall = clock.learned[-1] - clock.learned[warm - 1]
    starts = [clock.learned[i // t - 1] if i % t == 0 else clock.ends[i - 1] for i in range(first, len(clock.ends))]
    epochs = [end - start for end, start in zip(clock.ends[first:], starts, strict=True)]
    # An episode's first epoch includes the making of fresh hosts and their first scoring.
    inner = [e for i, e in enumerate(epochs) if i % t]
    began, ended = clock.learned[warm - 1], clock.learned[-1]
    trained, scored = (
        sum(seconds for start, seconds in clock.spent[name] if began <= start < ended) for name in ("train", "evaluate")
    )
    return {
        "hosts": config.n_envs,
        "amp": config.amp,
        "devices": list(config.devices),
        "epoch_seconds": statistics.median(inner),
        "p95_over_p50": sorted(inner)[int(0.95 * (len(inner) - 1))] / statistics.median(inner),
        "env_epochs_per_second": config.n_envs * len(epochs) / wall,
        "share": {"train": trained / wall, "evaluate": scored / wall, "rest": 1.0 - (trained + scored) / wall},
        "filled": statistics.mean(clock.filled[first:]),
        "recorded": clock.recorded[-1],
        "recorded_after_warm": clock.recorded[-1] - clock.recorded[first - 1],
        "busy_percent": statistics.mean(load[len(load) // 2 :]) if load else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "accuracy": summary["validation_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="synthetic")
    parser.add_argument("--hosts", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--amp", nargs="+", default=["off", "bf16"])
    parser.add_argument("--devices", nargs="+", default=None)
    parser.add_argument("--rollouts", type=int, default=3, help="at least 2; the first does not count")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of an episode (default: the task's)")
    parser.add_argument("--fields", type=json.loads, default={}, help="further configuration fields, as JSON")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench-whole.json"))
    given = parser.parse_args()
    if given.rollouts < 2:
        parser.error(f"--rollouts: {given.rollouts}; must be at least 2, of which the first does not count")
    devices = given.devices or ["cuda:0" if torch.cuda.is_available() else "cpu"]
    if given.smoke:
        given.task, given.hosts, given.amp, given.rollouts, given.epochs = "digits", [2], ["off"], 2, 2
        given.fields = {"train_samples": 128, "gates": "permissive", "lstm_hidden_dim": 16}
    name = torch.cuda.get_device_name() if devices[0].startswith("cuda") else "CPU"
    print(f"{name} x{len(devices)}, torch {torch.__version__}", flush=True)
    rows = []
    for n in given.hosts:
        for amp in given.amp:
            config = TrainingConfig(
                task=given.task,
                slots=["early", "mid", "late"],
                n_envs=n,
                n_episodes=n * given.rollouts,
                devices=devices,
                device=devices[0] if len(devices) > 1 else "cpu",
                amp=amp,
                max_epochs=given.epochs,
                **given.fields,
            )
            row = measure(config, 1)
            rows.append(row)
            share = ", ".join(f"{part} {100 * value:.1f} %" for part, value in row["share"].items())
            print(
                f"N={n:3d} {amp:4s}: {1e3 * row['epoch_seconds']:.1f} ms an epoch (p95/p50 {row['p95_over_p50']:.2f}), "
                f"{row['env_epochs_per_second']:.1f} env-epochs/s; {share}; slots {100 * row['filled']:.0f} % full, "
                f"{row['recorded']} recordings, {row['recorded_after_warm']} after warm-up; "
                f"busy {row['busy_percent']} %, peak {row['peak_gb']} GB",
                flush=True,
            )
    given.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
