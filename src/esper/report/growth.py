"""The sections about what grew: accuracy, hosts and their slots, decisions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from esper.plots import STAGE_COLOURS
from esper.report.facts import BINS, Run, correlation, decisions, mean, value
from esper.report.hosts import accuracies, accuracy_limits, host_picture, stage_legend
from esper.report.html import Section, grid, note
from esper.report.learning import response_chart
from esper.report.svg import Dot, Series, line_chart, number, scatter, share_bars

OP_COLOURS = {"WAIT": "#c3cad1", "GERMINATE": "#f2994a", "CULL": "#c8374a", "FOSSILIZE": STAGE_COLOURS["FOSSILIZED"]}
BLUEPRINT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
_NAMES = {
    "parameters": "parameters of host and seeds",
    "validation_accuracy": "accuracy, %",
    "objective": "objective, points",
    "returns": "return",
}
_BLUE, _VIOLET, _GREY = "#2f6db5", "#8a4fb8", "#9aa5b1"
_MOST_HOSTS = 24
_EPOCHS_MISSING = "No epochs in the log; telemetry level normal or debug has them."


def accuracy_section(run: Run) -> Section:
    """How the hosts ended in every rollout, and how they came there."""
    rollouts = run.of("rollout")
    charts = []
    if rollouts:
        x = list(range(1, len(rollouts) + 1))
        for key, title, colour in (
            ("validation_accuracy", "Final validation accuracy, % (mean and range over hosts)", _BLUE),
            ("objective", "Objective: accuracy minus the price of growth (mean and range)", "#2a8a77"),
            ("returns", "Return (mean and range)", _VIOLET),
            ("parameters", "Parameters of host and seeds (mean and range)", "#7a6a53"),
        ):
            values = [[value(v) for v in event["data"].get(key, [])] for event in rollouts]
            if all(values):
                low, high = [min(v) for v in values], [max(v) for v in values]
                series = Series("mean", x, [mean(v) for v in values], colour, low, high)
                charts.append(line_chart([series], title, "rollout"))
    episodes = sorted({event["episode"] for event in run.of("epoch")})
    if episodes:
        charts.append(_course(run, episodes))
    if rollouts:
        charts.append(_pairs(run, "parameters", "validation_accuracy", "Accuracy against parameters"))
    return Section("accuracy", "Accuracy", grid("charts", charts) if charts else note(_EPOCHS_MISSING))


def _course(run: Run, episodes: Sequence[int]) -> str:
    """Mean validation accuracy over an episode, for up to six episodes from the first to the last."""
    chosen = sorted({episodes[round(i * (len(episodes) - 1) / 5)] for i in range(6)})
    series, curves = [], []
    for rank, episode in enumerate(chosen):
        by_epoch: dict[int, list[float]] = {}
        for event in run.of("epoch"):
            if event["episode"] == episode:
                by_epoch.setdefault(event["epoch"], []).append(value(event["data"]["validation_accuracy"]))
        share = rank / max(1, len(chosen) - 1)
        colour = f"#{int(200 - 160 * share):02x}{int(212 - 110 * share):02x}{int(224 - 45 * share):02x}"
        x = sorted(by_epoch)
        series.append(Series(f"episode {episode + 1}", x, [mean(by_epoch[e]) for e in x], colour))
        curves.append(list(zip(x, series[-1].y, strict=True)))
    limits = accuracy_limits(curves)
    return line_chart(series, "Validation accuracy, % (mean over hosts)", "epoch", y_limits=limits)


def host_section(run: Run, hosts: Sequence[int] | None, episode: int | None) -> Section:
    """Accuracy and slots of single hosts in one episode. Raises ValueError for what the log lacks."""
    epochs = run.of("epoch")
    if not epochs:
        return Section("hosts", "Hosts and their slots", note(_EPOCHS_MISSING))
    if episode is None:
        episode = max(event["episode"] for event in (run.of("rollout") or epochs))
    present = sorted({event["host"] for event in epochs if event["episode"] == episode})
    if not present:
        raise ValueError(
            f"episode: {episode}; the log has {min(e['episode'] for e in epochs)} to {epochs[-1]['episode']}"
        )
    missing = set(hosts or ()) - set(present)
    if missing:
        raise ValueError(f"hosts: {sorted(missing)}; episode {episode} has {present}")
    shown = list(hosts or present[:_MOST_HOSTS])
    first = min(event["episode"] for event in epochs)
    by_host = {h: [e for e in run.events if e["host"] == h and e["episode"] == episode] for h in shown}
    before = {h: accuracies([e for e in epochs if e["host"] == h and e["episode"] == first]) for h in shown}
    limits = accuracy_limits([accuracies(events) for events in by_host.values()])
    end = run.started["max_epochs"]
    pictures = [host_picture(h, by_host[h], run.started["slots"], before[h], end, limits) for h in shown]
    left_out = (
        f" Hosts {shown[0]} to {shown[-1]} of {len(present)}; --hosts chooses others."
        if len(shown) < len(present)
        else ""
    )
    about = note(
        f"Episode {episode + 1}. Validation accuracy in percent over epochs; below, the life of the seed in each slot. "
        f"Point at anything for details.{left_out}"
    )
    return Section("hosts", "Hosts and their slots", about + stage_legend() + grid("hosts", pictures))


def decision_section(run: Run) -> Section:
    """What the controller did, and whether what it did follows what was measured."""
    rollouts = run.of("rollout")
    if not rollouts:
        return Section("decisions", "Decisions", note("No rollout has finished yet."))
    names = [str(i) for i in range(1, len(rollouts) + 1)]
    mix = {op: [event["data"]["ops"].get(op, 0) for event in rollouts] for op in OP_COLOURS}
    charts = [share_bars(names, mix, OP_COLOURS, "What the controller did, share of steps", "rollout")]
    fates = ("planted", "kept", "culled")
    colours = (_GREY, STAGE_COLOURS["FOSSILIZED"], OP_COLOURS["CULL"])
    counts = [
        Series(name, list(range(1, len(rollouts) + 1)), [event["data"][name] for event in rollouts], colour)
        for name, colour in zip(fates, colours, strict=True)
    ]
    charts.append(line_chart(counts, "Seeds, all hosts together", "rollout"))
    followed = decisions(run.events)
    look = {"left": OP_COLOURS["WAIT"], "CULL": OP_COLOURS["CULL"], "FOSSILIZE": OP_COLOURS["FOSSILIZE"]}
    for stage, title in (
        ("PROBATIONARY", "Next decision on a seed on probation, by its contribution"),
        ("BLENDING", "Next decision on a seed being blended in, by its contribution"),
    ):
        bins = [name for _, _, name in BINS]
        bars = share_bars(bins, followed[stage], look, title, "contribution, points", show_counts=True)
        charts.append(bars)
    if run.of("update"):
        charts.append(response_chart(run, OP_COLOURS))
    planted = blueprints_planted(run)
    if planted:
        colours_of = dict(zip(planted, BLUEPRINT_COLOURS, strict=False))
        charts.append(share_bars(names, planted, colours_of, "Which blueprints were planted", "rollout"))
    charts.append(_pairs(run, "objective", "returns", "Return against objective"))
    about = note(
        "A seed on probation can be fossilised (from 1 point of contribution on), culled or left; one being blended in "
        "can be culled or left. A controller that reads its measurements culls on the left and fossilises on the "
        "right. Measurements after which there was no decision (last epoch, removal by a rule) do not count. "
        "What the policy would do shows before it does it: the probabilities are those of the last fifth of the run, "
        "for CULL and FOSSILIZE that of aiming them at the slot in question."
    )
    return Section("decisions", "Decisions", about + grid("charts", charts))


def blueprints_planted(run: Run) -> dict[str, list[int]]:
    """Seeds planted of every blueprint in every rollout that is over; empty if none was."""
    rollouts = [event["episode"] for event in run.of("rollout")]
    germinated = [(event["data"]["blueprint"], event["episode"]) for event in run.of("germinated")]
    count = Counter(germinated)
    return {b: [count[b, e] for e in rollouts] for b in run.started["blueprints"]} if germinated else {}


def _pairs(run: Run, across: str, up: str, title: str) -> str:
    """Two outcomes of every host and episode against each other, from early to late rollouts."""
    rollouts = run.of("rollout")
    dots, xs, ys = [], [], []
    for event in rollouts:
        colour = _early_to_late(event["episode"] / max(1, rollouts[-1]["episode"]))
        rows = zip(event["data"].get(across, []), event["data"].get(up, []), strict=False)
        for host, (x, y) in enumerate((value(a), value(b)) for a, b in rows):
            if math.isfinite(x) and math.isfinite(y):
                what = f"{_NAMES[across]} {number(x)}, {_NAMES[up]} {number(y)}"
                dots.append(Dot(x, y, colour, f"rollout {event['episode'] + 1}, host {host}: {what}"))
                xs.append(x)
                ys.append(y)
    r = correlation(xs, ys)
    found = "" if math.isnan(r) else f" (correlation {r:+.2f})"
    legend = (("first rollout", _early_to_late(0.0)), ("last rollout", _early_to_late(1.0)))
    return scatter(dots, title + found, _NAMES[across], _NAMES[up], legend)


def _early_to_late(share: float) -> str:
    ends = ((242, 182, 90), (46, 74, 140))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))
