"""The picture of a run, drawn from its events. Every function returns or fills a matplotlib figure; nothing is global.

run_picture(load("runs/one"), ("early", "mid", "late")).savefig("run.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from esper.events import Event

STAGE_COLOURS = {
    "GERMINATED": "#f6d55c",
    "TRAINING": "#f2994a",
    "BLENDING": "#4f8fd9",
    "PROBATIONARY": "#9b6bc9",
    "FOSSILIZED": "#3c9d6b",
}
"""Stages in which a slot holds a seed, in the order of its life."""

EMPTY, _INK, _FAINT, _CULL = "#eceef1", "#22303c", "#9aa5b1", "#c8374a"
_MAX_HOSTS = 4
STYLE = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "esper",
}


class Span(NamedTuple):
    """A slot in one stage from epoch `start` to epoch `end`; `seed` counts the seeds of the slot from 0."""

    start: int
    end: int
    stage: str
    blueprint: str
    seed: int


def spans(events: Iterable[Event], end: int) -> list[Span]:
    """The life of one slot of one host in one episode up to epoch `end`, without empty time, from its events."""
    found: list[Span] = []
    stage, blueprint, start, seed = "", "", 0, -1
    for event in events:
        after = _stage_after(event)
        if after is None:
            continue
        if stage in STAGE_COLOURS and event["epoch"] > start:
            found.append(Span(start, event["epoch"], stage, blueprint, seed))
        if event["type"] == "germinated":
            blueprint, seed = event["data"]["blueprint"], seed + 1
        stage, start = after, event["epoch"]
    if stage in STAGE_COLOURS and end > start:
        found.append(Span(start, end, stage, blueprint, seed))
    return found


def _stage_after(event: Event) -> str | None:
    if event["type"] == "stage_changed":
        return str(event["data"]["after"])
    return {"germinated": "GERMINATED", "fossilized": "FOSSILIZED", "culled": "CULLED"}.get(event["type"])


def run_picture(
    events: Sequence[Event], slots: Sequence[str], hosts: Sequence[int] | None = None, episode: int | None = None
) -> Figure:
    """How hosts grew in one episode, and how the run went over its rollouts.

    The upper half has a column per host (at most four; the first ones unless `hosts` says which): validation accuracy
    per epoch, the first episode in grey for comparison, and below it the life of the seed in each slot. `episode` is
    the last complete one unless given. The lower half has final accuracy, return and seeds per rollout. Raises
    ValueError if the log holds no epochs, as with a telemetry level below normal, or lacks a host.
    """
    epochs = [event for event in events if event["type"] == "epoch"]
    if not epochs:
        raise ValueError("events: no epochs; a picture needs telemetry_level normal or debug")
    rollouts = [event for event in events if event["type"] == "rollout"]
    if episode is None:
        episode = max(event["episode"] for event in (rollouts or epochs))
    present = sorted({event["host"] for event in epochs if event["episode"] == episode})
    shown = list(present if hosts is None else hosts)[:_MAX_HOSTS]
    if not shown or not set(shown) <= set(present):
        raise ValueError(f"hosts: {shown}; episode {episode} has {present}")
    with matplotlib.rc_context(STYLE):
        return _draw(events, epochs, rollouts, tuple(slots), shown, episode)


def save_picture(figure: Figure, run_dir: Path) -> tuple[Path, Path]:
    """Write `run.png` and `run.svg`; the same picture gives the same files."""
    png, svg = run_dir / "run.png", run_dir / "run.svg"
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=130, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _draw(
    events: Sequence[Event],
    epochs: Sequence[Event],
    rollouts: Sequence[Event],
    slots: tuple[str, ...],
    hosts: Sequence[int],
    episode: int,
) -> Figure:
    columns = len(hosts)
    lane = 0.34
    heights = [2.5, lane * len(slots), 1.9]
    size = (max(10.0, 3.4 * columns + 1.2), sum(heights) + 2.1)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06))
    halves: Any = figure.subfigures(2, 1, height_ratios=[heights[0] + heights[1] + 1.0, heights[2] + 0.7])
    upper, lower = halves
    grid = upper.subplots(2, columns, sharex=True, sharey="row", squeeze=False, height_ratios=heights[:2])
    end = max(event["epoch"] for event in epochs if event["episode"] == episode)
    for column, host in enumerate(hosts):
        top, strip = grid[0][column], grid[1][column]
        _accuracy(top, epochs, events, host, episode)
        _strips(strip, [e for e in events if e["host"] == host and e["episode"] == episode], slots, end)
        top.set_title(f"host {host}", loc="left")
        strip.set_xlabel("epoch")
    grid[0][0].set_ylabel("validation accuracy, %")
    grid[0][0].set_ylim(bottom=_floor(epochs, hosts, episode))
    grid[1][0].set_yticks(range(len(slots)), slots)
    legend = _legend(rolled_back=any(event["type"] == "governor_rollback" for event in events))
    per_row = len(legend) if columns == _MAX_HOSTS else 5
    upper.legend(handles=legend, loc="outside lower center", ncols=per_row, frameon=False, handlelength=1.3)
    upper.suptitle(_headline(events, episode), x=0.006, ha="left", fontsize=13, fontweight="bold", color=_INK)
    _course(lower.subplots(1, 3), rollouts)
    return figure


def _headline(events: Sequence[Event], episode: int) -> str:
    started: dict[str, Any] = next((event["data"] for event in events if event["type"] == "run_started"), {})
    parts = [str(started[key]) for key in ("task", "controller") if key in started]
    return ", ".join((*parts, f"episode {episode + 1}"))


def _accuracy(axes: Axes, epochs: Sequence[Event], events: Sequence[Event], host: int, episode: int) -> None:
    first = min(event["episode"] for event in epochs)
    for number, colour, width in ((first, _FAINT, 1.0), (episode, _INK, 1.8)):
        curve = [e for e in epochs if e["host"] == host and e["episode"] == number]
        x, y = [e["epoch"] for e in curve], [as_number(e["data"]["validation_accuracy"]) for e in curve]
        axes.plot(x, y, color=colour, linewidth=width, zorder=2 if number == first else 3)
    axes.annotate(
        f"{y[-1]:.1f}", (x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8, color=_INK
    )
    for event in events:
        if event["type"] == "governor_rollback" and (event["host"], event["episode"]) == (host, episode):
            axes.axvline(event["epoch"], color=_CULL, linestyle=":", linewidth=1.2)


def _strips(axes: Axes, events: Sequence[Event], slots: Sequence[str], end: int) -> None:
    for lane, slot in enumerate(slots):
        axes.barh(lane, end, height=0.42, color=EMPTY, linewidth=0)
        mine = [event for event in events if event["slot"] == slot]
        labelled_to, labelled = -1.0, -1
        for span in spans(mine, end):
            colour = STAGE_COLOURS[span.stage]
            axes.barh(lane, span.end - span.start, left=span.start, height=0.42, color=colour, linewidth=0)
            if span.seed != labelled and span.start >= labelled_to:
                axes.text(span.start, lane - 0.26, span.blueprint, fontsize=6.5, color=_INK, va="bottom", ha="left")
                labelled, labelled_to = span.seed, span.start + 0.022 * end * len(span.blueprint)
        culls = [event["epoch"] for event in mine if event["type"] == "culled"]
        axes.plot(culls, [lane] * len(culls), "x", markersize=5, color=_CULL, markeredgewidth=1.6)
    axes.set_ylim(len(slots) - 0.6, -0.75)
    axes.set_xlim(0, end * 1.06)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _floor(epochs: Sequence[Event], hosts: Sequence[int], episode: int) -> float | None:
    """Where the accuracy axis starts: below all but the steepest first epochs, or the end would be a flat line."""
    shown = [e for e in epochs if e["host"] in hosts and e["episode"] == episode]
    values = sorted(value for e in shown if (value := as_number(e["data"]["validation_accuracy"])) == value)
    return values[len(values) // 8] - 2.0 if values else None


def _legend(rolled_back: bool) -> list[Any]:
    stages = [Patch(color=colour, label=stage.lower()) for stage, colour in STAGE_COLOURS.items()]
    return [
        Line2D([], [], color=_INK, linewidth=1.8, label="this episode"),
        Line2D([], [], color=_FAINT, linewidth=1.0, label="first episode"),
        *stages,
        Line2D([], [], color=_CULL, marker="x", linestyle="none", markeredgewidth=1.6, label="culled"),
        *([Line2D([], [], color=_CULL, linestyle=":", linewidth=1.2, label="rolled back")] if rolled_back else []),
    ]


def _course(axes: Sequence[Axes], rollouts: Sequence[Event]) -> None:
    x = range(1, len(rollouts) + 1)
    marker = "o" if len(x) < 30 else None
    for panel, key, title, colour in (
        (axes[0], "validation_accuracy", "final accuracy, %", "#2f6db5"),
        (axes[1], "returns", "return", "#8a4fb8"),
    ):
        rows = [[as_number(value) for value in event["data"][key]] for event in rollouts]
        lowest, highest = [min(row) for row in rows], [max(row) for row in rows]
        panel.fill_between(x, lowest, highest, color=colour, alpha=0.16, linewidth=0)
        panel.plot(x, [sum(row) / len(row) for row in rows], color=colour, marker=marker, markersize=3, linewidth=1.6)
        panel.set_title(f"{title} (mean, range)", loc="left", fontsize=9)
    for key, colour in (("planted", _FAINT), ("kept", STAGE_COLOURS["FOSSILIZED"]), ("culled", _CULL)):
        counts = [event["data"][key] for event in rollouts]
        axes[2].plot(x, counts, color=colour, marker=marker, markersize=3, linewidth=1.6, label=key)
    axes[2].set_title("seeds", loc="left", fontsize=9)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(
        frameon=False,
        fontsize=7.5,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1.02, 0.97),
        handlelength=1.0,
        columnspacing=1.0,
    )
    for panel in axes:
        panel.set_xlabel("rollout")
        panel.set_xlim(0.5, max(len(x), 1) + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def as_number(value: Any) -> float:
    """A number as the event log writes it: null is NaN, infinities are texts."""
    return float("nan") if value is None else float(value)
