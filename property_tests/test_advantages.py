"""Generalised advantages against their definition as a sum, with ends at every position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.learn.advantages import gae, standardize


@st.composite
def rollouts(draw):
    """Rewards, values, next values `[N, T]` and ends anywhere."""
    n, t = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    reward, value, next_value = (torch.randn(n, t, generator=generator) for _ in range(3))
    chance = draw(st.floats(0, 1))
    terminated, truncated = (torch.rand(n, t, generator=generator) < chance / 2 for _ in range(2))
    return reward, value, next_value, terminated, terminated | truncated


DISCOUNTS = st.floats(0, 1)


def by_definition(reward, value, next_value, terminated, done, gamma, lmbda):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, up to the end of the segment, in float64."""
    reward, value, next_value = reward.double(), value.double(), next_value.double()
    result = torch.zeros_like(reward)
    for n in range(reward.shape[0]):
        for t in range(reward.shape[1]):
            for k in range(reward.shape[1] - t):
                future = 0.0 if terminated[n, t + k] else gamma * next_value[n, t + k]
                result[n, t] += (gamma * lmbda) ** k * (reward[n, t + k] + future - value[n, t + k])
                if done[n, t + k]:
                    break
    return result


@given(rollouts(), DISCOUNTS, DISCOUNTS)
def test_equals_the_definition(rollout, gamma, lmbda):
    advantage, target = gae(*rollout, gamma=gamma, lmbda=lmbda)
    expected = by_definition(*rollout, gamma, lmbda)
    scale = max(1.0, expected.abs().max().item())
    assert (advantage - expected).abs().max() <= 1e-6 * scale
    assert torch.equal(target, advantage + rollout[1])


@given(rollouts(), DISCOUNTS, DISCOUNTS, st.data())
def test_nothing_crosses_an_end_or_a_row(rollout, gamma, lmbda, data):
    reward, value, next_value, terminated, done = rollout
    row = data.draw(st.integers(0, reward.shape[0] - 1))
    end = data.draw(st.integers(0, reward.shape[1] - 1))
    done[row, end] = True
    changed = reward.clone()
    changed[row, end + 1 :] += 100.0
    before, _ = gae(reward, value, next_value, terminated, done, gamma=gamma, lmbda=lmbda)
    after, _ = gae(changed, value, next_value, terminated, done, gamma=gamma, lmbda=lmbda)
    assert torch.equal(before[row, : end + 1], after[row, : end + 1])
    others = torch.arange(reward.shape[0]) != row
    assert torch.equal(before[others], after[others])


@given(rollouts(), DISCOUNTS, DISCOUNTS, st.data())
def test_a_terminal_step_has_no_future_and_a_truncated_one_has(rollout, gamma, lmbda, data):
    reward, value, next_value, terminated, done = rollout
    at = data.draw(st.integers(0, reward.shape[1] - 1))
    done[:, at] = True
    terminated[:, at] = True
    cut, _ = gae(reward, value, next_value, terminated, done, gamma=gamma, lmbda=lmbda)
    torch.testing.assert_close(cut[:, at], reward[:, at] - value[:, at])
    terminated[:, at] = False
    kept, _ = gae(reward, value, next_value, terminated, done, gamma=gamma, lmbda=lmbda)
    torch.testing.assert_close(kept[:, at], reward[:, at] + gamma * next_value[:, at] - value[:, at])


@given(st.integers(2, 200), st.floats(0.1, 1e3), st.floats(-1e3, 1e3), st.integers(0, 2**31))
def test_standardised_advantages_have_mean_zero_and_deviation_one(n, scale, shift, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift
    result = standardize(x)
    assert result.mean().abs() < 1e-6
    assert abs(result.std() - 1) < 1e-6
    assert torch.equal(result.argsort(), x.argsort())


def test_one_advantage_alone_stays_as_it_is():
    assert torch.equal(standardize(torch.tensor([[3.0]])), torch.tensor([[3.0]]))


def test_shapes_must_agree():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"one shape \[N, T\]"):
        gae(x, x, torch.zeros(2, 3, 1), x.bool(), x.bool(), gamma=0.9, lmbda=0.9)
