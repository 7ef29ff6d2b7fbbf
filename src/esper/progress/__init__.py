"""What a run shows while it runs: a live view on a terminal, plain lines anywhere else, a table at the end.

It looks at events and timings only, and draws so rarely that it takes less than a fiftieth of a run's time.
"""

from esper.progress.display import RunProgress
from esper.progress.lines import health, rollout_line
from esper.progress.summary import summary_table

__all__ = ["RunProgress", "health", "rollout_line", "summary_table"]
