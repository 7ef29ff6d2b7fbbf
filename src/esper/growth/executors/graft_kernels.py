"""Triton kernels of `esper.growth.executors.grafting`: rows to seats, seeds blended in, and both backwards.

Every array has its rows first: `N` rows of features, `R` seats, `P` positions with an alpha of their own and `M`
numbers at each. Index arrays are int64. Rows without a seed cost one copy, seats without one nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.growth.executors.seating import BLEND, STRAIGHT

_BLOCK = 1024


@triton.jit
def _take_kernel(h, source, active, out, size, BLOCK: tl.constexpr):
    seat = tl.program_id(1).to(tl.int64)
    if tl.load(active + seat) == 0:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(source + seat)
    tl.store(out + seat * size + i, tl.load(h + row * size + i, mask=i < size), mask=i < size)


@triton.jit
def _take_grad_kernel(g, seat, mode, out, size, BLEND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(seat + row)
    takes = (at >= 0) & (tl.load(mode + row) == BLEND)
    value = tl.load(g + at * size + i, mask=takes & (i < size), other=0.0)
    tl.store(out + row * size + i, value, mask=i < size)


@triton.jit
def _combine_kernel(
    h, s, strength, seat, mode, source, active, out, size, m, positions,
    BLEND: tl.constexpr, BRANCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    origin = row
    if BRANCHES:
        if tl.load(active + row) == 0:
            return
        origin = tl.load(source + row)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    at = tl.load(seat + row)
    blends = (at >= 0) & (tl.load(mode + row) == BLEND)
    value = tl.load(h + origin * size + i, mask=valid, other=0.0)
    alpha = tl.load(strength + at * positions + i // m, mask=valid & blends, other=0.0).to(value.dtype)
    grown = tl.load(s + at * size + i, mask=valid & blends, other=0.0).to(value.dtype)
    value = tl.where(blends, value + alpha * (grown - value), value)
    tl.store(out + row * size + i, value, mask=valid)


@triton.jit
def _combine_grad_kernel(
    g, h, s, strength, seat, mode, to_h, to_s, to_strength, positions,
    M: tl.constexpr, STRAIGHT: tl.constexpr, BLEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, position = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at, how = tl.load(seat + row), tl.load(mode + row)
    seated = at >= 0
    blends = seated & (how == BLEND)
    alpha = tl.load(strength + at * positions + position, mask=blends, other=0.0).to(tl.float32)
    here = (row * positions + position) * M
    there = (at * positions + position) * M
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, M, BLOCK):
        i = start + tl.arange(0, BLOCK)
        valid = i < M
        upstream = tl.load(g + here + i, mask=valid, other=0.0)
        grad = upstream.to(tl.float32)
        grown = tl.load(s + there + i, mask=valid & seated, other=0.0).to(tl.float32)
        value = tl.load(h + here + i, mask=valid & blends, other=0.0).to(tl.float32)
        total += tl.where(valid & blends, grad * (grown - value), 0.0)
        kept = tl.where(blends, ((1.0 - alpha) * grad).to(upstream.dtype), upstream)
        tl.store(to_h + here + i, kept, mask=valid)
        finite = (grown == grown) & (tl.abs(grown) != float("inf"))
        whole = tl.where((how == STRAIGHT) & finite, grad, 0.0)
        tl.store(to_s + there + i, tl.where(blends, alpha * grad, whole).to(to_s.dtype.element_ty), mask=valid & seated)
    result = tl.sum(total, 0).to(to_strength.dtype.element_ty)
    tl.store(to_strength + at * positions + position, result, mask=seated)


def take(h: Tensor, source: Tensor, active: Tensor) -> Tensor:
    """Rows `source` `[R]` of `h` `[N, ...]`; seats that are not `active` are left out."""
    h = h.contiguous()
    out = h.new_empty(source.shape[0], *h.shape[1:])
    size = h[0].numel()
    _take_kernel[(triton.cdiv(size, _BLOCK), source.shape[0])](h, source, active, out, size, _BLOCK)
    return out


def take_grad(g: Tensor, seat: Tensor, mode: Tensor) -> Tensor:
    """Gradient `[N, ...]` of the rows that blended seats took: `g` `[R, ...]` brought back, 0 for all others."""
    g = g.contiguous()
    out = g.new_empty(seat.shape[0], *g.shape[1:])
    size = g[0].numel()
    _take_grad_kernel[(triton.cdiv(size, _BLOCK), seat.shape[0])](g, seat, mode, out, size, BLEND, _BLOCK)
    return out


def combine(
    h: Tensor,
    s: Tensor,
    strength: Tensor,
    seat: Tensor,
    mode: Tensor,
    source: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`h + strength (s - h)` in rows whose seed blends, `h` in all others.

    With `source` the rows are those of `h` it names, and rows that are not `active` are left out.
    """
    h, s, strength = h.contiguous(), s.contiguous(), strength.contiguous()
    out = h.new_empty(seat.shape[0], *h.shape[1:])
    size, positions = h[0].numel(), strength[0].numel()
    _combine_kernel[(triton.cdiv(size, _BLOCK), seat.shape[0])](
        h, s, strength, seat, mode, seat if source is None else source, seat if active is None else active, out,
        size, size // positions, positions, BLEND, source is not None, _BLOCK,
    )  # fmt: skip
    return out


def combine_grad(
    g: Tensor, h: Tensor, s: Tensor, strength: Tensor, seat: Tensor, mode: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `h`, `s` and `strength`; those of free seats are whatever they are."""
    g, h, s, strength = (t.contiguous() for t in (g, h, s, strength))
    to_h, to_s, to_strength = torch.empty_like(h), torch.empty_like(s), torch.empty_like(strength)
    positions = strength[0].numel()
    m = h[0].numel() // positions
    block = min(_BLOCK, triton.next_power_of_2(m))
    _combine_grad_kernel[(positions, h.shape[0])](
        g, h, s, strength, seat, mode, to_h, to_s, to_strength, positions, m, STRAIGHT, BLEND, block
    )
    return to_h, to_s, to_strength
