"""The event log as tables, for analysis with pandas (`pip install 'esper[analysis]'`).

from esper.table import columns, table

table("runs/one", "contribution").groupby("slot").contribution.describe()
columns("contribution")   # what each column means
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.event_table import EVENTS, PLACES
from esper.events import Event, load

if TYPE_CHECKING:
    from pandas import DataFrame

_COUNTS = ("step", "episode", "epoch", "host")


def columns(type: str) -> dict[str, str]:
    """The columns that `table` always has for a type of event, and what they mean, with units.

    Types with open data (`reward`, `update`, `gradients`, `anomaly`) have a further column for every further entry;
    counts by name become one column `<entry>.<name>` each. Raises ValueError for a type there is not.
    """
    if type not in EVENTS:
        raise ValueError(f"type: {type!r}; must be one of {', '.join(EVENTS)}")
    places = {name: about for name, (_, about) in PLACES.items() if name != "type"}
    data = {name: field.about for name, field in EVENTS[type].data.items() if field.kind != "counts by name"}
    return places | data


def table(run: str | Path, type: str) -> DataFrame:
    """All events of one type, a row each in the order in which they happened; `columns` explains the columns.

    `run` is a run directory or an event log. What an event says per host becomes a row per host. What was not measured
    is NaN, a place that means nothing is NA. Raises ImportError without pandas, ValueError for a type there is not,
    FileNotFoundError if there is no log.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("esper.table needs pandas: pip install 'esper[analysis]'") from None
    known = columns(type)
    rows = [row for event in load(run) if event["type"] == type for row in _rows(event)]
    names = [*known, *sorted({name for row in rows for name in row} - set(known))]
    frame = pandas.DataFrame(rows, columns=names)
    numbers = [n for n, field in EVENTS[type].data.items() if field.kind in ("number", "numbers per host")]
    if EVENTS[type].others == "number":
        numbers += [name for name in names if name not in known]
    kinds = dict.fromkeys(_COUNTS, "Int64") | dict.fromkeys(numbers, "float64")
    return frame.astype(kinds)


def _rows(event: Event) -> list[dict[str, Any]]:
    fields = EVENTS[event["type"]].data
    kinds = {name: fields[name].kind if name in fields else "" for name in event["data"]}
    row = {name: event[name] for name in PLACES if name != "type"}
    for name, value in event["data"].items():
        if kinds[name] == "counts by name":
            row |= {f"{name}.{key}": count for key, count in value.items()}
        elif kinds[name] != "numbers per host":
            row[name] = value
    per_host = {name: event["data"][name] for name in kinds if kinds[name] == "numbers per host"}
    if not per_host:
        return [row]
    return [
        {**row, "host": host, **dict(zip(per_host, values, strict=True))}
        for host, values in enumerate(zip(*per_host.values(), strict=True))
    ]
