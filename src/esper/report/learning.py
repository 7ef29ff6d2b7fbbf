"""The section about the controller's own learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from esper.events import Event
from esper.learn.responses import BINS
from esper.report.facts import Run, metric, value
from esper.report.html import Section, grid, note
from esper.report.svg import Series, line_chart
from esper.seeds.actions import HEADS

HEAD_COLOURS = dict(zip(HEADS, ("#0072b2", "#e69f00", "#009e73", "#cc4c79"), strict=True))
_INK = "#22303c"
_LAST = 0.2

_HOW_TO_READ = (
    "Explained variance: share of the returns that the value head foresees; near 1 is good, near 0 means it knows no "
    "more than the mean. KL and clip fraction: how far an update moves each head; a KL far above target_kl (dashed) or "
    "a clip fraction above 0.2 to 0.3 is too far. Entropy: 1 is a uniform choice among the legal ones, 0 a fixed one "
    "or one without alternative; a head that falls to 0 early has stopped exploring. Gradient norm is before clipping; "
    "the dashed line is the limit."
)


def section(run: Run) -> Section:
    """Health of every update; empty for controllers that do not learn."""
    updates = run.of("update")
    if not updates:
        text = "No update yet." if run.config["controller"] == "ppo" else f"{run.config['controller']} does not learn."
        return Section("learning", "Learning", note(text))
    x = [event["episode"] + 1 for event in updates]
    target = run.config["target_kl"]
    stops = [(event["episode"] + 1, "stopped early") for event in updates if event["data"].get("stopped_early")]
    charts = [
        _single(updates, x, "explained_variance", "Explained variance", (-0.2, 1.05), rule=0.0),
        _by_head(updates, x, "kl", "KL divergence of an update, per head", log=True, rule=target, marks=stops),
        _by_head(updates, x, "clip_fraction", "Clip fraction per head", y_limits=(0.0, _clip_limit(updates))),
        _by_head(updates, x, "entropy", "Entropy per head, share of the largest possible", y_limits=(0.0, 1.05)),
        _norms(updates, x, run.config["max_grad_norm"]),
        _losses(updates, x),
    ]
    faults = sorted({name for event in updates for name in event["data"] if name.startswith("non_finite/")})
    warning = note("Not finite at least once: " + ", ".join(faults) + ".") if faults else ""
    stopped = note(f"Stopped early for its divergence: {len(stops)} of {len(updates)} updates.")
    return Section("learning", "Learning", note(_HOW_TO_READ) + warning + stopped + grid("charts", charts))


def response_chart(run: Run, colours: Mapping[str, str]) -> str:
    """Probability of every op by the contribution of an undecided seed, mean over the last fifth of the updates."""
    updates = run.of("update")
    late = [event["data"] for event in updates[-max(1, round(_LAST * len(updates))) :]]
    lines = []
    for op, colour in colours.items():
        y = [_response(late, op, name) for name in BINS]
        lines.append(Series(op, list(range(len(BINS))), y, colour))
    title = "Probability of each op, by contribution of the seed"
    return line_chart(lines, title, "contribution, points", y_limits=(0.0, 1.0), columns=BINS)


def _response(updates: Sequence[Mapping[str, Any]], op: str, name: str) -> float:
    counts = [value(data.get(f"response/slots/{name}", 0)) for data in updates]
    shares = [value(data.get(f"response/{op}/{name}", 0)) for data in updates]
    total = sum(counts)
    return sum(n * share for n, share in zip(counts, shares, strict=True)) / total if total else math.nan


def _single(
    updates: Sequence[Event], x: list[int], name: str, title: str, limits: tuple[float, float], rule: float
) -> str:
    y = metric(updates, name)
    low = min([limits[0], *(v for v in y if math.isfinite(v))])
    return line_chart([Series(name, x, y, _INK)], title, "rollout", y_limits=(max(low, -2.0), limits[1]), rule=rule)


def _by_head(
    updates: Sequence[Event],
    x: list[int],
    name: str,
    title: str,
    *,
    log: bool = False,
    rule: float | None = None,
    y_limits: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    floor = 1e-6 if log else -math.inf
    lines = [Series(h, x, [max(v, floor) for v in metric(updates, f"{name}/{h}")], c) for h, c in HEAD_COLOURS.items()]
    return line_chart(lines, title, "rollout", log=log, rule=rule, y_limits=y_limits, marks=marks)


def _clip_limit(updates: Sequence[Event]) -> float:
    seen = [v for head in HEADS for v in metric(updates, f"clip_fraction/{head}") if math.isfinite(v)]
    return max(0.3, *(1.06 * v for v in seen)) if seen else 0.3


def _norms(updates: Sequence[Event], x: list[int], limit: float) -> str:
    lines = [Series(h, x, metric(updates, f"grad_norm/{h}"), c, width=1.2) for h, c in HEAD_COLOURS.items()]
    lines.append(Series("all", x, metric(updates, "grad_norm"), _INK))
    return line_chart(lines, "Gradient norm before clipping", "rollout", log=True, rule=limit)


def _losses(updates: Sequence[Event], x: list[int]) -> str:
    names = (
        ("policy", "loss_objective", "#0072b2"),
        ("value", "loss_critic", "#e69f00"),
        ("entropy", "loss_entropy", "#009e73"),
    )
    lines = [Series(name, x, metric(updates, key), colour) for name, key, colour in names]
    return line_chart(lines, "Losses", "rollout")
