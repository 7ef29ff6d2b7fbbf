"""Whole runs with their hosts on a GPU: the same decisions as on the CPU, and growth on the device."""

from __future__ import annotations

import pytest

from engine import run, tiny_task

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


@pytest.mark.parametrize("executor", ["stacked", "auto"])
@pytest.mark.parametrize("controller", ["ppo", "random"])
def test_a_run_on_the_gpu_grows(tmp_path, executor: str, controller: str) -> None:
    fields = {"devices": ["cuda:0"], "executor": executor, "controller": controller, "max_epochs": 10}
    summary, events = run(tmp_path / "a", **fields)
    again, same = run(tmp_path / "b", **fields)
    assert summary["seeds_planted"] > 0
    assert summary["weights_digest"] == again["weights_digest"]
    assert events == same
    assert not any(event["type"] == "refused" for event in events)


def test_the_first_decisions_are_those_of_the_cpu(tmp_path) -> None:
    """Keyed draws do not depend on the device: the random controller starts the same way on both."""
    fields = {"controller": "random", "max_epochs": 2, "n_episodes": 4}
    _, on_gpu = run(tmp_path / "gpu", devices=["cuda:0"], **fields)
    _, on_cpu = run(tmp_path / "cpu", **fields)
    first = [
        [
            (e["host"], e["slot"], e["data"]["blueprint"])
            for e in events
            if e["type"] == "germinated" and e["epoch"] == 0
        ]
        for events in (on_gpu, on_cpu)
    ]
    assert first[0] == first[1]
    assert first[0]


def test_hosts_of_a_family_grow_on_the_gpu(tmp_path) -> None:
    """Hosts that differ in whatever a family can draw: what is drawn is on the CPU, what is trained is not."""
    family = {"classes": [2, 3], "train_fraction": [0.5, 1.0], "label_noise": [0.0, 0.3], "host_lr_factor": [0.5, 2.0]}
    summary, _ = run(tmp_path / "a", devices=["cuda:0"], family=family, controller="random", max_epochs=4)
    assert summary["seeds_planted"] > 0


def test_a_policy_on_the_gpu_imitates_a_schedule(tmp_path) -> None:
    schedule = [{"epoch": 1, "op": "germinate", "slot": "early", "blueprint": "norm", "blend": "linear"}]
    fields = {"schedule": schedule, "imitation_rollouts": 1, "devices": ["cuda:0"], "device": "cuda:0"}
    _, events = run(tmp_path / "a", max_epochs=4, **fields)
    planted = [(e["epoch"], e["slot"]) for e in events if e["type"] == "germinated" and e["episode"] == 0]
    assert planted == [(1, "early")] * 4


def test_the_policy_may_live_on_the_gpu(tmp_path) -> None:
    summary, _ = run(tmp_path / "a", devices=["cuda:0"], device="cuda:0", n_episodes=4, max_epochs=4)
    assert summary["env_epochs"] == 16
