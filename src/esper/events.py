"""What a run leaves behind: its configuration, its event log, its timings and its summary.

A run directory holds

| file | content |
|---|---|
| `config.json` | the effective configuration |
| `events.jsonl` | what happened, one JSON object a line; the same for every run of one seed: no clock, no paths |
| `timings.jsonl` | how long it took: everything that depends on the clock |
| `summary.json` | the outcome (see `Summary`) |
| `run.png`, `run.svg` | the picture of the run |

Every event is `{"step", "type", "episode", "epoch", "host", "slot", "severity", "data"}`. `step` counts the events of
the run, written or not, so it does not depend on the level. `episode` counts resets of the hosts from 0 and is the
same for all hosts; `epoch` is the number of epochs trained in the episode when it happened, so an action taken before
the first epoch has epoch 0. A place that means nothing for an event is null. NaN is written as null ("not measured"),
infinities as the texts "inf" and "-inf", so that every line is standard JSON. The types of events and what their data
holds are in `esper.event_table`, as a JSON schema in `docs/events.schema.json`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypedDict

from esper.event_table import EVENTS, LEVELS, Level, Severity

__all__ = [
    "EVENTS",
    "LEVELS",
    "Event",
    "EventLog",
    "Level",
    "Severity",
    "Summary",
    "is_free",
    "load",
    "standard",
    "write_json",
]

Event = dict[str, Any]


class Timing(TypedDict):
    """The part of a summary that depends on the clock."""

    seconds: float
    env_epochs_per_second: float


class Summary(TypedDict):
    """What `summary.json` holds, means over the hosts of the last rollout unless said otherwise.

    Accuracies are percentage points. `parameters` counts host and seeds; the test split is used for this report only.
    """

    task: str
    controller: str
    seed: int
    episodes: int
    env_epochs: int
    validation_accuracy: float
    test_accuracy: float
    objective: float
    host_parameters: int
    parameters: float
    seeds_planted: int
    seeds_kept: int
    seeds_culled: int
    weights_digest: str
    timing: Timing


def standard(value: Any) -> Any:
    """`value` as standard JSON data: tensors and arrays as lists, NaN as None, infinities as texts."""
    if isinstance(value, str | int | None):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): standard(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [standard(item) for item in value]
    return value


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one go: a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(standard(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


class EventLog:
    """Writes a run directory. `level` filters what is written and may be changed at any time; `listeners` are called
    with every event, written or not, `clocks` with every phase and the seconds it took.

    The directory and `config.json` appear with the first event, so a run refused before it started leaves nothing.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], level: Level = "normal") -> None:
        self.run_dir = run_dir
        self.level: Level = level
        self.step = 0
        self.listeners: list[Callable[[Event], None]] = []
        self.clocks: list[Callable[[str, float], None]] = []
        self._config = dict(config)
        self._events: IO[str] | None = None
        self._timings: IO[str] | None = None

    @property
    def started(self) -> bool:
        """Whether anything has happened yet."""
        return self._events is not None

    def write(
        self,
        kind: str,
        /,
        *,
        episode: int | None = None,
        epoch: int | None = None,
        host: int | None = None,
        slot: str | None = None,
        severity: Severity | None = None,
        **data: Any,
    ) -> None:
        """Append one event. Raises ValueError for a type that the table of events lacks."""
        if kind not in EVENTS:
            raise ValueError(f"event type: {kind!r}; must be one of {', '.join(EVENTS)}")
        stream, step = self._open()[0], self.step
        self.step += 1
        written = LEVELS.index(EVENTS[kind].level) <= LEVELS.index(self.level)
        if not written and not self.listeners:
            return
        event = {
            "step": step,
            "type": kind,
            "episode": episode,
            "epoch": epoch,
            "host": host,
            "slot": slot,
            "severity": severity or EVENTS[kind].severity,
            "data": standard(data),
        }
        for listen in self.listeners:
            listen(event)
        if written:
            stream.write(json.dumps(event, allow_nan=False) + "\n")

    def time(self, phase: str, seconds: float, /, **data: Any) -> None:
        """Append one line to `timings.jsonl`: how long a phase took, and what it was about."""
        for tell in self.clocks:
            tell(phase, seconds)
        line = {"phase": phase, "seconds": seconds, **data}
        self._open()[1].write(json.dumps(standard(line), allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Forget every event from `step` on: a resumed run writes them again."""
        self.close()
        path = self.run_dir / "events.jsonl"
        if path.exists():
            kept = [json.dumps(event, allow_nan=False) + "\n" for event in load(path) if event["step"] < step]
            beside = path.with_name(path.name + ".new")
            beside.write_text("".join(kept), encoding="utf-8")
            os.replace(beside, path)
        self.step = step

    def close(self) -> None:
        """Close the files; a later event opens them again."""
        for stream in (self._events, self._timings):
            if stream is not None:
                stream.close()
        self._events = self._timings = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> tuple[IO[str], IO[str]]:
        if self._events is None or self._timings is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / "config.json", self._config)
            self._events = (self.run_dir / "events.jsonl").open("a", encoding="utf-8", buffering=1)
            self._timings = (self.run_dir / "timings.jsonl").open("a", encoding="utf-8", buffering=1)
        return self._events, self._timings


def load(path: str | Path) -> list[Event]:
    """The lines of an event log or of timings; `path` is the file or a run directory.

    A last line without its end is left out: the run is still writing it, or was killed while it did. Raises
    FileNotFoundError, and ValueError naming the line that is not a JSON object.
    """
    where = Path(path)
    return list(_parse(where / "events.jsonl" if where.is_dir() else where))


def _parse(path: Path) -> Iterator[Event]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith("\n"):
                return
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if not isinstance(event, dict):
                raise ValueError(f"{path}, line {number}: must be an object, not {line.strip()[:60]}")
            yield event


def is_free(run_dir: Path) -> bool:
    """Whether a new run may use this directory: it does not exist yet, or is empty."""
    return not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
