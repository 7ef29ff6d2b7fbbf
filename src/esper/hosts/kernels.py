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
    row, column = place // W, place % W
    source = x + host * x_host + sample * (C * H * W) + place
    weights = w + host * (O * C * K * K) + o * (C * K * K)
    total = tl.zeros((BP, BO), dtype=tl.float32)
    for start in range(0, C * K * K, BT):
        t = start + tl.arange(0, BT)
        channel, tap = t // (K * K), t % (K * K)
        dy, dx = tap // K - K // 2, tap % K - K // 2
        y, z = row[:, None] + dy[None, :], column[:, None] + dx[None, :]
        inside = (y >= 0) & (y < H) & (z >= 0) & (z < W) & valid[:, None] & (t < C * K * K)[None, :]
        shift = channel * (H * W) + dy * W + dx
        patch = tl.load(source[:, None] + shift[None, :], mask=inside, other=0.0)
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
    dy, dx = tap // K - K // 2, tap % K - K // 2
    shift = channel * (H * W) + dy * W + dx
    total = tl.zeros((BO, BT), dtype=tl.float32)
    for start in range(0, share, BP):
        p = chunk * share + start + tl.arange(0, BP)
        valid = p < pixels
        sample, place = p // (H * W), p % (H * W)
        row, column = place // W, place % W
        y, z = row[:, None] + dy[None, :], column[:, None] + dx[None, :]
        inside = (y >= 0) & (y < H) & (z >= 0) & (z < W) & valid[:, None] & (t < C * K * K)[None, :]
        source = x + host * x_host + sample * (C * H * W) + place
        patch = tl.load(source[:, None] + shift[None, :], mask=inside, other=0.0)
        upstream = g + host * pixels * O + (sample * (O * H * W) + place)[None, :] + (o * (H * W))[:, None]
        grad = tl.load(upstream, mask=valid[None, :] & (o < O)[:, None], other=0.0)
        total = tl.dot(grad, patch.to(grad.dtype), total, input_precision=PRECISION)
    target = partial + (host * chunks + chunk) * (O * C * K * K) + o[:, None] * (C * K * K) + t[None, :]
    tl.store(target, total, mask=(o < O)[:, None] & (t < C * K * K)[None, :])


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
    best = tl.load(source, mask=valid, other=0.0).to(tl.float32) * scale + shift
    if P == 2:
        at = tl.zeros((BLOCK,), dtype=tl.int32)
        for step in tl.static_range(1, 4):
            value = tl.load(source + step // 2 * W + step % 2, mask=valid, other=0.0).to(tl.float32) * scale + shift
            best, at = _larger(best, at, value, step)
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
        chosen = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        best = chosen * scale + shift
        if P == 2:
            for step in tl.static_range(1, 4):
                value = tl.load(source + step // 2 * W + step % 2, mask=valid, other=0.0).to(tl.float32)
                best, chosen = _larger(best, chosen, value * scale + shift, value)
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
    best = tl.load(z + corner, mask=valid, other=0.0).to(tl.float32) * scale + shift
    at = tl.zeros((BLOCK,), dtype=tl.int32)
    if P == 2:
        for step in tl.static_range(1, 4):
            value = tl.load(z + corner + step // 2 * W + step % 2, mask=valid, other=0.0).to(tl.float32)
            best, at = _larger(best, at, value * scale + shift, step)
    grad = tl.load(g + host * size + i, mask=valid, other=0.0).to(tl.float32)
    grad = tl.where(best > 0, grad, 0.0)
    for step in tl.static_range(P * P):
        here = corner + step // 2 * W + step % 2
        value = tl.load(z + here, mask=valid, other=0.0).to(tl.float32)
        upstream = tl.where(at == step, grad, 0.0)
        result = scale * (upstream - bias_mean - (value - mean) * inverse * scale_mean)
        tl.store(out + here, result.to(out.dtype.element_ty), mask=valid)


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
    x, w = _rows(x), w.contiguous()
    out = torch.empty(n, b, o, height, width, dtype=w.dtype, device=x.device)
    pixels, block = b * height * width, _block(o)
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(o, block), n)
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
    x, g = _rows(x), g.contiguous()
    pixels, taps = b * height * width, c * size * size
    block, tile = _block(o), 32 if taps <= 96 else 64
    tiles = triton.cdiv(taps, tile)
    across = n * triton.cdiv(o, block) * tiles
    chunks = max(1, min(triton.cdiv(pixels, 4 * _PIXELS), triton.cdiv(2048, across)))
    share = triton.cdiv(triton.cdiv(pixels, chunks), _PIXELS) * _PIXELS
    chunks = triton.cdiv(pixels, share)
    partial = torch.empty(n, chunks, o, c, size, size, dtype=torch.float32, device=x.device)
    grid = (chunks, triton.cdiv(o, block) * tiles, n)
    _conv_weight_kernel[grid](
        x, g, partial, x.stride(0), pixels, share, chunks, c, o, height, width, size,
        _PIXELS, block, tile, tiles, _precision(g.dtype),
    )  # fmt: skip
    return partial.sum(1)


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


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous samples; a batch shared by all hosts (stride 0) is not copied."""
    return x if x[0].is_contiguous() else x.contiguous()


def compiled() -> int:
    """Kernel variants compiled so far in this process."""
    kernels = (
        _conv_kernel, _conv_weight_kernel, _moments_kernel, _merge_kernel,
        _activate_kernel, _activate_sums_kernel, _activate_grad_kernel,
    )  # fmt: skip
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
