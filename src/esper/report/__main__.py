"""`python -m esper.report RUN`: one self-contained HTML page about a finished or running run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from esper.report import write_report

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m esper.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (default: RUN/report.html)")
    parser.add_argument("--episode", type=int, help="episode whose hosts are drawn, from 0 (default: last complete)")
    parser.add_argument("--hosts", type=int, nargs="+", metavar="HOST", help="hosts to draw (default: the first 24)")
    given = parser.parse_args(arguments)
    try:
        written = write_report(given.run, given.out, hosts=given.hosts, episode=given.episode)
    except (OSError, ValueError) as error:
        print(f"esper.report: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"report: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
