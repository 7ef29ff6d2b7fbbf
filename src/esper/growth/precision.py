"""Mixed precision: one knob, `amp`, honoured by every executor in the same way ("tf32" by recorded programs alone).

Autocast surrounds the forward pass and the loss only; parameters, moments, BatchNorm statistics and losses stay in
full precision. In fp16 every host has its own loss scale, so one host's overflow skips only that host's step and
halves only that host's scale (Micikevicius et al. 2018, section 3.2, per host).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PRECISIONS = ("off", "tf32", "bf16", "fp16")
INITIAL_SCALE = 2.0**10
LARGEST_SCALE = 2.0**16
SMALLEST_SCALE = 1.0
GROWTH_INTERVAL = 200
"""Steps without overflow after which a scale doubles."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager[None]:
    """The context of the forward pass and the loss. Raises ValueError for an unknown `amp`.

    Under "tf32" all types are those of "off"; only products inside convolutions are shorter (`esper.hosts.ops.fused`).
    Casts of weights are not cached: a cast made while gradients are off would silence every later gradient.
    """
    if amp not in PRECISIONS:
        raise ValueError(f"amp: {amp!r}; legal are {', '.join(PRECISIONS)}")
    if amp in ("off", "tf32"):
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[amp], cache_enabled=False)


def fresh_scale(amp: str, n_hosts: int) -> dict[str, Tensor]:
    """What the growth state keeps for fp16: `loss_scale` float32 `[N]` and `scale_age` int64 `[N]`, the steps since the
    scale last changed. Nothing for other precisions."""
    if amp != "fp16":
        return {}
    return {"loss_scale": torch.full((n_hosts,), INITIAL_SCALE), "scale_age": torch.zeros(n_hosts, dtype=torch.int64)}


def adapt(scale: Tensor, age: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and its age after a step: halved where a gradient was not finite, doubled after `GROWTH_INTERVAL`
    good steps. All `[N]`, or scalars of one host."""
    age = torch.where(finite, age + 1, torch.zeros_like(age))
    grown = age >= GROWTH_INTERVAL
    scale = torch.where(finite, torch.where(grown, scale * 2.0, scale), scale * 0.5)
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE), torch.where(grown, torch.zeros_like(age), age)


def unscale(grads: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Gradients of the loss from gradients of `scale` times the loss; `scale` has the gradients' leading axes."""
    inverse = 1.0 / scale
    return [g * _over(inverse, g).to(g.dtype) for g in grads]


def all_finite(grads: Sequence[Tensor], leading: int) -> Tensor:
    """Whether every gradient is finite, bool over the first `leading` axes (0 or 1) of the tensors."""
    flags = [torch.isfinite(g).flatten(leading).all(dim=-1) if g.dim() > leading else torch.isfinite(g) for g in grads]
    return torch.stack(flags).all(dim=0)


def keep(ok: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """`new` where a step was good, `old` where it is skipped; `ok` has the tensors' leading axes."""
    return [torch.where(_over(ok, a), a, b) for a, b in zip(new, old, strict=True)]


def _over(values: Tensor, tensor: Tensor) -> Tensor:
    """`values`, which have the leading axes of `tensor`, made broadcastable to it."""
    return values[(..., *([None] * (tensor.dim() - values.dim())))]
