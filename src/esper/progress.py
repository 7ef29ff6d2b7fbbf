"""What a run shows while it runs: a live line on a terminal, plain lines anywhere else, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table
from rich.text import Text

_SECONDS_BETWEEN_LINES = 5.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rollout_line(episode: int, rollouts: int, outcome: Mapping[str, Any]) -> str:
    """One line about a finished rollout; `outcome` is the data of its `rollout` event."""
    seeds = ", ".join(f"{outcome[key]} {key}" for key in ("planted", "kept", "culled"))
    return (
        f"rollout {episode + 1}/{rollouts}: accuracy {_mean(outcome['validation_accuracy']):.1f} %, "
        f"return {_mean(outcome['returns']):+.2f}, seeds {seeds}"
    )


class _Rate(ProgressColumn):
    """Epochs of single hosts per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed * task.fields['n_envs']:.1f} env-epochs/s", style="cyan")


class RunProgress:
    """Shows a run of `rollouts` x `max_epochs` epochs of `n_envs` hosts on `console`.

    Use as a context manager; call `epoch` after every epoch and `rollout` after every rollout. On a terminal a live
    line is redrawn and finished rollouts scroll by above it; elsewhere rollouts are lines, and a slow one reports its
    epochs every few seconds.
    """

    def __init__(self, console: Console, rollouts: int, max_epochs: int, n_envs: int) -> None:
        self._console = console
        self._rollouts = rollouts
        self._max_epochs = max_epochs
        self._live: Progress | None = None
        self._last_line = time.monotonic()
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Rate(), Remaining())
            self._live = Progress(*columns, console=console, transient=True)
            self._bar: TaskID = self._live.add_task("starting", total=rollouts * max_epochs, n_envs=n_envs)

    def epoch(self, episode: int, epoch: int, accuracies: Sequence[float]) -> None:
        """Epoch `epoch` (from 1) of episode `episode` (from 0) is trained; validation accuracies per host, points."""
        text = f"rollout {episode + 1}/{self._rollouts}, epoch {epoch}/{self._max_epochs}, {_mean(accuracies):.1f} %"
        if self._live is not None:
            self._live.update(self._bar, completed=episode * self._max_epochs + epoch, description=text)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line(text)

    def rollout(self, episode: int, outcome: Mapping[str, Any]) -> None:
        """Episode `episode` is over; `outcome` is the data of its `rollout` event."""
        self._line(rollout_line(episode, self._rollouts, outcome))

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table at the end of a run, from `esper.events.Summary`."""
    table = Table(title=f"{summary['controller']} on {summary['task']}, seed {summary['seed']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    grown = summary["parameters"] - summary["host_parameters"]
    for name, value in (
        ("validation accuracy", f"{summary['validation_accuracy']:.2f} %"),
        ("test accuracy", f"{summary['test_accuracy']:.2f} %"),
        ("objective", f"{summary['objective']:.2f}"),
        ("parameters", f"{summary['parameters']:,.0f} (host {summary['host_parameters']:,} + seeds {grown:,.0f})"),
        (
            "seeds planted / kept / culled",
            " / ".join(str(summary[f"seeds_{k}"]) for k in ("planted", "kept", "culled")),
        ),
        ("episodes", f"{summary['episodes']:,}"),
        ("env-epochs/s", f"{summary['timing']['env_epochs_per_second']:.1f}"),
        ("time", f"{summary['timing']['seconds']:.0f} s"),
    ):
        table.add_row(name, value)
    return table
