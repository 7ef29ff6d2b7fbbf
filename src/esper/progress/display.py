"""`RunProgress`: when to draw and where to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live

from esper.events import Event
from esper.progress.lines import mean, number, rollout_line
from esper.progress.seen import Seen
from esper.progress.view import view

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_REDRAWS = 0.25
_REST = 100
"""After a redraw that took t seconds none follows for so many t: drawing takes at most 1 % of the time."""


class RunProgress:
    """Shows a run of `rollouts` x `max_epochs` epochs of `n_envs` hosts with `slots` on `console`.

    Use as a context manager; `event` listens to the run's events and `phase` to its timings, `epoch` is called after
    every epoch and `rollout` after every rollout. On a terminal a view is redrawn at most four times a second and
    finished rollouts scroll by above it; elsewhere rollouts are lines, and a slow one reports its epochs every few
    seconds. `clock` gives seconds.
    """

    def __init__(
        self,
        console: Console,
        rollouts: int,
        max_epochs: int,
        n_envs: int,
        slots: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._clock = clock
        self._seen = Seen(rollouts, max_epochs, n_envs, slots)
        self._lines: list[str] = []
        self._began = self._last_line = clock()
        self._next_redraw = self._began
        self._live: Live | None = None
        if console.is_interactive:
            self._live = Live(console=console, transient=True, auto_refresh=False)

    def event(self, event: Event) -> None:
        """Something happened; for `EventLog.listeners`."""
        if self._live is not None or event["type"] == "update":
            self._seen.event(event)

    def phase(self, name: str, seconds: float) -> None:
        """A phase of the run took some seconds; for `EventLog.clocks`."""
        self._seen.phase(name, seconds)

    def epoch(self, episode: int, epoch: int, accuracies: Sequence[float]) -> None:
        """Epoch `epoch` (from 1) of episode `episode` (from 0) is trained; validation accuracies per host, points."""
        now = self._clock()
        self._seen.epoch_over(episode, epoch, accuracies, now)
        if self._live is not None:
            if now >= self._next_redraw:
                self._redraw()
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            seen = self._seen
            place = f"rollout {episode + 1}/{seen.rollouts}, epoch {epoch}/{seen.max_epochs}"
            self._line(f"{place}, {mean(accuracies):.1f} %{self._rate()}")

    def rollout(self, episode: int, outcome: Mapping[str, Any]) -> None:
        """Episode `episode` is over; `outcome` is the data of its `rollout` event."""
        line = rollout_line(episode, self._seen.rollouts, outcome)
        if self._seen.learner:
            line += "".join(f", {name} {number(value)}" for name, value in self._seen.learner[-1].items())
        self._line(line + self._rate())

    def _rate(self) -> str:
        rate = self._seen.epochs_per_second()
        return "" if rate is None else f", {rate * self._seen.n_envs:.1f} env-epochs/s"

    def _line(self, text: str) -> None:
        if self._live is None:
            self._print([text])
        else:  # every print would redraw the view
            self._lines.append(text)
        self._last_line = self._clock()

    def _print(self, lines: Sequence[str]) -> None:
        self._console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=self._live is None)

    def _redraw(self) -> None:
        assert self._live is not None, "only a terminal is redrawn"
        began = self._clock()
        size = self._console.size
        self._live.update(view(self._seen, began - self._began, size.width, size.height))
        if self._lines:
            self._print(self._lines)
            self._lines = []
        else:
            self._live.refresh()
        ended = self._clock()
        self._next_redraw = began + max(_SECONDS_BETWEEN_REDRAWS, _REST * (ended - began))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if self._lines:
                self._print(self._lines)
            self._live.stop()
