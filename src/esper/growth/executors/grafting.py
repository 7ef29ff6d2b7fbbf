"""Features to seats and grown features back: the graft of `esper.growth.forward` for a stack, with the plan as data.

Which row a seat takes and how its seed takes part are numbers on the device, so nothing here depends on the plan.
Letters: `N` rows of features (hosts, or rows of the coalition tree), `R` seats, `P` positions that have an alpha of
their own (samples; for sequences also places), `M` numbers at each.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esper.growth.executors.seating import BLEND, BYPASS, STRAIGHT, Seats
from esper.hosts import ops


def take(h: Tensor, seats: Seats) -> Tensor:
    """Features `[R, ...]` for the seats of a slot from those of all hosts `[N, ...]`.

    A straight-through seed sees its host's features but sends no gradient back.
    """
    result: Tensor = _Take.apply(h, seats.source, seats.active, seats.seat, seats.mode, ops.is_fused(h))
    return result


def combine(h: Tensor, s: Tensor, strength: Tensor, seats: Seats) -> Tensor:
    """All hosts' features with the seeds' outputs `s` `[R, ...]` grafted on; `strength` `[R, P]` scales what blends.

    Blended: `h + strength (s - h)`. Straight-through: `h`, with the whole gradient going to `s` too, where that is
    finite. Anybody else: `h`, as if there was no seed.
    """
    result: Tensor = _Combine.apply(h, s, strength, seats.source, seats.seat, seats.mode, ops.is_fused(h))
    return result


def select_rows(h: Tensor, source: Tensor, active: Tensor) -> Tensor:
    """Rows of `h`, without gradients; those of inactive seats are whatever they are."""
    return _kernels().take(h, source, active) if ops.is_fused(h) else h.index_select(0, source)


def branch(h: Tensor, s: Tensor, strength: Tensor, source: Tensor, seat: Tensor, active: Tensor) -> Tensor:
    """Rows `source` `[N']` of `h`, with the output of seat `seat` (-1 for none) blended in; without gradients."""
    if ops.is_fused(h):
        return _kernels().combine(h, s, strength, seat, torch.where(seat >= 0, BLEND, BYPASS), source, active)
    return _blended(h.index_select(0, source), s, strength, seat, seat >= 0)


def _blended(h: Tensor, s: Tensor, strength: Tensor, seat: Tensor, blends: Tensor) -> Tensor:
    at = seat.clamp(min=0)
    alpha = _over(strength.index_select(0, at).to(h.dtype), h)
    return torch.where(_over(blends, h), h + alpha * (s.index_select(0, at).to(h.dtype) - h), h)


def _over(values: Tensor, tensor: Tensor) -> Tensor:
    return values[(..., *([None] * (tensor.dim() - values.dim())))]


def _kernels() -> ModuleType:
    """Triton is there only where a GPU is."""
    from esper.growth.executors import graft_kernels

    return graft_kernels


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, source: Tensor, active: Tensor, seat: Tensor, mode: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(seat, mode)
        ctx.fused = fused
        return _kernels().take(h, source, active) if fused else h.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        seat, mode = ctx.saved_tensors
        if ctx.fused:
            return _kernels().take_grad(g, seat, mode), None, None, None, None, None
        mine = g.index_select(0, seat.clamp(min=0))
        return torch.where(_over(mode == BLEND, mine), mine, 0.0), None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, s: Tensor, strength: Tensor, source: Tensor, seat: Tensor, mode: Tensor, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(h, s, strength, source, seat, mode)
        ctx.fused = fused
        if fused:
            return _kernels().combine(h, s, strength, seat, mode)
        return _blended(h, s, strength, seat, mode == BLEND)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, s, strength, source, seat, mode = ctx.saved_tensors
        if ctx.fused:
            return *_kernels().combine_grad(g, h, s, strength, seat, mode), None, None, None, None
        blends = _over(mode == BLEND, h)
        alpha = _over(strength.to(h.dtype), s)
        mine = g.index_select(0, source)
        how = _over(mode.index_select(0, source), s)
        to_s = torch.where(how == BLEND, alpha * mine, torch.where((how == STRAIGHT) & s.isfinite(), mine, 0.0))
        apart = mine * (s.to(h.dtype) - h.index_select(0, source))
        to_strength = torch.where(how == BLEND, apart, 0.0).flatten(strength.dim()).sum(-1)
        kept = 1.0 - _over(strength.to(h.dtype).index_select(0, seat.clamp(min=0)), h)
        to_h = torch.where(blends, kept * g, g)
        return to_h, to_s.to(s.dtype), to_strength.to(strength.dtype), None, None, None, None
