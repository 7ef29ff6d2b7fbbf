"""The page: sections in reading order, each a pure function from a run to HTML.

The page is well-formed XML as well as HTML, holds everything it shows and asks nothing of the network.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.resources import files

from pydantic.fields import FieldInfo

from esper.config import TrainingConfig
from esper.report import learning
from esper.report.facts import Row, Run, contribution_rows, mean, seeds, value
from esper.report.growth import accuracy_section, decision_section, host_section
from esper.report.html import Section, data_table, element, note, paragraph
from esper.report.svg import number

QUIET = (
    "epoch",
    "contribution",
    "reward",
    "stage_changed",
    "germinated",
    "fossilized",
    "culled",
    "rollout",
    "update",
    "checkpoint",
)
"""Types that the plots and tables show already."""
_MOST_EVENTS = 200


def page(run: Run, hosts: Sequence[int] | None = None, episode: int | None = None) -> str:
    """The whole report. `hosts` and `episode` choose what the pictures of hosts show; the last complete episode and its
    first hosts unless given. Raises ValueError for an episode or a host that the log lacks."""
    sections = [
        summary_section(run),
        accuracy_section(run),
        host_section(run, hosts, episode),
        decision_section(run),
        contribution_section(run),
        learning.section(run),
        speed_section(run),
        configuration_section(run),
        event_section(run),
    ]
    links = [element("a", section.title, href=f"#{section.name}") for section in sections]
    body = [
        element("header", element("h1", run.name, state(run)), paragraph(headline(run))),
        element("nav", element("div", *links)),
        element("main", *(section.html() for section in sections), footer(run)),
    ]
    style = files("esper.report").joinpath("style.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        '<link rel="icon" href="data:,"/>',
        element("title", f"Esper: {run.name}"),
        f"<style>{style}</style>",
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{"".join(head)}</head><body>{"".join(body)}</body></html>\n'


def state(run: Run) -> str:
    """Finished, or how far the run has come."""
    if run.finished:
        return element("span", "finished", class_="state")
    epochs = [event for event in run.of("epoch") if event["episode"] == len(run.of("rollout"))]
    within = f", epoch {max(e['epoch'] for e in epochs)} of {run.started.get('max_epochs')}" if epochs else ""
    return element(
        "span", f"not finished: {len(run.of('rollout'))} of {run.rollouts} rollouts{within}", class_="state open"
    )


def headline(run: Run) -> str:
    """What was run, in one line."""
    config, started = run.config, run.started
    slots = ", ".join(started.get("slots", config["slots"]))
    length = f" of {started['max_epochs']} epochs" if "max_epochs" in started else ""
    return (
        f"{config['controller']} on {config['task']}, seed {config['seed']}: {config['n_episodes']} episodes{length}, "
        f"{config['n_envs']} hosts side by side, slots {slots}"
    )


def summary_section(run: Run) -> Section:
    """The outcome in a few numbers: of the last rollout, and how far from the first."""
    rollouts, cards = [event["data"] for event in run.of("rollout")], []
    if rollouts:
        for key, name, unit in (
            ("validation_accuracy", "validation accuracy", " %"),
            ("objective", "objective", ""),
            ("returns", "return", ""),
        ):
            first, last = (mean(map(value, data[key])) for data in (rollouts[0], rollouts[-1]))
            known = len(rollouts) > 1 and math.isfinite(last - first)
            since = f" ({last - first:+.2f} since the first rollout)" if known else ""
            cards.append((f"{last:.2f}{unit}", name + since))
        grown = mean(map(value, rollouts[-1]["parameters"])) if "parameters" in rollouts[-1] else math.nan
        cards.append((number(grown), f"parameters (host alone {number(run.started.get('host_parameters', math.nan))})"))
        planted, culled = (sum(data[key] for data in rollouts) for key in ("planted", "culled"))
        cards.append((f"{planted} / {culled}", "seeds planted / culled in the run"))
        cards.append((str(rollouts[-1]["kept"]), "seeds kept in the last rollout, all hosts"))
    if run.summary is not None:
        timing = run.summary["timing"]
        cards.append((f"{run.summary['test_accuracy']:.2f} %", "test accuracy, last rollout"))
        cards.append((f"{timing['env_epochs_per_second']:.1f}", "host epochs per second"))
        cards.append((duration(timing["seconds"]), "time"))
    shown = [element("div", element("b", big), element("span", small), class_="card") for big, small in cards]
    body = element("div", *shown, class_="cards") if shown else note("No rollout has finished yet.")
    return Section("summary", "Summary", body + _alarms(run))


def _alarms(run: Run) -> str:
    counts = Counter(event["type"] for event in run.events if event["severity"] in ("warning", "error", "critical"))
    if not counts:
        return note("No warnings, no rollbacks.")
    return note("Warnings: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) + ".")


def contribution_section(run: Run) -> Section:
    """What seeds of each blueprint were worth in each slot."""
    title = "Contribution by blueprint and slot"
    found = seeds(run.events)
    if not found:
        return Section("contributions", title, note("No seeds in the log (telemetry level normal or debug has them)."))
    rows = contribution_rows(found, run.started["slots"], run.started["blueprints"])
    head = ["blueprint", "slot", "planted", "kept", "culled", "removed by a rule", "measured", "contribution, points"]
    head += ["of kept seeds", "parameters"]
    about = note(
        "Contribution: validation accuracy with all live seeds minus accuracy without this one, the last time it was "
        "measured, mean over seeds with its standard error. Seeds that never began to blend in have none."
    )
    cells = [_contribution_row(row) for row in rows]
    return Section("contributions", title, about + data_table(head, cells, numeric=range(2, 10)))


def _contribution_row(row: Row) -> list[str | tuple[str, str]]:
    if not row.planted:
        return [row.blueprint, row.slot, "0", *[""] * 7]
    error = "" if math.isnan(row.standard_error) else f" ± {row.standard_error:.2f}"
    clear = not math.isnan(row.standard_error) and abs(row.contribution) > 2 * row.standard_error
    look = ("good" if row.contribution > 0 else "bad") if clear else ""
    worth = "" if math.isnan(row.contribution) else f"{row.contribution:+.2f}{error}"
    kept = "" if math.isnan(row.kept_contribution) else f"{row.kept_contribution:+.2f}"
    counts = (row.planted, row.kept, row.culled, row.removed, row.measured)
    return [row.blueprint, row.slot, *map(str, counts), (worth, look), kept, number(row.parameters)]


def speed_section(run: Run) -> Section:
    """Where the time went."""
    phases = [line for line in run.timings if "phase" in line and "seconds" in line]
    if not phases:
        return Section("speed", "Time", note("No timings yet."))
    spent: dict[str, float] = defaultdict(float)
    for line in phases:
        spent[line["phase"]] += value(line["seconds"])
    total = sum(spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1])
    rows = [[name, duration(seconds), f"{seconds / total:.1%}"] for name, seconds in longest]
    return Section("speed", "Time", data_table(["phase", "time", "share"], rows, numeric=range(1, 3)))


def configuration_section(run: Run) -> Section:
    """Every field; those that are not at their default first."""
    fields, defaults = TrainingConfig.model_fields, TrainingConfig().to_dict()
    rows = [
        [name, json.dumps(given), json.dumps(defaults.get(name)), _meaning(fields.get(name))]
        for name, given in run.config.items()
    ]
    head = ["field", "value", "default", "meaning"]
    changed = data_table(head, [row for row in rows if row[1] != row[2]])
    whole = element("details", element("summary", "All fields"), data_table(head, rows))
    return Section("configuration", "Configuration", note("Fields that are not at their default.") + changed + whole)


def _meaning(field: FieldInfo | None) -> str:
    return "" if field is None else field.description or ""


def event_section(run: Run) -> Section:
    """How many events of each type, and the latest that no plot shows."""
    counts = Counter(event["type"] for event in run.events)
    table = data_table(["type", "events"], [[kind, f"{n:,}"] for kind, n in counts.most_common()], numeric=[1])
    special = [event for event in run.events if event["type"] not in QUIET]
    rows = [
        [
            *("" if event[key] is None else str(event[key]) for key in ("step", "severity", "type")),
            *("" if event[key] is None else str(event[key]) for key in ("episode", "epoch", "host", "slot")),
            json.dumps(event["data"], ensure_ascii=False),
        ]
        for event in special[-_MOST_EVENTS:]
    ]
    head = ["step", "severity", "type", "episode", "epoch", "host", "slot", "data"]
    about = note(f"The last {len(rows)} of {len(special):,} events that the plots and tables above do not show.")
    latest = element("details", element("summary", "Events"), data_table(head, rows, numeric=[0, 3, 4, 5]))
    return Section("events", "Events", table + about + latest)


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def footer(run: Run) -> str:
    """What the page was made from."""
    digest = run.summary["weights_digest"][:16] if run.summary is not None else None
    made = (
        f"Made from {len(run.events):,} events"
        + (f"; SHA-256 of the final weights begins {digest}" if digest else "")
        + "."
    )
    return element("footer", made)
