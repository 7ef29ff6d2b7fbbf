"""A run that is cut anywhere and resumed in a new process ends like one left alone, to the bit; here on a GPU.

    python bench/resume_cuda.py                          # digits on cuda:0 with the executor that "auto" picks
    python bench/resume_cuda.py --device cpu --hosts 2   # the same on a CPU

Every line cuts one run: SIGTERM saves the step before and ends the process, SIGKILL leaves the checkpoint of the last
rollout, "twice" is both in turn. Then a new process goes on to the end, and everything is compared with the run left
alone: every tensor of the last checkpoint (hosts, seeds, moments, records, policy, its moments, both normalisers), the
summary without its timing, and every event. Writes resume_cuda.json; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import Tensor

EPOCHS, ROLLOUTS = 6, 3
CUTS: dict[str, tuple[tuple[signal.Signals, int], ...]] = {
    "TERM in the first step": ((signal.SIGTERM, 1),),
    "TERM within the first episode": ((signal.SIGTERM, 3),),
    "TERM in the last step of an episode": ((signal.SIGTERM, EPOCHS),),
    "TERM in the first step after an update": ((signal.SIGTERM, EPOCHS + 1),),
    "TERM within an episode with grown hosts": ((signal.SIGTERM, EPOCHS + 4),),
    "KILL within an episode": ((signal.SIGKILL, 2 * EPOCHS + 3),),
    "TERM in the very last step": ((signal.SIGTERM, ROLLOUTS * EPOCHS),),
    "twice": ((signal.SIGKILL, EPOCHS + 2), (signal.SIGTERM, 2 * EPOCHS + 2)),
}


@dataclass
class Cutting:
    """A display that shows nothing and sends its own process a signal in the middle of a step."""

    cut: tuple[signal.Signals, int] | None

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
        if self.cut is not None and episode * EPOCHS + epoch == self.cut[1]:
            os.kill(os.getpid(), self.cut[0])
            time.sleep(60)

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
        pass


def work(folder: Path, fields: dict[str, Any], resume: bool, cut: tuple[signal.Signals, int] | None) -> None:
    """One process's share of a run."""
    from esper.config import TrainingConfig
    from esper.events import EventLog, write_json
    from esper.run import train

    config = TrainingConfig(**fields)
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        summary = train(
            run_dir=folder,
            events=events,
            progress=Cutting(cut),
            resume=folder if resume else None,
            farewell=lambda what: None,
            **config.to_train_kwargs(),
        )
    write_json(folder / "summary.json", summary)


def start(*arguments: Any) -> int | None:
    process = get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def differences(whole: Path, cut: Path) -> list[str]:
    """What differs between two finished runs."""
    from esper.checkpoint.snapshot import checkpoints, read_snapshot
    from esper.checkpoint.store import FOLDER
    from esper.events import load

    (_, a), (_, b) = (read_snapshot(checkpoints(folder / FOLDER)[-1]) for folder in (whole, cut))
    found = [f"part {part}" for part in a.parts.keys() ^ b.parts.keys()]
    for part in a.parts.keys() & b.parts.keys():
        left, right = (dict(s.parts[part].flatten_keys("/").items()) for s in (a, b))
        found += [f"{part}/{name}" for name in left.keys() ^ right.keys()]
        found += [f"{part}/{n}" for n in left.keys() & right.keys() if not _equal(left[n], right[n])]
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    found += [f"summary.{name}" for name in one if name != "timing" and one[name] != other[name]]
    return found + (["events"] if load(whole) != load(cut) else [])


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, nan to nan."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--out", type=Path, default=Path("resume_cuda.json"))
    options = parser.parse_args()
    fields = {
        "task": options.task,
        "slots": ["early", "mid", "late"],
        "n_envs": options.hosts,
        "n_episodes": options.hosts * ROLLOUTS,
        "max_epochs": EPOCHS,
        "devices": [options.device],
        "device": options.device,
        "executor": options.executor,
        "gates": "permissive",
        "telemetry_level": "debug",
    }
    results = {}
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        if start(whole, fields, False, None) != 0:
            return 1
        for name, cuts in CUTS.items():
            folder = Path(place) / name.replace(" ", "-")
            codes = [start(folder, fields, index > 0, cut) for index, cut in enumerate(cuts)]
            last = start(folder, fields, True, None)
            found = differences(whole, folder) if last == 0 else ["the resumed process failed"]
            results[name] = {"exit_codes": [*codes, last], "differences": found}
            print(f"{name:42} exit {codes} then {last}: {'identical' if not found else found[:4]}", flush=True)
    options.out.write_text(json.dumps({"fields": fields, "cuts": results}, indent=2) + "\n")
    return int(any(result["differences"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
