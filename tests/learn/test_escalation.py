"""Levels and trends as values, and whole runs in which something goes wrong: event, escalation, and its end."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import jsonschema
import pytest
import torch

from engine import run, tiny_task
from esper.engine import Engine
from esper.errors import RunStopped
from esper.event_table import schema
from esper.events import load
from esper.learn import learner
from esper.learn.diagnostics import AnomalyDetector
from esper.learn.escalation import AccuracyTrend, TelemetryLevel
from esper.seeds.actions import OP

ROLLOUTS = 5


def test_escalation_is_counted_in_rollouts() -> None:
    level = TelemetryLevel("minimal")
    assert level.effective == "minimal"
    level = level.escalate_temporarily(2)
    seen = []
    for _ in range(4):
        seen.append(level.effective)
        level = level.tick()
    assert seen == ["debug", "debug", "minimal", "minimal"]
    assert level.remaining == 0
    assert TelemetryLevel("normal", 1).escalate_temporarily(3).remaining == 3


def test_off_stays_off() -> None:
    assert TelemetryLevel("off").escalate_temporarily(5).effective == "off"
    with pytest.raises(ValueError, match="remaining: -1; must be at least 0"):
        TelemetryLevel("normal", -1)


@pytest.mark.parametrize(
    ("accuracies", "kind"),
    [
        ([50.0], None),
        ([50.0, 50.9], "plateau"),
        ([50.0, 49.2], "plateau"),
        ([50.0, 51.0], None),
        ([50.0, 54.0], None),
        ([50.0, 54.2], "improvement"),
        ([50.0, 45.8], "degradation"),
        # Eleven rollouts: the one from 60 to 0 eleven back has left the window, and the mean moves from 49 to 50.
        ([40.0] + [50.0] * 10, None),
        ([20.0] + [50.0] * 10, "improvement"),
        ([20.0] + [50.0] * 11, "plateau"),
    ],
)
def test_a_trend_is_a_change_of_the_mean_of_ten_rollouts(accuracies, kind) -> None:
    """Thresholds 0.5 and 2: from the second rollout on, the rolling mean moves by half the difference of two."""
    trend = AccuracyTrend()
    for accuracy in accuracies:
        trend = trend.add(accuracy)
    assert trend.kind(0.5, 2.0) == kind
    assert len(trend.accuracies) <= 11


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    """Short tiny runs learn nothing, so the value function is let alone; everything else is watched."""
    lenient = AnomalyDetector(value_phases=(), value_late=-math.inf)
    monkeypatch.setattr("esper.oversight.AnomalyDetector", lambda: lenient)
    with tiny_task():
        yield


def spoil(monkeypatch, at: int, change) -> None:
    """Let `change` spoil what the update of rollout `at` gets."""
    original, rollouts = learner.ppo_update, itertools.count()

    def spoiled(policy, optimizer, rollout, settings, **options):
        if next(rollouts) == at:
            rollout = rollout.clone()
            change(policy, rollout)
        return original(policy, optimizer, rollout, settings, **options)

    monkeypatch.setattr(learner, "ppo_update", spoiled)


def tiny_run(folder, **fields):
    base = {"n_envs": 2, "n_episodes": 2 * ROLLOUTS, "max_epochs": 2, "slots": ["mid"], "escalation_rollouts": 2}
    return run(folder, **{**base, **fields})


def explode(policy, rollout) -> None:
    rollout["action_log_prob"][1, 1, OP] -= 3.0


def collapse(policy, rollout) -> None:
    rollout["action_log_prob"][1, 1, OP] += 3.0


def nan_reward(policy, rollout) -> None:
    rollout["next", "reward"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "kind"),
    [(explode, "ratio_explosion"), (collapse, "ratio_collapse"), (nan_reward, "numerical_instability")],
)
def test_what_goes_wrong_is_logged_escalates_and_settles(tmp_path, monkeypatch, change, kind) -> None:
    spoil(monkeypatch, 1, change)
    _, events = tiny_run(tmp_path / "run")
    by_type = {name: [e for e in events if e["type"] == name] for name in ("anomaly", "escalated", "settled")}
    (anomaly,) = by_type["anomaly"]
    assert (anomaly["episode"], anomaly["data"]["kind"], anomaly["severity"]) == (1, kind, "warning")
    if kind.startswith("ratio"):
        (entry,) = anomaly["data"]["ratios"]["entries"]
        assert (entry["host"], entry["epoch"], entry["head"]) == (1, 1, "op")
    else:
        assert anomaly["data"]["detail"] == "next.reward not finite"
        assert "ratios" not in anomaly["data"]
    assert [(e["episode"], e["data"]) for e in by_type["escalated"]] == [(1, {"rollouts": 2})]
    assert [e["episode"] for e in by_type["settled"]] == [3]
    debug = Counter(e["episode"] for e in events if e["type"] in ("reward", "gradients"))
    assert debug == {2: 5, 3: 5}
    for event in events:
        jsonschema.Draft202012Validator(schema()).validate(event)


def test_an_anomaly_while_escalated_starts_the_count_again(tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, 0, explode)
    spoil(monkeypatch, 1, explode)
    _, events = tiny_run(tmp_path / "run")
    assert [e["episode"] for e in events if e["type"] == "escalated"] == [0, 1]
    assert [e["episode"] for e in events if e["type"] == "settled"] == [3]
    layers = [e["data"]["layers"] for e in events if e["type"] == "gradients"]
    # The update that exploded was stopped before its first backward pass.
    assert [len(records) > 10 for records in layers] == [False, True, True]


def test_escalation_can_be_switched_off_and_off_is_silent(tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, 1, explode)
    kinds = Counter(e["type"] for e in tiny_run(tmp_path / "run", escalation_rollouts=0)[1])
    assert (kinds["anomaly"], kinds["escalated"], kinds["settled"], kinds["gradients"]) == (1, 0, 0, 0)
    spoil(monkeypatch, 1, explode)
    assert tiny_run(tmp_path / "off", telemetry_level="off")[1] == []


def test_escalation_changes_no_number(tmp_path, monkeypatch) -> None:
    digests = set()
    for level, rollouts in (("normal", 2), ("normal", 0), ("debug", 2)):
        spoil(monkeypatch, 1, explode)
        folder = tmp_path / f"{level}-{rollouts}"
        digests.add(tiny_run(folder, telemetry_level=level, escalation_rollouts=rollouts)[0]["weights_digest"])
        monkeypatch.undo()
        monkeypatch.setattr("esper.oversight.AnomalyDetector", lambda: AnomalyDetector(value_phases=()))
    assert len(digests) == 1


def test_a_policy_that_is_not_finite_is_named(tmp_path, monkeypatch) -> None:
    """Weights that are NaN while a rollout is collected: the run goes on collecting legal actions, refuses to learn
    from them, and says so."""
    learn = Engine.learn

    def broken(self, rollout, watch):
        metrics = learn(self, rollout, watch)
        with torch.no_grad():
            self.learner.policy.value[-1].bias.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(Engine, "learn", broken)
    with pytest.raises(RunStopped, match="not finite"):
        tiny_run(tmp_path / "run")
    anomalies = [e for e in load(tmp_path / "run") if e["type"] == "anomaly"]
    assert [e["data"]["kind"] for e in anomalies] == ["numerical_instability"] * 3
    assert "state_value not finite" in anomalies[0]["data"]["detail"]


def test_the_trend_of_a_run_is_in_its_log(tmp_path) -> None:
    """With the widest thresholds every rollout but the first is a plateau, with none an improvement or degradation."""
    _, events = tiny_run(tmp_path / "flat", plateau_threshold=100.0, improvement_threshold=100.0)
    assert [e["data"]["kind"] for e in events if e["type"] == "trend"] == ["plateau"] * (ROLLOUTS - 1)
    _, events = tiny_run(tmp_path / "steep", plateau_threshold=0.0, improvement_threshold=0.0)
    means = [sum(e["data"]["validation_accuracy"]) / 2 for e in events if e["type"] == "rollout"]
    changes = [sum(means[: i + 1]) / (i + 1) - sum(means[:i]) / i for i in range(1, len(means))]
    expected = ["improvement" if change > 0 else "degradation" for change in changes if change]
    assert [e["data"]["kind"] for e in events if e["type"] == "trend"] == expected


def test_the_state_of_watching_is_part_of_a_checkpoint(tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, 1, explode)
    kept = []
    mark = Engine.mark
    monkeypatch.setattr(Engine, "mark", lambda self, *at: (mark(self, *at), kept.append(self.moment().counters))[0])
    tiny_run(tmp_path / "run")
    by_rollout = {c["rollouts"]: SimpleNamespace(**c) for c in kept}
    assert [by_rollout[i].escalated for i in range(1, ROLLOUTS + 1)] == [0, 2, 1, 0, 0]
    assert [len(by_rollout[i].accuracies) for i in range(1, ROLLOUTS + 1)] == [1, 2, 3, 4, 5]
