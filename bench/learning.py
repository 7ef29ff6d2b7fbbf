"""Does the controller learn? Return, explained variance and entropies over training, on several seeds.

    python bench/learning.py --task digits --seeds 0 1 2 3 4 --hosts 32 --rollouts 60 --out learning-digits.json

Every seed is a process of its own, on its own share of the cores. For each seed the script prints the mean return of
the first and the last fifth of the rollouts with a 95 % bootstrap interval of their difference (episodes resampled),
the explained variance of the last fifth, and each head's least normalised entropy there. Controllers that do not learn
can be run the same way (`--controller`). `--minutes` ends every run with the rollout in which its time is up.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

HEADS = ("slot", "blueprint", "blend", "op")


class TimeUp(Exception):
    """The run has had its minutes."""


def run(work: tuple[dict[str, Any], set[int], float]) -> dict[str, Any]:
    """One training on the given cores; what its rollouts and updates reported."""
    job, cores, minutes = work
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
            if episode % 10 == 0:
                mean = sum(outcome["returns"]) / len(outcome["returns"])
                print(f"seed {job['seed']} rollout {episode}: return {mean:+.3f} {outcome['ops']}", flush=True)
            if time.perf_counter() - start > 60.0 * minutes:
                raise TimeUp

    config = TrainingConfig(**job)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        with EventLog(run_dir, config.to_dict(), "minimal") as events, contextlib.suppress(TimeUp):
            train(run_dir=run_dir, events=events, progress=Silent(), **config.to_train_kwargs())
        logged = load(run_dir)
    return {
        "seed": job["seed"],
        "seconds": time.perf_counter() - start,
        "rollouts": [event["data"] for event in logged if event["type"] == "rollout"],
        "updates": [event["data"] for event in logged if event["type"] == "update"],
    }


def interval(first: list[float], last: list[float], draws: int = 4000) -> tuple[float, float, float]:
    """Mean difference last - first and its 95 % bootstrap interval."""
    import numpy as np

    generator = np.random.default_rng(0)
    a, b = np.asarray(first), np.asarray(last)
    samples = generator.choice(b, (draws, b.size)).mean(axis=1) - generator.choice(a, (draws, a.size)).mean(axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(b.mean() - a.mean()), float(low), float(high)


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """First fifth against last fifth."""
    rollouts, updates = result["rollouts"], result["updates"]
    fifth = max(1, len(rollouts) // 5)
    part = {"first": rollouts[:fifth], "last": rollouts[-fifth:]}
    row: dict[str, Any] = {"seed": result["seed"]}
    for name in ("returns", "objective", "validation_accuracy"):
        first, last = ([value for r in part[p] for value in r[name]] for p in ("first", "last"))
        row[name] = {"first": sum(first) / len(first), "last": sum(last) / len(last), "gain": interval(first, last)}
    if updates:
        tail = updates[-fifth:]
        row["explained_variance"] = sum(u["explained_variance"] for u in tail) / len(tail)
        row["entropy"] = {h: min(u[f"entropy/{h}"] for u in tail) for h in HEADS}
    row["ops"] = part["last"][-1]["ops"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--controller", default="ppo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--fields", type=json.loads, default={}, help="further configuration fields, as JSON")
    parser.add_argument("--processes", type=int, default=None, help="runs at a time (default: one per core)")
    parser.add_argument("--cores", type=int, nargs="+", default=None, help="cores to use (default: all)")
    parser.add_argument("--out", type=Path, default=Path("learning.json"))
    given = parser.parse_args()
    base = {
        "task": given.task,
        "controller": given.controller,
        "slots": ["early", "mid", "late"],
        "n_envs": given.hosts,
        "n_episodes": given.hosts * given.rollouts,
        "checkpoint_every": 10**6,
        **given.fields,
    }
    jobs = [{**base, "seed": seed} for seed in given.seeds]
    cores = given.cores or sorted(os.sched_getaffinity(0))
    at_once = min(len(jobs), given.processes or len(cores))
    shares = [set(cores[i % at_once :: at_once] or cores) for i in range(len(jobs))]
    with multiprocessing.get_context("spawn").Pool(at_once) as pool:
        results = pool.map(
            run, [(job, share, given.minutes) for job, share in zip(jobs, shares, strict=True)], chunksize=1
        )
    rows = [judge(result) for result in results]
    for row in rows:
        gain, low, high = row["returns"]["gain"]
        line = f"{given.task} seed {row['seed']}: return {row['returns']['first']:.3f} -> {row['returns']['last']:.3f} "
        line += f"({gain:+.3f}, 95 % {low:+.3f} .. {high:+.3f}), objective {row['objective']['first']:.2f} -> "
        line += f"{row['objective']['last']:.2f}"
        if "entropy" in row:
            entropies = " ".join(f"{name} {value:.3f}" for name, value in row["entropy"].items())
            line += f", EV {row['explained_variance']:.2f}, least entropy {entropies}"
        print(line)
    given.out.write_text(json.dumps({"jobs": jobs, "rows": rows, "results": results}) + "\n")


if __name__ == "__main__":
    main()
