"""A policy that learns from a teacher first: the loss, who acts, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.envs.utils import ExplorationType

from engine import run, tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.control.policy import RecurrentPolicy
from esper.control.taught import TaughtPolicy
from esper.learn.collector import BatchFirstCollector
from esper.learn.losses import factored_clip_objective
from esper.run import acting, build_learner
from esper.seeds.actions import OP, Op

SCHEDULE = [
    {"epoch": 1, "op": "germinate", "slot": "mid", "blueprint": "conv_light", "blend": "sigmoid"},
    {"epoch": 1, "op": "germinate", "slot": "early", "blueprint": "norm", "blend": "linear"},
    {"epoch": 4, "op": "cull", "slot": "mid"},
]
"""One step an epoch, as soon as it is possible: the second comes in the epoch after the first."""


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with tiny_task():
        yield


def losses(log_prob: Tensor, advantage: Tensor, relevant: Tensor, **how: Any) -> dict[str, Tensor]:
    zeros = torch.zeros(advantage.shape)
    old = log_prob.detach() - 0.3
    entropy = torch.full_like(log_prob, 0.5)
    coefficients = {"clip_ratio": 0.2, "value_clip": None, "value_coef": 1.0, "entropy_coef": 0.1}
    return factored_clip_objective(
        log_prob, old, entropy, relevant, advantage, zeros, zeros, zeros + 2.0, **coefficients, **how
    )


def test_the_objective_of_imitation_is_the_likelihood_of_what_was_done() -> None:
    """Mean over the steps where a head matters, whatever the advantage; value and entropy as ever."""
    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(6, 5, 4, generator=generator)
    log_prob.requires_grad_()
    relevant = torch.rand(6, 5, 4, generator=generator) < 0.5
    advantage = torch.randn(6, 5, generator=generator)
    found = losses(log_prob, advantage, relevant, imitate=True)
    by_head = [log_prob[..., h][relevant[..., h]].mean() for h in range(4)]
    torch.testing.assert_close(found["loss_objective"], -torch.stack(by_head).sum())
    improved = losses(log_prob, advantage, relevant)
    assert not torch.isclose(found["loss_objective"], improved["loss_objective"])
    assert torch.equal(found["loss_critic"], improved["loss_critic"])
    assert torch.equal(found["loss_entropy"], improved["loss_entropy"])
    (gradient,) = torch.autograd.grad(found["loss_objective"], log_prob)
    torch.testing.assert_close(gradient, -relevant.float() / relevant.flatten(0, 1).sum(0))


def test_a_policy_comes_to_act_like_its_teacher() -> None:
    """After three rollouts its likeliest actions are the teacher's, on hosts that it has not seen."""
    config = tiny_config(
        schedule=SCHEDULE, imitation_rollouts=3, n_episodes=16, lr=1e-2, ppo_updates_per_batch=16, entropy_coef=0.01
    )
    env = build_env(config)
    policy = build_controller(config, env)
    assert isinstance(policy, RecurrentPolicy)
    learner = build_learner(config, policy)
    who = acting(config, env, policy, learner)
    assert isinstance(who, TaughtPolicy)
    ops, chosen = [], []
    for rollout in BatchFirstCollector(env, who, rollouts=4, exploration=ExplorationType.MODE):
        ops.append(rollout["action"][..., OP])
        chosen.append(rollout["action"])
        assert learner.imitates == (len(ops) <= 3)
        assert learner.learn(rollout)["updates"] == 16 or not learner.imitates
    planted = torch.tensor([0, Op.GERMINATE, Op.GERMINATE, 0, Op.CULL, 0, 0, 0])
    assert all(torch.equal(op, planted.expand(4, -1)) for op in ops)
    assert all(torch.equal(chosen[-1], actions) for actions in chosen)


def test_without_a_teacher_nothing_is_like_that() -> None:
    """What makes the test above a test."""
    config = tiny_config()
    env = build_env(config)
    policy = build_controller(config, env)
    (rollout,) = BatchFirstCollector(env, policy, rollouts=1, exploration=ExplorationType.MODE)
    assert not torch.equal(rollout["action"][:, 1, OP], torch.full((4,), int(Op.GERMINATE)))


def test_a_run_begins_with_what_its_schedule_does(tmp_path: Path) -> None:
    fields = {"schedule": SCHEDULE, "imitation_rollouts": 1}
    _, events = run(tmp_path / "a", **fields)
    done = [
        {
            (e["epoch"], e["type"], e["slot"])
            for e in events
            if e["episode"] == episode and e["slot"] in ("early", "mid")
        }
        for episode in (0, 1)
    ]
    wanted = {(1, "germinated", "mid"), (2, "germinated", "early"), (4, "culled", "mid")}
    assert wanted <= done[0]
    assert {what for what in done[0] if what[1] in ("germinated", "culled")} == wanted
    assert not wanted <= done[1]
    _, alone = run(tmp_path / "b")
    planted = [[e for e in found if e["type"] == "germinated" and e["episode"] == 0] for found in (events, alone)]
    assert planted[0] != planted[1]
