"""How a seed enters the forward value: ramps of alpha, the learned gate, and the graft itself."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts import init
from esper.hosts.base import Tree
from esper.seeds.stages import BLENDS

_STEEPNESS = 12.0
GATED = BLENDS.index("gated")
SIGMOID = BLENDS.index("sigmoid")


def ramp(step: Tensor, total: int, blend: Tensor) -> Tensor:
    """Alpha after `step` (int64) of `total` blending epochs; exactly 0 at step 0 and exactly 1 at the last.

    Linear and gated blends rise in a straight line; the sigmoid of steepness 12 is rescaled so that it meets both ends
    (the raw curve stops at 0.9975). Shapes of `step` and `blend` broadcast; float32.
    """
    alphas = _ramps(max(1, total)).to(step.device)
    return alphas[(blend == SIGMOID).long(), step.clamp(0, alphas.shape[1] - 1)]


@cache
def _ramps(total: int) -> Tensor:
    """Alpha after every step, `[2, total + 1]`: along the straight line, along the sigmoid."""
    progress = torch.arange(total + 1, dtype=torch.float64) / total
    curve = torch.sigmoid(_STEEPNESS * (progress - 0.5))
    return torch.stack([progress, (curve - curve[0]) / (curve[-1] - curve[0])]).to(torch.float32)


def gate_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    """Parameters of the gate of the gated blend: C -> max(1, C // 4) -> 1, leaves `[N, ...]`."""
    hidden = max(1, channels // 4)
    return TensorDict(
        {
            "hidden": {
                "weight": init.linear_weight(k.fold(keys, 0), hidden, channels, dtype),
                "bias": init.linear_bias(k.fold(keys, 1), hidden, channels, dtype),
            },
            "out": {
                "weight": init.linear_weight(k.fold(keys, 2), 1, hidden, dtype),
                "bias": init.linear_bias(k.fold(keys, 3), 1, hidden, dtype),
            },
        },
        batch_size=keys.shape,
    )


def gate_parameter_count(channels: int) -> int:
    """Trainable parameters of a gate."""
    hidden = max(1, channels // 4)
    return hidden * channels + hidden + hidden + 1


def gate(params: Tree, h: Tensor) -> Tensor:
    """The gate's value in (0, 1), broadcastable to `h`.

    Images `[B, C, H, W]` are pooled over space and get one value each; sequences `[B, L, C]` get one value for each
    position from that position's features alone, so a gated blend never looks ahead.
    """
    value = gate_value(params, h.mean(dim=(-2, -1)) if h.dim() == 4 else h)
    return value[..., None, None] if h.dim() == 4 else value


def gate_value(params: Tree, pooled: Tensor) -> Tensor:
    """The gate's value `[..., 1]` of features `[..., C]` that are already pooled over space."""
    hidden = F.relu(F.linear(pooled, params["hidden"]["weight"], params["hidden"]["bias"]))
    return torch.sigmoid(F.linear(hidden, params["out"]["weight"], params["out"]["bias"]))


def straight_through(h: Tensor, s: Tensor) -> Tensor:
    """The value of `h` with the full output gradient flowing to `s` as well.

    A non-finite seed must not touch its host: where `s` is not finite the added term is a constant zero.
    """
    echo = torch.where(torch.isfinite(s), s - s.detach(), torch.zeros_like(s))
    return h + echo.to(h.dtype)


def blend(h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
    """`h + alpha (s - h)`; unlike `lerp` it accepts a seed that autocast left in another dtype."""
    return h + alpha.to(h.dtype) * (s.to(h.dtype) - h)
