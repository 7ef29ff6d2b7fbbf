"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table at the end of a run, from `esper.events.Summary`."""
    table = Table(title=f"{summary['controller']} on {summary['task']}, seed {summary['seed']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    grown = summary["parameters"] - summary["host_parameters"]
    for name, value in (
        ("validation accuracy", f"{summary['validation_accuracy']:.2f} %"),
        ("test accuracy", f"{summary['test_accuracy']:.2f} %"),
        ("objective", f"{summary['objective']:.2f}"),
        ("parameters", f"{summary['parameters']:,.0f} (host {summary['host_parameters']:,} + seeds {grown:,.0f})"),
        (
            "seeds planted / kept / culled",
            " / ".join(str(summary[f"seeds_{k}"]) for k in ("planted", "kept", "culled")),
        ),
        ("episodes", f"{summary['episodes']:,}"),
        ("env-epochs/s", f"{summary['timing']['env_epochs_per_second']:.1f}"),
        ("time", f"{summary['timing']['seconds']:.0f} s"),
    ):
        table.add_row(name, value)
    return table
