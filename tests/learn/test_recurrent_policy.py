"""What the policy promises TorchRL and the learner."""

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper.control.policy import RecurrentPolicy
from esper.control.recurrence import restarts
from esper.keys import host_keys, root
from esper.learn.normalizers import running_mean_std, update
from esper.seeds.actions import OP, Op
from learn.learning_tasks import MASKS, Memory, collect

FEATURES, HIDDEN = 7, 16


def step_input(n, policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    td = TensorDict({"observation": torch.randn(n, policy.observation_dim, generator=generator)}, batch_size=[n])
    for key, shape in MASKS.items():
        td[key] = torch.ones(n, *shape, dtype=torch.bool)
    td["key"] = host_keys(root(seed), n)
    td["is_init"] = torch.zeros(n, 1, dtype=torch.bool)
    for key in ("hidden_h", "hidden_c"):
        td[key] = torch.randn(n, policy.hidden_dim, generator=generator)
    return td


@pytest.fixture
def policy():
    """A policy whose heads are not nearly uniform."""
    policy = RecurrentPolicy(FEATURES, HIDDEN, seed=4)
    with torch.no_grad():
        for head in policy.heads.values():
            head[-1].weight.mul_(200)
    return policy


@pytest.mark.parametrize(("features", "count"), [(80, 185_296), (50, 181_456)])
def test_parameter_count(features, count):
    assert sum(p.numel() for p in RecurrentPolicy(features).parameters()) == count


def test_initial_weights_are_keyed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (RecurrentPolicy(FEATURES, HIDDEN, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
    assert not torch.equal(first.memory.weight_hh, other.memory.weight_hh)


def test_a_patient_policy_first_waits_and_keeps_more_often():
    policy = RecurrentPolicy(FEATURES, HIDDEN, patience=3.0)
    batch = step_input(4, policy).unsqueeze(1)
    logits = policy.unroll(batch)[0][:, 0, OP, : len(Op)]
    preferred = logits[:, [Op.WAIT, Op.FOSSILIZE]] - logits[:, [Op.GERMINATE, Op.CULL]]
    torch.testing.assert_close(preferred, torch.full_like(preferred, 3.0), rtol=0, atol=0.2)


def test_initial_weights_are_orthogonal_with_the_stated_gains():
    policy = RecurrentPolicy(FEATURES, HIDDEN, seed=0)
    eye = torch.eye(HIDDEN)
    torch.testing.assert_close(policy.memory.weight_hh.T @ policy.memory.weight_hh, eye, rtol=0, atol=1e-5)
    gains = {policy.features[0]: math.sqrt(2), policy.value[0]: math.sqrt(2), policy.value[-1]: 1.0}
    gains |= {head[-1]: 0.01 for head in policy.heads.values()}
    for layer, gain in gains.items():
        torch.testing.assert_close(
            torch.linalg.svdvals(layer.weight), torch.full((min(layer.weight.shape),), gain), rtol=1e-4, atol=1e-6
        )
        assert (layer.bias == 0).all()
    forget = policy.memory.bias_ih + policy.memory.bias_hh
    assert forget.reshape(4, HIDDEN).sum(-1).tolist() == [0, 2 * HIDDEN, 0, 0]


def test_a_step_reads_and_writes_the_declared_keys(policy):
    out = policy(step_input(3, policy).select(*policy.in_keys))
    shapes = {key: tuple(out[key].shape) for key in policy.out_keys}
    assert shapes == {
        "action": (3, 4),
        "action_log_prob": (3, 4),
        "state_value": (3, 1),
        ("next", "hidden_h"): (3, HIDDEN),
        ("next", "hidden_c"): (3, HIDDEN),
    }
    assert out["action"].dtype == torch.int64
    assert {out[key].dtype for key in policy.out_keys if key != "action"} == {torch.float32}


def test_draws_depend_on_the_hosts_key_alone(policy):
    td = step_input(64, policy)
    state = torch.get_rng_state()
    whole, again, part = policy(td.clone()), policy(td.clone()), policy(td[5:9].clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole["action"], again["action"])
    assert torch.equal(whole["action"][5:9], part["action"])
    td["key"] = host_keys(root(9), 64)
    assert not torch.equal(policy(td)["action"], whole["action"])


@pytest.mark.parametrize("mode", [ExplorationType.DETERMINISTIC, ExplorationType.MODE])
def test_greedy_takes_the_likeliest_op(policy, mode):
    td = step_input(32, policy)
    logits, _, _, _ = policy.unroll(td.clone().unsqueeze(1))
    with set_exploration_type(mode):
        action = policy(td)["action"]
    assert torch.equal(action[:, OP], logits[:, 0, OP, :4].argmax(-1))
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(policy(td)["action"], action)


def test_the_first_step_of_a_segment_forgets(policy):
    td = step_input(4, policy)
    td["is_init"][1:3] = True
    clean = td.clone()
    for key in ("hidden_h", "hidden_c"):
        td[key][1:3] = float("nan")
        clean[key][1:3] = 0.0
    one, two = policy(td), policy(clean)
    for key in policy.out_keys:
        assert torch.equal(one[key], two[key])


def test_observations_are_standardised_inside(policy):
    td = step_input(8, policy)
    other = copy.deepcopy(policy)
    shift, scale = torch.linspace(-3, 3, FEATURES), torch.logspace(-1, 2, FEATURES)
    x = td["observation"] * scale + shift
    other.load_statistics(update(running_mean_std(FEATURES), x))
    own = update(running_mean_std(FEATURES), td["observation"])
    policy.load_statistics(own)
    assert torch.equal(policy.statistics["mean"], own["mean"])
    assert "observation_mean" in policy.state_dict()
    before = other.statistics
    raw, scaled = policy(td.clone()), other(td.clone().set("observation", x))
    torch.testing.assert_close(raw["state_value"], scaled["state_value"], rtol=0, atol=1e-2)
    assert torch.equal(scaled["observation"], x)
    assert (other.statistics == before).all()


def test_weights_can_be_passed_in(policy):
    td = step_input(4, policy)
    half = TensorDict.from_module(policy).detach().apply(lambda x: x / 2)
    reference = copy.deepcopy(policy)
    half.to_module(reference, inplace=True)
    before = policy(td.clone())["state_value"]
    with half.to_module(policy):
        functional = policy(td.clone())["state_value"]
    assert torch.equal(functional, reference(td.clone())["state_value"])
    assert not torch.equal(functional, before)
    assert torch.equal(policy(td.clone())["state_value"], before)


def test_restarts_told_and_restarts_read_are_the_same():
    env = Memory(0)
    policy = RecurrentPolicy(env.features, HIDDEN, seed=0)
    rollout = collect(env, policy)
    assert restarts(rollout["is_init"].squeeze(-1)) == []
    assert restarts(rollout["is_init"][:, :1].squeeze(-1)) == []
    rollout["is_init"][::3, 2] = rollout["is_init"][1, 3] = True
    starts = restarts(rollout["is_init"].squeeze(-1))
    assert starts == [2, 3]
    for read, told in zip(policy.unroll(rollout), policy.unroll(rollout, starts), strict=True):
        assert torch.equal(read, told)
    assert not torch.equal(policy.unroll(rollout)[1], policy.unroll(rollout, [])[1])


def test_next_value_uses_the_state_the_step_left_behind():
    """Also at the last step and where the row restarts."""
    env = Memory(0)
    policy = RecurrentPolicy(env.features, HIDDEN, seed=0)
    rollout = collect(env, policy)
    with torch.no_grad():
        following = policy.next_value(rollout)
    torch.testing.assert_close(following[:, :-1], rollout["state_value"][:, 1:], rtol=0, atol=1e-5)
    last = rollout[:, -1]["next"].copy()
    last["is_init"] = torch.zeros_like(last["is_init"])
    torch.testing.assert_close(following[:, -1], policy(last)["state_value"], rtol=0, atol=1e-5)
    cut = rollout.clone()
    cut["is_init"][:, 2] = True
    with torch.no_grad():
        assert torch.equal(policy.next_value(cut), following)
