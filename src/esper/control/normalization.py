"""Standardising observations with statistics that are a value (`learn/normalizers.py` updates them)."""

from __future__ import annotations

from typing import TypeAlias

import torch
from tensordict import TensorDict
from torch import Tensor

RunningMeanStd: TypeAlias = TensorDict
"""A TensorDict of `mean`, `var` (population variance) and `count`, one entry per feature, float64."""

VARIANCE_FLOOR = 1e-4
"""Added to the variance: a feature that never moved is centred, not blown up."""
CLIP = 10.0


def running_mean_std(*shape: int) -> RunningMeanStd:
    """Statistics of no samples: mean 0, variance 1, count 0, each of `shape`."""
    values = {"mean": torch.zeros, "var": torch.ones, "count": torch.zeros}
    return TensorDict({name: make(shape, dtype=torch.float64) for name, make in values.items()})


def normalize(state: RunningMeanStd, x: Tensor, clip: float = CLIP) -> Tensor:
    """`x` `[..., *features]` centred and divided by the standard deviation, within +-`clip`, in the dtype of `x`."""
    scaled: Tensor = (x - state["mean"]) * (state["var"] + VARIANCE_FLOOR).rsqrt()
    return scaled.clamp(-clip, clip).to(x.dtype)
