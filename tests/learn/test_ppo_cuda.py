"""The learner on a CUDA device."""

import copy

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper.control.policy import RecurrentPolicy
from esper.control.recorded import RecordedPolicy
from esper.keys import fold, root
from esper.learn.learner import Learner
from esper.learn.losses import FactoredPPOLoss
from esper.learn.normalizers import reward_scale
from esper.learn.recorded import MAX_PROGRAMS, RecordedGradients
from esper.learn.update import PPOSettings, eager_gradients, ppo_update, with_advantages
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


class Trainee:
    """A policy on a GPU with its optimiser; every one starts from the same weights."""

    def __init__(self, gradients, policy: RecurrentPolicy, lr: float = 1e-3) -> None:
        self.policy, self.gradients = copy.deepcopy(policy).to("cuda"), gradients
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr, eps=1e-5, fused=True)

    def update(self, rollout, settings: PPOSettings, index: int) -> dict[str, float]:
        """One update with an entropy coefficient of its own, and other observation statistics after it."""
        options = {"entropy_coef": 0.05 / (1 + index), "key": fold(root(0), index), "gradients": self.gradients}
        metrics = ppo_update(self.policy, self.optimizer, rollout.to("cuda"), settings, **options)
        self.policy.load_statistics(self.policy.statistics.apply(lambda value: value + 0.1))
        return metrics


@pytest.fixture
def rollouts():
    """A policy on the CPU and three of its rollouts, 64 hosts each."""
    env = Memory(0)
    policy = RecurrentPolicy(env.features, 32, seed=0, floors=(0.0, 0.01, 0.01, 0.02))
    return policy, [collect(env, policy) for _ in range(3)]


@pytest.fixture
def evaluations(monkeypatch):
    """A list that grows with every evaluation that Python runs; a replay is none."""
    calls, original = [], RecurrentPolicy.evaluate

    def counted(*given):
        calls.append(1)
        return original(*given)

    monkeypatch.setattr(RecurrentPolicy, "evaluate", counted)
    return calls


def assert_alike(one: Trainee, other: Trainee) -> None:
    """The same weights and moments, within what the order of a sum may change."""
    for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        mine, theirs = one.optimizer.state[a], other.optimizer.state[b]
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("imitate", [False, True])
def test_recorded_gradients_are_the_eager_ones_whatever_the_weights(rollouts, imitate: bool) -> None:
    """With other weights, statistics, rows and entropy coefficients at every evaluation."""
    policy, several = rollouts
    policy, recorded = policy.to("cuda"), RecordedGradients()
    settings = PPOSettings(entropy_weights=(2.0, 1.0, 1.0, 1.0), imitate=imitate)
    for index, rollout in enumerate(several):
        rows = with_advantages(policy, rollout.to("cuda"), settings)
        results = []
        for gradients in (eager_gradients, recorded):
            outputs, differentiate = gradients(policy, rows, [], settings, 0.05 / (1 + index))
            norms, finite = differentiate()
            taken = [p.grad.clone() for p in policy.parameters()]
            results.append([*(v.clone() for v in (*outputs.values(), *norms.values())), *taken])
            assert all(bool(flag) for flag in finite.values())
            assert len({p.grad.data_ptr() for p in policy.parameters()}) == len(taken)
            assert not outputs["loss_objective"].requires_grad
        for eager, replayed in zip(*results, strict=True):
            torch.testing.assert_close(replayed, eager, rtol=1e-5, atol=1e-6)
        policy.zero_grad()
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        policy.load_statistics(policy.statistics.apply(lambda value: value + 0.1))


@pytest.mark.parametrize(("minibatches", "sizes"), [(1, 1), (3, 2)])
def test_recorded_updates_are_the_eager_ones(rollouts, evaluations, minibatches, sizes) -> None:
    """64 hosts in three minibatches are rows of two sizes; a recording of each runs the loss twice."""
    policy, several = rollouts
    settings = PPOSettings(minibatches=minibatches, target_kl=None)
    eager, recorded = Trainee(eager_gradients, policy), Trainee(RecordedGradients(), policy)
    for index, rollout in enumerate(several):
        plain = eager.update(rollout, settings, index)
        evaluations.clear()
        replayed = recorded.update(rollout, settings, index)
        assert len(evaluations) == (2 * sizes if index == 0 else 0)
        assert replayed == pytest.approx(plain, rel=1e-4, abs=1e-6)
        assert replayed["updates"] == 4 * minibatches
        assert all(p.grad is None for p in recorded.policy.parameters())
        assert_alike(recorded, eager)


def test_rows_that_restart_are_not_recorded(rollouts, evaluations) -> None:
    """One host restarts in the first rollout, so that eager steps and recordings take turns, and all in the second."""
    policy, several = rollouts
    several[0]["is_init"][5, 2] = True
    several[1]["is_init"][:, 3] = True
    settings = PPOSettings(minibatches=4, ppo_updates_per_batch=2, target_kl=None)
    eager, recorded = Trainee(eager_gradients, policy), Trainee(RecordedGradients(), policy)
    for index, (rollout, expected) in enumerate(zip(several, (2 + 2, 8, 0), strict=True)):
        plain = eager.update(rollout, settings, index)
        evaluations.clear()
        replayed = recorded.update(rollout, settings, index)
        assert len(evaluations) == expected
        assert replayed == pytest.approx(plain, rel=1e-4, abs=1e-6)
        assert_alike(recorded, eager)


def test_the_oldest_recording_makes_room(rollouts, evaluations) -> None:
    policy, (rollout, *_) = rollouts
    policy, recorded = policy.to("cuda"), RecordedGradients()
    rows = with_advantages(policy, rollout.to("cuda"), PPOSettings())
    for size in (*range(1, MAX_PROGRAMS + 2), MAX_PROGRAMS + 1, 2, 1):
        outputs, _ = recorded(policy, rows[:size], [], PPOSettings(), 0.05)
        eager, _ = eager_gradients(policy, rows[:size], [], PPOSettings(), 0.05)
        torch.testing.assert_close(outputs["loss_critic"], eager["loss_critic"])
    eager_ones, recordings = MAX_PROGRAMS + 4, MAX_PROGRAMS + 2
    assert len(evaluations) == eager_ones + 2 * recordings


def test_refused_updates_leave_everything_as_it_was(rollouts) -> None:
    """Rewards and losses that are not finite; the update after them is the one that would have been."""
    policy, (first, second, _) = rollouts
    trainee, twin = Trainee(RecordedGradients(), policy), Trainee(RecordedGradients(), policy)
    settings = PPOSettings()
    for each in (trainee, twin):
        each.update(first, settings, 0)
    before = copy.deepcopy((trainee.policy.state_dict(), trainee.optimizer.state_dict()["state"]))
    reward = second.clone()
    reward["next", "reward"][3, 1] = float("nan")
    huge = second.clone()
    huge["state_value"][3, 1] = 1e30
    options = {"entropy_coef": 0.05, "key": root(0), "gradients": trainee.gradients}
    for spoiled, source in ((reward, "next.reward"), (huge, "loss_critic")):
        metrics = ppo_update(trainee.policy, trainee.optimizer, spoiled.to("cuda"), settings, **options)
        assert metrics["updates"] == 0
        assert metrics[f"non_finite/{source}"] == 1
        assert all(p.grad is None for p in trainee.policy.parameters())
        weights, moments = trainee.policy.state_dict(), trainee.optimizer.state_dict()["state"]
        assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
        assert all(torch.equal(v, before[1][i][name]) for i, moment in moments.items() for name, v in moment.items())
    assert trainee.update(second, settings, 1) == pytest.approx(twin.update(second, settings, 1), rel=1e-4, abs=1e-6)
    assert_alike(trainee, twin)


def test_divergence_stops_a_recorded_update_before_the_step(rollouts) -> None:
    policy, (rollout, *_) = rollouts
    eager, recorded = Trainee(eager_gradients, policy, lr=0.03), Trainee(RecordedGradients(), policy, lr=0.03)
    settings = PPOSettings(target_kl=0.01, ppo_updates_per_batch=20)
    plain, replayed = eager.update(rollout, settings, 0), recorded.update(rollout, settings, 0)
    assert replayed["stopped_early"] == plain["stopped_early"] == 1
    assert 1 <= replayed["updates"] == plain["updates"] < 20
    assert_alike(recorded, eager)


def test_a_learner_that_goes_back_does_the_same_again(rollouts) -> None:
    """What was recorded serves the weights and moments that were loaded."""
    policy, (first, second, _) = rollouts
    trainee = Trainee(RecordedGradients(), policy)
    rewards = reward_scale().to("cuda")
    learner = Learner(trainee.policy, trainee.optimizer, rewards, PPOSettings(), root(0), 1.0)
    trainee.gradients = learner.gradients
    trainee.update(first, learner.settings, 0)
    before = learner.state()
    once = trainee.update(second, learner.settings, 1)
    after = learner.state()
    learner.load_state(before)
    assert trainee.update(second, learner.settings, 1) == pytest.approx(once, rel=1e-4, abs=1e-6)
    for name, weight in learner.state()["weights"].items():
        torch.testing.assert_close(weight, after["weights", name], rtol=1e-5, atol=1e-6)
