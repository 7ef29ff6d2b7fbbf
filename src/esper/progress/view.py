"""The live view as rich text: pure functions of what was seen and of the size of the terminal.

Everything is one `Text` without tables: laying out tables costs more than the rest of a redraw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.text import Text

from esper.progress.lines import duration, mean, number
from esper.progress.seen import MOST_HOSTS, Seen

_LEVELS = "▁▂▃▄▅▆▇█"
_STAGES = {
    "": (" ", ""),
    "DORMANT": ("·", "bright_black"),
    "GERMINATED": ("▁", "yellow"),
    "TRAINING": ("▂", "yellow"),
    "BLENDING": ("▄", "blue"),
    "PROBATIONARY": ("▆", "magenta"),
    "FOSSILIZED": ("█", "green"),
    "CULLED": ("×", "bold red"),
    "EMBARGOED": ("-", "red"),
    "RESETTING": ("-", "red"),
}
"""Heights tell the stages apart without colours, too; colours are the terminal's own, so they suit its theme."""
_LEGEND = {
    "DORMANT": "empty",
    "TRAINING": "trains",
    "BLENDING": "is blended in",
    "PROBATIONARY": "on probation",
    "FOSSILIZED": "kept",
    "CULLED": "culled",
}
_OPS = {"WAIT": "bright_black", "GERMINATE": "yellow", "CULL": "red", "FOSSILIZE": "green"}
_PHASES = ("cyan", "magenta", "yellow", "blue", "green")
_OTHER_LINES = 9
_BAR = 30

Piece = tuple[str, str]
"""Characters and their style."""


def view(seen: Seen, elapsed: float, width: int, height: int) -> Text:
    """The whole view for a terminal of `width` x `height` characters; `elapsed` is seconds since the start."""
    lines = [
        _headline(seen),
        _clock(seen, elapsed, width),
        *_hosts(seen, width, max(1, height - _OTHER_LINES)),
        _legend(),
        _shares("ops", seen.ops, _OPS),
        _learner(seen),
        _shares("time", seen.phases, dict(zip(seen.phases, _PHASES, strict=False))),
    ]
    if seen.alarms:
        told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(seen.alarms.items()))
        lines.append([_label("alarms"), (told, "bold red")])
    return Text("\n", no_wrap=True, overflow="crop").join(Text.assemble(*line) for line in lines)


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """A character per value, its height between `low` and `high`; a space for NaN."""
    if high <= low:
        return "".join(" " if math.isnan(v) else _LEVELS[3] for v in values)
    top = len(_LEVELS) - 1
    scaled = (
        " " if math.isnan(v) else _LEVELS[round(top * min(1.0, max(0.0, (v - low) / (high - low))))] for v in values
    )
    return "".join(scaled)


def squeezed(stages: Sequence[str], epochs: int, width: int) -> list[str]:
    """At most `width` stages for an episode of `epochs`: the last of each stretch, unless a seed was culled in it."""
    kept = []
    for stretch in _stretches(stages, epochs, width):
        kept.append("CULLED" if "CULLED" in stretch else stretch[-1])
    return kept


def _stretches(values: Sequence[str], epochs: int, width: int) -> Iterable[Sequence[str]]:
    cells = min(epochs, width)
    for i in range(cells):
        stretch = values[i * epochs // cells : (i + 1) * epochs // cells]
        if stretch:
            yield stretch


def _label(text: str) -> Piece:
    return f"{text:<8}", "bold"


def _headline(seen: Seen) -> list[Piece]:
    place = f"rollout {max(0, seen.episode) + 1}/{seen.rollouts}, epoch {seen.epoch}/{seen.max_epochs}"
    if not seen.present:
        return [(place, "bold")]
    least, most = min(seen.present), max(seen.present)
    told = f"accuracy {mean(seen.present):.1f} % ({least:.1f} to {most:.1f}) of {seen.n_envs} hosts"
    return [(place, "bold"), (f"   {told}", "")]


def _clock(seen: Seen, elapsed: float, width: int) -> list[Piece]:
    rate, left = seen.epochs_per_second(), seen.seconds_left()
    share = seen.done / (seen.rollouts * seen.max_epochs)
    told = [f"{100 * share:.0f} %", f"{duration(elapsed)} so far"]
    if rate is not None and left is not None:
        told += [f"{duration(left)} left", f"{rate * seen.n_envs:.1f} env-epochs/s"]
    bar = max(8, min(_BAR, width - 60))
    full = round(share * bar)
    return [("━" * full, "green"), ("━" * (bar - full), "bright_black"), ("  " + "   ".join(told), "")]


def _hosts(seen: Seen, width: int, rows: int) -> list[list[Piece]]:
    """A row per host: course of accuracy, accuracy, a strip per slot."""
    known = [v for course in seen.accuracy.values() for v in course if not math.isnan(v)]
    if not known:
        return []
    low, high = min(known), max(known)
    hosts = min(seen.n_envs, MOST_HOSTS)
    shown = hosts if seen.n_envs <= min(rows, MOST_HOSTS) else min(hosts, max(1, rows - 1))
    cells = max(4, min(seen.max_epochs, (width - 16) // (len(seen.slots) + 1) - 2))
    room = max(cells, *(len(slot) for slot in seen.slots)) + 2
    span = f"{low:.0f} to {high:.0f} %"
    pad = max(cells, len(span))
    heading = f"{'host':<6}{span:<{pad}}  {'now':>7}  "
    lines: list[list[Piece]] = [[(heading + "".join(f"{slot:<{room}}" for slot in seen.slots), "bold")]]
    for host in range(shown):
        course = seen.accuracy[host]
        line: list[Piece] = [(f"{host:>4}  ", "bold"), (f"{_course(course, seen, cells, low, high):<{pad}}", "cyan")]
        line.append((f"  {_points(course):>5} %  ", ""))
        for slot in seen.slots:
            strip = squeezed(seen.strips[host, slot], seen.max_epochs, cells)
            line += [(mark * len(list(run)), style) for (mark, style), run in groupby(_STAGES[name] for name in strip)]
            line.append((" " * (room - len(strip)), ""))
        lines.append(line)
    if shown < seen.n_envs:
        lines.append([(f"      and {seen.n_envs - shown:,} more hosts", "bright_black")])
    return lines


def _course(course: Sequence[float], seen: Seen, cells: int, low: float, high: float) -> str:
    cells = min(cells, seen.max_epochs)
    ends = [min(len(course), (i + 1) * seen.max_epochs // cells) for i in range(cells)]
    starts = [i * seen.max_epochs // cells for i in range(cells)]
    return sparkline([course[end - 1] for start, end in zip(starts, ends, strict=True) if end > start], low, high)


def _points(course: Sequence[float]) -> str:
    return "–" if not course or math.isnan(course[-1]) else f"{course[-1]:.1f}"


def _legend() -> list[Piece]:
    line = [_label("slots")]
    for stage, told in _LEGEND.items():
        line += [_STAGES[stage], (f" {told}   ", "bright_black")]
    return line


def _shares(name: str, amounts: Mapping[str, float], colours: Mapping[str, str]) -> list[Piece]:
    """A bar that is shared out, and its shares in words."""
    total = sum(amounts.values())
    if total <= 0:
        return [_label(name), ("after the first rollout" if name == "time" else "none yet", "bright_black")]
    bar, told, end, reached = [_label(name)], [], 0.0, 0
    for part, colour in colours.items():
        end += amounts.get(part, 0.0)
        upto = round(_BAR * end / total)
        bar.append(("█" * (upto - reached), colour))
        reached = upto
        told.append((f"  {part} {100 * amounts.get(part, 0.0) / total:.0f} %", colour))
    return bar + told


def _learner(seen: Seen) -> list[Piece]:
    """The last update's health and how it came there."""
    if not seen.learner:
        return [_label("learner"), ("no update yet", "bright_black")]
    line = [_label("learner")]
    for name, now in seen.learner[-1].items():
        history = [update[name] for update in list(seen.learner)[-10:]]
        known = [v for v in history if math.isfinite(v)]
        course = sparkline(history, min(known), max(known)) if known else ""
        line += [(f"{name} {number(now)} ", ""), (f"{course}   ", "cyan")]
    return line
