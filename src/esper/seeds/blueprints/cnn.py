"""Blueprints for convolutional hosts. Seeds use GroupNorm, so they carry no running statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts import init
from esper.hosts.base import Tree
from esper.hosts.ops import conv2d, group_norm, spatial_mean
from esper.seeds.blueprints.registry import Blueprint, register

_TOPOLOGY = "cnn"
_EXPANSION = 4


def norm_groups(channels: int) -> int:
    """Groups of a GroupNorm: the most that leave at least 16 channels in each, else one."""
    return next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)


def _affine(keys: Tensor, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": init.constant(keys, (channels,), 1.0, dtype),
        "bias": init.constant(keys, (channels,), 0.0, dtype),
    }


def _pack(keys: Tensor, leaves: dict[str, object]) -> TensorDict:
    return TensorDict(leaves, batch_size=keys.shape)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False, onto: Tensor | None = None) -> Tensor:
    return group_norm(x, norm_groups(x.shape[-3]), weight, bias, relu=relu, onto=onto)


def _living(filters: Tensor, weight: Tensor) -> Tensor:
    """Filters `[C, ...]` in front of a norm with scales `weight` `[C]`, without those of channels that the norm wipes
    out. Through the averages of the norm such a filter would learn to move the other channels."""
    return filters * (weight != 0).view(-1, *[1] * (filters.dim() - 1))


def _norm_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(keys, {"scale": init.constant(keys, (), 1.0, dtype), **_affine(keys, channels, dtype)})


def _norm(params: Tree, x: Tensor) -> Tensor:
    # Contiguous, because GroupNorm's CPU backward crashes the process on a channels_last input that needs no gradient.
    normed = _group_norm(x.contiguous(), params["weight"], params["bias"])
    return x + torch.tanh(params["scale"]) * (normed - x)


def _attention_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    hidden = max(1, channels // 4)
    return _pack(
        keys,
        {
            "down": init.linear_weight(k.fold(keys, 0), hidden, channels, dtype),
            "up": init.linear_weight(k.fold(keys, 1), channels, hidden, dtype),
        },
    )


def _attention(params: Tree, x: Tensor) -> Tensor:
    squeezed = F.relu(F.linear(spatial_mean(x), params["down"]))
    return x * torch.sigmoid(F.linear(squeezed, params["up"]))[..., None, None]


def _depthwise_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(
        keys,
        {
            "depthwise": init.conv_weight(k.fold(keys, 0), channels, 1, 3, dtype),
            "pointwise": init.conv_weight(k.fold(keys, 1), channels, channels, 1, dtype),
            **_affine(keys, channels, dtype),
        },
    )


def _depthwise(params: Tree, x: Tensor) -> Tensor:
    y = conv2d(conv2d(x, params["depthwise"]), _living(params["pointwise"], params["weight"]))
    return _group_norm(y, params["weight"], params["bias"], relu=True, onto=x)


def _conv_light_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(keys, {"conv": init.conv_weight(keys, channels, channels, 3, dtype), **_affine(keys, channels, dtype)})


def _conv_unit(params: Tree, x: Tensor, onto: Tensor | None = None) -> Tensor:
    y = conv2d(x, _living(params["conv"], params["weight"]))
    return _group_norm(y, params["weight"], params["bias"], relu=True, onto=onto)


def _conv_light(params: Tree, x: Tensor) -> Tensor:
    return _conv_unit(params, x, onto=x)


def _conv_heavy_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(
        keys,
        {
            "first": _conv_light_init(k.fold(keys, 0), channels, dtype),
            "second": _conv_light_init(k.fold(keys, 1), channels, dtype),
        },
    )


def _conv_heavy(params: Tree, x: Tensor) -> Tensor:
    return _conv_unit(params["second"], _conv_unit(params["first"], x), onto=x)


def _conv_expand_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    wide = _EXPANSION * channels
    up, down = _affine(keys, wide, dtype), _affine(keys, channels, dtype)
    return _pack(
        keys,
        {
            "up": init.conv_weight(k.fold(keys, 0), wide, channels, 3, dtype),
            "up_weight": up["weight"],
            "up_bias": up["bias"],
            "down": init.conv_weight(k.fold(keys, 1), channels, wide, 3, dtype),
            "down_weight": down["weight"],
            "down_bias": down["bias"],
        },
    )


def _conv_expand(params: Tree, x: Tensor) -> Tensor:
    y = conv2d(x, _living(params["up"], params["up_weight"]))
    y = _group_norm(y, params["up_weight"], params["up_bias"], relu=True)
    y = conv2d(y, _living(params["down"], params["down_weight"]))
    return _group_norm(y, params["down_weight"], params["down_bias"], onto=x)


def _noop_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(keys, {})


register(Blueprint("noop", _TOPOLOGY, _noop_init, lambda params, x: x, "identity, no parameters; never offered"))
register(Blueprint("norm", _TOPOLOGY, _norm_init, _norm, "a learned share of GroupNorm"))
register(Blueprint("attention", _TOPOLOGY, _attention_init, _attention, "squeeze-and-excitation gate per channel"))
register(Blueprint("depthwise", _TOPOLOGY, _depthwise_init, _depthwise, "residual depthwise-separable convolution"))
register(Blueprint("conv_light", _TOPOLOGY, _conv_light_init, _conv_light, "residual 3x3 convolution"))
register(Blueprint("conv_heavy", _TOPOLOGY, _conv_heavy_init, _conv_heavy, "two residual 3x3 convolutions"))
register(Blueprint("conv_expand", _TOPOLOGY, _conv_expand_init, _conv_expand, "residual expansion C -> 4C -> C"))
