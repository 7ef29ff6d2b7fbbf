"""Watching over a run: what to report after each rollout, and how closely to look at the next (plan step 12).

Reads what happened and writes events; nothing here changes what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.config import TrainingConfig
from esper.events import EventLog
from esper.learn.diagnostics import AnomalyDetector, UpdateWatch
from esper.learn.escalation import AccuracyTrend, TelemetryLevel
from esper.tasks import get_task


@dataclass(frozen=True)
class OversightSettings:
    """When to report what. `rollouts` is the length of the run, thresholds are percentage points of mean accuracy, and
    an anomaly makes the level debug for `escalation_rollouts` rollouts, 0 for never."""

    rollouts: int
    escalation_rollouts: int
    plateau: float
    improvement: float
    detector: AnomalyDetector


def oversight_settings(config: TrainingConfig) -> OversightSettings:
    """The settings of a run; thresholds that the configuration leaves open are the task's."""
    task = get_task(config.task)
    plateau, improvement = config.plateau_threshold, config.improvement_threshold
    return OversightSettings(
        rollouts=config.rollouts,
        escalation_rollouts=config.escalation_rollouts,
        plateau=task.plateau_threshold if plateau is None else plateau,
        improvement=task.improvement_threshold if improvement is None else improvement,
        detector=AnomalyDetector(),
    )


@dataclass(frozen=True)
class Oversight:
    """What has to be remembered from rollout to rollout."""

    level: TelemetryLevel
    trend: AccuracyTrend

    def watch(self, settings: OversightSettings) -> UpdateWatch:
        """What looks at the next update; layer by layer if the level is debug."""
        return UpdateWatch(settings.detector, per_layer=self.level.effective == "debug")


def oversee(
    events: EventLog,
    now: Oversight,
    settings: OversightSettings,
    *,
    episode: int,
    outcome: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
    watch: UpdateWatch,
) -> Oversight:
    """Report on rollout `episode` and set the level of `events` for the next.

    `outcome` is the data of the `rollout` event; `metrics` are those of the update, None for a controller that does
    not learn, and `watch` is what looked at it. Writes `gradients`, every `anomaly`, the `trend`, and `escalated` or
    `settled`. What is written never depends on the level, only whether the log keeps it.
    """
    anomalies = []
    if metrics is not None:
        events.write("gradients", episode=episode, layers=watch.layers())
        anomalies = settings.detector.detect(metrics, (episode + 1) / settings.rollouts)
    for anomaly in anomalies:
        data: dict[str, Any] = {"kind": anomaly.kind, "detail": anomaly.detail}
        if watch.explosion is not None:
            data["ratios"] = watch.explosion.to_dict()
        events.write("anomaly", episode=episode, **data)
    trend = _report_trend(events, now.trend, settings, episode, outcome["validation_accuracy"])
    level = now.level.tick()
    if anomalies and settings.escalation_rollouts:
        level = level.escalate_temporarily(settings.escalation_rollouts)
        events.write("escalated", episode=episode, rollouts=settings.escalation_rollouts)
    elif now.level.remaining and not level.remaining:
        events.write("settled", episode=episode)
    events.level = level.effective
    return Oversight(level, trend)


def _report_trend(
    events: EventLog, trend: AccuracyTrend, settings: OversightSettings, episode: int, accuracies: Sequence[float]
) -> AccuracyTrend:
    trend = trend.add(sum(accuracies) / len(accuracies))
    if kind := trend.kind(settings.plateau, settings.improvement):
        events.write("trend", episode=episode, kind=kind, change=trend.change)
    return trend
