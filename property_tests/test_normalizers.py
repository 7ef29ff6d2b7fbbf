"""Running statistics equal those of all samples at once; rewards are scaled, never shifted."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.learn.normalizers import (
    discounted_returns,
    normalize,
    reward_scale,
    running_mean_std,
    scale_reward,
    update,
    update_reward_scale,
)

SEEDS = st.integers(0, 2**31)


def samples(seed, n, features=3):
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.empty(features).uniform_(-2, 3, generator=generator)
    shift = torch.empty(features).uniform_(-100, 100, generator=generator)
    return torch.randn(n, features, generator=generator) * scale + shift


@given(SEEDS, st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_portions_merge_to_the_whole(seed, sizes):
    x = samples(seed, sum(sizes))
    state = running_mean_std(3)
    for portion in x.split(sizes):
        state = update(state, portion)
    assert (state["count"] == len(x)).all()
    if len(x):
        exact = x.double()
        torch.testing.assert_close(state["mean"], exact.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state["var"], exact.var(0, unbiased=False), rtol=1e-7, atol=1e-9)


@given(SEEDS, st.integers(1, 10), st.integers(1, 5))
def test_unmeasured_entries_are_ignored(seed, n, t):
    x = samples(seed, n * t).reshape(n, t, 3)
    mask = torch.rand(n, t, 3, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    poisoned = torch.where(mask, x, float("nan"))
    state = update(update(running_mean_std(3), x[:1]), poisoned, mask)
    for feature in range(3):
        known = torch.cat([x[:1, :, feature].flatten(), x[..., feature][mask[..., feature]]]).double()
        assert state["count"][feature] == len(known)
        torch.testing.assert_close(state["mean"][feature], known.mean(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state["var"][feature], known.var(unbiased=False), rtol=1e-7, atol=1e-9)


@given(SEEDS, st.integers(1, 50))
def test_states_are_values(seed, n):
    x = samples(seed, n)
    before = running_mean_std(3)
    copy = before.clone()
    after = update(before, x)
    normalize(after, x)
    assert (before == copy).all()
    assert (after["count"] == n).all()


@given(SEEDS, st.integers(20, 200))
def test_normalised_samples_are_of_order_one(seed, n):
    x = samples(seed, n)
    result = normalize(update(running_mean_std(3), x), x)
    assert result.dtype == torch.float32
    assert result.abs().max() <= 10
    assert result.mean(0).abs().max() < 1e-3
    assert (result.std(0, unbiased=False) <= 1 + 1e-3).all()


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.floats(0, 1))
def test_discounted_returns_look_back_within_a_segment(seed, n, t, gamma):
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(n, t, generator=generator, dtype=torch.float64)
    done = torch.rand(n, t, generator=generator) < 0.3
    got = discounted_returns(reward, done, gamma)
    for row in range(n):
        running = 0.0
        for step in range(t):
            running = reward[row, step].item() + gamma * running
            assert abs(got[row, step].item() - running) < 1e-9
            running = 0.0 if done[row, step] else running


@given(SEEDS, st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_scaled_rewards_do_not_depend_on_their_unit_and_keep_their_sign(seed, unit, shift):
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(4, 25, generator=generator, dtype=torch.float64) + shift
    done = torch.zeros(4, 25, dtype=torch.bool)
    scaled, other = (
        scale_reward(update_reward_scale(reward_scale(), r, done, 0.99), r) for r in (reward, reward * unit)
    )
    torch.testing.assert_close(scaled, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(scaled.sign(), reward.sign())
    assert scaled.abs().max() <= 10


@given(SEEDS, st.integers(2, 5))
def test_scale_of_several_rollouts_is_that_of_all_their_returns(seed, rollouts):
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(rollouts, 3, 10, generator=generator, dtype=torch.float64)
    done = torch.zeros(3, 10, dtype=torch.bool)
    state = reward_scale()
    for one in reward:
        state = update_reward_scale(state, one, done, 0.9)
    returns = torch.cat([discounted_returns(one, done, 0.9) for one in reward])
    expected = reward[0] / returns.std(unbiased=False)
    torch.testing.assert_close(scale_reward(state, reward[0], clip=1e9), expected, rtol=1e-9, atol=1e-9)
