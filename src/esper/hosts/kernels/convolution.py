"""Convolutions of stacks of hosts as implicit matrix products: no patches are ever written.

Letters: `N` hosts, `B` samples, `C` input and `O` output channels, `H`, `W` pixels. Where `active` `[N]` is given, rows
whose flag is 0 are left out and what stands there is arbitrary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Integers that vary with the number of hosts are never specialised: a new number of rows must not compile a new kernel.
_PIXELS = 128
_TAPS = 32


@triton.jit
def _reach(row, column, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """A bit per tap: whether it lies inside the image. Cheaper to look up per element than to compare again."""
    bits = tl.zeros_like(row)
    for tap in tl.static_range(K * K):
        y, x = row + (tap // K - K // 2), column + (tap % K - K // 2)
        bits |= ((y >= 0) & (y < H) & (x >= 0) & (x < W)).to(tl.int32) << tap
    return bits


@triton.jit(do_not_specialize=["x_host"])
def _conv_kernel(
    x, w, out, active, x_host, pixels,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    valid = p < pixels
    sample, place = p // (H * W), p % (H * W)
    bits = tl.where(valid, _reach(place // W, place % W, H, W, K), 0)
    source, start_of = x + host * x_host, sample * (C * H * W) + place
    weights = w + host * (O * C * K * K) + o * (C * K * K)
    total = tl.zeros((BP, BO), dtype=tl.float32)
    for start in range(0, C * K * K, BT):
        t = start + tl.arange(0, BT)
        channel, tap = t // (K * K), t % (K * K)
        shift = channel * (H * W) + (tap // K - K // 2) * W + tap % K - K // 2
        tap = tl.where(t < C * K * K, tap, 31)
        inside = ((bits[:, None] >> tap[None, :]) & 1) != 0
        patch = tl.load(source + (start_of[:, None] + shift[None, :]), mask=inside, other=0.0)
        kernel = tl.load(weights[None, :] + t[:, None], mask=(t < C * K * K)[:, None] & (o < O)[None, :], other=0.0)
        total = tl.dot(patch.to(w.dtype.element_ty), kernel, total, input_precision=PRECISION)
    target = out + host * pixels * O + (sample * (O * H * W) + place)[:, None] + (o * (H * W))[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=valid[:, None] & (o < O)[None, :])


@triton.jit(do_not_specialize=["x_host", "share", "chunks"])
def _conv_weight_kernel(
    x, g, partial, active, x_host, pixels, share, chunks,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    chunk = tl.program_id(0)
    o = tl.program_id(1) // TILES * BO + tl.arange(0, BO)
    t = tl.program_id(1) % TILES * BT + tl.arange(0, BT)
    channel, tap = t // (K * K), t % (K * K)
    shift = channel * (H * W) + (tap // K - K // 2) * W + tap % K - K // 2
    tap = tl.where(t < C * K * K, tap, 31)
    total = tl.zeros((BO, BT), dtype=tl.float32)
    for start in range(0, share, BP):
        p = chunk * share + start + tl.arange(0, BP)
        valid = p < pixels
        sample, place = p // (H * W), p % (H * W)
        bits = tl.where(valid, _reach(place // W, place % W, H, W, K), 0)
        at = (sample * (C * H * W) + place)[:, None] + shift[None, :]
        patch = tl.load(x + host * x_host + at, mask=((bits[:, None] >> tap[None, :]) & 1) != 0, other=0.0)
        upstream = g + host * pixels * O + ((sample * (O * H * W) + place)[None, :] + (o * (H * W))[:, None])
        grad = tl.load(upstream, mask=valid[None, :] & (o < O)[:, None], other=0.0)
        total = tl.dot(grad, patch.to(grad.dtype), total, input_precision=PRECISION)
    target = partial + (host * chunks + chunk) * (O * C * K * K) + o[:, None] * (C * K * K) + t[None, :]
    tl.store(target, total, mask=(o < O)[:, None] & (t < C * K * K)[None, :])


@triton.jit(do_not_specialize=["x_host"])
def _conv_last_kernel(
    x, w, out, active, x_host, pixels,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    valid = p < pixels
    sample, place = p // (H * W), p % (H * W)
    row, column = place // W, place % W
    source, weights = x + host * x_host, w + host * (O * C * K * K)
    total = tl.zeros((BP, BO), dtype=tl.float32)
    for start in range(0, K * K, BT):
        tap = start + tl.arange(0, BT)
        dy, dx = tap // K - K // 2, tap % K - K // 2
        y, z = row[:, None] + dy[None, :], column[:, None] + dx[None, :]
        inside = (y >= 0) & (y < H) & (z >= 0) & (z < W) & valid[:, None] & (tap < K * K)[None, :]
        at = p[:, None] * C + ((dy * W + dx) * C)[None, :]
        for part in range(0, C, BC):
            c = part + tl.arange(0, BC)
            patch = tl.load(source + (at[:, :, None] + c[None, None, :]), mask=inside[:, :, None], other=0.0)
            cell = o[None, None, :] * (K * K * C) + (tap * C)[:, None, None] + c[None, :, None]
            kernel = tl.load(weights + cell, mask=(tap < K * K)[:, None, None] & (o < O)[None, None, :], other=0.0)
            total = tl.dot(
                tl.reshape(patch, (BP, BT * BC)), tl.reshape(kernel, (BT * BC, BO)), total, input_precision=PRECISION
            )
    target = out + host * pixels * O + (sample * (O * H * W) + place)[:, None] + (o * (H * W))[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=valid[:, None] & (o < O)[None, :])


@triton.jit(do_not_specialize=["x_host", "share", "chunks"])
def _conv_weight_last_kernel(
    x, g, partial, active, x_host, pixels, share, chunks,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    chunk = tl.program_id(0)
    o = tl.program_id(1) // TILES * BO + tl.arange(0, BO)
    tile = tl.program_id(1) % TILES
    tap = tile // (C // BC) * BT + tl.arange(0, BT)
    c = tile % (C // BC) * BC + tl.arange(0, BC)
    dy, dx = tap // K - K // 2, tap % K - K // 2
    total = tl.zeros((BO, BT * BC), dtype=tl.float32)
    for start in range(0, share, BP):
        p = chunk * share + start + tl.arange(0, BP)
        valid = p < pixels
        sample, place = p // (H * W), p % (H * W)
        y, z = (place // W)[:, None] + dy[None, :], (place % W)[:, None] + dx[None, :]
        inside = (y >= 0) & (y < H) & (z >= 0) & (z < W) & valid[:, None] & (tap < K * K)[None, :]
        at = p[:, None] * C + ((dy * W + dx) * C)[None, :]
        patch = tl.load(x + host * x_host + (at[:, :, None] + c[None, None, :]), mask=inside[:, :, None], other=0.0)
        upstream = g + host * pixels * O + ((sample * (O * H * W) + place)[None, :] + (o * (H * W))[:, None])
        grad = tl.load(upstream, mask=valid[None, :] & (o < O)[:, None], other=0.0)
        total = tl.dot(grad, tl.reshape(patch, (BP, BT * BC)), total, input_precision=PRECISION)
    cell = tl.reshape((tap * C)[:, None] + c[None, :], (BT * BC,))
    target = partial + (host * chunks + chunk) * (O * C * K * K) + o[:, None] * (C * K * K) + cell[None, :]
    tl.store(target, total, mask=(o < O)[:, None] & (cell < C * K * K)[None, :])


def _precision(dtype: torch.dtype) -> str:
    """Three tf32 products stand in for one float32 product and keep its accuracy; other types need no help."""
    return "tf32x3" if dtype is torch.float32 else "ieee"


def _block(channels: int) -> int:
    return min(64, max(16, triton.next_power_of_2(channels)))


def conv(x: Tensor, w: Tensor, active: Tensor | None = None) -> Tensor:
    """Same-padded convolutions of all hosts: `x` `[N, B, C, H, W]`, `w` `[N, O, C, K, K]`, result in `w`'s dtype.

    `x` may have another dtype (rounded on the way) and may be one batch expanded over hosts.
    """
    n, b, c, height, width = x.shape
    o, size = w.shape[1], w.shape[-1]
    out = torch.empty(n, b, o, height, width, dtype=w.dtype, device=x.device)
    pixels, block = b * height * width, _block(o)
    grid, flags = (triton.cdiv(pixels, _PIXELS), triton.cdiv(o, block), n), x if active is None else active
    if vectorised(c, w.dtype):
        x, w = channels_last(x, w.dtype), w.permute(0, 1, 3, 4, 2).contiguous()
        taps, part = _tile(c, size, 32)
        _conv_last_kernel[grid](
            x, w, out, flags, x.stride(0), pixels, c, o, height, width, size,
            _PIXELS, block, taps, part, _precision(w.dtype), active is not None,
        )  # fmt: skip
    else:
        x, w = _rows(x), w.contiguous()
        _conv_kernel[grid](
            x, w, out, flags, x.stride(0), pixels, c, o, height, width, size,
            _PIXELS, block, min(_TAPS, max(16, triton.next_power_of_2(c * size * size))), _precision(w.dtype),
            active is not None,
        )  # fmt: skip
    return out


def conv_input_grad(g: Tensor, w: Tensor, active: Tensor | None = None) -> Tensor:
    """Gradient of the inputs of `conv`: a convolution with the transposed, mirrored weights."""
    return conv(g, w.flip(-1, -2).transpose(1, 2), active)


def conv_weight_grad(x: Tensor, g: Tensor, size: int, active: Tensor | None = None) -> Tensor:
    """Gradient `[N, O, C, size, size]` float32 of the weights of `conv`."""
    n, b, c, height, width = x.shape
    o = g.shape[2]
    g, pixels, area, block = g.contiguous(), b * height * width, size * size, _block(o)
    taps, part = _tile(c, size, 32 if c <= 8 else 64)
    flat = 32 if c * area <= 96 else 64
    tiles = triton.cdiv(area, taps) * (c // part) if vectorised(c, g.dtype) else triton.cdiv(c * area, flat)
    across = n * triton.cdiv(o, block) * tiles
    chunks = max(1, min(triton.cdiv(pixels, 4 * _PIXELS), triton.cdiv(2048, across)))
    share = triton.cdiv(triton.cdiv(pixels, chunks), _PIXELS) * _PIXELS
    chunks = triton.cdiv(pixels, share)
    partial = torch.empty(n, chunks, o, c * area, dtype=torch.float32, device=x.device)
    grid, flags = (chunks, triton.cdiv(o, block) * tiles, n), g if active is None else active
    if vectorised(c, g.dtype):
        x = channels_last(x, g.dtype)
        _conv_weight_last_kernel[grid](
            x, g, partial, flags, x.stride(0), pixels, share, chunks, c, o, height, width, size,
            _PIXELS, block, taps, part, tiles, _precision(g.dtype), active is not None,
        )  # fmt: skip
        return partial.sum(1).view(n, o, size, size, c).permute(0, 1, 4, 2, 3)
    x = _rows(x)
    _conv_weight_kernel[grid](
        x, g, partial, flags, x.stride(0), pixels, share, chunks, c, o, height, width, size,
        _PIXELS, block, flat, tiles, _precision(g.dtype), active is not None,
    )  # fmt: skip
    return partial.sum(1).view(n, o, c, size, size)


def vectorised(channels: int, dtype: torch.dtype) -> bool:
    """Whether a pixel's channels are loaded as whole vectors: powers of two from 8, in 16 bits.

    In float32 the three tf32 products cost more than the loads, and the plain arrangement measured faster.
    """
    return dtype.itemsize == 2 and channels >= 8 and channels & (channels - 1) == 0


def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` stored as `conv` and `conv_weight_grad` read it, so that both can without moving it again."""
    if not vectorised(x.shape[2], dtype):
        return _rows(x)
    return channels_last(x, dtype).permute(0, 1, 4, 2, 3)


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` `[N, B, C, H, W]` laid out `[N, B, H, W, C]` as `dtype`; a batch shared by all hosts stays shared."""
    shared = x.stride(0) == 0 and x.shape[0] > 1
    moved = (x[:1] if shared else x).permute(0, 1, 3, 4, 2).to(dtype).contiguous()
    return moved.expand(x.shape[0], *moved.shape[1:]) if shared else moved


def _tile(channels: int, size: int, width: int) -> tuple[int, int]:
    """Taps and channels of a tile of about `width` columns."""
    part = min(channels, width)
    return max(1, min(width // part, triton.next_power_of_2(size * size))) if part >= 16 or size > 1 else 2, part


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous samples; a batch shared by all hosts (stride 0) is not copied."""
    return x if x[0].is_contiguous() else x.contiguous()
