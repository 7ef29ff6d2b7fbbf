"""Experiment trackers, through TorchRL's loggers: they listen to the same events that the log writes.

| tracker | what it leaves in the run directory | extra |
|---|---|---|
| `csv` | `tracker/<run>/scalars/*.csv`, lines of rollout and value | none |
| `tensorboard` | `tracker/<run>/`; show with `tensorboard --logdir RUN/tracker` | `tensorboard` |
| `wandb` | `tracker/wandb/offline-run-*`, nothing sent; send with `wandb sync` | `wandb` |
| `mlflow` | `tracker/mlflow.db`; show with `mlflow ui --backend-store-uri sqlite:///RUN/tracker/mlflow.db` | `mlflow` |
| `trackio` | nothing: trackio keeps its own database; show with `trackio show --project esper` | `trackio` |

Scalars are named `rollout/<entry>` and `update/<entry>` after the entries of those events (`esper.event_table`), means
over the hosts where an entry is per host. Their step is the number of finished rollouts.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from esper.errors import InputError
from esper.events import Event

_TRACKED = ("rollout", "update")


def check_tracker(kind: str) -> None:
    """Raises InputError if the package of a tracker is missing, naming what to install."""
    if kind not in ("none", "csv") and importlib.util.find_spec(kind) is None:
        raise InputError([f"tracker: \"{kind}\": needs the package {kind}: pip install 'esper[{kind}]'"])


def scalars(event: Event) -> dict[str, float]:
    """What a tracker gets from an event: finite numbers by name; nothing for events that are not tracked."""
    if event["type"] not in _TRACKED:
        return {}
    found: dict[str, float] = {}
    for name, entry in event["data"].items():
        for suffix, value in entry.items() if isinstance(entry, dict) else (("", entry),):
            number = _number(value)
            if math.isfinite(number):
                found[f"{event['type']}/{name}" + (f"/{suffix}" if suffix else "")] = number
    return found


def _number(value: Any) -> float:
    """Lists are averaged; what is no number is NaN."""
    if isinstance(value, list):
        return sum(map(_number, value)) / len(value) if value else math.nan
    return float(value) if isinstance(value, int | float) else math.nan


class Tracker:
    """A listener for `EventLog.listeners` and a context manager; it opens its logger with the run's first event.

    Events of a resumed run arrive again from the checkpoint on, under the steps they had.
    """

    def __init__(self, kind: str, run_dir: Path) -> None:
        check_tracker(kind)
        self._kind = kind
        self._run_dir = run_dir.resolve()
        self._logger: Any = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if self._kind == "none":
            return
        if self._logger is None:
            self._logger = self._open()
        for name, value in scalars(event).items():
            self._logger.log_scalar(name, value, step=event["episode"] + 1)

    def _open(self) -> Any:
        from torchrl.record.loggers import MLFlowLogger, get_logger

        folder, name = self._run_dir / "tracker", self._run_dir.name
        if self._kind == "mlflow":  # get_logger would choose MLflow's file store, which MLflow itself refuses by now
            folder.mkdir(parents=True, exist_ok=True)
            store = f"sqlite:///{folder / 'mlflow.db'}"
            return MLFlowLogger(name, tracking_uri=store, artifact_location=folder.as_uri())
        return get_logger(
            self._kind,
            str(folder),
            name,
            wandb_kwargs={"offline": True, "project": "esper"},
            trackio_kwargs={"project": "esper"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._logger is not None:
            self._logger.shutdown()
