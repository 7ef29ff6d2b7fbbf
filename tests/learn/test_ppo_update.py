"""One rollout in, a better policy out, and nothing at all when something is not finite."""

import copy

import pytest
import torch

from esper.control.policy import RecurrentPolicy
from esper.keys import root
from esper.learn.recorded import RecordedGradients, differentiated
from esper.learn.update import (
    PPOSettings,
    eager_gradients,
    explained_variance,
    ppo_loss,
    ppo_update,
    with_advantages,
)
from esper.seeds.actions import HEADS
from learn.learning_tasks import Bandit, Memory, collect

DEFAULT = PPOSettings()


@pytest.fixture
def learner():
    """A policy, its optimiser after one update, and a fresh rollout."""
    env = Memory(2)
    policy = RecurrentPolicy(env.features, 16, seed=2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    ppo_update(policy, optimizer, collect(env, policy), PPOSettings(), entropy_coef=0.01, key=root(0))
    return policy, optimizer, collect(env, policy)


def snapshot(policy, optimizer):
    return copy.deepcopy((policy.state_dict(), optimizer.state_dict()))


def same(one, other):
    """Bitwise equality of nested state dicts."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def run(learner, settings=DEFAULT, key=0):
    policy, optimizer, rollout = learner
    return ppo_update(policy, optimizer, rollout, settings, entropy_coef=0.01, key=root(key))


def test_every_part_of_the_policy_gets_a_gradient(learner):
    before = {name: p.clone() for name, p in learner[0].named_parameters()}
    metrics = run(learner, PPOSettings(ppo_updates_per_batch=1))
    assert metrics["updates"] == 1
    for part in (*HEADS, "value", "features", "memory"):
        assert metrics[f"grad_norm/{part}"] > 0
    for name, parameter in learner[0].named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_metrics_are_flat_finite_floats(learner):
    metrics = run(learner)
    assert metrics["updates"] == 4
    assert metrics["stopped_early"] == 0
    assert all(isinstance(v, float) and abs(v) < float("inf") for v in metrics.values())
    for name in ("kl", "clip_fraction", "ratio_max", "ratio_min", "entropy", "relevant", "grad_norm"):
        assert {f"{name}/{head}" for head in HEADS} <= metrics.keys()
    assert metrics["ratio_max/op"] > 1 > metrics["ratio_min/op"]
    assert metrics["kl_joint"] > 0


def test_explained_variance_is_that_of_the_rollouts_own_values(learner):
    policy, _, rollout = learner
    target = with_advantages(policy, rollout, DEFAULT)["value_target"]
    residual = (target - rollout["state_value"]).var(unbiased=False) / target.var(unbiased=False)
    assert run(learner)["explained_variance"] == pytest.approx(1 - residual.item(), abs=1e-6)


def test_the_norm_is_reported_before_clipping(learner):
    policy, _, rollout = learner
    plain = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    settings = PPOSettings(ppo_updates_per_batch=1, max_grad_norm=1e-3)
    metrics = ppo_update(policy, plain, rollout, settings, entropy_coef=0.01, key=root(0))
    moved = torch.nn.utils.parameters_to_vector(policy.parameters()).detach() - before
    assert metrics["grad_norm"] > 1e-2
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_divergence_stops_before_the_step(learner):
    """The weights are those after the steps counted, and the step that was refused left no trace."""
    policy, optimizer, rollout = learner
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    twin = copy.deepcopy(policy)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.03)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    metrics = run((policy, optimizer, rollout), PPOSettings(target_kl=0.01, ppo_updates_per_batch=20))
    assert metrics["stopped_early"] == 1
    assert metrics["kl_joint"] > 0.015
    taken = int(metrics["updates"])
    assert 1 <= taken < 20
    run((twin, twin_optimizer, rollout), PPOSettings(target_kl=None, ppo_updates_per_batch=taken))
    assert same(snapshot(policy, optimizer), snapshot(twin, twin_optimizer))


def test_without_a_target_nothing_stops(learner):
    for group in learner[1].param_groups:
        group["lr"] = 0.03
    assert run(learner, PPOSettings(target_kl=None, ppo_updates_per_batch=6))["updates"] == 6


@pytest.mark.parametrize("key", ["observation", "action_log_prob", "state_value", ("next", "reward")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rollout_that_is_not_finite_changes_nothing(learner, key, value):
    policy, optimizer, rollout = learner
    before = snapshot(policy, optimizer)
    rollout[key].view(-1)[7] = value
    metrics = run(learner)
    name = key if isinstance(key, str) else ".".join(key)
    assert metrics == {"updates": 0.0, f"non_finite/{name}": 1.0}
    assert same(before, snapshot(policy, optimizer))


def test_a_loss_that_is_not_finite_changes_nothing(learner):
    policy, optimizer, _ = learner
    with torch.no_grad():
        policy.value[-1].bias.fill_(1e30)
    before = snapshot(policy, optimizer)
    metrics = run(learner)
    assert metrics["updates"] == 0
    assert metrics["non_finite/loss_critic"] == 1
    assert same(before, snapshot(policy, optimizer))


def test_a_gradient_that_is_not_finite_is_named_and_the_steps_before_it_stay(learner):
    policy, optimizer, rollout = learner
    twin = copy.deepcopy(policy)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    calls = []

    def fail_third(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 3 else gradient

    policy.get_parameter("memory.weight_hh").register_hook(fail_third)
    metrics = run(learner)
    assert metrics["updates"] == 2
    assert [name for name in metrics if name.startswith("non_finite")] == ["non_finite/gradient/memory.weight_hh"]
    assert all(p.grad is None for p in policy.parameters())
    run((twin, twin_optimizer, rollout), PPOSettings(ppo_updates_per_batch=2))
    assert same(snapshot(policy, optimizer), snapshot(twin, twin_optimizer))


def test_minibatches_are_keyed_groups_of_hosts(learner):
    policy, optimizer, rollout = learner
    settings = PPOSettings(minibatches=4, ppo_updates_per_batch=2, target_kl=None)
    results = []
    for key in (1, 1, 2):
        twin = copy.deepcopy(policy)
        twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert run((twin, twin_optimizer, rollout), settings, key)["updates"] == 8
        results.append(twin.state_dict())
    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    with pytest.raises(ValueError, match="minibatches is 65; a rollout of 64 hosts"):
        run(learner, PPOSettings(minibatches=65))


@pytest.mark.parametrize("imitate", [False, True])
def test_what_is_recorded_is_what_is_computed_eagerly(learner, imitate):
    """The recorded part on a CPU: to the bit, and without touching the gradients of the weights. It is given what the
    loss says it reads, and nothing else."""
    policy, _, rollout = learner
    settings = PPOSettings(imitate=imitate)
    rows = with_advantages(policy, rollout, settings)
    loss = ppo_loss(policy, settings, torch.tensor(0.03))
    assert ("action_log_prob" in loss.in_keys) == (not imitate)
    outputs, gradients, checks = differentiated(loss, rows.select(*loss.in_keys))
    assert set(outputs.keys()) == set(loss.out_keys)
    assert all(p.grad is None for p in policy.parameters())
    eager = eager_gradients(policy, rows, [], settings, 0.03)
    assert same(dict(outputs.items()), dict(eager.outputs.items()))
    assert same(checks, eager.differentiate())
    assert same(gradients, {name: p.grad for name, p in policy.named_parameters()})
    assert len({gradient.data_ptr() for gradient in gradients.values()}) == len(gradients)


def test_nothing_is_recorded_on_a_cpu(learner):
    policy, optimizer, rollout = learner
    twin = copy.deepcopy(policy)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rollout["is_init"][::3, 2] = True
    options = {"entropy_coef": 0.03, "key": root(0)}
    plain = ppo_update(policy, optimizer, rollout, DEFAULT, **options)
    assert plain == ppo_update(twin, twin_optimizer, rollout, DEFAULT, **options, gradients=RecordedGradients())
    assert same(snapshot(policy, optimizer), snapshot(twin, twin_optimizer))


def test_a_rollout_of_one_step_is_usable():
    env = Bandit(0)
    policy = RecurrentPolicy(env.features, 16, seed=0)
    rollout = collect(env, policy)[:1]
    prepared = with_advantages(policy, rollout, PPOSettings())
    assert prepared["advantage"].item() == pytest.approx(
        (rollout["next", "reward"] - rollout["state_value"]).item(), abs=1e-6
    )
    metrics = ppo_update(
        policy, torch.optim.Adam(policy.parameters()), rollout, PPOSettings(), entropy_coef=0.01, key=root(0)
    )
    assert metrics["updates"] == 4


def test_the_rollout_is_not_changed(learner):
    before = learner[2].clone()
    run(learner)
    assert set(learner[2].keys()) == set(before.keys())
    assert (learner[2] == before).all()


def test_explained_variance():
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target, target) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(3), target) == pytest.approx(0.0)
    assert explained_variance(-target, target) == pytest.approx(-3.0)
    assert explained_variance(torch.zeros(3), torch.ones(3)) == 0.0
