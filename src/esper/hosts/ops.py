"""The operators in which image networks spend their time, for one host, with a fused form for stacks of hosts.

Outside `fused()` they are plain PyTorch and the specification. Inside, under `torch.func.vmap` on a CUDA device, a
stack of hosts runs the Triton kernels of `esper.hosts.kernels` instead; float64, windows that do not divide the image
and hosts that are not stacked keep the plain form. A stack may have rows that nobody reads: inside `active(flags)` the
kernels leave them out, and what stands there afterwards is arbitrary, except where a function says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-5
_MOST_SEQUENCES, _LONGEST = 65_535, 128
"""What one launch of attention can hold, and the length up to which a gradient of its has at most two parts: more are
added up in the order in which they happen to arrive."""
_FUSED: ContextVar[bool] = ContextVar("esper_fused", default=False)
_TF32: ContextVar[bool] = ContextVar("esper_tf32", default=False)
_ACTIVE: ContextVar[Tensor | None] = ContextVar("esper_active", default=None)


@contextmanager
def fused(enabled: bool = True, *, tf32: bool = False) -> Iterator[None]:
    """Let stacks of hosts use the fused kernels within the block; with `tf32` their convolutions, and the gradients of
    those, may round float32 numbers to tf32."""
    tokens = _FUSED.set(enabled), _TF32.set(tf32)
    try:
        yield
    finally:
        _FUSED.reset(tokens[0])
        _TF32.reset(tokens[1])


@contextmanager
def active(flags: Tensor) -> Iterator[None]:
    """Within the block the rows of a stack whose flag (int64 `[N]`) is 0 need not be computed."""
    token = _ACTIVE.set(flags)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_fused(x: Tensor) -> bool:
    """Whether the fused kernels may serve for `x`."""
    return _FUSED.get() and x.is_cuda and x.dtype is not torch.float64


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of `[B, C, H, W]` with `[O, C, K, K]`, depthwise with `[C, 1, K, K]`. `K` is odd; `H`, `W` stay."""
    if _stacked(x, weight):
        # The features are rounded inside the kernel.
        result: Tensor = _Conv.apply(x, _cast(weight))
        return result
    return F.conv2d(_cast(x), _cast(weight), padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])


def norm_relu_pool(
    h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *, momentum: float | None, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm, ReLU and (for `pool` 2) max-pooling of `h` `[B, C, H, W]`, with the statistics `[C]` afterwards.

    `momentum` None normalises by `mean` and `var`; a number normalises by the batch and moves them by that share.
    """
    if _stacked(h, weight) and h.shape[-1] % pool == 0 and h.shape[-2] % pool == 0:
        if momentum is None:
            scale = weight * (var + EPS).rsqrt()
            return _Activate.apply(h, torch.stack((scale, bias - mean * scale), -1), pool), mean, var
        out, batch = _NormActivate.apply(h, weight, bias, pool)
        count = h.shape[0] * h.shape[2] * h.shape[3]
        batch_mean, batch_var = batch[..., 0], batch[..., 1] * (count / max(1, count - 1))
        return out, mean + momentum * (batch_mean - mean), var + momentum * (batch_var - var)
    if momentum is not None:
        # batch_norm writes into its running statistics; clones keep the function pure, also under vmap.
        mean, var = mean.clone(), var.clone()
    training = momentum is not None
    # A stack's features must have the type of its statistics, or one of the two passes refuses them.
    wide = F.batch_norm(h.to(mean.dtype), mean, var, weight, bias, training=training, momentum=momentum or 0.0, eps=EPS)
    h = F.relu(wide.to(h.dtype))
    return (F.max_pool2d(h, pool) if pool > 1 else h), mean, var


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, relu: bool = False, onto: Tensor | None = None
) -> Tensor:
    """GroupNorm of `[B, C, H, W]` with affine `[C]`, followed by ReLU if asked for, and added `onto` features of the
    same shape if there are any."""
    if _stacked(x, weight) and _kernels().fits_group_norm(x.shape[1], groups, x.shape[2] * x.shape[3]):
        result: Tensor = _GroupNorm.apply(x, groups, weight, bias, relu, onto)
        return result
    result = F.group_norm(x, groups, weight, bias, EPS)
    result = F.relu(result) if relu else result
    return result if onto is None else onto + result


def spatial_mean(x: Tensor) -> Tensor:
    """The mean over the pixels of `[B, C, H, W]`. The kernel gives rows that are not `active` the mean 0."""
    if is_fused(x) and is_batchedtensor(x):
        result: Tensor = _SpatialMean.apply(x)
        return result
    return x.mean(dim=(-2, -1))


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights `[B, heads, L, L]` of queries and keys `[B, heads, L, D]`, on oneself and one's past."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention `[B, heads, L, D]` of queries to themselves and their past."""
    if is_fused(q) and is_batchedtensor(q) and q.shape[-2] <= _LONGEST:
        result: Tensor = _Attention.apply(q, k, v)
        return result
    return causal_weights(q, k) @ v


def _kernels() -> ModuleType:
    """The kernels need Triton, which only machines with a GPU have."""
    from esper.hosts import kernels

    return kernels


def _stacked(x: Tensor, weight: Tensor) -> bool:
    return is_fused(x) and weight.dtype is not torch.float64 and is_batchedtensor(weight)


def _cast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's type. Under `torch.func.vmap` autocast on a CPU overlooks convolutions."""
    kind = tensor.device.type
    wanted = torch.is_autocast_enabled(kind) and tensor.dtype is not torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if wanted else tensor


def _stack(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> list[Tensor]:
    """Bring the host axis to the front of every tensor; what all hosts share is expanded, not copied."""
    return [
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=False)
    ]


class _Stacked(torch.autograd.Function):
    """A function that exists for stacks only, through its rule for vmap."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        raise RuntimeError("fused operators run under torch.func.vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _Conv(_Stacked):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> tuple[Tensor, int]:
        return _StackedConv.apply(*_stack(info, in_dims, x, w)), 0


class _Activate(_Stacked):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], h: Tensor, affine: Tensor, pool: int) -> tuple[Tensor, int]:
        h, affine = _stack(info, in_dims, h, affine)
        return _kernels().activate(h.contiguous(), affine.float().contiguous(), pool, _ACTIVE.get()), 0


class _NormActivate(_Stacked):
    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], h: Tensor, weight: Tensor, bias: Tensor, pool: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _StackedNormActivate.apply(*_stack(info, in_dims, h, weight, bias), pool), (0, 0)


class _GroupNorm(_Stacked):
    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        relu: bool,
        onto: Tensor | None,
    ) -> tuple[Tensor, int]:
        dims = (in_dims[0], in_dims[2], in_dims[3])
        x, weight, bias = _stack(info, dims, x, weight, bias)
        if onto is not None:
            (onto,) = _stack(info, (in_dims[5],), onto)
        return _StackedGroupNorm.apply(x, groups, weight, bias, relu, onto), 0


class _SpatialMean(_Stacked):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, int]:
        return _StackedSpatialMean.apply(*_stack(info, in_dims, x)), 0


class _Attention(_Stacked):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
        q, k, v = (t.flatten(0, 1) for t in _stack(info, in_dims, q, k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
            parts = zip(*(t.split(_MOST_SEQUENCES) for t in (q, k, v)), strict=True)
            mixed = [F.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in parts]
        whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return whole.unflatten(0, (info.batch_size, -1)), 0


class _StackedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.active, ctx.tf32 = _ACTIVE.get(), _TF32.get()
        ctx.save_for_backward(x, w)
        return _kernels().conv(x, w, ctx.active, ctx.tf32)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        kernels = _kernels()
        x, w = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        return (
            kernels.conv_input_grad(g, w, x.shape[2], ctx.active, ctx.tf32).to(x.dtype) if needs_x else None,
            kernels.conv_weight_grad(x, g, w.shape, ctx.active, ctx.tf32).to(w.dtype) if needs_w else None,
        )


class _StackedNormActivate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, pool: int) -> tuple[Tensor, Tensor]:
        kernels, active = _kernels(), _ACTIVE.get()
        h = h.contiguous()
        statistics, affine = kernels.moments(h, weight, bias, EPS, active)
        ctx.save_for_backward(h, affine, statistics)
        ctx.pool = pool
        ctx.mark_non_differentiable(statistics)
        return kernels.activate(h, affine, pool, active), statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        kernels = _kernels()
        h, weight, bias = kernels.activate_grad(*ctx.saved_tensors, g, ctx.pool, EPS)
        return h, weight, bias, None


class _StackedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, relu: bool, onto: Tensor | None
    ) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        ctx.groups, ctx.relu, ctx.active = groups, relu, _ACTIVE.get()
        out, saved = _kernels().group_norm(x, groups, weight, bias, relu, EPS, onto, ctx.active)
        ctx.save_for_backward(x, weight, bias, saved)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        dx, dw, db = _kernels().group_norm_grad(x, ctx.groups, weight, bias, saved, g, ctx.relu, ctx.active)
        return dx, None, dw, db, None, g if ctx.needs_input_grad[5] else None


class _StackedSpatialMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return _kernels().spatial_mean(x, _ACTIVE.get())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        height, width = ctx.shape[-2:]
        return (g / (height * width))[..., None, None].expand(ctx.shape)
