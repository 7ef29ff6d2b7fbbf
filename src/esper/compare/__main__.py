"""Does growing pay? `python -m esper.compare --config compare.json --out DIR` runs every arm on the same fresh seeds.

`DIR` gets `compare.json` (everything, the values of every seed too), `compare.md` (the table), three pictures
(`compare`, `lifecycles`, `responses`, as png and svg), and the directory of every controller that was trained. Exit
codes: 0 done, 2 bad input, 1 stopped on the way, 130 interrupted; what was stopped goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.compare.config import CompareConfig
from esper.config import read_json
from esper.errors import InputError, RunStopped
from esper.events import is_free, write_json

STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_GO_ON = "the same command with --resume goes on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m esper.compare", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="what is compared (JSON)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where it goes; new or empty, or with --resume what is there",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the comparison in DIR that was stopped")
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "esper.compare", "--config", str(given.config), "--out", str(given.out)])
    try:
        config = CompareConfig.from_json_path(given.config)
        if given.resume:
            _require_same(config, given.out)
        elif not is_free(given.out):
            raise InputError([f'out: "{given.out}": must be new or empty, so that nothing is written over'])
        compare(config, given.out, command, resume=given.resume)
    except InputError as error:
        print(f"esper.compare: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunStopped as error:
        print(f"esper.compare: stopped: {error}; {_GO_ON}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"esper.compare: interrupted; {_GO_ON}", file=sys.stderr)
        return INTERRUPTED
    print(f"table: {given.out / 'compare.md'}")
    return 0


def _require_same(config: CompareConfig, out: Path) -> None:
    """Raises InputError unless `out` holds what this comparison has found so far."""
    file = out / "compare.json"
    if not file.exists():
        raise InputError([f'resume: "{out}": must hold a comparison that was stopped; it has no compare.json'])
    if read_json(file)["config"] != config.to_dict():
        raise InputError([f'resume: "{out}": holds another comparison; its configuration must be the same'])


def compare(config: CompareConfig, out: Path, command: str, *, resume: bool = False) -> None:
    """Run a comparison and write its files. With `resume` controllers in `out` whose training was stopped are taken up
    from their last checkpoints; everything else is played again, with the same numbers. Raises InputError for what this
    machine lacks or a run that does not fit, RunStopped when a controller's training stops."""
    # Spinning threads that wait for work starve every other process; read once, when torch loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from esper import keys as k
    from esper.checkpoint.store import versions
    from esper.compare.arms import run_arms
    from esper.compare.bench import Bench
    from esper.compare.picture import pictures, save
    from esper.compare.table import markdown, summarise
    from esper.devices import check_devices

    check_devices(config.shared.devices, config.shared.device)
    bench = Bench(config, out, say=lambda text: print(text, flush=True), resume=resume)
    try:
        judge = bench.judge
    except (ValueError, OSError, ImportError) as error:
        raise InputError([str(error)]) from error
    out.mkdir(parents=True, exist_ok=True)
    summary: list[dict[str, Any]] = []
    about: dict[str, Any] = {
        "command": command,
        "versions": {"python": platform.python_version(), **versions()},
        "config": config.to_dict(),
        "training": config.shared.to_dict(),
        "host_parameters": judge.spec.host_parameters,
        "hosts": None,
        "arms": summary,
    }
    # Written now and after every arm, so that a comparison that is stopped leaves what it is and what it has found.
    write_json(out / "compare.json", about)
    for arm in run_arms(bench):
        drawn = judge.drawn()
        summary = summarise(bench.rows.values(), k.fold(k.root(config.shared.seed), k.Purpose.STATISTICS))
        about |= {"hosts": None if drawn is None else drawn.to_dict(), "arms": summary}
        write_json(out / "compare.json", about)
        (out / "compare.md").write_text(markdown(summary, about), encoding="utf-8")
        bench.say(f"{arm.kind}: done")
    for name, figure in pictures(list(bench.rows.values()), summary).items():
        save(figure, out, name)


if __name__ == "__main__":
    sys.exit(main())
