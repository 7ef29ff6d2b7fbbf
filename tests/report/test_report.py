"""The HTML report: it is well-formed, needs nothing outside, and says what the log says."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from esper.config import TrainingConfig
from esper.events import EventLog, write_json
from esper.report import write_report
from esper.report.__main__ import BAD_INPUT, main
from esper.report.facts import BINS, Run, contribution_rows, correlation, decisions, read_run, seeds
from esper.report.learning import response_chart
from esper.report.svg import Series, line_chart, number, share_bars, ticks
from esper.seeds.actions import HEADS

SLOTS, BLUEPRINTS, MAX_EPOCHS = ("early", "mid"), ("norm", "conv_light"), 8
SECTIONS = [
    "summary",
    "accuracy",
    "hosts",
    "decisions",
    "contributions",
    "learning",
    "speed",
    "configuration",
    "events",
]
CONFIG = TrainingConfig(slots=list(SLOTS), blueprints=list(BLUEPRINTS), n_envs=2, n_episodes=4, max_epochs=MAX_EPOCHS)
SUMMARY = {
    "test_accuracy": 91.5,
    "weights_digest": "ab" * 32,
    "timing": {"seconds": 130.0, "env_epochs_per_second": 4.5},
}


def contribution(events: EventLog, epoch: int, points: float, **place: object) -> None:
    events.write("contribution", epoch=epoch, contribution=points, contribution_se=0.5, alpha=1.0, **place)


def seed_life(events: EventLog, episode: int, host: int) -> None:
    """A seed in `mid`: planted at 0, blending at 3, on probation at 5, worth 2 points, fossilised at 6."""
    place = {"episode": episode, "host": host, "slot": "mid"}
    events.write("germinated", epoch=0, blueprint="norm", blend="linear", parameters=12, **place)
    stages = {0: ("DORMANT", "TRAINING"), 3: ("TRAINING", "BLENDING"), 5: ("BLENDING", "PROBATIONARY")}
    for epoch, points in ((0, None), (3, None), (4, 0.5), (5, 2.0), (6, 2.5)):
        if epoch in stages:
            before, after = stages[epoch]
            events.write("stage_changed", epoch=epoch, before=before, after=after, blueprint="norm", **place)
        if points is not None:
            contribution(events, epoch, points, **place)
    life = {"blueprint": "norm", "contribution": 2.5, "contribution_se": 0.5, "improvement": 3.0, "age": 6}
    events.write("fossilized", epoch=6, parameters=12, **life, **place)
    contribution(events, 7, 2.75, **place)
    lost = {**place, "slot": "early"}
    life = {"blueprint": "conv_light", "contribution": -4.0, "contribution_se": 0.1, "improvement": 0.0, "age": 3}
    for planted, reason in ((1, "controller"), (5, "negative_contribution")):
        events.write("germinated", epoch=planted, blueprint="conv_light", blend="gated", parameters=90, **lost)
        events.write(
            "stage_changed", epoch=planted, before="TRAINING", after="BLENDING", blueprint="conv_light", **lost
        )
        if reason == "controller":
            contribution(events, planted + 1, -4.0, **lost)
            events.write("culled", epoch=planted + 1, reason=reason, **life, **lost)
        else:
            events.write("culled", epoch=planted + 1, reason=reason, **life, **lost)
            contribution(events, planted + 1, -4.0, **lost)


def epoch(events: EventLog, episode: int, host: int, number: int) -> None:
    metrics = {"train_loss": 1.0 / number, "train_accuracy": 90.0, "validation_loss": math.nan if number == 2 else 0.5}
    accuracy = math.nan if (number, host) == (3, 1) else 60.0 + 4 * number + host
    events.write("epoch", episode=episode, epoch=number, host=host, validation_accuracy=accuracy, **metrics)


def rollout(events: EventLog, episode: int) -> None:
    ops = {"WAIT": 10, "GERMINATE": 6, "CULL": 2, "FOSSILIZE": 2}
    hosts = {
        "validation_accuracy": [92.0, 93.0],
        "returns": [1.0, math.inf],
        "objective": [90.0, 91.0],
        "parameters": [500, 600],
    }
    events.write("rollout", episode=episode, **hosts, ops=ops, planted=6, kept=2, culled=4, growing=0)
    metrics = {f"{name}/{head}": 0.25 for name in ("kl", "clip_fraction", "entropy", "grad_norm") for head in HEADS}
    metrics |= {"explained_variance": 0.1 + 0.2 * episode, "grad_norm": 2.0, "loss_objective": -0.1, "loss_critic": 0.2}
    metrics |= {"loss_entropy": -0.1, "stopped_early": float(episode), "kl/op": 0.0}
    events.write("update", episode=episode, updates=4.0, **metrics)


def write_run(
    run_dir: Path, level: str = "normal", *, rollouts: int = 2, finished: bool = True, config: TrainingConfig = CONFIG
) -> Path:
    """Two hosts, two episodes of the same life; unfinished, the last episode is three epochs old."""
    with EventLog(run_dir, config.to_dict(), level) as events:  # type: ignore[arg-type]
        facts = {"task": "digits", "controller": config.controller, "slots": SLOTS, "blueprints": BLUEPRINTS}
        events.write("run_started", **facts, max_epochs=MAX_EPOCHS, host_parameters=496)
        for episode in range(rollouts):
            for host in (0, 1):
                seed_life(events, episode, host)
                for n in range(1, MAX_EPOCHS + 1):
                    epoch(events, episode, host, n)
            alarm = {"reason": "<loss & more>", "loss": math.inf, "threshold": 5.0, "restored_epoch": 2}
            events.write("governor_rollback", episode=episode, epoch=4, host=1, **alarm)
            rollout(events, episode)
            events.time("collect", 3.0, episode=episode)
            events.time("learn", 1.0, episode=episode)
        if finished:
            events.write("run_finished", weights_digest="ab" * 32)
        else:
            for n in (1, 2, 3):
                epoch(events, rollouts, 0, n)
    if finished:
        write_json(run_dir / "summary.json", SUMMARY)
    return run_dir


def read(run_dir: Path, **options: object) -> tuple[str, ET.Element]:
    text = write_report(run_dir, **options).read_text(encoding="utf-8")  # type: ignore[arg-type]
    return text, ET.fromstring(text)


def words(element: ET.Element) -> str:
    return " ".join(text.strip() for text in element.itertext() if text.strip())


def cells(root: ET.Element, section: str) -> list[list[str]]:
    rows = root.findall(f".//section[@id='{section}']//tbody/tr")
    return [[words(cell) for cell in row.findall("td")] for row in rows]


RUNS = {
    "finished": {},
    "debug": {"level": "debug"},
    "running": {"finished": False},
    "first episode": {"finished": False, "rollouts": 0},
    "minimal": {"level": "minimal"},
    "off": {"level": "off"},
    "off and running": {"level": "off", "finished": False},
    "does not learn": {"config": CONFIG.replace(controller="heuristic")},
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_page_is_well_formed_whole_and_needs_nothing_outside(tmp_path: Path, kind: str) -> None:
    text, root = read(write_run(tmp_path, **RUNS[kind]))  # type: ignore[arg-type]
    assert text.startswith("<!DOCTYPE html>\n<html")
    assert [section.get("id") for section in root.iter("section")] == SECTIONS
    assert [link.get("href") for link in root.iter("a")] == [f"#{name}" for name in SECTIONS]
    assert "http" not in text.lower()
    assert not re.search(r"\ssrc=|url\(|@import|<script", text)
    assert [link.get("href") for link in root.iter("link")] == ["data:,"]
    for section in root.iter("section"):
        assert len(words(section)) > len(section.findtext("h2") or "") + 3, section.get("id")
    for chart in root.iterfind(".//svg[@class='chart']"):
        assert chart.findtext("title")
        drawn = ET.tostring(chart, "unicode")
        assert not re.search(r"\b(nan|inf)\b", re.sub(r"<title>.*?</title>", "", drawn)), drawn[:200]


def test_a_finished_run_shows_every_plot(tmp_path: Path) -> None:
    _, root = read(write_run(tmp_path))
    titles = {
        s.get("id"): [svg.findtext("title") for svg in s.iterfind(".//svg[@class='chart']")]
        for s in root.iter("section")
    }
    assert len(titles["accuracy"]) == 6
    assert titles["hosts"] == ["host 0", "host 1"]
    assert len(titles["decisions"]) == 7
    assert [str(title).split(",")[0] for title in titles["learning"]] == [
        *("Explained variance", "KL divergence of an update", "Clip fraction per head", "Entropy per head"),
        *("Gradient norm before clipping", "Losses"),
    ]
    summary = words(root.find(".//section[@id='summary']"))  # type: ignore[arg-type]
    for fragment in ("92.50 %", "91.50 %", "2 governor_rollback", "12 / 8", "2 min"):
        assert fragment in summary, fragment
    assert words(root.find(".//h1")).endswith("finished")  # type: ignore[arg-type]
    assert "Stopped early for its divergence: 1 of 2" in words(root)


def test_a_running_run_says_how_far_it_is(tmp_path: Path) -> None:
    _, root = read(write_run(tmp_path, finished=False, rollouts=1))
    assert "since the first rollout" not in words(root)
    assert "not finished: 1 of 2 rollouts, epoch 3 of 8" in words(root.find(".//h1"))  # type: ignore[arg-type]


def test_text_from_the_log_is_escaped(tmp_path: Path) -> None:
    text, root = read(write_run(tmp_path))
    assert "<loss" not in text
    assert "<loss & more>" in words(root.find(".//section[@id='events']"))  # type: ignore[arg-type]


def test_the_configuration_is_all_there(tmp_path: Path) -> None:
    _, root = read(write_run(tmp_path))
    rows = cells(root, "configuration")
    changed = [name for name, value in CONFIG.to_dict().items() if value != TrainingConfig().to_dict()[name]]
    assert [row[0] for row in rows] == [*changed, *CONFIG.to_dict()]
    assert ["n_envs", "2", "4"] in [row[:3] for row in rows]


def test_the_time_is_shared_out(tmp_path: Path) -> None:
    _, root = read(write_run(tmp_path))
    assert cells(root, "speed") == [["collect", "6.0 s", "75.0%"], ["learn", "2.0 s", "25.0%"]]


def test_the_contribution_table_counts_every_seed(tmp_path: Path) -> None:
    _, root = read(write_run(tmp_path))
    rows = {(row[0], row[1]): row[2:] for row in cells(root, "contributions")}
    assert rows["norm", "mid"] == ["4", "4", "0", "0", "4", "+2.75 ± 0.00", "+2.75", "12"]
    assert rows["conv_light", "early"] == ["8", "0", "4", "4", "8", "-4.00 ± 0.00", "", "90"]
    assert rows["norm", "early"] == ["0", *[""] * 7]


def test_decisions_follow_their_measurements(tmp_path: Path) -> None:
    counts = decisions(read_run(write_run(tmp_path)).events)
    names = [name for _, _, name in BINS]
    found = {
        (stage, op, names[i]): n
        for stage, ops in counts.items()
        for op, row in ops.items()
        for i, n in enumerate(row)
        if n
    }
    assert found == {
        ("BLENDING", "left", "0…1"): 4,  # epoch 4
        ("BLENDING", "CULL", "< −3"): 4,  # the one the controller culled; the other was removed by a rule
        ("PROBATIONARY", "left", "1…3"): 4,  # epoch 5
        ("PROBATIONARY", "FOSSILIZE", "1…3"): 4,  # epoch 6; at epoch 7 it is a fossil and nothing can be decided
    }


def test_no_decision_follows_the_last_epoch(tmp_path: Path) -> None:
    with EventLog(tmp_path, {}) as events:
        place = {"episode": 0, "host": 0, "slot": "mid"}
        events.write("stage_changed", epoch=1, before="TRAINING", after="BLENDING", blueprint="norm", **place)
        for n in (1, 2):
            epoch(events, 0, 0, n)
            contribution(events, n, 1.0, **place)
    assert sum(map(sum, decisions(read_events(tmp_path))["BLENDING"].values())) == 1


def read_events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_seeds_and_their_errors() -> None:
    def event(kind: str, epoch: int, **data: object) -> dict[str, object]:
        return {"type": kind, "episode": 0, "host": 0, "slot": "mid", "epoch": epoch, "data": data}

    log = [event("contribution", 0, contribution=9.0, contribution_se=1.0)]
    for worth in (1.0, 3.0):
        log += [event("germinated", 0, blueprint="norm", blend="linear", parameters=10)]
        log += [event("contribution", 4, contribution=worth, contribution_se=None)]
    log += [event("germinated", 5, blueprint="norm", blend="linear", parameters=13)]
    found = seeds(log)  # type: ignore[arg-type]
    assert [(s.contribution, s.fate) for s in found[:2]] == [(1.0, "undecided"), (3.0, "undecided")]
    assert math.isnan(found[2].contribution)
    (row,) = contribution_rows(found, ["mid"], ["norm"])
    assert (row.planted, row.measured, row.contribution, row.parameters) == (3, 2, 2.0, 11.0)
    assert row.standard_error == pytest.approx(1.0)  # spread sqrt(2), over the root of two seeds


def test_episode_and_hosts_can_be_chosen(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    _, root = read(run_dir, hosts=[1], episode=0)
    hosts = root.find(".//section[@id='hosts']")
    assert hosts is not None
    assert "Episode 1." in words(hosts)
    assert [svg.findtext("title") for svg in hosts.iter("svg")] == ["host 1"]
    assert "rolled back to epoch 2" in words(hosts)
    assert main([str(run_dir), "--episode", "7"]) == BAD_INPUT
    assert main([str(run_dir), "--hosts", "2"]) == BAD_INPUT


def test_many_hosts_are_cut_and_the_page_says_so(tmp_path: Path) -> None:
    with EventLog(tmp_path, CONFIG.to_dict()) as events:
        events.write("run_started", slots=SLOTS, blueprints=BLUEPRINTS, max_epochs=MAX_EPOCHS)
        for host in range(30):
            epoch(events, 0, host, 1)
    _, root = read(tmp_path)
    hosts = root.find(".//section[@id='hosts']")
    assert hosts is not None
    assert len(hosts.findall(".//svg")) == 24
    assert "Hosts 0 to 23 of 30" in words(hosts)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run")
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out == f"report: {run_dir / 'report.html'}\n"
    assert main([str(run_dir), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == (run_dir / "report.html").read_bytes()
    assert main([str(tmp_path / "nothing")]) == BAD_INPUT
    assert "it has no config.json and no events.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1234"), (12345.6, "12,346"), (0.5, "0.5"), (1e-5, "1e-5"), (-2.5e-4, "-2.5e-4")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text
    assert number(math.nan) == "not measured"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.7, 912.0), (89.98, 90.02), (1e-6, 3e-6)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_charts_draw_what_they_are_given() -> None:
    chart = ET.fromstring(line_chart([Series("a", [1, 2, 3, 4], [1.0, math.nan, 2.0, 1.5], "#000000")], "t", "x"))
    path = next(p.get("d") or "" for p in chart.iter("path"))
    assert path.count("M") == 2  # a gap where nothing was measured
    assert len(chart.findall(".//circle")) == 3
    bars = ET.fromstring(
        share_bars(["one", "two"], {"a": [1, 0], "b": [3, 0]}, {"a": "#111111", "b": "#222222"}, "t", "x")
    )
    heights = [float(bar.get("height") or 0) for bar in bars.iter("rect") if bar.find("title") is not None]
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.01)
    assert len(heights) == 2


def test_responses_weigh_updates_by_what_they_saw() -> None:
    def update(slots: int, share: float) -> dict[str, object]:
        data = {"response/slots/0 to 1": slots, "response/CULL/0 to 1": share}
        return {"type": "update", "data": data if slots else {}}

    events = [update(100, 1.0)] * 12 + [update(1, 0.8), update(0, 0.0), update(3, 0.4)]
    chart = response_chart(Run("r", CONFIG.to_dict(), events), {"CULL": "#c8374a"})  # type: ignore[arg-type]
    (dot,) = ET.fromstring(chart).findall(".//circle")
    assert dot.findtext("title") == "CULL, contribution, points 0 to 1: 0.5"


def test_correlation() -> None:
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert correlation([1.0, 2.0], [2.0, 1.0]) == pytest.approx(-1.0)
    assert math.isnan(correlation([1.0, 1.0], [2.0, 1.0]))


def test_a_run_without_events_has_no_start() -> None:
    run = Run("empty", CONFIG.to_dict(), [])
    assert (run.started, run.finished, run.rollouts) == ({}, False, 2)
