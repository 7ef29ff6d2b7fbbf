"""Initial weights, drawn from keys. Every function returns leaves with the keys' leading `N`, on the keys' device or,
within `drawn_on`, on the one asked for. The numbers are the same on all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from esper import keys as k

_PLACE: ContextVar[torch.device | None] = ContextVar("esper_drawn_on", default=None)


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Within the block leaves are made on `device`; keys, of which there are few, best stay on the CPU."""
    token = _PLACE.set(device)
    try:
        yield
    finally:
        _PLACE.reset(token)


def fan_in_uniform(keys: Tensor, shape: tuple[int, ...], fan_in: int, dtype: torch.dtype) -> Tensor:
    """U(-b, b) with b = 1/sqrt(fan_in), PyTorch's default for convolutions and linear layers: `[N, *shape]`."""
    bound, keys = 1.0 / math.sqrt(fan_in), keys.to(_PLACE.get() or keys.device)
    if keys.is_cuda:
        from esper.hosts.kernels.draw import centred_uniform

        return centred_uniform(keys, math.prod(shape), bound, dtype).view(*keys.shape, *shape)
    return (k.uniform(keys, *shape, dtype=torch.float64) * 2.0 - 1.0).mul(bound).to(dtype)


def conv_weight(keys: Tensor, out_channels: int, in_channels: int, size: int, dtype: torch.dtype) -> Tensor:
    """`[N, out, in, size, size]`; `in_channels` is per group."""
    return fan_in_uniform(keys, (out_channels, in_channels, size, size), in_channels * size * size, dtype)


def linear_weight(keys: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """`[N, out, in]`."""
    return fan_in_uniform(keys, (out_features, in_features), in_features, dtype)


def linear_bias(keys: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """`[N, out]`."""
    return fan_in_uniform(keys, (out_features,), in_features, dtype)


def constant(keys: Tensor, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    """`[N, *shape]` of one value."""
    return torch.full((*keys.shape, *shape), value, dtype=dtype, device=_PLACE.get() or keys.device)
