"""The picture of a comparison: what accuracy and objective every row reached, and for how many operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esper.plots import STYLE

_COLOURS = ("#22303c", "#9aa5b1", "#f2994a", "#4f8fd9", "#3c9d6b", "#9b6bc9", "#c8374a", "#d4b12f")
_MARKERS = "os^Dv<>P"


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


def save_comparison(figure: Figure, folder: Path) -> tuple[Path, Path]:
    """Write `compare.png` and `compare.svg`; the same picture gives the same files."""
    png, svg = folder / "compare.png", folder / "compare.svg"
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=130, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


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
