"""The learner on a CUDA device."""

import copy

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper.control.policy import RecurrentPolicy
from esper.control.recorded import RecordedPolicy
from esper.keys import root
from esper.learn.losses import FactoredPPOLoss
from esper.learn.update import PPOSettings, ppo_update, with_advantages
from learn.learning_tasks import Memory, collect

pytestmark = pytest.mark.cuda


def test_one_update_on_a_gpu_agrees_with_the_cpu():
    env = Memory(0)
    policy = RecurrentPolicy(env.features, 32, seed=0)
    rollout = collect(env, policy)
    rollout["is_init"][::3, 2] = True
    metrics = {}
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(policy).to(device)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        settings = PPOSettings(ppo_updates_per_batch=2)
        metrics[device] = ppo_update(twin, optimizer, rollout.to(device), settings, entropy_coef=0.01, key=root(0))
    assert metrics["cuda"] == pytest.approx(metrics["cpu"], rel=1e-2, abs=1e-4)


def test_steps_and_rows_agree_on_a_gpu():
    env = Memory(0)
    policy = RecurrentPolicy(env.features, 32, seed=0)
    rollout = collect(env, policy).to("cuda")
    policy = policy.to("cuda")
    steps = torch.stack([policy(rollout[:, t].clone())["action_log_prob"] for t in range(env.steps)], 1)
    rollout["action"] = torch.stack([policy(rollout[:, t].clone())["action"] for t in range(env.steps)], 1)
    rollout["action_log_prob"] = steps.detach()
    outputs = FactoredPPOLoss(policy)(with_advantages(policy, rollout, PPOSettings()))
    assert (outputs["ratio_max"] - 1).abs().max() <= 1e-5
    assert (outputs["ratio_min"] - 1).abs().max() <= 1e-5


def test_a_recorded_step_has_the_same_bits_whatever_the_weights() -> None:
    """In both modes by turns, with other weights and other statistics at every step."""
    env = Memory(0)
    policy = RecurrentPolicy(env.features, 32, seed=0)
    rollout = collect(env, policy).to("cuda")
    policy = policy.to("cuda")
    recorded, drawn = RecordedPolicy(policy), 0
    for t in range(env.steps):
        actions = []
        for exploration in (ExplorationType.RANDOM, ExplorationType.MODE):
            with set_exploration_type(exploration):
                plain, replayed = policy(rollout[:, t].clone()), recorded(rollout[:, t].clone())
            for key in policy.out_keys:
                assert torch.equal(plain[key], replayed[key]), (t, exploration, key)
            actions.append(replayed["action"])
        drawn += int(not torch.equal(*actions))
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        policy.load_statistics(policy.statistics.apply(lambda value: value + 1.0))
    assert drawn > 0
    few = policy(rollout[:2, 0].clone())
    assert torch.equal(few["action"], recorded(rollout[:2, 0].clone())["action"])
