"""A run that is cut anywhere and resumed in a new process ends like one left alone, to the bit; here on a GPU.

    python bench/resume_cuda.py                          # digits on cuda:0 with the executor that "auto" picks
    python bench/resume_cuda.py --device cpu --hosts 2   # the same on a CPU

Every line of the table cuts one run: SIGTERM saves the step before and ends the process, SIGKILL leaves the checkpoint
of the last rollout, "twice" is both in turn. Then a new process goes on to the end, and everything is compared with the
run left alone: every tensor of the last checkpoint (hosts, seeds, their moments and records, the policy, its moments,
both normalisers), the summary without its timing, and every event. The cut runs go side by side. Prints the table as
Markdown, writes resume_cuda.json; exit code 1 if anything differs or a process did not end as it should.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import Tensor

EPOCHS, ROLLOUTS = 8, 3
Cut = tuple[signal.Signals, int]
"""A signal and the step, counted from 1 over all rollouts, in the middle of which it comes."""
CUTS: dict[str, tuple[Cut, ...]] = {
    "TERM in the first step": ((signal.SIGTERM, 1),),
    "TERM within the first episode": ((signal.SIGTERM, 3),),
    "TERM in the last step of an episode": ((signal.SIGTERM, EPOCHS),),
    "TERM in the first step after an update": ((signal.SIGTERM, EPOCHS + 1),),
    "TERM while seeds blend": ((signal.SIGTERM, EPOCHS + 7),),
    "KILL within an episode": ((signal.SIGKILL, 2 * EPOCHS + 3),),
    "TERM in the very last step": ((signal.SIGTERM, ROLLOUTS * EPOCHS),),
    "twice": ((signal.SIGKILL, EPOCHS + 2), (signal.SIGTERM, 2 * EPOCHS + 2)),
}
SHOULD = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
"""How a process that got the signal ends."""


@dataclass
class Cutting:
    """A display that shows nothing and sends its own process a signal in the middle of a step."""

    cut: Cut | None

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
        if self.cut is not None and episode * EPOCHS + epoch == self.cut[1]:
            os.kill(os.getpid(), self.cut[0])
            time.sleep(60)

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
        pass


def work(folder: Path, fields: dict[str, Any], resume: bool, cut: Cut | None) -> None:
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
            farewell=lambda what: None if what == "interrupted" else print(what, file=sys.stderr, flush=True),
            **config.to_train_kwargs(),
        )
    write_json(folder / "summary.json", summary)


def start(folder: Path, fields: dict[str, Any], resume: bool, cut: Cut | None) -> int | None:
    """The exit code of a new process that does `work`."""
    process = get_context("spawn").Process(target=work, args=(folder, fields, resume, cut))
    process.start()
    process.join()
    return process.exitcode


def cut_and_resume(folder: Path, fields: dict[str, Any], cuts: tuple[Cut, ...]) -> tuple[list[int | None], list[int]]:
    """Exit codes of all processes of a run that is cut, and the steps from which each but the first went on."""
    from esper.checkpoint.snapshot import checkpoints
    from esper.checkpoint.store import FOLDER

    codes, steps = [start(folder, fields, False, cuts[0])], []
    for cut in (*cuts[1:], None):
        steps.append(int(checkpoints(folder / FOLDER)[-1].name) if (folder / FOLDER).is_dir() else -1)
        codes.append(start(folder, fields, True, cut))
    return codes, steps


def last_snapshot(folder: Path) -> tuple[Mapping[str, Tensor], str]:
    """Every tensor of a run's last checkpoint by part and path, and the executor that made it."""
    from esper.checkpoint.snapshot import checkpoints, read_snapshot
    from esper.checkpoint.store import FOLDER

    manifest, snapshot = read_snapshot(checkpoints(folder / FOLDER)[-1])
    tensors = {
        f"{part}/{name}": leaf
        for part, value in snapshot.parts.items()
        for name, leaf in value.flatten_keys("/").items()
    }
    return tensors, manifest.groups[0].executor


def differences(whole: Path, cut: Path) -> list[str]:
    """What differs between two finished runs."""
    from esper.events import load

    (a, _), (b, _) = last_snapshot(whole), last_snapshot(cut)
    found = sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not _equal(a[name], b[name])]
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    found += [f"summary.{name}" for name in one if name != "timing" and one[name] != other[name]]
    return found + (["events"] if load(whole) != load(cut) else [])


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, nan to nan."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def main() -> int:
    from esper.events import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--fields", type=json.loads, default={}, help="further configuration fields, as JSON")
    parser.add_argument("--at-once", type=int, default=len(CUTS), help="cut runs side by side")
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
        "gates": "permissive",
        "telemetry_level": "debug",
        **options.fields,
    }
    began, results = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.at_once) as pool:
        whole = Path(place) / "whole"
        if start(whole, fields, False, None) != 0:
            print("the run left alone failed")
            return 1
        tensors, executor = last_snapshot(whole)
        summary, events = json.loads((whole / "summary.json").read_text()), load(whole)
        print(
            f"{options.task}, {options.hosts} hosts on {options.device} ({executor}), {ROLLOUTS} rollouts of {EPOCHS} "
            f"epochs, {summary['seeds_planted']} seeds planted; {len(tensors)} tensors and {len(events)} events "
            f"compared; left alone: {time.perf_counter() - began:.0f} s\n\n"
            "| cut | exit codes | went on after step | resumed run |\n|---|---|---|---|",
            flush=True,
        )
        folders = {name: Path(place) / name.replace(" ", "-") for name in CUTS}
        runs = {name: pool.submit(cut_and_resume, folders[name], fields, cuts) for name, cuts in CUTS.items()}
        for name, cuts in CUTS.items():
            codes, steps = runs[name].result()
            wanted = [*(SHOULD[number] for number, _ in cuts), 0]
            found = differences(whole, folders[name]) if codes == wanted else [f"exit codes must be {wanted}"]
            results[name] = {"exit_codes": codes, "steps": steps, "differences": found}
            shown = "identical" if not found else f"**{len(found)} differences**: {', '.join(found[:4])}"
            print(f"| {name} | {', '.join(map(str, codes))} | {', '.join(map(str, steps))} | {shown} |", flush=True)
    print(f"\nin all {time.perf_counter() - began:.0f} s")
    options.out.write_text(json.dumps({"fields": fields, "executor": executor, "cuts": results}, indent=2) + "\n")
    return int(any(result["differences"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
