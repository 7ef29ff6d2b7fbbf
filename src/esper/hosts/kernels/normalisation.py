"""BatchNorm, ReLU and pooling, GroupNorm and ReLU, and means over pixels, of stacks of hosts.

Letters: `N` hosts, `B` samples, `C` channels, `H`, `W` pixels, `P` side of the pooling window. Batch statistics are
merged from exact partial moments; normalisation, ReLU and pooling are one pass forward and two backward. Where
`active` `[N]` is given, rows whose flag is 0 are left out and what stands there is arbitrary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["chunks"])
def _moments_kernel(
    z, partial, active, size, chunks, C: tl.constexpr, AREA: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    host, channel, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    if MASKED:
        if tl.load(active + host) == 0:
            return
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
    z, affine, out, active, size,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    host = tl.program_id(1).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
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
    z, weight, bias, onto, out, saved, active, B, EPS: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    AREA: tl.constexpr, RELU: tl.constexpr, ADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = C // G
    host, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if MASKED:
        if tl.load(active + host) == 0:
            return
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
    if ADDED:
        # Rounded before the sum, as it would be without the fusion.
        result = tl.load(onto + at).to(tl.float32) + result.to(z.dtype.element_ty).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty))
    tl.store(saved + (host * B * G + row) * 2, mean)
    tl.store(saved + (host * B * G + row) * 2 + 1, inverse)


@triton.jit
def _group_norm_grad_kernel(
    z, weight, bias, saved, g, out, sums, active, B,
    C: tl.constexpr, G: tl.constexpr, AREA: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = C // G
    host, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if MASKED:
        if tl.load(active + host) == 0:
            return
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


@triton.jit
def _spatial_mean_kernel(
    x, out, active, planes, AREA: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    host = tl.program_id(1).to(tl.int64)
    plane, i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)
    wanted = plane < planes
    if MASKED:
        wanted = wanted & (tl.load(active + host) != 0)
    source = x + (host * planes + plane)[:, None] * AREA + i[None, :]
    value = tl.load(source, mask=wanted[:, None] & (i < AREA)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / AREA
    tl.store(out + host * planes + plane, mean.to(out.dtype.element_ty), mask=plane < planes)


def moments(z: Tensor, weight: Tensor, bias: Tensor, eps: float, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Batch statistics of `z` `[N, B, C, H, W]` and what they make of the affine `[N, C]`.

    Returns float32 `[N, C, 2]` twice: (mean, biased variance), and (scale, shift) of the normalisation.
    """
    n, b, c, height, width = z.shape
    size = b * height * width
    block = min(4096, size & -size)
    chunks = size // block
    partial = torch.empty(n, c, chunks, 2, dtype=torch.float32, device=z.device)
    result, affine = (torch.empty(n, c, 2, dtype=torch.float32, device=z.device) for _ in range(2))
    _moments_kernel[(chunks, c, n)](
        z, partial, _flags(active, z), size, chunks, c, height * width, block, active is not None
    )
    many = triton.next_power_of_2(chunks)
    _merge_kernel[(n * c,)](partial, weight.contiguous(), bias.contiguous(), result, affine, chunks, block, eps, many)
    return result, affine


def activate(z: Tensor, affine: Tensor, pool: int, active: Tensor | None = None) -> Tensor:
    """`max_pool(relu(scale z + shift))` with windows of side `pool` (1 or 2)."""
    n, b, c, height, width = z.shape
    out = torch.empty(n, b, c, height // pool, width // pool, dtype=z.dtype, device=z.device)
    size, block = out[0].numel(), 1024
    _activate_kernel[(triton.cdiv(size, block), n)](
        z, affine, out, _flags(active, z), size, c, height, width, pool, block, active is not None
    )
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


def group_norm(
    z: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    eps: float,
    onto: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of `z` `[N, B, C, H, W]` with affine `[N, C]`, then ReLU if asked for, added `onto` features if given.

    Also returns float32 `[N, B, groups, 2]`: the mean and the inverse deviation of every group.
    """
    n, b, c, height, width = z.shape
    below = z if onto is None else onto.contiguous()
    out = torch.empty_like(z, dtype=torch.promote_types(z.dtype, below.dtype))
    saved = torch.empty(n, b, groups, 2, dtype=torch.float32, device=z.device)
    area = height * width
    _group_norm_kernel[(b * groups, n)](
        z, weight, bias, below, out, saved, _flags(active, z), b, eps, c, groups, area, relu, onto is not None,
        active is not None, num_warps=_warps(c // groups * area),
    )  # fmt: skip
    return out, saved


def group_norm_grad(
    z: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    saved: Tensor,
    g: Tensor,
    relu: bool,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `z`, weight and bias through `group_norm`."""
    n, b, c, height, width = z.shape
    out, area = torch.empty_like(z), height * width
    sums = torch.empty(n, b, 2, c, dtype=torch.float32, device=z.device)
    _group_norm_grad_kernel[(b * groups, n)](
        z, weight, bias, saved, g.contiguous(), out, sums, _flags(active, z), b, c, groups, area, relu,
        active is not None, num_warps=_warps(c // groups * area),
    )  # fmt: skip
    total = sums.sum(1)
    return out, total[:, 1], total[:, 0]


def spatial_mean(x: Tensor, active: Tensor | None = None) -> Tensor:
    """Means over the pixels of `x` `[N, B, C, H, W]`; 0 in rows that are left out."""
    n, b, c, height, width = x.shape
    x, area = x.contiguous(), height * width
    wide = triton.next_power_of_2(area)
    block = max(1, 2048 // wide)
    out = torch.empty(n, b, c, dtype=x.dtype, device=x.device)
    _spatial_mean_kernel[(triton.cdiv(b * c, block), n)](
        x, out, _flags(active, x), b * c, area, wide, block, active is not None
    )
    return out


def _flags(active: Tensor | None, any_tensor: Tensor) -> Tensor:
    """The flags, or something to stand in their place in a kernel that does not look at them."""
    return any_tensor if active is None else active


def fits_group_norm(channels: int, groups: int, area: int) -> bool:
    """Whether a group is a tile the kernel can hold: powers of two, at most 8,192 values."""
    members = channels // groups
    return members & (members - 1) == 0 and area & (area - 1) == 0 and members * area <= 8192


def _warps(size: int) -> int:
    return max(1, min(8, size // 512))
