"""Initial weights, drawn from keys. Every function returns leaves with the keys' leading `N`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper import keys as k


def fan_in_uniform(keys: Tensor, shape: tuple[int, ...], fan_in: int, dtype: torch.dtype) -> Tensor:
    """U(-b, b) with b = 1/sqrt(fan_in), PyTorch's default for convolutions and linear layers: `[N, *shape]`."""
    bound = 1.0 / math.sqrt(fan_in)
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
    return torch.full((*keys.shape, *shape), value, dtype=dtype, device=keys.device)
