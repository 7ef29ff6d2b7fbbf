"""Laws of the joint distribution over (slot, blueprint, blend, op)."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.control.distributions import WIDTHS, ActionMasks, AllFalseMaskError, FactoredActions, MaskedCategorical
from esper.seeds.actions import OP, RELEVANT, SLOT, Op

SEEDS = st.integers(0, 2**31)


def masks_from(generator, rows, *, complete=True):
    """Random masks; when `complete`, every head has a legal entry, otherwise only the op head has."""

    def rand(*shape):
        mask = torch.rand(rows, *shape, generator=generator) < 0.5
        if complete:
            mask[..., 0] |= ~mask.any(-1)
        return mask

    op = torch.rand(rows, 4, generator=generator) < 0.6
    op[:, 0] |= ~op.any(-1)
    return ActionMasks(op=op, slot=rand(4, 3), blueprint=rand(5), blend=rand(3))


def logits_from(generator, rows):
    return 3 * torch.randn(rows, 4, 5, generator=generator)


def everything(rows):
    ones = torch.ones(rows, 5, dtype=torch.bool)
    return ActionMasks(op=ones[:, :4], slot=ones[:, None, :3].expand(rows, 4, 3), blueprint=ones, blend=ones[:, :3])


@given(SEEDS)
def test_draws_are_legal_and_irrelevant_columns_are_zero(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = masks_from(generator, 6)
    actions = FactoredActions(logits_from(generator, 6), masks)
    draws = [actions.sample_from(torch.rand(6, 4, generator=generator)) for _ in range(20)]
    for action in [actions.mode, *draws]:
        for row, (slot, blueprint, blend, op) in enumerate(action.tolist()):
            assert masks.op[row, op]
            assert masks.slot[row, op, slot] if op != Op.WAIT else slot == 0
            if op == Op.GERMINATE:
                assert masks.blueprint[row, blueprint]
                assert masks.blend[row, blend]
            else:
                assert (blueprint, blend) == (0, 0)


@given(SEEDS)
def test_joint_log_probability_is_the_sum_over_relevant_heads(seed):
    generator = torch.Generator().manual_seed(seed)
    masks, logits = masks_from(generator, 5), logits_from(generator, 5)
    actions = FactoredActions(logits, masks)
    action = actions.sample_from(torch.rand(5, 4, generator=generator))
    for row, choice in enumerate(action.tolist()):
        op = choice[OP]
        legal = (masks.slot[row, op], masks.blueprint[row], masks.blend[row], masks.op[row])
        total = 0.0
        for head, width in enumerate(WIDTHS):
            if RELEVANT[op, head]:
                single = MaskedCategorical(logits[row, head, :width], legal[head])
                terms = actions.head_terms(action)
                torch.testing.assert_close(terms.log_prob[row, head], single.log_prob(action[row, head]))
                torch.testing.assert_close(terms.entropy[row, head], single.entropy())
                total += single.log_prob(action[row, head]).item()
        assert actions.log_prob(action)[row].item() == pytest.approx(total, abs=1e-5)


@given(SEEDS)
def test_irrelevant_heads_contribute_exactly_nothing(seed):
    """Even where their masks allow nothing."""
    generator = torch.Generator().manual_seed(seed)
    logits = logits_from(generator, 4).requires_grad_()
    masks = everything(4)
    nothing = ActionMasks(
        op=masks.op,
        slot=masks.slot & (torch.arange(4) == Op.CULL)[:, None],
        blueprint=torch.zeros(4, 5, dtype=torch.bool),
        blend=torch.zeros(4, 3, dtype=torch.bool),
    )
    slots = torch.randint(3, (4,), generator=generator)
    ops = torch.tensor([Op.WAIT, Op.CULL, Op.CULL, Op.WAIT])
    zero = torch.zeros(4, dtype=torch.int64)
    action = torch.stack([torch.where(ops == Op.CULL, slots, 0), zero, zero, ops], -1)
    terms = FactoredActions(logits, nothing).head_terms(action)
    irrelevant = ~RELEVANT[ops]
    assert torch.equal(terms.relevant, ~irrelevant)
    assert (terms.log_prob[irrelevant] == 0).all()
    assert (terms.entropy[irrelevant] == 0).all()
    (terms.log_prob.sum() + terms.entropy.sum()).backward()
    assert (logits.grad[irrelevant] == 0).all()
    assert (logits.grad[~irrelevant].abs().sum(-1) > 0).all()


@given(SEEDS)
def test_probabilities_of_all_actions_sum_to_one(seed):
    generator = torch.Generator().manual_seed(seed)
    actions = FactoredActions(logits_from(generator, 1), masks_from(generator, 1))
    every = []
    for op in Op:
        widths = [range(width if RELEVANT[op, head] else 1) for head, width in enumerate(WIDTHS[:OP])]
        every += [(*choice, int(op)) for choice in itertools.product(*widths)]
    total = sum(actions.log_prob(torch.tensor([action])).exp().item() for action in every)
    assert total == pytest.approx(1.0, abs=1e-5)


@given(SEEDS, st.sampled_from([Op.GERMINATE, Op.CULL, Op.FOSSILIZE]))
def test_the_op_selects_the_row_of_the_slot_mask(seed, op):
    generator = torch.Generator().manual_seed(seed)
    target = int(torch.randint(3, (), generator=generator))
    slot = torch.ones(1, 4, 3, dtype=torch.bool)
    slot[0, op] = torch.arange(3) == target
    only = ActionMasks(
        op=(torch.arange(4) == op)[None],
        slot=slot,
        blueprint=torch.ones(1, 5, dtype=torch.bool),
        blend=torch.ones(1, 3, dtype=torch.bool),
    )
    actions = FactoredActions(logits_from(generator, 1), only)
    action = actions.sample_from(torch.rand(1, 4, generator=generator))
    assert action[0, SLOT] == target
    terms = actions.head_terms(action)
    assert terms.log_prob[0, SLOT] == 0
    assert terms.entropy[0, SLOT] == 0


@given(SEEDS)
def test_a_needed_head_without_legal_entry_is_named(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = everything(3)
    broken = ActionMasks(op=masks.op, slot=masks.slot & False, blueprint=masks.blueprint, blend=masks.blend)
    actions = FactoredActions(logits_from(generator, 3), broken)
    with pytest.raises(AllFalseMaskError, match=r"slot, blueprint, blend, op.*row \(1, 0\)"):
        actions.head_terms(torch.tensor([[0, 0, 0, Op.WAIT], [0, 0, 0, Op.CULL], [0, 0, 0, Op.WAIT]]))
    with pytest.raises(AllFalseMaskError, match="op mask"):
        FactoredActions(
            logits_from(generator, 3),
            ActionMasks(op=masks.op & False, slot=masks.slot, blueprint=masks.blueprint, blend=masks.blend),
        )
