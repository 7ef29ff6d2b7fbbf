"""`GrowthEnv` against TorchRL's own checks, and the order of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from engine import tiny_config, tiny_task
from esper.build import build_env
from esper.config import TrainingConfig
from esper.environment.env import GrowthEnv
from esper.environment.rewards import COMPONENTS
from esper.environment.signals import SignalTracker
from esper.growth.executors.stacked import StackedExecutor
from esper.seeds.actions import Op
from esper.seeds.stages import Stage


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


def step(env, action: list[int]):
    td = env.fake_tensordict()
    td["action"] = torch.tensor(action).expand(env.batch_size[0], 4).clone()
    return env.step(td)["next"]


@pytest.mark.parametrize("fields", [{}, {"use_telemetry": False}, {"slots": ["mid"]}, {"devices": ["cpu", "cpu"]}])
def test_specs(fields) -> None:
    env = build_env(tiny_config(n_envs=2, max_epochs=3, **fields))
    check_env_specs(env)
    assert env.rollout(7, break_when_any_done=False)["observation"].shape[-1] == (
        80 if "use_" not in str(fields) else 50
    )


def test_reset_observes_without_training() -> None:
    env = build_env(tiny_config(n_envs=2))
    first = env.reset()
    weights = env.growth()[0]["host", "params"].clone()
    fresh = build_env(tiny_config(n_envs=2))
    fresh.reset()
    assert env.epoch == 0
    assert bool(first["is_init"].all())
    assert (env.growth()[0]["host", "params"] == fresh.growth()[0]["host", "params"]).all()
    step(env, [0, 0, 0, Op.WAIT])
    assert not (env.growth()[0]["host", "params"] == weights).all()


def test_a_seed_is_planted_before_the_epoch_and_ages_with_it() -> None:
    env = build_env(tiny_config(n_envs=2))
    env.reset()
    seen = step(env, [1, 0, 0, Op.GERMINATE])
    records = env.records()
    assert records["stage"][:, 1].tolist() == [Stage.TRAINING] * 2
    assert records["age"][:, 1].tolist() == [1, 1]
    assert not bool(seen["mask_slot"][:, Op.GERMINATE, 1].any())
    assert bool(seen["mask_slot"][:, Op.CULL, 1].all())
    step(env, [1, 0, 0, Op.CULL])
    assert env.records()["stage"][:, 1].tolist() == [Stage.DORMANT] * 2


def test_a_slot_the_run_does_not_have_is_refused() -> None:
    env = build_env(tiny_config(n_envs=2, slots=["mid"]))
    env.reset()
    reward = step(env, [0, 0, 0, Op.GERMINATE])["components"][:, COMPONENTS.index("action")]
    assert env.records()["stage"].eq(Stage.DORMANT).all()
    assert bool((reward < 0).all())


def test_the_last_step_truncates_and_a_new_episode_has_new_hosts() -> None:
    env = build_env(tiny_config(n_envs=2, max_epochs=2))
    env.reset()
    before = env.growth()[0]["key"].clone()
    assert not bool(step(env, [0, 0, 0, 0])["done"].any())
    last = step(env, [0, 0, 0, 0])
    assert bool(last["truncated"].all())
    assert not bool(last["terminated"].any())
    env.reset()
    assert env.episode == 1
    assert not bool((env.growth()[0]["key"] == before).any())


def test_a_terminal_end_is_worth_nothing_afterwards() -> None:
    env = build_env(tiny_config(n_envs=2, max_epochs=2, episode_end="terminal"))
    env.reset()
    assert not bool(step(env, [0, 0, 0, 0])["terminated"].any())
    last = step(env, [0, 0, 0, 0])
    assert bool(last["terminated"].all())
    assert bool(last["done"].all())
    assert not bool(last["truncated"].any())


@pytest.mark.parametrize("planted", [0, 3])
def test_what_was_measured_last_is_what_is_left_behind(planted: int) -> None:
    """A seed whose probation would end with the episode keeps its place, its price and its share of the accuracy."""
    env = build_env(tiny_config(n_envs=2, max_epochs=13))
    seen: list[TensorDict] = []
    env.observer = seen.append
    env.reset()
    for epoch in range(13):
        step(env, [2, 0, 0, Op.GERMINATE if epoch == planted else Op.WAIT])
    growth = env.finished_growth()
    scores = env.backend.evaluate(growth, "validation")
    accuracy = 100.0 * scores["correct"][:, -1] / scores["seen"]
    assert torch.equal(accuracy.float(), seen[-1]["metrics", "val_accuracy"])
    assert torch.equal(growth[0]["slots", "parameters"], seen[-1]["lived", "parameters"])
    assert bool((growth[0]["slots", "parameters"] > 0).any())


def test_observers_are_told_while_the_next_epoch_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its work is issued and before it is waited for; of the last epoch at once, of an episode left early too, and
    of an epoch before one that fails."""
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    env = build_env(tiny_config(n_envs=2, max_epochs=3, executor="stacked"))
    order: list[tuple[str, int]] = []
    env.observer = lambda result: order.append(("told", env.epoch))
    issue, wait = StackedExecutor.begin_evaluation, StackedExecutor.finish_evaluation
    env.reset()
    monkeypatch.setattr(
        StackedExecutor, "begin_evaluation", lambda *a: (order.append(("issued", env.epoch + 1)), issue(*a))[1]
    )
    monkeypatch.setattr(
        StackedExecutor, "finish_evaluation", lambda *a: (order.append(("waited", env.epoch + 1)), wait(*a))[1]
    )
    for _ in range(3):
        step(env, [0, 0, 0, Op.WAIT])
    assert order == [
        *[("issued", 1), ("waited", 1)],
        *[("issued", 2), ("told", 1), ("waited", 2)],
        *[("issued", 3), ("told", 2), ("waited", 3), ("told", 3)],
    ]
    monkeypatch.undo()
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    env.reset()
    step(env, [0, 0, 0, Op.WAIT])
    env.reset()
    assert order[9:] == [("told", 1)]
    step(env, [0, 0, 0, Op.WAIT])
    monkeypatch.setattr(StackedExecutor, "begin", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(env, [0, 0, 0, Op.WAIT])
    assert order[10:] == [("told", 1)]


def test_on_a_cpu_observers_are_told_at_once() -> None:
    env = build_env(tiny_config(n_envs=2, max_epochs=3))
    told: list[int] = []
    env.observer = lambda result: told.append(env.epoch)
    env.reset()
    for epoch in (1, 2, 3):
        step(env, [0, 0, 0, Op.WAIT])
        assert told[-1] == len(told) == epoch


def test_with_gpus_a_step_is_paid_at_once_unless_it_may_be_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    now, later = (build_env(tiny_config(n_envs=2)) for _ in range(2))
    for env in (now, later):
        env.reset()
    action = [1, 0, 0, Op.GERMINATE]
    paid = step(now, action)
    with later.paid_later():
        owed = step(later, action)
    assert paid["reward"].isfinite().all()
    assert owed["reward"].isnan().all()
    assert owed["components"].isnan().all()
    later.settle()
    assert torch.equal(owed["reward"], paid["reward"])
    assert torch.equal(owed["components"], paid["components"])
    assert step(later, action)["reward"].isfinite().all(), "that was for one block"


def test_without_gpus_nothing_is_owed() -> None:
    env = build_env(tiny_config(n_envs=2))
    env.reset()
    with env.paid_later():
        assert step(env, [0, 0, 0, Op.WAIT])["reward"].isfinite().all()


def test_training_is_measured_over_all_its_samples() -> None:
    # Without batch statistics, and with weights that stay as they are, training is a pass over the training split.
    told: list[TensorDict] = []
    config = TrainingConfig(task="pydocs", n_envs=2, n_episodes=2, train_samples=64, batch_size=16, max_epochs=5)
    env = build_env(config, told.append)
    env.reset()
    for rate in env.growth()[0]["rates"].values():
        rate.zero_()
    scores = env.backend.evaluate(env.growth(), "train")
    step(env, [0, 0, 0, Op.WAIT])
    metrics, seen = told[0]["metrics"], scores["seen"]
    torch.testing.assert_close(metrics["train_loss"], (scores["loss"] / seen).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["train_accuracy"], 100.0 * scores["correct"][:, -1] / seen, rtol=1e-5, atol=0)
    assert bool((metrics["train_loss"] != metrics["val_loss"]).all())


def test_a_host_is_said_to_be_stabilized_once() -> None:
    told: list[TensorDict] = []
    env = build_env(tiny_config(n_envs=2, max_epochs=8), told.append)
    env.reset()
    # From now on any loss that does not explode is a stable one.
    env.settings = replace(env.settings, tracker=SignalTracker(stabilization_threshold=10.0))
    for _ in range(6):
        step(env, [0, 0, 0, Op.WAIT])
    said = torch.stack([result["stabilized"] for result in told])
    held = torch.stack([result["tracker", "stabilized"] for result in told])
    assert held[-1].all()
    assert said.sum(0).tolist() == [1, 1]
    assert torch.equal(said.cumsum(0).bool(), held)
