"""Laws of the masked categorical, in three precisions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from esper.control.distributions import AllFalseMaskError, MaskedCategorical

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DRAWS = 1000


@st.composite
def cases(draw, low=-40.0, high=40.0):
    """Logits and a mask `[R, A]` with a legal entry in every row."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    number = st.floats(low, high, width=32)
    logits = [draw(st.lists(number, min_size=width, max_size=width)) for _ in range(rows)]
    masks = [draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(rows)]
    for mask in masks:
        mask[draw(st.integers(0, width - 1))] = True
    return torch.tensor(logits), torch.tensor(masks)


@given(cases(-60000.0, 60000.0), DTYPES, st.integers(0, 2**31))
def test_no_illegal_draw(case, dtype, seed):
    logits, mask = case
    distribution = MaskedCategorical(logits.to(dtype), mask)
    uniforms = torch.rand(DRAWS, len(mask), generator=torch.Generator().manual_seed(seed))
    uniforms[0], uniforms[1] = 0.0, 1.0 - 2.0**-24
    drawn = distribution.sample_from(uniforms)
    assert mask.expand(DRAWS, -1, -1).gather(-1, drawn.unsqueeze(-1)).all()
    assert mask.gather(-1, distribution.mode.unsqueeze(-1)).all()
    assert (distribution.log_prob(drawn).exp() > 0).all()
    assert (distribution.probs[~mask] == 0).all()
    torch.testing.assert_close(distribution.probs.sum(-1), torch.ones(len(mask)))


@given(cases())
def test_draws_follow_the_probabilities(case):
    distribution = MaskedCategorical(*case)
    grid = (torch.arange(DRAWS) + 0.5) / DRAWS
    drawn = distribution.sample_from(grid.unsqueeze(-1).expand(DRAWS, len(case[0])))
    share = torch.nn.functional.one_hot(drawn, case[0].shape[-1]).float().mean(0)
    assert (share - distribution.probs).abs().max() <= 1.01 / DRAWS


@given(st.integers(1, 8), st.integers(0, 4), st.floats(-30, 30), DTYPES)
def test_equal_logits_have_the_entropy_of_their_number(legal, masked, level, dtype):
    mask = torch.tensor([[True] * legal + [False] * masked])
    entropy = MaskedCategorical(torch.full(mask.shape, level).to(dtype), mask).entropy()
    assert math.exp(entropy.item() * math.log(legal)) == pytest.approx(legal, rel=1e-5)
    assert entropy.item() == pytest.approx(1.0 if legal > 1 else 0.0, abs=1e-6)


@given(cases(), DTYPES)
def test_entropy_is_between_zero_and_one(case, dtype):
    entropy = MaskedCategorical(case[0].to(dtype), case[1]).entropy()
    assert (entropy >= 0).all()
    assert (entropy <= 1 + 1e-6).all()


@given(cases(), DTYPES)
def test_one_legal_entry_is_certain(case, dtype):
    logits, mask = case
    only = torch.zeros_like(mask).scatter(-1, mask.int().argmax(-1, keepdim=True), True)
    logits = logits.to(dtype).requires_grad_()
    distribution = MaskedCategorical(logits, only)
    chosen = distribution.sample_from(torch.rand(len(mask), generator=torch.Generator().manual_seed(0)))
    assert (distribution.entropy() == 0).all()
    assert (distribution.log_prob(chosen) == 0).all()
    (distribution.entropy().sum() + distribution.log_prob(chosen).sum()).backward()
    assert (logits.grad == 0).all()


@given(cases(), st.data())
def test_a_row_without_legal_entries_is_named(case, data):
    logits, mask = case
    bad = data.draw(st.integers(0, len(mask) - 1))
    mask[bad] = False
    with pytest.raises(AllFalseMaskError, match=rf"row \({bad},\)") as caught:
        MaskedCategorical(logits, mask)
    assert caught.value.rows == [[bad]]


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_entries_permutes_the_results(case, random):
    logits, mask = case
    order = list(range(logits.shape[-1]))
    random.shuffle(order)
    plain, permuted = MaskedCategorical(logits, mask), MaskedCategorical(logits[:, order], mask[:, order])
    torch.testing.assert_close(plain.logits[:, order], permuted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.entropy(), permuted.entropy(), rtol=1e-5, atol=1e-6)


@given(cases(), DTYPES, st.sampled_from([float("nan"), float("inf"), -1e4, 5.0]))
def test_masked_logits_count_for_nothing(case, dtype, poison):
    logits, mask = case
    poisoned = torch.where(mask, logits, poison).to(dtype).requires_grad_()
    plain, other = MaskedCategorical(logits.to(dtype), mask), MaskedCategorical(poisoned, mask)
    assert torch.equal(plain.logits, other.logits)
    (other.entropy().sum() + other.log_prob(other.mode).sum() + other.logits[mask].sum()).backward()
    assert (poisoned.grad[~mask] == 0).all()
    assert poisoned.grad.isfinite().all()


@given(cases(), st.integers(0, 2**31))
def test_divergence_is_that_of_the_legal_entries(case, seed):
    logits, mask = case
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    got = kl_divergence(MaskedCategorical(logits, mask), MaskedCategorical(other, mask))
    for row in range(len(mask)):
        p, q = (Categorical(logits=x[row][mask[row]].double()) for x in (logits, other))
        assert got[row].item() == pytest.approx(kl_divergence(p, q).item(), abs=1e-5)


def test_divergence_refuses_different_masks():
    p = MaskedCategorical(torch.zeros(2), torch.tensor([True, True]))
    q = MaskedCategorical(torch.zeros(2), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="equal masks"):
        kl_divergence(p, q)


@given(cases())
def test_a_broken_network_still_cannot_choose_what_is_masked(case):
    _, mask = case
    distribution = MaskedCategorical(torch.full(mask.shape, float("nan")), mask)
    for chosen in (distribution.sample_from(torch.full((len(mask),), 0.5)), distribution.mode):
        assert mask.gather(-1, chosen.unsqueeze(-1)).all()
