"""Every controller decides through the same engine; growth really happens where the controller grows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from engine import run, tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.events import load
from esper.learn.collector import BatchFirstCollector
from esper.seeds.actions import HEADS
from esper.train import main


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


def test_never_grows(tmp_path) -> None:
    summary, events = run(tmp_path / "a", controller="never", n_episodes=4)
    assert summary["seeds_planted"] == 0
    assert summary["parameters"] == summary["host_parameters"]
    assert all(set(e["data"]["ops"]) == {"WAIT"} for e in events if e["type"] == "rollout")


def test_random_controller_is_legal_and_keyed(tmp_path) -> None:
    first, events = run(tmp_path / "a", controller="random", n_episodes=4)
    again, _ = run(tmp_path / "b", controller="random", n_episodes=4)
    assert first["weights_digest"] == again["weights_digest"]
    assert first["seeds_planted"] > 0
    assert not any(event["type"] == "refused" for event in events)


def test_schedule_does_what_it_says(tmp_path) -> None:
    schedule = [
        {"epoch": 1, "op": "germinate", "slot": "early", "blueprint": "conv_expand", "blend": "linear"},
        {"epoch": 4, "op": "cull", "slot": "early"},
        {"epoch": 5, "op": "fossilize", "slot": "mid"},
    ]
    _, events = run(tmp_path / "a", controller="schedule", schedule=schedule, n_episodes=4)
    planted = [e for e in events if e["type"] == "germinated"]
    assert {(e["epoch"], e["slot"], e["data"]["blueprint"]) for e in planted} == {(1, "early", "conv_expand")}
    assert {(e["epoch"], e["slot"]) for e in events if e["type"] == "culled"} == {(4, "early")}
    assert sum(e["type"] == "refused" for e in events) == 4
    assert len(planted) == 4


def test_the_heuristic_grows_in_several_slots_and_keeps_what_pays(tmp_path: Path) -> None:
    """On real data, from the command line; few samples and a constant rate make hosts stand still early."""
    hard = "--train-samples 128 --max-epochs 50 --gates permissive --lr-schedule constant"
    size = "--task digits --n-envs 2 --n-episodes 2 --seed 1"
    flags = f"--controller heuristic --slots early mid late {size} {hard} --run-dir {tmp_path / 'run'}"
    assert main(flags.split()) == 0
    events = load(tmp_path / "run")
    planted = Counter(event["slot"] for event in events if event["type"] == "germinated")
    assert len(planted) > 1
    assert any(event["type"] == "fossilized" for event in events)
    assert not any(event["type"] == "refused" for event in events)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_learner_plants_in_several_slots_and_learns_with_every_head(tmp_path: Path, amp: str) -> None:
    _, events = run(tmp_path / "a", controller="ppo", amp=amp, n_episodes=4)
    assert len({event["slot"] for event in events if event["type"] == "germinated"}) > 1
    (update,) = (event["data"] for event in events if event["type"] == "update")
    assert all(update[f"grad_norm/{part}"] > 0 for part in (*HEADS, "value", "features", "memory"))


def test_carry_travels_and_starts_afresh() -> None:
    """A scripted controller with memory remembers within an episode and forgets between episodes."""
    config = tiny_config(controller="heuristic", n_envs=2, max_epochs=4)
    env = build_env(config)
    policy = build_controller(config, env)
    rollouts = list(BatchFirstCollector(env, policy, rollouts=2))
    for rollout in rollouts:
        losses = rollout["carry_since_loss"]
        assert losses.shape == (2, 4)
        assert torch.equal(losses[:, 0], torch.zeros_like(losses[:, 0]))
        assert bool((losses[:, 1:] > 0).all())
