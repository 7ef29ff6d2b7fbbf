"""Functional SGD with momentum, the arithmetic of `torch.optim.SGD` on flat lists of tensors.

Moments are part of the state and start at zero, which equals PyTorch's first step (its buffer starts as the gradient).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    lr: Tensor | float,
    *,
    momentum: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """One step: `m <- momentum m + g + decay p`, `p <- p - lr m`. `lr` is a number, or `[N]` for stacked parameters."""
    if not params:
        return [], []
    steps = torch._foreach_add(list(grads), list(params), alpha=weight_decay) if weight_decay else list(grads)
    new_moments = torch._foreach_add(torch._foreach_mul(list(moments), momentum), steps)
    if isinstance(lr, Tensor) and lr.dim() > 0:
        scaled = [m * lr.reshape(-1, *([1] * (m.dim() - 1))).to(m.dtype) for m in new_moments]
        return list(torch._foreach_sub(list(params), scaled)), list(new_moments)
    return list(torch._foreach_sub(list(params), torch._foreach_mul(new_moments, float(lr)))), list(new_moments)


def schedule(kind: str, step: int, total: int) -> float:
    """Share of the base learning rate at `step` of `total`: 1 for `"constant"`; `"cosine"` falls from 1 to 0
    (Loshchilov & Hutter 2017, without restarts)."""
    if kind == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, total))))
