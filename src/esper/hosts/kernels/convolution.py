"""Convolutions of stacks of hosts as implicit matrix products: no patches are ever written.

Letters: `N` hosts, `B` samples, `C` input and `O` output channels, `H`, `W` pixels, `K` taps a side. Weights are `[N,
O, C, K, K]`, or `[N, C, 1, K, K]` for a depthwise convolution. Where `active` `[N]` is given, rows whose flag is 0 are
left out and what stands there is arbitrary.

From eight channels on, each tap is a small product of its own. Taps then differ by constants, which the load
instructions hold, and next to no addresses are computed; those were what bound kernels with all taps in one product,
which took up to six times as long. Fewer channels would leave such products mostly empty: there the convolution has
all taps in one, and the weight gradient is plain multiply-adds, as is everything depthwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Integers that vary with the number of hosts are never specialised: a new number of rows must not compile a new kernel.

# From so many channels on each tap is a product of its own.
_PER_TAP = 8


@triton.jit
def _place(p, pixels, H: tl.constexpr, W: tl.constexpr):
    """Image, place in it, row and column of pixel `p`. Past the last pixel the row is -1, which no tap reaches from."""
    place = p % (H * W)
    return p // (H * W), place, tl.where(p < pixels, place // W, -1), place % W


@triton.jit
def _inside(row, column, tap: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """Whether a tap lies inside the image; comparisons that cannot fail are left out."""
    dy: tl.constexpr = tap // K - K // 2
    dx: tl.constexpr = tap % K - K // 2
    ok = row >= 0
    if dy < 0:
        ok = ok & (row >= -dy)
    if dy > 0:
        ok = ok & (row < H - dy)
    if dx < 0:
        ok = ok & (column >= -dx)
    if dx > 0:
        ok = ok & (column < W - dx)
    return ok


@triton.jit
def _halves(value):
    """A float32 value rounded to tf32, and what is left."""
    large = ((value.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return large, value - large


@triton.jit
def _product(a, b, total, TF32: tl.constexpr):
    """`total + a @ b`; three tf32 products stand in for a float32 one and keep its accuracy, unless `TF32` is enough.

    Tensor cores cut off what does not fit when they add, 2e-6 after 900 products in float32: a longer sum there must be
    made of several totals, added up outside.
    """
    if a.dtype == tl.float32:
        a_large, a_small = _halves(a)
        b_large, b_small = _halves(b)
        if not TF32:
            total = tl.dot(a_small, b_large, total, input_precision="tf32")
            total = tl.dot(a_large, b_small, total, input_precision="tf32")
        return tl.dot(a_large, b_large, total, input_precision="tf32")
    else:
        return tl.dot(a, b, total)


@triton.jit(do_not_specialize=["x_host"])
def _conv_kernel(
    x, w, out, active, x_host, pixels,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Products `[BP, BT] @ [BT, BO]` of pixels, channels and taps together, and outputs; `w` `[N, O, C, K, K]`."""
    host = tl.program_id(2).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    sample, place, row, column = _place(p, pixels, H, W)
    # A bit per tap: cheaper to look up per element than to compare again.
    bits = tl.zeros_like(p)
    for i in tl.static_range(K * K):
        bits |= _inside(row, column, i, H, W, K).to(tl.int32) << i
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
        total += _product(patch.to(kernel.dtype), kernel, tl.zeros((BP, BO), dtype=tl.float32), TF32)
    target = out + host * pixels * O + (sample * (O * H * W) + place)[:, None] + (o * (H * W))[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(p < pixels)[:, None] & (o < O)[None, :])


@triton.jit(do_not_specialize=["x_host"])
def _conv_taps_kernel(
    x, w, out, active, x_host, pixels,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, MASKED: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Per tap a product `[BO, BC] @ [BC, BP]` of outputs, channels and pixels; `w` `[N, K * K, O, C]`."""
    host = tl.program_id(2).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o, c = tl.program_id(1) * BO + tl.arange(0, BO), tl.arange(0, BC)
    sample, place, row, column = _place(p, pixels, H, W)
    source = (x + host * x_host + (sample * (C * H * W) + place))[None, :] + (c * (H * W))[:, None]
    weights = (w + host * (O * C * K * K)) + (o * C)[:, None] + c[None, :]
    total = tl.zeros((BO, BP), dtype=tl.float32)
    for start in range(0, C, BC):
        centre, filters, known = source + start * (H * W), weights + start, start + c < C
        part = tl.zeros((BO, BP), dtype=tl.float32)
        for tap in tl.static_range(K * K):
            ok = _inside(row, column, tap, H, W, K)[None, :]
            if C % BC != 0:
                ok = ok & known[:, None]
            shift = (tap // K - K // 2) * W + tap % K - K // 2
            patch = tl.load(centre + shift, mask=ok, other=0.0)
            kernel = tl.load(filters + tap * O * C, mask=(o < O)[:, None] & known[None, :], other=0.0)
            part = _product(kernel, patch.to(kernel.dtype), part, TF32)
        total += part
    target = out + host * pixels * O + (sample * (O * H * W) + place)[None, :] + (o * (H * W))[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(o < O)[:, None] & (p < pixels)[None, :])


@triton.jit(do_not_specialize=["x_host"])
def _conv_depthwise_kernel(
    x, w, out, active, x_host, pixels,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A host's `[B, C, H, W]` is flat here; `w` `[N, C, 1, K, K]`."""
    host = tl.program_id(1).to(tl.int64)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    plane, _, row, column = _place(p, pixels * C, H, W)
    centre, weights = x + host * x_host + p, w + host * (C * K * K) + plane % C * (K * K)
    total = tl.zeros((BP,), dtype=tl.float32)
    for tap in tl.static_range(K * K):
        shift = (tap // K - K // 2) * W + tap % K - K // 2
        value = tl.load(centre + shift, mask=_inside(row, column, tap, H, W, K), other=0.0)
        total += value.to(w.dtype.element_ty).to(tl.float32) * tl.load(weights + tap).to(tl.float32)
    tl.store(out + host * pixels * C + p, total.to(out.dtype.element_ty), mask=p < pixels * C)


@triton.jit(do_not_specialize=["x_host", "steps", "chunks"])
def _conv_weight_taps_kernel(
    x, g, partial, active, x_host, pixels, steps, chunks,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, MASKED: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Per tap a product `[BO, BP] @ [BP, BC]`; `g` is read once for all. `partial` `[N, chunks, K * K, O, C]`."""
    host, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    parts: tl.constexpr = (C + BC - 1) // BC
    o = tl.program_id(0) // parts * BO + tl.arange(0, BO)
    c = tl.program_id(0) % parts * BC + tl.arange(0, BC)
    total = (tl.zeros((BO, BC), dtype=tl.float32),) * (K * K)
    source, upstream = x + host * x_host, g + host * pixels * O
    for step in range(0, steps):
        p = (chunk * steps + step) * BP + tl.arange(0, BP)
        sample, place, row, column = _place(p, pixels, H, W)
        above = (upstream + (sample * (O * H * W) + place))[None, :] + (o * (H * W))[:, None]
        grad = tl.load(above, mask=(o < O)[:, None] & (p < pixels)[None, :], other=0.0)
        centre = (source + (sample * (C * H * W) + place))[:, None] + (c * (H * W))[None, :]
        new = ()
        for tap in tl.static_range(K * K):
            ok = _inside(row, column, tap, H, W, K)[:, None]
            if C % BC != 0:
                ok = ok & (c < C)[None, :]
            shift = (tap // K - K // 2) * W + tap % K - K // 2
            patch = tl.load(centre + shift, mask=ok, other=0.0).to(grad.dtype)
            if grad.dtype == tl.float32:
                sums = total[tap] + _product(grad, patch, tl.zeros((BO, BC), dtype=tl.float32), TF32)
            else:
                sums = _product(grad, patch, total[tap], TF32)
            new = new + (sums,)
        total = new
    target = partial + (host * chunks + chunk) * (O * C * K * K) + (o * C)[:, None] + c[None, :]
    for tap in tl.static_range(K * K):
        tl.store(target + tap * O * C, total[tap], mask=(o < O)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["x_host", "pixels", "steps", "chunks"])
def _conv_weight_direct_kernel(
    x, g, partial, active, x_host, pixels, steps, chunks,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, SEEN: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One input channel and BO outputs a program, which see `SEEN` channels: C, or 1 if depthwise (then BO is 1).

    Every thread walks over its pixels with BO * K * K sums; `partial` is `[N, chunks, O, SEEN, K * K]`.
    """
    host, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    if MASKED:
        if tl.load(active + host) == 0:
            return
    o, seen = tl.program_id(0) // SEEN * BO, tl.program_id(0) % SEEN
    c = seen if SEEN == C else o
    total = (tl.zeros((BP,), dtype=tl.float32),) * (BO * K * K)
    source, upstream = x + host * x_host + c * (H * W), g + host * pixels * O + o * (H * W)
    for step in range(0, steps):
        p = (chunk * steps + step) * BP + tl.arange(0, BP)
        sample, place, row, column = _place(p, pixels, H, W)
        centre, above = source + (sample * (C * H * W) + place), upstream + (sample * (O * H * W) + place)
        grads = ()
        for j in tl.static_range(BO):
            grads = grads + (tl.load(above + j * (H * W), mask=p < pixels, other=0.0),)
        new = ()
        for tap in tl.static_range(K * K):
            shift = (tap // K - K // 2) * W + tap % K - K // 2
            value = tl.load(centre + shift, mask=_inside(row, column, tap, H, W, K), other=0.0)
            value = value.to(g.dtype.element_ty).to(tl.float32)
            for j in tl.static_range(BO):
                new = new + (total[tap * BO + j] + value * grads[j].to(tl.float32),)
        total = new
    target = partial + ((host * chunks + chunk) * O + o) * (SEEN * K * K) + seen * (K * K)
    for tap in tl.static_range(K * K):
        for j in tl.static_range(BO):
            tl.store(target + (j * SEEN * K * K + tap), tl.sum(total[tap * BO + j], 0))


def conv(x: Tensor, w: Tensor, active: Tensor | None = None, tf32: bool = False) -> Tensor:
    """Same-padded convolutions of all hosts: `x` `[N, B, C, H, W]`, `w` `[N, O, C, K, K]`, result in `w`'s dtype.

    `x` may have another dtype (rounded on the way) and may be one batch expanded over hosts. With `tf32` products of
    float32 numbers may round them to tf32.
    """
    n, b, c, height, width = x.shape
    o, seen, size = w.shape[1:4]
    out = torch.empty(n, b, o, height, width, dtype=w.dtype, device=x.device)
    x, pixels, masked = _rows(x), b * height * width, active is not None
    flags = active if masked else x
    if seen < c:
        _conv_depthwise_kernel[(triton.cdiv(c * pixels, 1024), n)](
            x, w.contiguous(), out, flags, x.stride(0), pixels, c, height, width, size, 1024, masked
        )
        return out
    block = min(64, max(16, triton.next_power_of_2(o)))
    grid = (triton.cdiv(pixels, 128), triton.cdiv(o, block), n)
    if c < _PER_TAP:
        _conv_kernel[grid](
            x, w.contiguous(), out, flags, x.stride(0), pixels, c, o, height, width, size,
            128, block, min(32, max(16, triton.next_power_of_2(c * size * size))), masked, tf32, num_stages=1,
        )  # fmt: skip
    else:
        _conv_taps_kernel[grid](
            x, w.flatten(3).permute(0, 3, 1, 2).contiguous(), out, flags, x.stride(0), pixels, c, o, height, width,
            size, 128, block, min(32, max(16, triton.next_power_of_2(c))), masked, tf32, num_stages=1,
        )  # fmt: skip
    return out


def conv_input_grad(g: Tensor, w: Tensor, channels: int, active: Tensor | None = None, tf32: bool = False) -> Tensor:
    """Gradient of the inputs of `conv`, of so many channels: a convolution with the transposed, mirrored weights."""
    mirrored = w.flip(-1, -2)
    return conv(g, mirrored if w.shape[2] < channels else mirrored.transpose(1, 2), active, tf32)


def conv_weight_grad(
    x: Tensor, g: Tensor, shape: torch.Size, active: Tensor | None = None, tf32: bool = False
) -> Tensor:
    """Gradient of the weights of `conv`, of their `shape`, in float32."""
    n, b, c, height, width = x.shape
    o, seen, size = shape[1:4]
    x, g, pixels, area, masked = _rows(x), g.contiguous(), b * height * width, size * size, active is not None
    flags = active if masked else g

    def tiles(across: int, block: int) -> tuple[tuple[int, int, int], int, Tensor]:
        """Grid, steps of `block` pixels a chunk (four or more), and room for the chunks' sums."""
        steps = max(4, triton.cdiv(triton.cdiv(pixels, block) * n * across, 4096))
        chunks = triton.cdiv(pixels, block * steps)
        partial = torch.empty(n, chunks, o * seen * area, dtype=torch.float32, device=x.device)
        return (across, chunks, n), steps, partial

    if c < _PER_TAP or seen < c:
        # A thread's sums are few enough for its registers; a plane of its own leaves them to more pixels at once.
        block, warps, pixels_at_once = (1, 4, 512) if seen < c else (min(8, o & -o), 2, 64)
        grid, steps, partial = tiles(o // block * seen, pixels_at_once)
        _conv_weight_direct_kernel[grid](
            x, g, partial, flags, x.stride(0), pixels, steps, grid[1], c, o, height, width, size, seen,
            pixels_at_once, block, masked, num_warps=warps,
        )  # fmt: skip
        return partial.sum(1).view(shape)
    warps = 1 if o <= 16 else 2
    part = min(16, triton.next_power_of_2(c))
    grid, steps, partial = tiles(triton.cdiv(o, 16 * warps) * triton.cdiv(c, part), 64)
    _conv_weight_taps_kernel[grid](
        x, g, partial, flags, x.stride(0), pixels, steps, grid[1], c, o, height, width, size,
        64, 16 * warps, part, masked, tf32, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return partial.sum(1).view(n, size, size, o, c).permute(0, 3, 4, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous samples; a batch shared by all hosts (stride 0) is not copied."""
    return x if x[0].is_contiguous() else x.contiguous()
