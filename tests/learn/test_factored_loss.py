"""The objective against TorchRL's own clip loss, and what the loss module promises."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Module
from torch import nn
from torchrl.objectives import ClipPPOLoss, LossModule

from esper.control.distributions import ActionMasks, FactoredActions
from esper.control.policy import RecurrentPolicy
from esper.keys import root
from esper.learn.losses import FactoredPPOLoss, factored_clip_objective
from esper.learn.update import PPOSettings, ppo_update, with_advantages
from esper.seeds.actions import OP
from learn.learning_tasks import Bandit, Memory, collect

STEPS, FEATURES = 64, 5


@pytest.fixture
def single_head():
    """An actor, a critic and stored steps of a single choice among four."""
    torch.manual_seed(0)
    actor, critic = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, 1)
    rollout = TensorDict({"observation": torch.randn(STEPS, FEATURES)}, batch_size=[STEPS])
    rollout["action"] = torch.randint(4, (STEPS,))
    rollout["action_log_prob"] = torch.log_softmax(torch.randn(STEPS, 4), -1)[torch.arange(STEPS), rollout["action"]]
    rollout["advantage"] = torch.randn(STEPS, 1)
    rollout["value_target"] = 3 * torch.randn(STEPS, 1)
    rollout["state_value"] = torch.randn(STEPS, 1)
    return actor, critic, rollout


def ours(actor, critic, rollout, value_clip):
    """Our objective on the same numbers: the op head relevant everywhere, the other heads nowhere."""
    only_op = (torch.arange(4) == OP).expand(STEPS, 4)
    logits = nn.functional.pad(actor(rollout["observation"]).unsqueeze(1), (0, 1)).expand(STEPS, 4, 5)
    free = torch.ones(STEPS, 5, dtype=torch.bool)
    masks = ActionMasks(op=free[:, :4], slot=free[:, None, :3].expand(STEPS, 4, 3), blueprint=free, blend=free[:, :3])
    action = torch.zeros(STEPS, 4, dtype=torch.int64)
    action[:, OP] = rollout["action"]
    terms = FactoredActions(logits, masks).head_terms(action)
    old = torch.zeros(STEPS, 4)
    old[:, OP] = rollout["action_log_prob"]
    return factored_clip_objective(
        terms.log_prob,
        old,
        terms.entropy,
        only_op,
        rollout["advantage"].squeeze(-1),
        critic(rollout["observation"]).squeeze(-1),
        rollout["state_value"].squeeze(-1),
        rollout["value_target"].squeeze(-1),
        clip_ratio=0.2,
        value_clip=value_clip,
        value_coef=2.0,
        entropy_coef=0.01 * math.log(4),
    )


@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_one_head_equals_the_clip_loss_of_torchrl(single_head, value_clip):
    actor, critic, rollout = single_head
    policy = ProbabilisticTensorDictSequential(
        Module(actor, in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )
    oracle = ClipPPOLoss(
        policy,
        Module(critic, in_keys=["observation"], out_keys=["state_value"]),
        clip_epsilon=0.2,
        entropy_coeff=0.01,
        critic_coeff=1.0,
        loss_critic_type="l2",
        clip_value=value_clip,
    )
    oracle.set_keys(sample_log_prob="action_log_prob")
    expected, got = oracle(rollout.clone()), ours(actor, critic, rollout, value_clip)
    parameters = [*actor.parameters(), *critic.parameters()]
    for name in ("loss_objective", "loss_critic", "loss_entropy"):
        torch.testing.assert_close(got[name], expected[name].sum(), rtol=1e-5, atol=1e-6)
    total = sum(expected[name].sum() for name in ("loss_objective", "loss_critic", "loss_entropy"))
    wanted = torch.autograd.grad(total, oracle.parameters())
    gradients = torch.autograd.grad(sum(got[n] for n in got if n.startswith("loss_")), parameters)
    by_shape = {tuple(g.shape): g for g in wanted}
    assert len(by_shape) == len(gradients)
    for gradient in gradients:
        torch.testing.assert_close(gradient, by_shape[tuple(gradient.shape)], rtol=1e-4, atol=1e-6)
    assert got["clip_fraction"][OP].item() == pytest.approx(expected["clip_fraction"].item(), abs=1e-6)
    assert (got["clip_fraction"][:OP] == 0).all()


def test_diagnostics_by_hand():
    log_ratio = torch.tensor([[0.0, 0.0, 0.0, 0.5], [0.3, 9.0, 9.0, 0.0]], requires_grad=True)
    relevant = torch.tensor([[False, False, False, True], [True, False, False, True]])
    zero = torch.zeros(2)
    got = factored_clip_objective(
        log_ratio,
        torch.zeros(2, 4),
        torch.tensor([[0.9, 0.9, 0.9, 0.4], [0.6, 0.9, 0.9, 0.2]]),
        relevant,
        zero,
        zero,
        zero,
        zero,
        clip_ratio=0.2,
        value_clip=10.0,
        value_coef=0.5,
        entropy_coef=1.0,
        entropy_weights=torch.tensor([2.0, 1.0, 1.0, 1.0]),
    )
    drift = [math.exp(x) - 1 - x for x in (0.3, 0.5)]
    assert got["kl"].tolist() == pytest.approx([drift[0], 0, 0, drift[1] / 2], abs=1e-6)
    assert got["kl_joint"].item() == pytest.approx(sum(drift) / 2, abs=1e-6)
    assert got["clip_fraction"].tolist() == [1.0, 0.0, 0.0, 0.5]
    assert got["ratio_max"].tolist() == pytest.approx([math.exp(0.3), 1, 1, math.exp(0.5)])
    assert got["ratio_min"].tolist() == [1.0] * 4
    assert got["entropy"].tolist() == pytest.approx([0.6, 0.0, 0.0, 0.3])
    assert got["loss_entropy"].item() == pytest.approx(-(2 * 0.6 + 0.3))
    assert not any(v.requires_grad for name, v in got.items() if not name.startswith("loss_"))


def test_value_loss_has_the_same_half_with_and_without_clipping():
    zero, heads = torch.zeros(1), torch.zeros(1, 4)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    by_clip = {
        clip: factored_clip_objective(
            heads,
            heads,
            heads,
            everywhere,
            zero,
            torch.tensor([3.0]),
            torch.tensor([0.0]),
            torch.tensor([1.0]),
            clip_ratio=0.2,
            value_clip=clip,
            value_coef=0.5,
            entropy_coef=0.0,
        )["loss_critic"].item()
        for clip in (None, 10.0, 0.5)
    }
    assert by_clip == pytest.approx({None: 0.25 * 4.0, 10.0: 0.25 * 4.0, 0.5: 0.25 * 4.0})
    near = factored_clip_objective(
        heads,
        heads,
        heads,
        everywhere,
        zero,
        torch.tensor([1.0]),
        torch.tensor([0.0]),
        torch.tensor([1.0]),
        clip_ratio=0.2,
        value_clip=0.5,
        value_coef=0.5,
        entropy_coef=0.0,
    )["loss_critic"].item()
    assert near == pytest.approx(0.25 * 0.25)


@pytest.mark.parametrize("task", [Bandit, Memory])
def test_frozen_weights_mean_ratio_one_and_no_divergence(task):
    env = task(1)
    policy = RecurrentPolicy(env.features, 32, seed=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(3):
        ppo_update(policy, optimizer, collect(env, policy), PPOSettings(), entropy_coef=0.01, key=root(0))
    loss = FactoredPPOLoss(policy)
    outputs = loss(with_advantages(policy, collect(env, policy), PPOSettings()))
    assert (outputs["ratio_max"] - 1).abs().max() <= 1e-5
    assert (outputs["ratio_min"] - 1).abs().max() <= 1e-5
    assert outputs["kl"].max() <= 1e-6
    assert outputs["kl_joint"] <= 1e-6
    assert (outputs["clip_fraction"] == 0).all()


def test_the_entropy_coefficient_may_be_a_tensor():
    env = Memory(0)
    policy = RecurrentPolicy(env.features, 16, seed=0)
    prepared = with_advantages(policy, collect(env, policy), PPOSettings())
    results = []
    for coefficient in (0.03, torch.tensor(0.03)):
        outputs = FactoredPPOLoss(policy, entropy_coef=coefficient)(prepared)
        gradients = torch.autograd.grad(outputs["loss_entropy"], policy.heads.parameters())
        results.append([*outputs.values(), *gradients])
    assert all(torch.equal(number, tensor) for number, tensor in zip(*results, strict=True))


def test_the_loss_module_reads_and_writes_what_it_declares():
    env = Memory(0)
    policy = RecurrentPolicy(env.features, 16, seed=0)
    prepared = with_advantages(policy, collect(env, policy), PPOSettings())
    prepared.rename_key_("advantage", "credit")
    loss = FactoredPPOLoss(policy)
    assert isinstance(loss, LossModule)
    loss.set_keys(advantage="credit")
    outputs = loss(prepared.select(*loss.in_keys))
    assert set(outputs.keys()) == set(loss.out_keys)
    assert {p.data_ptr() for p in loss.parameters()} == {p.data_ptr() for p in policy.parameters()}
    for missing in loss.in_keys:
        with pytest.raises(KeyError):
            loss(prepared.select(*loss.in_keys).exclude(missing))
