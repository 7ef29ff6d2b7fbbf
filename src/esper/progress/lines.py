"""Single lines about a run, for terminals and files alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rollout_line(episode: int, rollouts: int, outcome: Mapping[str, Any]) -> str:
    """One line about a finished rollout; `outcome` is the data of its `rollout` event."""
    seeds = ", ".join(f"{outcome[key]} {key}" for key in ("planted", "kept", "culled"))
    return (
        f"rollout {episode + 1}/{rollouts}: accuracy {mean(outcome['validation_accuracy']):.1f} %, "
        f"return {mean(outcome['returns']):+.2f}, seeds {seeds}"
    )


def health(update: Mapping[str, Any]) -> dict[str, float]:
    """How the learner is doing, from the data of an `update` event; NaN for what the update did not measure.

    `EV` is the explained variance of the value, `KL` the joint policy's drift, `clip` the share of clipped ratios of
    the head where it is largest, `entropy` the mean over heads, where 1 is uniform.
    """
    clipped = _heads(update, "clip_fraction")
    entropy = _heads(update, "entropy")
    return {
        "EV": _number(update.get("explained_variance")),
        "KL": _number(update.get("kl_joint")),
        "clip": max(clipped) if clipped else math.nan,
        "entropy": mean(entropy) if entropy else math.nan,
    }


def number(value: float) -> str:
    """Three digits, or a dash for what was not measured."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _heads(update: Mapping[str, Any], name: str) -> list[float]:
    values = [_number(value) for key, value in update.items() if key.startswith(f"{name}/")]
    return [value for value in values if not math.isnan(value)]


def _number(value: Any) -> float:
    """Events hold null for NaN and texts for infinities."""
    return math.nan if value is None else float(value)
