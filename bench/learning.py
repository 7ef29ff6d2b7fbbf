"""Does the controller learn? Return, explained variance and entropies over training, on several seeds.

    python bench/learning.py --tasks mnist digits --seeds 0 1 2 3 4 --hosts 16 --minutes 7.5 --out learning
    python bench/learning.py --tasks digits --hosts 256 --fields '{"devices": ["cuda:0"]}' ...   # hosts on a GPU
    python bench/learning.py --read learning.json --out learning                     # judge and draw them again

Starts from each task's preset; `--fields` and, for one task, `--task-fields` change it. Every run is a process of its
own on its own share of the cores (the first ones named get what does not divide) and ends with the rollout in which its
minutes are up. Asked of every run: the 95 % bootstrap interval (episodes resampled) of the mean return of the last
fifth of its rollouts minus that of the first is above zero; explained variance is above 0.3 in the last fifth; no
head's mean normalised entropy is below 0.02 there. Writes <out>.json, <out>.md with a row per run, and <out>.png.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HEADS = ("slot", "blueprint", "blend", "op")
LEAST_VARIANCE, LEAST_ENTROPY = 0.3, 0.02
DRAWS = 4000

Result = dict[str, Any]
"""What a run left: `task`, `seed`, `setting`, `seconds`, and the data of its `rollouts` and `updates` events."""


class TimeUp(Exception):
    """The run has had its minutes."""


def run(job: dict[str, Any], setting: str, cores: Sequence[int], minutes: float) -> Result:
    """One training on the given cores; `job` are the fields of its configuration."""
    os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(1)
    from esper.config import TrainingConfig
    from esper.events import EventLog, load
    from esper.run import train

    class Silent:
        def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
            pass

        def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
            mean = sum(outcome["returns"]) / len(outcome["returns"])
            passed = time.perf_counter() - start
            if episode % 5 == 0:
                print(f"{passed:4.0f} s {job['task']} {job['seed']} rollout {episode}: return {mean:+.3f}", flush=True)
            if passed > 60.0 * minutes:
                raise TimeUp

    config = TrainingConfig(**job)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        with EventLog(run_dir, config.to_dict(), "minimal") as events, contextlib.suppress(TimeUp):
            train(run_dir=run_dir, events=events, progress=Silent(), **config.to_train_kwargs())
        logged = load(run_dir)
    return {
        "task": job["task"],
        "seed": job["seed"],
        "setting": setting,
        "seconds": time.perf_counter() - start,
        "rollouts": [event["data"] for event in logged if event["type"] == "rollout"],
        "updates": [event["data"] for event in logged if event["type"] == "update"],
    }


def interval(first: Sequence[float], last: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference last - first and its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    a, b = np.asarray(first), np.asarray(last)
    samples = generator.choice(b, (DRAWS, b.size)).mean(axis=1) - generator.choice(a, (DRAWS, a.size)).mean(axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(b.mean() - a.mean()), float(low), float(high)


def fifths(result: Result, name: str) -> tuple[list[float], list[float]]:
    """The episodes' `name` in the first and in the last fifth of the rollouts."""
    size = max(1, len(result["rollouts"]) // 5)
    parts = result["rollouts"][:size], result["rollouts"][-size:]
    first, last = ([float(value) for rollout in part for value in rollout[name]] for part in parts)
    return first, last


def judge(result: Result) -> dict[str, Any]:
    """The figures of a run, and what it fails of what is asked. Controllers that do not learn have no updates."""
    row: dict[str, Any] = {name: result[name] for name in ("task", "seed", "setting")}
    row |= {"rollouts": len(result["rollouts"]), "episodes": sum(len(r["returns"]) for r in result["rollouts"])}
    for name in ("returns", "objective", "validation_accuracy"):
        first, last = fifths(result, name)
        row[name] = {"first": float(np.mean(first)), "last": float(np.mean(last)), "gain": interval(first, last)}
    failed = [] if row["returns"]["gain"][1] > 0 else ["return"]
    if result["updates"]:
        tail = result["updates"][-max(1, len(result["updates"]) // 5) :]
        row["explained_variance"] = float(np.mean([u["explained_variance"] for u in tail]))
        # A head that no step of a rollout needed has no entropy there.
        row["entropy"] = {
            h: min((u[f"entropy/{h}"] for u in tail if u[f"relevant/{h}"] > 0), default=1.0) for h in HEADS
        }
        failed += ["explained variance"] if row["explained_variance"] <= LEAST_VARIANCE else []
        failed += [f"entropy of {h}" for h in HEADS if row["entropy"][h] < LEAST_ENTROPY]
    return {**row, "failed": failed}


def pooled(results: Sequence[Result]) -> tuple[float, float, float]:
    """The mean gain of return over runs and its interval, runs resampled and episodes within them."""
    generator = np.random.default_rng(0)
    gains = np.empty((len(results), DRAWS))
    for row, result in zip(gains, results, strict=True):
        a, b = (np.asarray(part) for part in fifths(result, "returns"))
        row[:] = generator.choice(b, (DRAWS, b.size)).mean(axis=1) - generator.choice(a, (DRAWS, a.size)).mean(axis=1)
    chosen = generator.integers(len(results), size=(DRAWS, len(results)))
    low, high = np.quantile(gains[chosen, np.arange(DRAWS)[:, None]].mean(axis=1), [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


def groups(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Runs by task and setting, in order of appearance, seeds ascending."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result["task"], result["setting"]), []).append(result)
    return {name: sorted(runs, key=lambda r: r["seed"]) for name, runs in found.items()}


def markdown(results: Iterable[Result]) -> str:
    """A table with a row per run and one per group of runs."""
    names = "task, setting", "seed", "rollouts", "return", "gain", "objective", "gain", "accuracy", "EV"
    names += "least entropy of a head", "fails"
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for (task, setting), runs in groups(results).items():
        for result in runs:
            row = judge(result)
            cells = [f"{task}, {setting}", str(row["seed"]), f"{row['rollouts']} ({row['episodes']} episodes)"]
            for name, digits in (("returns", 2), ("objective", 1)):
                cells += [_course(row[name], digits), _interval(row[name]["gain"], digits)]
            cells.append(_course(row["validation_accuracy"], 1))
            if "entropy" in row:
                head = min(HEADS, key=lambda h: row["entropy"][h])
                cells += [f"{row['explained_variance']:.2f}", f"{row['entropy'][head]:.2f} ({head})"]
            else:
                cells += ["", ""]
            lines.append(f"| {' | '.join([*cells, ', '.join(row['failed'])])} |")
        lines.append(f"| {task}, {setting} | all | | | {_interval(pooled(runs), 2)} | | | | | | |")
    return "\n".join(lines) + "\n"


def _course(part: dict[str, Any], digits: int) -> str:
    return f"{part['first']:.{digits}f} -> {part['last']:.{digits}f}"


def _interval(gain: Sequence[float], digits: int) -> str:
    return "{:+.{d}f} ({:+.{d}f}, {:+.{d}f})".format(*gain, d=digits)


def curves(results: Iterable[Result]) -> Figure:
    """Return, explained variance and each head's entropy by rollout: a row per task and setting, a line per seed."""
    found = groups(results)
    titles = ("mean return", "explained variance", *(f"entropy of {head}" for head in HEADS))
    figure = Figure(figsize=(3.0 * len(titles), 2.6 * len(found)), layout="constrained")
    for (name, runs), axes in zip(found.items(), figure.subplots(len(found), len(titles), squeeze=False), strict=True):
        for result in runs:
            updates, seed = result["updates"], f"seed {result['seed']}"
            lines = [[float(np.mean(rollout["returns"])) for rollout in result["rollouts"]]]
            lines.append([update["explained_variance"] for update in updates])
            lines += [[u[f"entropy/{h}"] if u[f"relevant/{h}"] > 0 else np.nan for u in updates] for h in HEADS]
            for panel, line in zip(axes, lines, strict=True):
                panel.plot(range(1, len(line) + 1), line, linewidth=1.2, label=seed)
        for panel, title in zip(axes, titles, strict=True):
            panel.set_title(title, loc="left", fontsize=9)
            panel.set_xlabel("rollout", fontsize=8)
        axes[0].set_ylabel(", ".join(name), fontsize=8)
        axes[0].legend(frameon=False, fontsize=7)
        axes[1].axhline(LEAST_VARIANCE, color="#9aa5b1", linewidth=0.8)
        for panel in axes[2:]:
            panel.set_ylim(0, 1.02)
            panel.axhline(LEAST_ENTROPY, color="#9aa5b1", linewidth=0.8)
    return figure


def train_all(given: argparse.Namespace) -> list[Result]:
    """Train everything that was asked for, side by side; a run that fails is named and left out."""
    from esper.config import PRESETS

    jobs = [
        {
            **PRESETS[task],
            "controller": given.controller,
            "n_envs": given.hosts,
            "n_episodes": given.hosts * given.rollouts,
            "checkpoint_every": 10**6,
            **given.fields,
            **given.task_fields.get(task, {}),
            "seed": seed,
        }
        for task in given.tasks
        for seed in given.seeds
    ]
    cores = sorted(os.sched_getaffinity(0))[: given.cores]
    at_once = min(len(jobs), given.processes or len(cores))
    shares = [cores[i % at_once :: at_once] or cores for i in range(len(jobs))]
    results = []
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        waiting = [
            pool.apply_async(run, (job, given.setting, share, given.minutes))
            for job, share in zip(jobs, shares, strict=True)
        ]
        for job, result in zip(jobs, waiting, strict=True):
            try:
                results.append(result.get())
            except Exception as error:
                print(f"{job['task']} seed {job['seed']} failed: {error!r}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits"])
    parser.add_argument("--controller", default="ppo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--fields", type=json.loads, default={}, help="further configuration fields, as JSON")
    parser.add_argument("--task-fields", type=json.loads, default={}, help='the same by task, {"mnist": {...}}')
    parser.add_argument("--setting", default="preset", help="what to call the setting in the table")
    parser.add_argument("--processes", type=int, default=None, help="runs at a time (default: one per core)")
    parser.add_argument("--cores", type=int, default=None, help="how many cores to use (default: all)")
    parser.add_argument("--read", type=Path, nargs="+", default=[], help="results to judge instead of training")
    parser.add_argument("--out", type=Path, default=Path("learning"))
    given = parser.parse_args()
    if given.read:
        results = [result for path in given.read for result in json.loads(path.read_text())]
    else:
        results = train_all(given)
        given.out.with_suffix(".json").write_text(json.dumps(results) + "\n")
    table = markdown(results)
    print(table)
    given.out.with_suffix(".md").write_text(table)
    curves(results).savefig(given.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
