"""Whole runs: reproducible, indifferent to telemetry and to how many hosts there are, honest about what happened."""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from engine import run, tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.environment.env import GrowthEnv
from esper.growth import governor
from esper.learn.collector import BatchFirstCollector
from esper.run import build_learner, train
from esper.seeds.stages import TRANSITIONS, Stage
from tiny import differing


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


def rollout_of(**fields):
    config = tiny_config(**fields)
    env = build_env(config)
    collector = BatchFirstCollector(env, build_controller(config, env), rollouts=1)
    rollout = next(iter(collector))
    collector.shutdown()
    return env, rollout


def test_same_seed_same_run(tmp_path) -> None:
    first, events = run(tmp_path / "a")
    second, again = run(tmp_path / "b")
    assert first["weights_digest"] == second["weights_digest"]
    assert events == again
    other, _ = run(tmp_path / "c", seed=43, n_episodes=4)
    assert other["weights_digest"] != first["weights_digest"]


def test_telemetry_never_changes_numbers(tmp_path) -> None:
    digests = {
        run(tmp_path / level, telemetry_level=level, n_episodes=4)[0]["weights_digest"]
        for level in ("off", "normal", "debug")
    }
    assert len(digests) == 1


def test_seeds_are_measured_whether_or_not_the_controller_sees_it() -> None:
    """The width of the observation changes nothing of the hosts: neither G2's ratios nor contributions nor weights."""
    (wide, _), (narrow, _) = (rollout_of(use_telemetry=seen, controller="random") for seen in (True, False))
    grown = wide.finished_growth()[0]
    assert bool((grown["slots", "gradient_ratio"] > 0).any())
    assert not differing(grown, narrow.finished_growth()[0])


def test_a_host_does_not_depend_on_the_others() -> None:
    """Identical draws and records whether host i runs among 4 or among 8; weights bit-equal under the loop."""
    small, four = rollout_of(n_envs=4)
    large, eight = rollout_of(n_envs=8)
    assert torch.equal(four["action"], eight["action"][:4])
    torch.testing.assert_close(four["observation"], eight["observation"][:4], rtol=0, atol=1e-6)
    ours, theirs = small.finished_growth()[0], large.finished_growth()[0][:4]
    assert torch.equal(ours["slots", "stage"], theirs["slots", "stage"])
    for name, leaf in ours.select("host", "seeds").flatten_keys(".").items():
        assert torch.equal(leaf, theirs.flatten_keys(".")[name]), name


def test_stacked_and_loop_agree_on_everything_discrete() -> None:
    loop, a = rollout_of(executor="loop", max_epochs=4)
    stacked, b = rollout_of(executor="stacked", max_epochs=4)
    assert torch.equal(a["action"], b["action"])
    torch.testing.assert_close(a["next", "reward"], b["next", "reward"], rtol=0, atol=0.3)
    pairs = zip(
        loop.finished_growth()[0]["host"].flatten_keys(".").items(),
        stacked.finished_growth()[0]["host"].flatten_keys(".").items(),
        strict=True,
    )
    for (name, x), (_, y) in pairs:
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3, msg=name)


def test_several_devices_give_the_same_run() -> None:
    """Two CPU devices, each with its group of hosts: the same numbers, and both really computed."""
    one, a = rollout_of(n_envs=4)
    two, b = rollout_of(n_envs=4, devices=["cpu", "cpu"])
    assert [(s.first, s.size) for s in two.backend.places] == [(0, 2), (2, 2)]
    assert torch.equal(a["action"], b["action"])
    assert torch.equal(a["next", "reward"], b["next", "reward"])
    merged = torch.cat([g["host"] for g in two.finished_growth()]).flatten_keys(".")
    for name, leaf in one.finished_growth()[0]["host"].flatten_keys(".").items():
        assert torch.equal(leaf, merged[name]), name


def test_rollouts_are_hosts_by_epochs_with_the_documented_keys() -> None:
    env, rollout = rollout_of()
    n, epochs = env.batch_size[0], env.spec.rules.max_epochs
    assert rollout.batch_size == torch.Size([n, epochs])
    assert rollout["observation"].shape == (n, epochs, 80)
    assert rollout["action_log_prob"].shape == (n, epochs, 4)
    assert bool(rollout["next", "truncated"][:, -1].all())
    assert not bool(rollout["next", "done"][:, :-1].any())
    assert bool(rollout["is_init"][:, 0].all())
    parts = rollout["next", "components"].sum(-1)
    torch.testing.assert_close(parts, rollout["next", "reward"].squeeze(-1), rtol=0, atol=1e-6)
    legal = rollout["mask_op"].gather(-1, rollout["action"][..., 3:]).squeeze(-1)
    assert bool(legal.all())


def test_rollouts_of_gpus_are_paid_when_they_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that panics begins a new segment, whose first step says what the others were paid in the one before."""
    check = governor.check

    def panics(books: TensorDict, *given: Any) -> tuple[TensorDict, torch.Tensor]:
        judged, panic = check(books, *given)
        return judged, panic | ((judged["seen"] == 2) & (torch.arange(len(panic)) == 0))

    monkeypatch.setattr(governor, "check", panics)
    _, usual = rollout_of()
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    _, rollout = rollout_of()
    assert rollout["next", "terminated"][0].any()
    assert rollout["components"].isfinite().all()
    assert all(torch.equal(part, usual[name]) for name, part in rollout.items(True, True))


def test_a_policy_may_return_no_more_than_its_actions() -> None:
    env = build_env(tiny_config(n_envs=2))
    wait = torch.zeros(2, 4, dtype=torch.int64)
    (rollout,) = BatchFirstCollector(env, lambda td: TensorDict({"action": wait}, td.batch_size), rollouts=1)
    assert rollout["observation"].isfinite().all()
    assert not rollout["action"].any()


def test_only_legal_edges_happen_and_they_are_logged(tmp_path) -> None:
    _, events = run(tmp_path / "a", n_episodes=8, max_epochs=12)
    kinds = Counter(event["type"] for event in events)
    assert kinds["germinated"] > 0
    assert kinds["stage_changed"] > 0
    assert kinds["epoch"] == 8 * 12
    assert "refused" not in kinds
    for event in events:
        if event["type"] == "stage_changed":
            before, after = Stage[event["data"]["before"]], Stage[event["data"]["after"]]
            path = [before, Stage.GERMINATED, Stage.TRAINING] if before is Stage.DORMANT else [before, after]
            assert path[-1] is after
            assert all(b in TRANSITIONS[a] for a, b in pairwise(path)), event


def test_summary_and_log_agree(tmp_path) -> None:
    summary, events = run(tmp_path / "a")
    last = [event["data"] for event in events if event["type"] == "rollout"][-1]
    assert summary["validation_accuracy"] == pytest.approx(sum(last["validation_accuracy"]) / 4)
    assert summary["seeds_planted"] == sum(event["type"] == "germinated" for event in events)
    assert summary["seeds_culled"] == sum(event["type"] == "culled" for event in events)
    assert summary["env_epochs"] == 64
    assert 0.0 <= summary["test_accuracy"] <= 100.0


def test_train_takes_the_configuration_fields() -> None:
    assert set(TrainingConfig().to_train_kwargs()) <= set(inspect.signature(train).parameters)


def test_the_five_lines_of_the_readme() -> None:
    config = TrainingConfig(task="tiny", slots=["early", "mid", "late"], n_envs=2, max_epochs=3)
    env = build_env(config)
    policy = build_controller(config, env)
    learner = build_learner(config, policy)
    before = [p.clone() for p in policy.parameters()]
    for rollout in BatchFirstCollector(env, policy, rollouts=2):
        metrics = learner.learn(rollout)
        assert metrics["updates"] == config.ppo_updates_per_batch
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_the_learner_keeps_its_statistics_beside_the_weights() -> None:
    """Numbers on another device would be divided by in another way, so a resumed run would differ."""
    config = tiny_config()
    policy = build_controller(config, build_env(config))
    learner = build_learner(config, policy.to("meta"))
    assert {leaf.device.type for leaf in learner.rewards.values()} == {"meta"}
