"""A least probability for every legal choice: a law of the distribution, the same in rollout and update."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from esper.control.distributions import WIDTHS, ActionMasks, FactoredActions, MaskedCategorical
from esper.control.policy import RecurrentPolicy
from esper.seeds.actions import HEADS, OP


@st.composite
def floored(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and masks of some rows with a legal entry each, and a floor that fits every row."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    logits = torch.tensor([[draw(st.floats(-200, 200)) for _ in range(width)] for _ in range(rows)])
    mask = torch.tensor([[draw(st.booleans()) for _ in range(width)] for _ in range(rows)])
    mask[:, draw(st.integers(0, width - 1))] = True
    floor = torch.tensor([draw(st.floats(0, 0.9)) for _ in range(rows)]) / mask.sum(-1)
    return logits, mask, floor


@given(floored())
def test_a_floored_distribution_is_the_mixture_with_the_uniform(case) -> None:
    logits, mask, floor = case
    plain, mixed = MaskedCategorical(logits, mask), MaskedCategorical(logits, mask, floor=floor)
    expected = floor[:, None] + (1 - mask.sum(-1, keepdim=True) * floor[:, None]) * plain.probs
    torch.testing.assert_close(mixed.probs, torch.where(mask, expected, 0.0), rtol=1e-5, atol=1e-6)
    assert bool((mixed.probs >= torch.where(mask, floor[:, None] - 1e-6, 0.0)).all())
    assert bool((mixed.entropy() <= 1 + 1e-5).all())


@given(floored())
def test_a_floor_of_zero_changes_nothing(case) -> None:
    logits, mask, floor = case
    plain = MaskedCategorical(logits.requires_grad_(), mask)
    (gradient,) = torch.autograd.grad(plain.logits[mask].sum(), logits)
    zero = MaskedCategorical(logits, mask, floor=torch.zeros_like(floor))
    assert torch.equal(zero.logits, plain.logits)
    (again,) = torch.autograd.grad(zero.logits[mask].sum(), logits)
    torch.testing.assert_close(again, gradient)


def test_floors_of_heads_that_do_not_matter_spoil_nothing() -> None:
    """Four floors just below their limits: log-probabilities and gradients stay finite for every op."""
    floors = torch.tensor([0.99 / width for width in WIDTHS])
    n = 4
    masks = ActionMasks(*(torch.ones(n, *shape, dtype=torch.bool) for shape in ((4,), (4, 3), (5,), (3,))))
    logits = torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    action = torch.zeros(n, 4, dtype=torch.int64)
    action[:, OP] = torch.arange(4)
    terms = FactoredActions(logits, masks, floors).head_terms(action)
    (gradient,) = torch.autograd.grad(terms.log_prob.sum() + terms.entropy.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert terms.log_prob.exp()[0, OP].item() == pytest.approx(1 / 4, abs=0.01)


def row(n: int, features: int) -> TensorDict:
    shapes = {"mask_op": (4,), "mask_slot": (4, 3), "mask_blueprint": (5,), "mask_blend": (3,)}
    return TensorDict(
        {
            "observation": torch.randn(n, features, generator=torch.Generator().manual_seed(1)),
            "key": torch.arange(n),
            "is_init": torch.ones(n, 1, dtype=torch.bool),
            "hidden_h": torch.zeros(n, 8),
            "hidden_c": torch.zeros(n, 8),
            **{name: torch.ones(n, *shape, dtype=torch.bool) for name, shape in shapes.items()},
        },
        batch_size=[n],
    )


def test_rollout_and_update_floor_alike() -> None:
    """A policy certain of WAIT still tries the other ops, and the update sees the log-probabilities of the rollout."""
    policy = RecurrentPolicy(6, 8, seed=0, floors=(0.1, 0.05, 0.1, 0.2))
    with torch.no_grad():
        policy.heads["op"][-1].bias[0] = 50.0
        stepped = policy(row(256, 6))
        again, _ = policy.evaluate(stepped.unsqueeze(1))
    shares = torch.bincount(stepped["action"][:, OP], minlength=4) / 256
    assert bool((shares[1:] > 0.1).all())
    terms = again.head_terms(stepped["action"].unsqueeze(1))
    torch.testing.assert_close(terms.log_prob.squeeze(1), stepped["action_log_prob"], rtol=0, atol=1e-6)
    waits = stepped["action"][:, OP] == 0
    torch.testing.assert_close(
        stepped["action_log_prob"][waits, OP], torch.full([int(waits.sum())], math.log(0.4)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("head", range(4))
def test_a_floor_that_leaves_nothing_to_choose_is_refused(head: int) -> None:
    floors = [0.0] * 4
    floors[head] = 1 / WIDTHS[head]
    with pytest.raises(ValueError, match=f"for {HEADS[head]}; must be at least 0 and below 1/{WIDTHS[head]}"):
        RecurrentPolicy(6, 8, floors=floors)
