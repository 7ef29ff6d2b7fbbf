"""Small charts as SVG text, without any library: they carry their tooltips, print well and need nothing outside.

Every function returns one `<svg>` element. NaN is a gap. Lengths are the units of the view box; the page scales charts
to its width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

_WIDTH, _HEIGHT = 560.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 34.0, 38.0
_MOST_DOTS = 80


@dataclass(frozen=True)
class Series:
    """A line; `low` and `high` give it a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    width: float = 1.8
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot."""

    x: float
    y: float
    colour: str
    about: str


def tag(name: str, *body: str, **attributes: object) -> str:
    """One element; attribute names may use `_` for `-` and end in `_`."""
    written = "".join(f" {k.rstrip('_').replace('_', '-')}={quoteattr(_plain(v))}" for k, v in attributes.items())
    return f"<{name}{written}>{''.join(body)}</{name}>" if body else f"<{name}{written}/>"


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    """Text at a place."""
    return tag("text", escape(text), x=x, y=y, text_anchor=anchor, class_=kind or "tick")


def number(value: float) -> str:
    """A number for people."""
    if not math.isfinite(value):
        return "not measured" if math.isnan(value) else str(value)
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    if size >= 1e-3 or size == 0:
        return f"{value:.0f}" if size >= 1000 else f"{value:.4g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within `low`..`high`, at most `most + 1`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _limits(values: Iterable[float], margin: float = 0.06) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(1e-3, abs(low)), high + 0.5 * max(1e-3, abs(high))
    return low - margin * (high - low), high + margin * (high - low)


@dataclass(frozen=True)
class _Axes:
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    height: float = _HEIGHT

    def at_x(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        place = math.log10(max(value, 1e-12)) if self.log else value
        return self.height - _BOTTOM - (place - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def draw(self, x_title: str, whole: bool, columns: Sequence[str] = ()) -> str:
        parts = []
        for value in ticks(*self.y):
            if self.log and value != int(value):
                continue
            y = self.at_y(10**value if self.log else value)
            parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(label(_LEFT - 7, y + 3.5, number(10**value if self.log else value), "end"))
        base = self.height - _BOTTOM
        for place, name in enumerate(columns):
            parts.append(label(self.at_x(place), base + 15, name, "middle"))
        for value in () if columns else ticks(*self.x):
            if whole and value != int(value):
                continue
            parts.append(label(self.at_x(value), base + 15, number(value), "middle"))
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
        parts.append(label((_LEFT + _WIDTH - _RIGHT) / 2, self.height - 6, x_title, "middle", "axis-title"))
        return "".join(parts)


def _svg(title: str, *body: str, width: float = _WIDTH, height: float = _HEIGHT) -> str:
    head = tag("title", escape(title)) + label(2, 14, title, kind="chart-title")
    return tag("svg", head, *body, viewBox=f"0 0 {width:g} {height:g}", role="img", class_="chart")


def _legend(entries: Sequence[tuple[str, str]], width: float = _WIDTH) -> str:
    """Coloured names, set from the right below the title."""
    parts, right = [], width - _RIGHT
    for name, colour in reversed(entries):
        right -= 6.2 * len(name)
        parts.append(label(right, 28, name, kind="legend"))
        parts.append(tag("rect", x=right - 13, y=20.0, width=9, height=9, rx=2, fill=colour))
        right -= 24
    return "".join(parts)


def line_chart(
    series: Sequence[Series],
    title: str,
    x_title: str,
    *,
    y_limits: tuple[float, float] | None = None,
    log: bool = False,
    rule: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
    columns: Sequence[str] = (),
) -> str:
    """Lines over whole numbers. `log` has a decade per unit of height, `rule` is a dashed level, `marks` are dashed
    vertical lines with a tooltip each, `columns` name the places 0, 1, ... of the axis. Names appear in the legend
    once, empty ones not at all."""
    xs = [x for s in series for x in s.x]
    values = [v for s in series for part in (s.y, s.low, s.high) for v in part]
    if rule is not None:
        values.append(rule)
    if log:
        low, high = _limits([math.log10(v) for v in values if v > 0], 0.0)
        y_limits = (math.floor(low), math.ceil(high))
    across = (-0.5, len(columns) - 0.5) if columns else _limits(xs, 0.02)
    axes = _Axes(across, y_limits or _limits(values), log)
    body = [axes.draw(x_title, whole=True, columns=columns)]
    for x, about in marks:
        place = axes.at_x(x)
        line = {"x1": place, "x2": place, "y1": _TOP, "y2": _HEIGHT - _BOTTOM}
        body.append(tag("line", tag("title", escape(about)), **line, class_="mark"))
    if rule is not None:
        y = axes.at_y(rule)
        body.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="rule"))
    inside = [_band(axes, s) for s in series if s.low]
    inside += [_line(axes, s) for s in series]
    inside += [_dots(axes, s, x_title, columns) for s in series if s.name and len(s.x) <= _MOST_DOTS]
    body.append(_clipped(*inside))
    named = list(dict.fromkeys((s.name, s.colour) for s in series if s.name))
    return _svg(title, *body, _legend(named) if len(named) > 1 else "")


def _clipped(*body: str) -> str:
    """The part of the drawing that lies in the plot area; an inner `<svg>` cuts off the rest."""
    area = {"x": 0.0, "y": _TOP - 4, "width": _WIDTH, "height": _HEIGHT - _TOP - _BOTTOM + 4}
    box = " ".join(f"{v:g}" for v in area.values())
    return tag("svg", *body, **area, viewBox=box)


def _band(axes: _Axes, s: Series) -> str:
    rows = [r for r in zip(s.x, s.low, s.high, strict=True) if all(map(math.isfinite, r))]
    around = [(x, low) for x, low, _ in rows] + [(x, high) for x, _, high in reversed(rows)]
    points = " ".join(f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in around)
    return tag("polygon", points=points, fill=s.colour, opacity=0.16)


def _line(axes: _Axes, s: Series) -> str:
    path, pen = [], "M"
    for x, y in zip(s.x, s.y, strict=True):
        if math.isfinite(y):
            path.append(f"{pen}{axes.at_x(x):.1f} {axes.at_y(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    if not path:
        return ""
    look = {"stroke": s.colour, "stroke_width": s.width, "opacity": s.opacity}
    return tag("path", d="".join(path), fill="none", stroke_linejoin="round", **look)


def _dots(axes: _Axes, s: Series, x_title: str, columns: Sequence[str]) -> str:
    return "".join(
        tag(
            "circle",
            tag("title", escape(f"{s.name}, {x_title} {columns[int(x)] if columns else number(x)}: {number(y)}")),
            cx=axes.at_x(x),
            cy=axes.at_y(y),
            r=2.2,
            fill=s.colour,
        )
        for x, y in zip(s.x, s.y, strict=True)
        if math.isfinite(y)
    )


def share_bars(
    columns: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    colours: Mapping[str, str],
    title: str,
    x_title: str,
    *,
    show_counts: bool = False,
) -> str:
    """Stacked bars of shares, one per column; `counts` has a row per part. Columns without counts stay empty."""
    axes = _Axes((0.0, float(max(1, len(columns)))), (0.0, 1.0))
    body = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = axes.at_y(share)
        body.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        body.append(label(_LEFT - 7, y + 3.5, f"{share:.0%}", "end"))
    every = max(1, math.ceil(len(columns) / 12))
    gap = 0.12 if len(columns) <= 40 else 0.0
    for i, column in enumerate(columns):
        left, right = axes.at_x(i + gap), axes.at_x(i + 1 - gap)
        total, below = sum(row[i] for row in counts.values()), 0
        for name, row in counts.items():
            if row[i]:
                low, high = axes.at_y(below / total), axes.at_y((below + row[i]) / total)
                about = tag("title", escape(f"{x_title} {column}, {name}: {row[i]} of {total} ({row[i] / total:.0%})"))
                bar = {"x": left, "y": high, "width": right - left, "height": low - high}
                body.append(tag("rect", about, **bar, fill=colours[name]))
                below += row[i]
        if i % every == 0:
            body.append(label((left + right) / 2, _HEIGHT - _BOTTOM + 14, column, "middle"))
        if show_counts:
            body.append(label((left + right) / 2, _HEIGHT - _BOTTOM - 4, f"n={total}", "middle", "count"))
    body.append(label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_title, "middle", "axis-title"))
    return _svg(title, *body, _legend([(name, colours[name]) for name in counts]))


def scatter(dots: Sequence[Dot], title: str, x_title: str, y_title: str, legend: Sequence[tuple[str, str]]) -> str:
    """Points with tooltips."""
    axes = _Axes(_limits([d.x for d in dots]), _limits([d.y for d in dots]))
    body = [axes.draw(x_title, whole=False)]
    for d in dots:
        place = {"cx": axes.at_x(d.x), "cy": axes.at_y(d.y)}
        body.append(tag("circle", tag("title", escape(d.about)), **place, r=3.2, fill=d.colour, opacity=0.75))
    body.append(label(2, 30, y_title, kind="axis-title"))
    return _svg(title, *body, _legend(legend))
