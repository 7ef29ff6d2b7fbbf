"""The checkpoints of one run: written in the background, few kept, the newest sound one found again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from esper import __version__
from esper.checkpoint.beside import Marks, beside, marked
from esper.checkpoint.snapshot import (
    Manifest,
    Snapshot,
    checkpoints,
    read_manifest,
    read_snapshot,
    remove,
    remove_unfinished,
    write_snapshot,
)
from esper.errors import CheckpointError, RunStopped

KEEP_LAST = 3
FOLDER = "checkpoints"
_LIBRARIES = ("torch", "tensordict", "torchrl", "safetensors")

log = logging.getLogger("esper")


def versions() -> dict[str, str]:
    """The libraries that make the numbers, by name."""
    return {"esper": __version__, **{name: version(name) for name in _LIBRARIES}}


class CheckpointStore:
    """Saves snapshots of a run in `run_dir/checkpoints`; use as a context manager, which starts and ends its thread.

    A snapshot is a value, so `save` only keeps it: the thread copies, hashes and writes it while the run goes on, on
    GPUs too. While a snapshot waits for its turn, a newer one takes its place. The newest `KEEP_LAST` stay, and the one
    with the best score.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        self.folder = run_dir / FOLDER
        self._about = {"versions": versions(), "config": dict(config), "groups": groups}
        self._changed = threading.Condition()
        self._pending: tuple[Snapshot, Marks] | None = None
        self._busy = self._closed = False
        self._failure: Exception | None = None
        self._written: int | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def save(self, snapshot: Snapshot) -> None:
        """Have `snapshot` written soon; returns at once. Raises RunStopped if an earlier one could not be written."""
        given = snapshot, marked(snapshot.parts.values())
        with self._changed:
            self._check()
            self._pending = given
            self._changed.notify_all()

    def finish(self) -> None:
        """Return when everything saved is on the disk. Raises RunStopped if it could not be written."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending is None and not self._busy)
            self._check()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            why = getattr(self._failure, "strerror", None) or self._failure
            raise RunStopped(
                f'checkpoints: "{self.folder}": could not be written: {why}; '
                "those written before are whole, --resume goes on from the last one"
            ) from self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closed)
                given, self._pending = self._pending, None
                if given is None:
                    return
                self._busy = True
            failure: Exception | None = None
            snapshot, marks = given
            try:
                if snapshot.step != self._written:
                    with beside(marks):
                        write_snapshot(self.folder, snapshot, self._about)
                    prune(self.folder)
                    self._written = snapshot.step
            except Exception as error:
                # Of whatever kind: the run has to hear of it, or it would wait for this thread for ever.
                failure = error
            with self._changed:
                self._busy, self._failure = False, failure
                self._changed.notify_all()


def prune(folder: Path) -> None:
    """Remove all checkpoints but the newest `KEEP_LAST` that can be read and the one with the best score."""
    sound: dict[Path, Manifest] = {}
    for path in checkpoints(folder):
        try:
            sound[path] = read_manifest(path)
        except CheckpointError:
            continue
    kept = set(list(sound)[-KEEP_LAST:])
    scores = [(manifest.score, manifest.step, path) for path, manifest in sound.items() if manifest.score is not None]
    if scores:
        kept.add(max(scores)[2])
    for path in sound.keys() - kept:
        remove(path)


def find(run_dir: Path, resume: Path) -> tuple[Manifest, Snapshot]:
    """The checkpoint to go on from: `resume` itself, or the newest sound one if `resume` is the run's directory.

    A damaged checkpoint is named in the log and the one before it is used. Raises CheckpointError if none is left, or
    if the one asked for is damaged or belongs to another run.
    """
    folder = run_dir / FOLDER
    if resume.resolve() not in (run_dir.resolve(), folder.resolve()):
        if resume.resolve().parent != folder.resolve():
            raise CheckpointError([f'resume: "{resume}": must be a checkpoint in "{folder}"'])
        return read_snapshot(resume)
    found = checkpoints(folder)
    problems: list[str] = []
    for path in reversed(found):
        try:
            return read_snapshot(path)
        except CheckpointError as error:
            log.warning("%s; the checkpoint before it is used", error.problems[0])
            problems += error.problems
    raise CheckpointError(problems or [f'resume: "{run_dir}": has no checkpoint to go on from'])


def forget_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints of a future that a run which goes on from `step` makes anew, and unfinished ones."""
    folder = run_dir / FOLDER
    remove_unfinished(folder)
    for path in checkpoints(folder):
        if int(path.name) > step:
            remove(path)
