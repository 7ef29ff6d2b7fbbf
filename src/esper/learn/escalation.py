"""How closely a run is watched, as values: the telemetry level with its escalation, and the trend of accuracy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from esper.event_table import Level

ROLLING = 10
"""Rollouts over which accuracy is averaged."""


@dataclass(frozen=True)
class TelemetryLevel:
    """The configured level, and for how many more rollouts it is debug instead. Off stays off.

    Raises ValueError for a negative `remaining`.
    """

    level: Level = "normal"
    remaining: int = 0

    def __post_init__(self) -> None:
        if self.remaining < 0:
            raise ValueError(f"remaining: {self.remaining}; must be at least 0")

    @property
    def effective(self) -> Level:
        """The level that holds now."""
        return "debug" if self.remaining > 0 and self.level != "off" else self.level

    def escalate_temporarily(self, rollouts: int) -> TelemetryLevel:
        """Debug for the next `rollouts` rollouts, counted from now."""
        return replace(self, remaining=rollouts)

    def tick(self) -> TelemetryLevel:
        """One rollout later."""
        return replace(self, remaining=max(0, self.remaining - 1))


@dataclass(frozen=True)
class AccuracyTrend:
    """The last mean accuracies of rollouts, percentage points, the latest last."""

    accuracies: tuple[float, ...] = ()

    @property
    def rolling(self) -> float:
        """Mean of the last ten rollouts. Raises ZeroDivisionError before the first."""
        recent = self.accuracies[-ROLLING:]
        return sum(recent) / len(recent)

    def add(self, accuracy: float) -> AccuracyTrend:
        """One rollout later. One more than ten is kept, so that the rolling mean before is still known."""
        return AccuracyTrend((*self.accuracies, accuracy)[-ROLLING - 1 :])

    @property
    def change(self) -> float | None:
        """By how many points the rolling mean moved with the last rollout; None before the second."""
        if len(self.accuracies) < 2:
            return None
        return self.rolling - AccuracyTrend(self.accuracies[:-1]).rolling

    def kind(self, plateau: float, improvement: float) -> str | None:
        """plateau for a change smaller than `plateau` points, improvement or degradation for one larger than
        `improvement` points; None in between, and before the second rollout."""
        change = self.change
        if change is None:
            return None
        if abs(change) < plateau:
            return "plateau"
        if abs(change) > improvement:
            return "improvement" if change > 0 else "degradation"
        return None
