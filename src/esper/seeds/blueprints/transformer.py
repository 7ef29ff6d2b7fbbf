"""Blueprints for transformer hosts, on features `[B, L, D]`. None of them lets a position see a later one.

All but `norm` end in a projection that starts at zero: the seed is exactly the identity when planted, and the
projection itself receives a gradient at once because what feeds it does not vanish.

There is no `flex_attention`: torch's operator of that name has no rule for `torch.func.vmap` or `torch.func.grad` on
any device and no backward on the CPU, and with a causal mask it computes what `attention` computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts import init
from esper.hosts.base import Tree
from esper.hosts.transformer import causal_attention, layer_norm, layer_norm_init, linear, require_heads
from esper.seeds.blueprints.registry import Blueprint, register

_TOPOLOGY = "transformer"
_RANK = 8
_N_HEAD = 4
_EXPANSION = 4


def _pack(keys: Tensor, leaves: dict[str, object]) -> TensorDict:
    return TensorDict(leaves, batch_size=keys.shape).auto_batch_size_(keys.dim())


def _linear_init(keys: Tensor, n_out: int, n_in: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": init.linear_weight(k.fold(keys, 0), n_out, n_in, dtype),
        "bias": init.linear_bias(k.fold(keys, 1), n_out, n_in, dtype),
    }


def _zero_linear_init(keys: Tensor, n_out: int, n_in: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": init.constant(keys, (n_out, n_in), 0.0, dtype),
        "bias": init.constant(keys, (n_out,), 0.0, dtype),
    }


def _noop_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(keys, {})


def _norm_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(keys, {"scale": init.constant(keys, (), 1.0, dtype), **layer_norm_init(keys, channels, dtype)})


def _norm(params: Tree, x: Tensor) -> Tensor:
    return x + torch.tanh(params["scale"]) * (layer_norm(params, x) - x)


def _lora_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(
        keys,
        {
            "down": init.linear_weight(keys, _RANK, channels, dtype),
            "up": init.constant(keys, (channels, _RANK), 0.0, dtype),
        },
    )


def _lora(params: Tree, x: Tensor) -> Tensor:
    return x + F.linear(F.linear(x, params["down"]), params["up"])


def _attention_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    require_heads(channels, _N_HEAD)
    return _pack(
        keys,
        {
            "qkv": _linear_init(keys, 3 * channels, channels, dtype),
            "out": _zero_linear_init(keys, channels, channels, dtype),
        },
    )


def _attention(params: Tree, x: Tensor) -> Tensor:
    return x + linear(params["out"], causal_attention(linear(params["qkv"], x), _N_HEAD))


def _mlp_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    return _pack(
        keys,
        {
            "up": _linear_init(keys, _EXPANSION * channels, channels, dtype),
            "down": _zero_linear_init(keys, channels, _EXPANSION * channels, dtype),
        },
    )


def _mlp(params: Tree, x: Tensor) -> Tensor:
    return x + linear(params["down"], F.gelu(linear(params["up"], x)))


register(Blueprint("noop", _TOPOLOGY, _noop_init, lambda params, x: x, "identity, no parameters; never offered"))
register(Blueprint("norm", _TOPOLOGY, _norm_init, _norm, "a learned share of LayerNorm"))
register(Blueprint("lora", _TOPOLOGY, _lora_init, _lora, "residual rank-8 linear map"))
register(Blueprint("attention", _TOPOLOGY, _attention_init, _attention, "residual causal self-attention, 4 heads"))
register(Blueprint("mlp", _TOPOLOGY, _mlp_init, _mlp, "residual two-layer perceptron, D -> 4D -> D"))
