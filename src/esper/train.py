"""Train a controller that grows networks: `python -m esper.train --config configs/demo.json`.

Everything that can be checked without torch is checked before torch is loaded. Exit codes: 0 done, 2 bad input (one
message names every problem), 1 stopped on the way (no space, no memory, numbers that are not finite), 130 and 143
interrupted by SIGINT and SIGTERM, with a checkpoint of the last step.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from esper.config import TrainingConfig
from esper.errors import InputError, RunStopped
from esper.events import EventLog, is_free, load, write_json
from esper.flags import Command, parse
from esper.tasks import get_task
from esper.trackers import Tracker

STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command.print_config or command.print_schema:
            shown = command.config.to_dict() if command.print_config else command.config.json_schema()
            print(json.dumps(shown, indent=2))
            return 0
        run_dir = command.run_dir or _new_run_dir(command.config)
        if command.resume is None:
            _check_free(run_dir)
        run(command, run_dir)
    except InputError as error:
        print(f"esper.train: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunStopped as error:
        print(f"esper.train: stopped: {error}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"esper.train: stopped: {error}; --resume goes on from the last checkpoint", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("esper.train: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(command: Command, run_dir: Path) -> None:
    """Train as the command says and leave summary and picture in `run_dir`.

    Raises InputError for whatever stops the run before it has started: a device, data or memory this machine lacks.
    """
    # Spinning threads that wait for work starve every other process; read once, when torch loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from esper.build import host_devices
    from esper.devices import describe_groups
    from esper.progress import RunProgress, summary_table
    from esper.run import train
    from esper.seeds.slots import ordered_slots

    config = command.config
    host_devices(config)
    console = Console()

    def farewell(what: str) -> None:
        console.show_cursor()
        print(f"esper.train: {what}; go on with --resume --run-dir {run_dir}", file=sys.stderr, flush=True)

    console.print(config.summary(), highlight=False, markup=False)
    console.print(f"{describe_groups(config.n_envs, config.devices)}; policy on {config.device}", highlight=False)
    max_epochs = config.max_epochs or get_task(config.task).max_epochs
    progress = RunProgress(console, config.rollouts, max_epochs, config.n_envs, ordered_slots(config.slots))
    tracker = Tracker(config.tracker, run_dir)
    with EventLog(run_dir, config.to_dict(), config.telemetry_level) as events, tracker, progress:
        events.listeners += [tracker, progress.event]
        events.clocks.append(progress.phase)
        try:
            summary = train(
                run_dir=run_dir,
                events=events,
                progress=progress,
                resume=command.resume,
                farewell=farewell,
                **config.to_train_kwargs(),
            )
        except (ValueError, OSError, ImportError) as error:
            if events.started:
                raise
            raise InputError([str(error)]) from error
    write_json(run_dir / "summary.json", summary)
    console.print(summary_table(summary))
    if config.telemetry_level in ("normal", "debug"):
        from esper.plots import run_picture, save_picture

        save_picture(run_picture(load(run_dir), config.slots), run_dir)
        console.print(f"picture: {run_dir / 'run.png'}", highlight=False, soft_wrap=True)
    console.print(f"run: {run_dir}", highlight=False, soft_wrap=True)


def _check_free(run_dir: Path) -> None:
    try:
        free = is_free(run_dir)
    except OSError as error:
        raise InputError([f'run_dir: "{run_dir}": must be a folder that can be read ({error.strerror})']) from None
    if not free:
        raise InputError([f'run_dir: "{run_dir}": must be new or empty, so that no run is written over'])


def _new_run_dir(config: TrainingConfig) -> Path:
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{moment}-{config.task}-{config.controller}-{config.seed}"


if __name__ == "__main__":
    sys.exit(main())
