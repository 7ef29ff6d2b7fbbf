"""Triton kernels for stacks of small convolutional networks: every array carries a leading host axis.

Letters: `N` hosts, `B` samples, `C` input and `O` output channels, `H`, `W` pixels, `P` side of the pooling window.

Libraries run a stack of tiny convolutions either host by host or as one grouped convolution, far from what the card
can do. Here a convolution is an implicit matrix product (no patches are ever written), batch statistics are merged
from exact partial moments, and normalisation, ReLU and pooling are one pass forward and two passes backward. Partial
sums are written and then added in a fixed order, so results do not depend on scheduling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Integers that vary with the number of hosts are never specialised: a new group size must not compile a new kernel.
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
    x, w, out, x_host, pixels,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
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
    x, g, partial, x_host, pixels, share, chunks,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
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
    x, w, out, x_host, pixels,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
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
    x, g, partial, x_host, pixels, share, chunks,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(2).to(tl.int64)
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


@triton.jit(do_not_specialize=["chunks"])
def _moments_kernel(z, partial, size, chunks, C: tl.constexpr, AREA: tl.constexpr, BLOCK: tl.constexpr):
    host, channel, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    source = z + host * size * C + i // AREA * (C * AREA) + channel * AREA + i % AREA
    value = tl.load(source).to(tl.float32)
    mean = tl.sum(value, 0) / BLOCK
    spread = tl.sum((value - mean) * (value - mean), 0)
    target = partial + ((host * C + channel) * chunks + chunk) * 2
    tl.store(target, mean)
    tl.store(target + 1, spread)


@triton.jit(do_not_specialize=["chunks"])
def _merge_kernel(
    partial, weight, bias, moments, affine, chunks, block, EPS: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0)
    j = tl.arange(0, MANY)
    means = tl.load(partial + (i * chunks + j) * 2, mask=j < chunks, other=0.0)
    spreads = tl.load(partial + (i * chunks + j) * 2 + 1, mask=j < chunks, other=0.0)
    mean = tl.sum(means, 0) / chunks
    apart = tl.where(j < chunks, means - mean, 0.0)
    var = (tl.sum(spreads, 0) + block * tl.sum(apart * apart, 0)) / (chunks * block)
    scale = tl.load(weight + i) * (1.0 / tl.sqrt(var + EPS))
    tl.store(moments + i * 2, mean)
    tl.store(moments + i * 2 + 1, var)
    tl.store(affine + i * 2, scale)
    tl.store(affine + i * 2 + 1, tl.load(bias + i) - mean * scale)


@triton.jit
def _pair(source, valid):
    """Two neighbouring values of every row of pointers, in one load."""
    both = tl.load(source[:, None] + tl.arange(0, 2)[None, :], mask=valid[:, None], other=0.0)
    return tl.split(both.to(tl.float32))


@triton.jit
def _larger(value, at, other, where):
    take = (other > value) | (other != other)
    return tl.where(take, other, value), tl.where(take, where, at)


@triton.jit
def _activate_kernel(
    z, affine, out, size,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    plane = i // ((H // P) * (W // P))
    y, x = i // (W // P) % (H // P), i % (W // P)
    table = affine + (host * C + plane % C) * 2
    scale, shift = tl.load(table, mask=valid, other=0.0), tl.load(table + 1, mask=valid, other=0.0)
    source = z + host * size * (P * P) + plane * (H * W) + y * (P * W) + x * P
    at = tl.zeros((BLOCK,), dtype=tl.int32)
    if P == 2:
        a, b = _pair(source, valid)
        c, d = _pair(source + W, valid)
        best, at = _larger(a * scale + shift, at, b * scale + shift, 1)
        best, at = _larger(best, at, c * scale + shift, 2)
        best, at = _larger(best, at, d * scale + shift, 3)
    else:
        best = tl.load(source, mask=valid, other=0.0).to(tl.float32) * scale + shift
    tl.store(out + host * size + i, tl.where(best < 0, 0.0, best).to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["chunks"])
def _activate_sums_kernel(
    z, affine, moments, g, partial, windows, chunks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    AREA: tl.constexpr = (H // P) * (W // P)
    host, channel, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    row = host * C + channel
    scale, shift = tl.load(affine + row * 2), tl.load(affine + row * 2 + 1)
    mean, inverse = tl.load(moments + row * 2), 1.0 / tl.sqrt(tl.load(moments + row * 2 + 1) + EPS)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(ROUNDS):
        i = (chunk * ROUNDS + turn) * BLOCK + tl.arange(0, BLOCK)
        valid = i < windows
        sample, place = i // AREA, i % AREA
        source = z + host * windows * C * (P * P) + (sample * C + channel) * (H * W)
        source += place // (W // P) * (P * W) + place % (W // P) * P
        if P == 2:
            a, b = _pair(source, valid)
            c, d = _pair(source + W, valid)
            best, chosen = _larger(a * scale + shift, a, b * scale + shift, b)
            best, chosen = _larger(best, chosen, c * scale + shift, c)
            best, chosen = _larger(best, chosen, d * scale + shift, d)
        else:
            chosen = tl.load(source, mask=valid, other=0.0).to(tl.float32)
            best = chosen * scale + shift
        grad = tl.load(g + host * windows * C + (sample * C + channel) * AREA + place, mask=valid, other=0.0)
        grad = tl.where(valid & (best > 0), grad.to(tl.float32), 0.0)
        bias_sum += grad
        scale_sum += tl.where(valid, grad * (chosen - mean) * inverse, 0.0)
    target = partial + (row * chunks + chunk) * 2
    tl.store(target, tl.sum(bias_sum, 0))
    tl.store(target + 1, tl.sum(scale_sum, 0))


@triton.jit
def _activate_grad_kernel(
    z, affine, moments, g, sums, out, size, count,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    plane = i // ((H // P) * (W // P))
    y, x = i // (W // P) % (H // P), i % (W // P)
    row = (host * C + plane % C) * 2
    scale, shift = tl.load(affine + row, mask=valid, other=0.0), tl.load(affine + row + 1, mask=valid, other=0.0)
    mean, var = tl.load(moments + row, mask=valid, other=0.0), tl.load(moments + row + 1, mask=valid, other=1.0)
    inverse = 1.0 / tl.sqrt(var + EPS)
    bias_mean = tl.load(sums + row, mask=valid, other=0.0) / count
    scale_mean = tl.load(sums + row + 1, mask=valid, other=0.0) / count
    corner = host * size * (P * P) + plane * (H * W) + y * (P * W) + x * P
    at = tl.zeros((BLOCK,), dtype=tl.int32)
    grad = tl.load(g + host * size + i, mask=valid, other=0.0).to(tl.float32)
    # d z = scale (upstream - mean of upstream - normalised z times mean of (upstream normalised z))
    slope = scale_mean * inverse
    offset = bias_mean - mean * slope
    if P == 2:
        v0, v1 = _pair(z + corner, valid)
        v2, v3 = _pair(z + corner + W, valid)
        best, at = _larger(v0 * scale + shift, at, v1 * scale + shift, 1)
        best, at = _larger(best, at, v2 * scale + shift, 2)
        best, at = _larger(best, at, v3 * scale + shift, 3)
        grad = tl.where(best > 0, grad, 0.0)
        d0 = scale * (tl.where(at == 0, grad, 0.0) - offset - v0 * slope)
        d1 = scale * (tl.where(at == 1, grad, 0.0) - offset - v1 * slope)
        d2 = scale * (tl.where(at == 2, grad, 0.0) - offset - v2 * slope)
        d3 = scale * (tl.where(at == 3, grad, 0.0) - offset - v3 * slope)
        target = (out + corner)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(target, tl.join(d0, d1).to(out.dtype.element_ty), mask=valid[:, None])
        tl.store(target + W, tl.join(d2, d3).to(out.dtype.element_ty), mask=valid[:, None])
    else:
        value = tl.load(z + corner, mask=valid, other=0.0).to(tl.float32)
        grad = tl.where(value * scale + shift > 0, grad, 0.0)
        tl.store(out + corner, (scale * (grad - offset - value * slope)).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _group_norm_kernel(
    z, weight, bias, out, saved, B, EPS: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, AREA: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = C // G
    host, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel = row % G * MEMBERS + tl.arange(0, MEMBERS)
    at = (host * B * G + row) * (MEMBERS * AREA) + tl.arange(0, MEMBERS)[:, None] * AREA + tl.arange(0, AREA)[None, :]
    value = tl.load(z + at).to(tl.float32)
    mean = tl.sum(tl.sum(value, 1), 0) / (MEMBERS * AREA)
    centred = value - mean
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 1), 0) / (MEMBERS * AREA) + EPS)
    scale, shift = tl.load(weight + host * C + channel), tl.load(bias + host * C + channel)
    result = centred * inverse * scale[:, None] + shift[:, None]
    if RELU:
        result = tl.where(result < 0, 0.0, result)
    tl.store(out + at, result.to(out.dtype.element_ty))
    tl.store(saved + (host * B * G + row) * 2, mean)
    tl.store(saved + (host * B * G + row) * 2 + 1, inverse)


@triton.jit
def _group_norm_grad_kernel(
    z, weight, bias, saved, g, out, sums, B,
    C: tl.constexpr, G: tl.constexpr, AREA: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = C // G
    host, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel = row % G * MEMBERS + tl.arange(0, MEMBERS)
    at = (host * B * G + row) * (MEMBERS * AREA) + tl.arange(0, MEMBERS)[:, None] * AREA + tl.arange(0, AREA)[None, :]
    mean, inverse = tl.load(saved + (host * B * G + row) * 2), tl.load(saved + (host * B * G + row) * 2 + 1)
    normed = (tl.load(z + at).to(tl.float32) - mean) * inverse
    grad = tl.load(g + at).to(tl.float32)
    scale = tl.load(weight + host * C + channel)
    if RELU:
        shift = tl.load(bias + host * C + channel)
        grad = tl.where(normed * scale[:, None] + shift[:, None] > 0, grad, 0.0)
    bias_sum, scale_sum = tl.sum(grad, 1), tl.sum(grad * normed, 1)
    first = tl.sum(bias_sum * scale, 0) / (MEMBERS * AREA)
    second = tl.sum(scale_sum * scale, 0) / (MEMBERS * AREA)
    tl.store(out + at, (inverse * (grad * scale[:, None] - first - normed * second)).to(out.dtype.element_ty))
    target = sums + (host * B + row // G) * (2 * C) + channel
    tl.store(target, bias_sum)
    tl.store(target + C, scale_sum)


def _precision(dtype: torch.dtype) -> str:
    """Three tf32 products stand in for one float32 product and keep its accuracy; other types need no help."""
    return "tf32x3" if dtype is torch.float32 else "ieee"


def _block(channels: int) -> int:
    return min(64, max(16, triton.next_power_of_2(channels)))


def conv(x: Tensor, w: Tensor) -> Tensor:
    """Same-padded convolutions of all hosts: `x` `[N, B, C, H, W]`, `w` `[N, O, C, K, K]`, result in `w`'s dtype.

    `x` may have another dtype (rounded on the way) and may be one batch expanded over hosts.
    """
    n, b, c, height, width = x.shape
    o, size = w.shape[1], w.shape[-1]
    out = torch.empty(n, b, o, height, width, dtype=w.dtype, device=x.device)
    pixels, block = b * height * width, _block(o)
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(o, block), n)
    if vectorised(c, w.dtype):
        x, w = channels_last(x, w.dtype), w.permute(0, 1, 3, 4, 2).contiguous()
        taps, part = _tile(c, size, 32)
        _conv_last_kernel[grid](
            x, w, out, x.stride(0), pixels, c, o, height, width, size,
            _PIXELS, block, taps, part, _precision(w.dtype),
        )  # fmt: skip
    else:
        x, w = _rows(x), w.contiguous()
        _conv_kernel[grid](
            x, w, out, x.stride(0), pixels, c, o, height, width, size,
            _PIXELS, block, min(_TAPS, max(16, triton.next_power_of_2(c * size * size))), _precision(w.dtype),
        )  # fmt: skip
    return out


def conv_input_grad(g: Tensor, w: Tensor) -> Tensor:
    """Gradient of the inputs of `conv`: a convolution with the transposed, mirrored weights."""
    return conv(g, w.flip(-1, -2).transpose(1, 2))


def conv_weight_grad(x: Tensor, g: Tensor, size: int) -> Tensor:
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
    grid = (chunks, triton.cdiv(o, block) * tiles, n)
    if vectorised(c, g.dtype):
        x = channels_last(x, g.dtype)
        _conv_weight_last_kernel[grid](
            x, g, partial, x.stride(0), pixels, share, chunks, c, o, height, width, size,
            _PIXELS, block, taps, part, tiles, _precision(g.dtype),
        )  # fmt: skip
        return partial.sum(1).view(n, o, size, size, c).permute(0, 1, 4, 2, 3)
    x = _rows(x)
    _conv_weight_kernel[grid](
        x, g, partial, x.stride(0), pixels, share, chunks, c, o, height, width, size,
        _PIXELS, block, flat, tiles, _precision(g.dtype),
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


def moments(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Batch statistics of `z` `[N, B, C, H, W]` and what they make of the affine `[N, C]`.

    Returns float32 `[N, C, 2]` twice: (mean, biased variance), and (scale, shift) of the normalisation.
    """
    n, b, c, height, width = z.shape
    size = b * height * width
    block = min(4096, size & -size)
    chunks = size // block
    partial = torch.empty(n, c, chunks, 2, dtype=torch.float32, device=z.device)
    result, affine = (torch.empty(n, c, 2, dtype=torch.float32, device=z.device) for _ in range(2))
    _moments_kernel[(chunks, c, n)](z, partial, size, chunks, c, height * width, block)
    many = triton.next_power_of_2(chunks)
    _merge_kernel[(n * c,)](partial, weight.contiguous(), bias.contiguous(), result, affine, chunks, block, eps, many)
    return result, affine


def activate(z: Tensor, affine: Tensor, pool: int) -> Tensor:
    """`max_pool(relu(scale z + shift))` with windows of side `pool` (1 or 2)."""
    n, b, c, height, width = z.shape
    out = torch.empty(n, b, c, height // pool, width // pool, dtype=z.dtype, device=z.device)
    size, block = out[0].numel(), 1024
    _activate_kernel[(triton.cdiv(size, block), n)](z, affine, out, size, c, height, width, pool, block)
    return out


def activate_grad(
    z: Tensor, affine: Tensor, statistics: Tensor, g: Tensor, pool: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `z`, weight and bias through normalisation by batch statistics, ReLU and pooling."""
    n, b, c, height, width = z.shape
    g = g.contiguous()
    windows, block, rounds = b * (height // pool) * (width // pool), 1024, 4
    chunks = triton.cdiv(windows, block * rounds)
    partial = torch.empty(n, c, chunks, 2, dtype=torch.float32, device=z.device)
    _activate_sums_kernel[(chunks, c, n)](
        z, affine, statistics, g, partial, windows, chunks, c, height, width, pool, eps, block, rounds
    )
    sums = partial.sum(2)
    out = torch.empty_like(z)
    size = windows * c
    _activate_grad_kernel[(triton.cdiv(size, block), n)](
        z, affine, statistics, g, sums, out, size, b * height * width, c, height, width, pool, eps, block
    )
    return out, sums[..., 1], sums[..., 0]


def group_norm(z: Tensor, groups: int, weight: Tensor, bias: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """GroupNorm of `z` `[N, B, C, H, W]` with affine `[N, C]`, then ReLU if asked for.

    Also returns float32 `[N, B, groups, 2]`: the mean and the inverse deviation of every group.
    """
    n, b, c, height, width = z.shape
    out = torch.empty_like(z)
    saved = torch.empty(n, b, groups, 2, dtype=torch.float32, device=z.device)
    area = height * width
    _group_norm_kernel[(b * groups, n)](
        z, weight, bias, out, saved, b, eps, c, groups, area, relu, num_warps=_warps(c // groups * area)
    )
    return out, saved


def group_norm_grad(
    z: Tensor, groups: int, weight: Tensor, bias: Tensor, saved: Tensor, g: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `z`, weight and bias through `group_norm`."""
    n, b, c, height, width = z.shape
    out, area = torch.empty_like(z), height * width
    sums = torch.empty(n, b, 2, c, dtype=torch.float32, device=z.device)
    _group_norm_grad_kernel[(b * groups, n)](
        z,
        weight,
        bias,
        saved,
        g.contiguous(),
        out,
        sums,
        b,
        c,
        groups,
        area,
        relu,
        num_warps=_warps(c // groups * area),
    )
    total = sums.sum(1)
    return out, total[:, 1], total[:, 0]


def fits_group_norm(channels: int, groups: int, area: int) -> bool:
    """Whether a group is a tile the kernel can hold: powers of two, at most 8,192 values."""
    members = channels // groups
    return members & (members - 1) == 0 and area & (area - 1) == 0 and members * area <= 8192


def _warps(size: int) -> int:
    return max(1, min(8, size // 512))


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous samples; a batch shared by all hosts (stride 0) is not copied."""
    return x if x[0].is_contiguous() else x.contiguous()


def compiled() -> int:
    """Kernel variants compiled so far in this process."""
    kernels = (
        _conv_kernel, _conv_weight_kernel, _conv_last_kernel, _conv_weight_last_kernel, _moments_kernel, _merge_kernel,
        _activate_kernel, _activate_sums_kernel, _activate_grad_kernel, _group_norm_kernel, _group_norm_grad_kernel,
    )  # fmt: skip
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
