"""How a controller learns, drawn from the events of its run.

learner_picture(load("runs/one")).savefig("learner.png")

| panel | what it answers |
|---|---|
| `explained_variance` | does the value head foresee returns |
| `kl`, `clip_fraction` | how far an update moves each head |
| `gradient_norm` | the policy's gradient before clipping |
| `entropy` | does each head still explore, over the steps in which it mattered |
| `ops` | what is done how often |
| `responses` | does what is done depend on what seeds contribute |
| `objective` | does the return pay for what a run is judged by |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from esper.events import Event
from esper.learn.responses import BINS
from esper.plots import STYLE, as_number
from esper.seeds.actions import HEADS, Op

_HEAD_COLOURS = dict(zip(HEADS, ("#2f6db5", "#f2994a", "#3c9d6b", "#8a4fb8"), strict=True))
OP_COLOURS = dict(zip((op.name for op in Op), ("#9aa5b1", "#f6d55c", "#c8374a", "#3c9d6b"), strict=True))
_INK = "#22303c"
_LAST = 0.2

Panel = Callable[[Axes, Sequence[Event]], None]


def learner_picture(events: Sequence[Event], panels: Sequence[str] | None = None) -> Figure:
    """The named panels (all unless given), side by side and in rows of four.

    Raises ValueError for a panel there is not, for a log without rollouts, and, if a panel needs updates, for a
    controller that has made none.
    """
    names = tuple(PANELS) if panels is None else tuple(panels)
    unknown = [name for name in names if name not in PANELS]
    if unknown or not names:
        raise ValueError(f"panels: {unknown}; must be some of {', '.join(PANELS)}")
    for kind in {PANELS[name][0] for name in names}:
        if not any(event["type"] == kind for event in events):
            raise ValueError(f"events: none of type {kind}; {', '.join(names)} cannot be drawn without")
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06))
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for name, panel in zip(names, axes, strict=False):
            kind, draw = PANELS[name]
            draw(panel, [event for event in events if event["type"] == kind])
        for panel in axes[len(names) :]:
            panel.remove()
    return figure


def _course(axes: Axes, events: Sequence[Event], metric: str, colour: str, label: str | None = None) -> None:
    x = [event["episode"] + 1 for event in events]
    marker = "o" if len(x) < 30 else None
    y = [as_number(event["data"].get(metric)) for event in events]
    axes.plot(x, y, color=colour, label=label, marker=marker, markersize=3, linewidth=1.5)
    axes.set_xlabel("rollout")


def _by_head(axes: Axes, events: Sequence[Event], metric: str, title: str) -> None:
    for head, colour in _HEAD_COLOURS.items():
        _course(axes, events, f"{metric}/{head}", colour, head)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=7.5, ncols=2)


def _explained_variance(axes: Axes, events: Sequence[Event]) -> None:
    _course(axes, events, "explained_variance", _INK)
    axes.axhline(0.0, color="#9aa5b1", linewidth=1.0)
    axes.set_ylim(bottom=-1.0, top=1.05)
    axes.set_title("explained variance", loc="left")


def _kl(axes: Axes, events: Sequence[Event]) -> None:
    _by_head(axes, events, "kl", "KL divergence of an update")
    axes.set_yscale("symlog", linthresh=1e-5)


def _clip_fraction(axes: Axes, events: Sequence[Event]) -> None:
    _by_head(axes, events, "clip_fraction", "share of clipped ratios")


def _gradient_norm(axes: Axes, events: Sequence[Event]) -> None:
    _course(axes, events, "grad_norm", _INK)
    axes.set_title("gradient norm before clipping", loc="left")
    axes.set_ylim(bottom=0.0)


def _entropy(axes: Axes, events: Sequence[Event]) -> None:
    _by_head(axes, events, "entropy", "entropy, 1 is uniform")
    axes.set_ylim(-0.03, 1.03)


def _ops(axes: Axes, events: Sequence[Event]) -> None:
    x = [event["episode"] + 1 for event in events]
    totals = [max(1, sum(event["data"]["ops"].values())) for event in events]
    shares = {
        name: [event["data"]["ops"].get(name, 0) / total for event, total in zip(events, totals, strict=True)]
        for name in OP_COLOURS
    }
    below = [0.0] * len(x)
    for name, share in shares.items():
        top = [a + b for a, b in zip(below, share, strict=True)]
        axes.bar(x, share, 1.0, bottom=below, color=OP_COLOURS[name], label=name.lower(), linewidth=0)
        below = top
    axes.set_ylim(0, 1)
    axes.set_xlabel("rollout")
    axes.set_title("ops", loc="left")
    axes.legend(frameon=True, fontsize=7.5, ncols=2)


def _responses(axes: Axes, events: Sequence[Event]) -> None:
    """Means over the last fifth of the updates, each bin weighted by how many slots it saw."""
    recent = events[-max(1, round(_LAST * len(events))) :]
    for name, colour in OP_COLOURS.items():
        means = [_mean_response(recent, name, b) for b in BINS]
        axes.plot(range(len(BINS)), means, color=colour, marker="o", markersize=4, linewidth=1.6, label=name.lower())
    axes.set_xticks(range(len(BINS)), BINS, fontsize=6.5, rotation=20)
    axes.set_xlabel("contribution of a blending or probationary seed, points")
    axes.set_ylim(bottom=0.0)
    axes.set_title("probability of each op, last fifth", loc="left")
    axes.legend(frameon=False, fontsize=7.5, ncols=2)


def _mean_response(events: Sequence[Event], op: str, b: str) -> float:
    rows = [
        (event["data"].get(f"response/slots/{b}", 0.0), event["data"].get(f"response/{op}/{b}")) for event in events
    ]
    total = sum(count for count, _ in rows)
    return sum(count * as_number(share) for count, share in rows if count) / total if total else float("nan")


def _objective(axes: Axes, events: Sequence[Event]) -> None:
    """One dot per host and rollout, darker the later."""
    for place, event in enumerate(events):
        x = [as_number(value) for value in event["data"]["objective"]]
        y = [as_number(value) for value in event["data"]["returns"]]
        axes.scatter(x, y, s=9, color="#2f6db5", alpha=0.15 + 0.75 * (place + 1) / len(events), linewidths=0)
    axes.set_xlabel("objective, points")
    axes.set_title("return, later rollouts darker", loc="left")


PANELS: dict[str, tuple[str, Panel]] = {
    "explained_variance": ("update", _explained_variance),
    "kl": ("update", _kl),
    "clip_fraction": ("update", _clip_fraction),
    "gradient_norm": ("update", _gradient_norm),
    "entropy": ("update", _entropy),
    "ops": ("rollout", _ops),
    "responses": ("update", _responses),
    "objective": ("rollout", _objective),
}
"""Every panel by name: the type of event it is drawn from, and what draws it."""
