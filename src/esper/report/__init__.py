"""A run as one HTML page that opens anywhere: `python -m esper.report RUN`, also while the run is going on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper.report.facts import read_run
from esper.report.page import page

__all__ = ["write_report"]


def write_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    hosts: Sequence[int] | None = None,
    episode: int | None = None,
) -> Path:
    """Write the report of a run to `out`, or to `report.html` in its directory, and return the path.

    `hosts` and `episode` (both from 0) choose whose slots are drawn; unless given, the first 24 hosts in the last
    complete episode. Raises FileNotFoundError for what is no run directory, ValueError for a torn log and for hosts or
    an episode that it lacks.
    """
    where = Path(run_dir)
    html = page(read_run(where), hosts, episode)
    target = where / "report.html" if out is None else Path(out)
    target.write_text(html, encoding="utf-8")
    return target
