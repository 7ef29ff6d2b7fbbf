"""The pictures of a comparison: what every row reached and for how many operations, how its hosts grew, and whether
what a learned controller does goes with what seeds contribute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from esper.compare.bench import Row
from esper.compare.table import ranked
from esper.learn.responses import BINS, EDGES
from esper.plots import EMPTY, STAGE_COLOURS, STYLE
from esper.plots_learner import OP_COLOURS
from esper.seeds.stages import Stage

_COLOURS = ("#22303c", "#9aa5b1", "#f2994a", "#4f8fd9", "#3c9d6b", "#9b6bc9", "#c8374a", "#d4b12f")
_MARKERS = "os^Dv<>P"
_MAX_HOSTS = 16


def pictures(rows: Sequence[Row], summary: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Every picture there is something to draw for, by name."""
    grown = [row for row in rows if bool((row.stages >= Stage.GERMINATED).any())]
    learned = [(row, entry) for row, entry in zip(rows, summary, strict=True) if row.aimed]
    found = {"compare": comparison_picture(summary)}
    if grown:
        found["lifecycles"] = lifecycle_picture(grown)
    if learned:
        found["responses"] = response_picture(learned)
    return found


def comparison_picture(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy and objective against the FLOPs of a seed, each row with its 95 % interval."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        for axes, (name, title) in zip(
            figure.subplots(1, 2), (("test", "test accuracy"), ("objective", "objective")), strict=True
        ):
            _panel(axes, summary, name, title)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def lifecycle_picture(rows: Sequence[Row]) -> Figure:
    """The stage of every slot in every epoch, a panel per row: a band per host (the first 16), a line in it per slot in
    forward order, epochs from left to right."""
    hosts, _, slots = rows[0].stages.shape
    shown = min(hosts, _MAX_HOSTS)
    columns = min(4, len(rows))
    height = -(-len(rows) // columns)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(3.4 * columns, height * (0.07 * shown * (slots + 1) + 1.1)), layout="constrained")
        axes = figure.subplots(height, columns, squeeze=False).flatten()
        for panel, row in zip(axes, rows, strict=False):
            image = _colours(row.stages[:shown].numpy())
            panel.imshow(image, aspect="auto", interpolation="nearest", extent=(0, image.shape[1], shown, 0))
            panel.set_title(row.name, loc="left")
            panel.set_xlabel("epoch")
            panel.set_yticks([i + 0.5 for i in range(shown)], [str(i) for i in range(shown)], fontsize=6.5)
            panel.tick_params(axis="y", length=0)
        for panel in axes[len(rows) :]:
            panel.remove()
        legend = [Patch(color=colour, label=stage.lower()) for stage, colour in STAGE_COLOURS.items()]
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    return figure


def response_picture(learned: Sequence[tuple[Row, Mapping[str, Any]]]) -> Figure:
    """The probability of culling and of fossilising a seed against its measured contribution, a panel per row: a dot
    per seed and epoch in which the op was legal, and the mean of each bin."""
    edges = (-6.0, *EDGES, 6.0)
    middles = {b: (low + high) / 2 for b, low, high in zip(BINS, edges[:-1], edges[1:], strict=True)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(learned), 3.4), layout="constrained")
        for panel, (row, entry) in zip(
            figure.subplots(1, len(learned), squeeze=False, sharex=True)[0], learned, strict=True
        ):
            for op, aim in row.aimed.items():
                found = entry["responses"][op]
                panel.scatter(aim.contribution, aim.probability, s=6, alpha=0.25, color=OP_COLOURS[op], linewidths=0)
                at = [middles[b] for b in found["means"]]
                ranks = [ranked(of["rank_correlation"]) for of in (found, found["probation"])]
                label = f"{op.lower()}, rank correlation {ranks[0]}, on probation {ranks[1]}"
                panel.plot(at, list(found["means"].values()), "o-", markersize=4, color=OP_COLOURS[op], label=label)
            panel.set_title(row.name, loc="left")
            panel.set_xlabel("measured contribution, points")
            panel.set_ylabel("probability")
            panel.set_ylim(-0.03, 1.03)
            panel.legend(frameon=False, fontsize=7.5)
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `<name>.png` and `<name>.svg`; the same picture gives the same files."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _colours(stages: np.ndarray) -> np.ndarray:
    """The image `[hosts (slots + 1), T, 3]` of stages `[hosts, T, slots]`: white between hosts, grey for no seed."""
    table = np.zeros((max(Stage) + 1, 3))
    for stage in Stage:
        table[stage] = to_rgb(STAGE_COLOURS.get(stage.name, EMPTY))
    hosts, epochs, slots = stages.shape
    image = np.ones((hosts, slots + 1, epochs, 3))
    image[:, :slots] = table[stages.transpose(0, 2, 1)]
    return image.reshape(hosts * (slots + 1), epochs, 3)


def _panel(axes: Axes, summary: Sequence[Mapping[str, Any]], name: str, title: str) -> None:
    for i, entry in enumerate(summary):
        value = entry[name]
        flops = entry["flops"]["training"] + entry["flops"]["evaluation"]
        axes.errorbar(
            flops,
            value["mean"],
            yerr=[[value["mean"] - value["low"]], [value["high"] - value["mean"]]],
            fmt=_MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
            capsize=3.0,
            label=entry["name"],
        )
    axes.set_title(f"{title}, percentage points")
    axes.set_xlabel("FLOPs of a seed, coalitions included")
