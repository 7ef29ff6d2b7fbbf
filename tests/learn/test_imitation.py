"""A policy that learns from a teacher first: the loss, who acts, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchrl.envs.utils import ExplorationType

from engine import run, tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.control.policy import RecurrentPolicy
from esper.control.taught import TaughtPolicy
from esper.learn.collector import BatchFirstCollector
from esper.learn.losses import factored_clip_objective, imitation_objective
from esper.run import acting, build_learner
from esper.seeds.actions import BLEND, BLUEPRINT, OP, RELEVANT, SLOT, Op

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


def test_every_op_of_a_teacher_counts_alike() -> None:
    """Of ten steps eight wait, one plants, one keeps: each is a third of what the op head is judged by, and planting
    and keeping are half each of the slot's. Critic and entropy are those of PPO."""
    generator = torch.Generator().manual_seed(0)
    op = torch.tensor([Op.WAIT] * 4 + [Op.GERMINATE] + [Op.WAIT] * 4 + [Op.FOSSILIZE]).reshape(2, 5)
    relevant = RELEVANT[op]
    log_prob, entropy = -torch.rand(2, 5, 4, generator=generator), torch.rand(2, 5, 4, generator=generator)
    log_prob.requires_grad_()
    value, old, target = torch.randn(3, 2, 5, generator=generator)
    shared = {"value_clip": 0.3, "value_coef": 0.7, "entropy_coef": 0.1}
    found = imitation_objective(log_prob, entropy, relevant, op, value, old, target, **shared)
    wait, plant, keep = (op == kind for kind in (Op.WAIT, Op.GERMINATE, Op.FOSSILIZE))
    means = [[log_prob[..., head][steps].mean() for steps in (wait, plant, keep)] for head in range(4)]
    slot, blueprint, blend = (means[head] for head in (SLOT, BLUEPRINT, BLEND))
    wanted = sum(means[OP]) / 3 + sum(slot[1:]) / 2 + blueprint[1] + blend[1]
    torch.testing.assert_close(found["loss_objective"], -wanted)
    torch.testing.assert_close(found["log_prob"].sum(), wanted.detach())
    (gradient,) = torch.autograd.grad(found["loss_objective"], log_prob)
    torch.testing.assert_close(gradient[..., OP][plant], torch.tensor([-1 / 3]))
    torch.testing.assert_close(gradient[..., OP][wait], torch.full((8,), -1 / 24))
    assert not gradient[~relevant].any()
    ppo = factored_clip_objective(
        log_prob, log_prob, entropy, relevant, value, value, old, target, clip_ratio=0.2, **shared
    )
    assert all(torch.equal(found[name], ppo[name]) for name in ("loss_critic", "loss_entropy", "entropy", "relevant"))


def test_nothing_done_is_nothing_to_imitate() -> None:
    """A teacher that only waits: heads that no op has used count nothing, and nothing is nan."""
    op = torch.zeros(3, 4, dtype=torch.int64)
    log_prob = torch.full((3, 4, 4), -0.5)
    zeros = torch.zeros(3, 4)
    found = imitation_objective(
        log_prob, log_prob, RELEVANT[op], op, zeros, zeros, zeros, value_clip=None, value_coef=1.0, entropy_coef=0.0
    )
    assert found["log_prob"].tolist() == [0.0, 0.0, 0.0, -0.5]
    assert found["loss_objective"] == 0.5


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
    chosen, likely = [], []
    for rollout in BatchFirstCollector(env, who, rollouts=4, exploration=ExplorationType.MODE):
        chosen.append(rollout["action"])
        taught = learner.imitates
        metrics = learner.learn(rollout)
        assert taught == learner.imitated == (len(chosen) <= 3) == ("log_prob/op" in metrics)
        # There is nothing to compare a teacher's actions with: no ratio, and no early stop by divergence.
        assert taught == ("kl_joint" not in metrics)
        if taught:
            assert metrics["updates"] == 16
            likely.append(metrics["log_prob/op"])
    planted = torch.tensor([0, Op.GERMINATE, Op.GERMINATE, 0, Op.CULL, 0, 0, 0])
    assert torch.equal(chosen[0][..., OP], planted.expand(4, -1))
    assert all(torch.equal(chosen[0], actions) for actions in chosen)
    assert likely[0] < likely[2] < 0


@pytest.mark.parametrize("updates", [1, 4])
def test_a_little_imitation_is_no_lesson_in_waiting(updates: int) -> None:
    """Eight steps of which two plant: from the first updates on planting becomes likelier there, not rarer."""
    config = tiny_config(schedule=SCHEDULE, imitation_rollouts=1, lr=1e-3, ppo_updates_per_batch=updates)
    env = build_env(config)
    policy = build_controller(config, env)
    assert isinstance(policy, RecurrentPolicy)
    learner = build_learner(config, policy)
    (rollout,) = BatchFirstCollector(env, acting(config, env, policy, learner), rollouts=1)

    def planting() -> float:
        with torch.no_grad():
            actions, _ = policy.evaluate(rollout)
        return float(actions.op.probs[:, 1, Op.GERMINATE].mean())

    before = planting()
    learner.learn(rollout)
    assert planting() > before


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
