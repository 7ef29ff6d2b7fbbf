"""The picture of one host in one episode: accuracy above, the life of the seeds in its slots below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from esper.events import Event
from esper.plots import STAGE_COLOURS, spans
from esper.report.facts import value
from esper.report.svg import label, number, tag, ticks

_WIDTH, _LEFT, _RIGHT = 420.0, 46.0, 34.0
_TOP, _CURVE, _LANE, _BAR = 24.0, 84.0, 24.0, 11.0
_INK, _FAINT, _EMPTY, _CULL = "#22303c", "#9aa5b1", "#eceef1", "#c8374a"

Curve = Sequence[tuple[float, float]]
"""Epochs and validation accuracies."""


def host_picture(
    host: int, events: Sequence[Event], slots: Sequence[str], before: Curve, end: int, limits: tuple[float, float]
) -> str:
    """One `<svg>` from the events of one host and one episode. `before` is the accuracy of its first episode, drawn in
    grey; `end` the last epoch of the axis, `limits` those of accuracy, the same for hosts to be compared."""
    curve = accuracies(events)
    height = _TOP + _CURVE + 12 + _LANE * len(slots) + 18
    title = f"host {host}"
    body = [tag("title", escape(title)), label(2, 13, title, kind="chart-title")]
    body.append(_axis(end, limits, height))
    for points, colour, width in ((before, _FAINT, 1.0), (curve, _INK, 1.8)):
        body.append(_curve(points, colour, width, end, limits))
    if curve:
        x, y = curve[-1]
        if math.isfinite(y):
            body.append(label(_x(x, end) + 4, _y(y, limits) + 3.5, f"{y:.1f}"))
    for event in events:
        if event["type"] == "governor_rollback":
            x = _x(event["epoch"], end)
            about = f"epoch {event['epoch']}: rolled back to epoch {event['data']['restored_epoch']}"
            line = {"x1": x, "x2": x, "y1": _TOP, "y2": _TOP + _CURVE}
            body.append(tag("line", tag("title", escape(about)), **line, class_="mark"))
    now = max((event["epoch"] for event in events), default=0)
    for lane, slot in enumerate(slots):
        top = _TOP + _CURVE + 18 + _LANE * lane
        body.append(_lane([event for event in events if event["slot"] == slot], slot, top, now, end))
    return tag("svg", *body, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", class_="chart")


def accuracies(events: Sequence[Event]) -> list[tuple[float, float]]:
    """The curve in a host's events."""
    return [(e["epoch"], value(e["data"]["validation_accuracy"])) for e in events if e["type"] == "epoch"]


def accuracy_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits that show all but the steepest first epochs, or the end would be a flat line."""
    values = sorted(y for curve in curves for _, y in curve if math.isfinite(y))
    if not values:
        return 0.0, 100.0
    low, high = values[len(values) // 10], values[-1]
    margin = max(1.0, 0.1 * (high - low))
    return low - margin, min(100.0, high + margin)


def stage_legend() -> str:
    """What the colours mean, as HTML."""
    parts = [
        tag("span", tag("i", " ", style=f"background:{colour}"), escape(stage.lower()), class_="key")
        for stage, colour in STAGE_COLOURS.items()
    ]
    parts.append(tag("span", tag("b", "×", style=f"color:{_CULL}"), " culled or removed", class_="key"))
    parts.append(tag("span", tag("i", " ", style=f"background:{_INK}"), "this episode", class_="key"))
    parts.append(tag("span", tag("i", " ", style=f"background:{_FAINT}"), "the host's first episode", class_="key"))
    return tag("p", *parts, class_="keys")


def _x(epoch: float, end: int) -> float:
    return _LEFT + epoch / end * (_WIDTH - _LEFT - _RIGHT)


def _y(accuracy: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return _TOP + (1 - (min(max(accuracy, low), high) - low) / (high - low)) * _CURVE


def _axis(end: int, limits: tuple[float, float], height: float) -> str:
    parts = []
    for level in ticks(*limits, 4):
        y = _y(level, limits)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(label(_LEFT - 6, y + 3.5, number(level), "end"))
    for epoch in ticks(0, end, 5):
        if epoch == int(epoch):
            parts.append(label(_x(epoch, end), height - 4, number(epoch), "middle"))
    return "".join(parts)


def _curve(points: Curve, colour: str, width: float, end: int, limits: tuple[float, float]) -> str:
    if not points:
        return ""
    path, pen = [], "M"
    for epoch, y in points:
        if math.isfinite(y):
            path.append(f"{pen}{_x(epoch, end):.1f} {_y(y, limits):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    return tag("path", d="".join(path) or "M0 0", fill="none", stroke=colour, stroke_width=width)


def _lane(events: Sequence[Event], slot: str, top: float, now: int, end: int) -> str:
    parts = [label(_LEFT - 6, top + 9, slot, "end")]
    parts.append(tag("rect", x=_LEFT, y=top, width=_x(end, end) - _LEFT, height=_BAR, fill=_EMPTY))
    written_to, written = -1.0, -1
    for span in spans(events, now):
        left, right = _x(span.start, end), _x(span.end, end)
        about = f"{slot}: {span.blueprint}, {span.stage.lower()}, epochs {span.start} to {span.end}"
        bar = {"x": left, "y": top, "width": right - left, "height": _BAR, "fill": STAGE_COLOURS[span.stage]}
        parts.append(tag("rect", tag("title", escape(about)), **bar))
        if span.seed != written and left >= written_to:
            parts.append(label(left, top - 2, span.blueprint, kind="seed"))
            written, written_to = span.seed, left + 4.6 * len(span.blueprint) + 4
    for event in events:
        if event["type"] == "culled":
            data, x = event["data"], _x(event["epoch"], end)
            worth = number(value(data["contribution"]))
            about = f"epoch {event['epoch']}: {data['blueprint']} culled ({data['reason']}), contribution {worth}"
            cross = f"M{x - 3:.1f} {top + 2.5:.1f}l6 6m0 -6l-6 6"
            parts.append(tag("path", tag("title", escape(about)), d=cross, stroke=_CULL, stroke_width=1.8, fill="none"))
    return "".join(parts)
