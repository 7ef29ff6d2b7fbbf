"""Worked examples small enough to check by hand."""

import math

import pytest
import torch

from esper.control.distributions import AllFalseMaskError, MaskedCategorical
from esper.learn.advantages import gae, standardize
from esper.learn.losses import factored_clip_objective
from esper.learn.normalizers import normalize, reward_scale, running_mean_std, scale_reward, update, update_reward_scale
from esper.learn.update import PPOSettings, anneal_steps, entropy_coefficient
from esper.seeds.actions import RELEVANT


def test_masked_categorical_of_equal_logits():
    distribution = MaskedCategorical(torch.zeros(4), torch.tensor([1, 1, 0, 1]))
    torch.testing.assert_close(distribution.probs, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]))
    assert distribution.entropy().item() == pytest.approx(1.0)


def test_log_probability_of_a_masked_entry_is_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        distribution = MaskedCategorical(torch.tensor([3.0, -2.0], dtype=dtype), torch.tensor([True, False]))
        assert distribution.log_prob(torch.tensor(1)).item() == pytest.approx(-1e4)


def test_entropy_is_normalised_by_the_legal_entries():
    p = torch.tensor([0.7, 0.2, 0.1])
    distribution = MaskedCategorical(torch.cat([p.log(), torch.tensor([9.0])]), torch.tensor([1, 1, 1, 0]))
    expected = -sum(x * math.log(x) for x in p.tolist()) / math.log(3)
    assert distribution.entropy().item() == pytest.approx(expected, abs=1e-6)


def test_all_false_rows_are_listed():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 1] = False
    with pytest.raises(AllFalseMaskError, match=r"\(0, 2\), \(1, 1\)") as caught:
        MaskedCategorical(torch.zeros(2, 3, 4), mask)
    assert caught.value.rows == [[0, 2], [1, 1]]


def test_sampling_with_the_global_generator_matches_the_probabilities():
    torch.manual_seed(0)
    distribution = MaskedCategorical(torch.tensor([0.0, math.log(3.0), 5.0]), torch.tensor([1, 1, 0]))
    drawn = distribution.sample((20000,))
    assert (drawn == 1).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert not (drawn == 2).any()
    assert distribution.expand((5,)).sample().shape == (5,)


def test_gae_of_a_truncated_row():
    reward, value = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 0.4, 0.6]])
    next_value = torch.tensor([[0.4, 0.6, 0.6]])
    no, end = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[False, False, True]])
    advantage, target = gae(reward, value, next_value, no, end, gamma=0.995, lmbda=0.97)
    torch.testing.assert_close(advantage, torch.tensor([[2.948369, 2.124405, 1.997]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(target, torch.tensor([[3.448369, 2.524405, 2.597]]), rtol=0, atol=1e-6)
    normalised = torch.tensor([[1.145882, -0.449592, -0.696291]])
    torch.testing.assert_close(standardize(advantage), normalised, rtol=0, atol=1e-5)


def test_every_head_is_credited_where_it_mattered():
    """Ops WAIT, GERMINATE, CULL, FOSSILIZE with advantages 1, 2, 3, 4: means over 3, 1, 1 and 4 steps."""
    advantage = torch.tensor([1.0, 2.0, 3.0, 4.0])
    log_prob = torch.zeros(4, 4, requires_grad=True)
    zero = torch.zeros(4)
    losses = factored_clip_objective(
        log_prob,
        torch.zeros(4, 4),
        torch.zeros(4, 4),
        RELEVANT,
        advantage,
        zero,
        zero,
        zero,
        clip_ratio=0.2,
        value_clip=None,
        value_coef=0.5,
        entropy_coef=0.0,
    )
    losses["loss_objective"].backward()
    expected = -torch.tensor([[0, 0, 0, 1 / 4], [2 / 3, 2, 2, 2 / 4], [3 / 3, 0, 0, 3 / 4], [4 / 3, 0, 0, 4 / 4]])
    torch.testing.assert_close(log_prob.grad, expected)
    assert losses["loss_objective"].item() == pytest.approx(-(3 + 2 + 2 + 2.5))
    assert losses["relevant"].tolist() == [0.75, 0.25, 0.25, 1.0]


def test_anneal_steps():
    assert anneal_steps(8, 3, 2) == 6
    assert anneal_steps(8, 3, 1) == 3
    assert anneal_steps(0, 3, 2) == 0
    with pytest.raises(ValueError, match="n_hosts is 0"):
        anneal_steps(8, 0, 1)


def test_entropy_coefficient_schedule():
    settings = PPOSettings(entropy_coef_start=0.1, entropy_coef_end=0.0, entropy_coef_min=0.02, entropy_anneal_steps=10)
    steps = (0, 5, 8, 10, 100)
    assert [entropy_coefficient(s, settings) for s in steps] == pytest.approx([0.1, 0.05, 0.02, 0.02, 0.02])
    assert entropy_coefficient(50, PPOSettings(entropy_coef=0.05)) == 0.05
    assert entropy_coefficient(50, PPOSettings(entropy_coef=0.001, entropy_coef_min=0.01)) == 0.01
    only_end = PPOSettings(entropy_coef=0.08, entropy_coef_end=0.04, entropy_anneal_steps=4)
    assert entropy_coefficient(2, only_end) == pytest.approx(0.06)


def test_observation_statistics_have_no_cold_start():
    state = update(running_mean_std(1), torch.tensor([[2.0], [4.0]]))
    assert (state["mean"].item(), state["var"].item(), state["count"].item()) == (3.0, 1.0, 2.0)
    assert normalize(state, torch.tensor([5.0])).item() == pytest.approx(2.0, abs=1e-3)
    assert normalize(state, torch.tensor([500.0])).item() == 10.0


def test_constant_rewards_are_not_blown_up():
    reward, done = torch.full((3, 1), 0.1), torch.ones(3, 1, dtype=torch.bool)
    state = update_reward_scale(reward_scale(), reward, done, 0.995)
    assert scale_reward(state, reward).flatten().tolist() == pytest.approx([10.0] * 3)
    silent = update_reward_scale(reward_scale(), torch.zeros(3, 1), done, 0.995)
    assert scale_reward(silent, torch.zeros(3, 1)).abs().sum() == 0
    assert torch.equal(scale_reward(reward_scale(), reward), reward)
