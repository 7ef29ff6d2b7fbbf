"""Distributions over masked choices and over the factored action.

Shapes: `[...]` is any batch shape (`[N]` in a rollout step, `[N, T]` in an update), `A` entries of a choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl
from torch.nn.functional import pad

from esper.seeds.actions import HEADS, MAX_BLUEPRINTS, OP, RELEVANT, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS

FILL = -1e4
"""Log-weight of a masked entry relative to the likeliest legal one: representable in every float type, exp() is 0."""

WIDTHS = (len(LAYOUT), MAX_BLUEPRINTS, len(BLENDS), len(Op))
"""Number of entries of each head, in the order of `HEADS`."""
MAX_WIDTH = max(WIDTHS)


class AllFalseMaskError(ValueError):
    """A mask row allows nothing, so there is no distribution; `rows` lists the indices of such rows."""

    def __init__(self, rows: list[list[int]], what: str) -> None:
        named = ", ".join(str(tuple(row)) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        super().__init__(f"{what} allows no entry in row {named}; every row needs at least one True")
        self.rows = rows


def require_legal(mask: Tensor, what: str = "mask") -> None:
    """Check that every row of `mask` `[..., A]` has a True entry.

    Raises AllFalseMaskError. Inside a captured or compiled program the check is an asynchronous device assertion.
    """
    legal = mask.any(-1)
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(legal.all(), f"{what} has a row that allows no entry")
    elif not bool(legal.all()):
        raise AllFalseMaskError((~legal).nonzero().tolist(), what)


class MaskedCategorical(Distribution):
    """A categorical over the legal entries of `logits` `[..., A]` (plan step 11).

    `mask` is boolean or 0/1, broadcastable to `logits`. Half-precision logits are evaluated in float32. Masked logits
    influence nothing and receive no gradient; the log-probability of a masked entry is about -1e4.

    `floor` `[...]` is the least probability f of every legal entry: of n legal entries with probabilities p, the
    distribution is the mixture f + (1 - n f) p. It has to be below 1 / n everywhere.

    Raises AllFalseMaskError (a ValueError) naming the rows without a legal entry.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - the attribute torch looks up
    has_rsample = False

    def __init__(self, logits: Tensor, mask: Tensor, *, floor: Tensor | None = None, what: str = "mask") -> None:
        mask = mask.to(torch.bool).expand(logits.shape)
        require_legal(mask, what)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Relative to the likeliest legal entry the finite fill is negligible however negative the legal logits are.
        highest = wide.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        self.mask = mask
        self.logits = torch.where(mask, wide - highest, FILL).log_softmax(-1)
        if floor is not None:
            least = floor.to(wide.dtype).unsqueeze(-1)
            rest = 1 - mask.sum(-1, keepdim=True) * least
            self.logits = torch.where(mask, torch.logaddexp(least.log(), rest.log() + self.logits), self.logits)
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def probs(self) -> Tensor:
        """Probabilities `[..., A]`, exactly 0 where masked."""
        return torch.exp(self.logits)

    @property
    def support(self) -> constraints.Constraint:
        """Integers below A."""
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @property
    def mode(self) -> Tensor:
        """The likeliest legal entry, the first of several, int64 `[...]`."""
        return self.logits.masked_fill(~self.mask, -torch.inf).argmax(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MaskedCategorical:
        """The same distribution over a larger batch shape."""
        shape = torch.Size(batch_shape) + self.logits.shape[-1:]
        return MaskedCategorical(self.logits.expand(shape), self.mask.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability `[...]` of entries `value` (int64, broadcast against the batch shape)."""
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return self.logits.expand(*shape, -1).gather(-1, value.expand(shape).unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy `[...]` over the legal entries divided by its maximum ln(n_legal): in [0, 1], exactly 0 for one."""
        n_legal = self.mask.sum(-1)
        entropy = -torch.where(self.mask, self.probs * self.logits, 0.0).sum(-1)
        return torch.where(n_legal > 1, entropy / n_legal.clamp(min=2).to(entropy.dtype).log(), 0.0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw with torch's global generator; use `sample_from` where draws must be keyed."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.sample_from(torch.rand(shape, dtype=torch.float32, device=self.logits.device))

    def sample_from(self, uniforms: Tensor) -> Tensor:
        """Turn `uniforms` in [0, 1), `[..., ]` or with leading sample dimensions, into entries (inverse distribution
        function over the legal entries). A masked entry is never returned."""
        with torch.no_grad():
            weights = self.probs.to(torch.float64)
            # A masked sum rather than cumsum: cumsum has no deterministic kernel on CUDA.
            below = torch.ones(weights.shape[-1], weights.shape[-1], dtype=torch.bool, device=weights.device).tril()
            cumulative = torch.where(below, weights.unsqueeze(-2), 0.0).sum(-1)
            reached = cumulative > uniforms.to(torch.float64).unsqueeze(-1) * cumulative[..., -1:]
            return (2 * reached.to(torch.int8) + self.mask.to(torch.int8)).argmax(-1)


@register_kl(MaskedCategorical, MaskedCategorical)
def _kl(p: MaskedCategorical, q: MaskedCategorical) -> Tensor:
    """KL(p || q) `[...]` over the legal entries. Raises ValueError if the two masks differ."""
    if not torch.equal(p.mask, q.mask):
        raise ValueError("the KL divergence of masked categoricals needs equal masks; these differ")
    return torch.where(p.mask, p.probs * (p.logits - q.logits), 0.0).sum(-1)


@dataclass(frozen=True)
class ActionMasks:
    """What is legal: `op` `[..., 4]`, `slot` `[..., 4, 3]` (row = op), `blueprint` `[..., 5]`, `blend` `[..., 3]`."""

    op: Tensor
    slot: Tensor
    blueprint: Tensor
    blend: Tensor


@dataclass(frozen=True)
class HeadTerms:
    """Per-head quantities of given actions, all `[..., 4]` in the order of `HEADS`; 0 where the head is irrelevant."""

    log_prob: Tensor
    entropy: Tensor
    relevant: Tensor


class FactoredActions(Distribution):
    """Joint distribution of an action `[..., 4]` (columns `HEADS`): the op first, then the other heads given the op.

    `logits` is `[..., 4, 5]`, heads narrower than 5 padded (the padding is ignored). The op selects the row of the slot
    mask, so an impossible (op, slot) pair has no probability. A head that the op does not use is the constant 0 and
    adds nothing to log-probability, entropy or gradient, and its masks are not looked at. `floors` `[4]`, in the order
    of `HEADS`, is the least probability of every legal entry of each head.

    Raises AllFalseMaskError, at once for the op and on use for the heads a given op needs.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - the attribute torch looks up
    has_rsample = False

    def __init__(self, logits: Tensor, masks: ActionMasks, floors: Tensor | None = None) -> None:
        self.logits, self.masks, self.floors = logits, masks, floors
        floor = None if floors is None else floors[OP]
        self.op = MaskedCategorical(logits[..., OP, : len(Op)], masks.op, floor=floor, what="op mask")
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

    def given(self, op: Tensor) -> tuple[MaskedCategorical, Tensor]:
        """The four heads given the op `[...]`: a categorical of batch shape `[..., 4]`, and which heads matter
        `[..., 4]`. Heads that do not matter are left unmasked."""
        row = op[..., None, None].expand(*op.shape, 1, len(LAYOUT))
        slot = self.masks.slot.to(torch.bool).expand(*op.shape, -1, -1).gather(-2, row).squeeze(-2)
        by_head = (slot, self.masks.blueprint, self.masks.blend, self.masks.op)
        rows = [pad(mask.to(torch.bool), (0, MAX_WIDTH - mask.shape[-1])) for mask in by_head]
        everything, used = _constants(op.device)
        relevant = used[op]
        mask = torch.where(relevant.unsqueeze(-1), torch.stack(torch.broadcast_tensors(*rows), -2), everything)
        what = f"action mask (last index: position in {', '.join(HEADS)})"
        return MaskedCategorical(self.logits.expand(mask.shape), mask, floor=self.floors, what=what), relevant

    def head_terms(self, action: Tensor) -> HeadTerms:
        """Per-head log-probabilities and normalised entropies of `action` `[..., 4]`, given its op. Rollout and update
        both come here, so equal logits give a ratio of exactly one."""
        heads, relevant = self.given(action[..., OP])
        return HeadTerms(
            log_prob=_of_relevant(heads.log_prob(action), relevant),
            entropy=_of_relevant(heads.entropy(), relevant),
            relevant=relevant,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Joint log-probability `[...]`: the sum over the relevant heads."""
        return self.head_terms(value).log_prob.sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw with torch's global generator; use `sample_from` where draws must be keyed."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        return self.sample_from(torch.rand(shape, dtype=torch.float32, device=self.logits.device))

    def sample_from(self, uniforms: Tensor) -> Tensor:
        """Turn `uniforms` `[..., 4]` (one column per head) into actions, int64 `[..., 4]`."""
        return self.choose(uniforms)[0]

    @property
    def mode(self) -> Tensor:
        """The likeliest op and, given it, the likeliest entry of every relevant head, int64 `[..., 4]`."""
        return self.choose(None)[0]

    def choose(self, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Actions int64 `[..., 4]`, drawn with `uniforms` `[..., 4]` or the likeliest (None), and the per-head
        log-probabilities `[..., 4]` that `head_terms` gives them."""
        op = self.op.mode if uniforms is None else self.op.sample_from(uniforms[..., OP])
        heads, relevant = self.given(op)
        entries = heads.mode if uniforms is None else heads.sample_from(uniforms)
        action = torch.where(relevant, torch.cat([entries[..., :OP], op.unsqueeze(-1)], -1), 0)
        return action, _of_relevant(heads.log_prob(action), relevant)


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The entries that heads have, `[4, 5]`, and the heads that ops use, `[4, 4]`; a recording cannot fetch them."""
    return (torch.arange(MAX_WIDTH) < torch.tensor(WIDTHS).unsqueeze(-1)).to(device), RELEVANT.to(device)


def _of_relevant(terms: Tensor, relevant: Tensor) -> Tensor:
    """Terms `[..., 4]` of the heads, 0 for those that the op does not use."""
    return torch.where(relevant, terms, torch.zeros((), dtype=terms.dtype, device=terms.device))
