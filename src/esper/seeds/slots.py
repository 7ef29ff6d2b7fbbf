"""Slot order and the layout of slot records. Every module that lists slots asks `ordered_slots`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds.stages import Stage
from esper.values import changed, constant

LAYOUT = ("early", "mid", "late")
"""The policy's fixed three-slot layout; hosts may offer any number of slots under any names."""


def ordered_slots(enabled: Iterable[str], order: tuple[str, ...] = LAYOUT) -> tuple[str, ...]:
    """The enabled slots in canonical order, without duplicates and without names that `order` lacks (plan step 6)."""
    present = set(enabled)
    return tuple(name for name in order if name in present)


_FIELDS: dict[str, tuple[torch.dtype, float]] = {
    "stage": (torch.int64, Stage.DORMANT),
    "previous_stage": (torch.int64, Stage.UNKNOWN),
    "epochs_in_stage": (torch.int64, 0),
    "previous_epochs_in_stage": (torch.int64, 0),
    "age": (torch.int64, 0),
    "alpha": (torch.float32, 0.0),
    "ramp_step": (torch.int64, 0),
    "blueprint": (torch.int64, -1),
    "blend": (torch.int64, -1),
    "accuracy_at_germination": (torch.float32, 0.0),
    "accuracy_initial": (torch.float32, 0.0),
    "accuracy_current": (torch.float32, 0.0),
    "accuracy_best": (torch.float32, 0.0),
    "accuracy_at_stage_start": (torch.float32, 0.0),
    "accuracy_at_blending_start": (torch.float32, float("nan")),
    "contribution": (torch.float32, float("nan")),
    "contribution_se": (torch.float32, float("nan")),
    "contribution_age": (torch.int64, -1),
    "gradient_norm": (torch.float32, 0.0),
    "gradient_ratio": (torch.float32, float("nan")),
    "gradient_health": (torch.float32, 0.0),
    "parameters": (torch.int64, 0),
    "healthy": (torch.bool, False),
    "planted": (torch.int64, 0),
    "embargo": (torch.int64, 0),
}


def emptied(records: TensorDict, mask: Tensor) -> TensorDict:
    """Records whose slots in `mask` `[N, S]` hold nothing; only the number of seeds ever planted survives."""
    kept = {
        name: torch.where(mask, constant(value, dtype, mask.device), records[name])
        for name, (dtype, value) in _FIELDS.items()
        if name != "planted"
    }
    return changed(records, **kept)


def empty_records(n_hosts: int, n_slots: int) -> TensorDict:
    """Records `[N, S]` of slots that hold nothing; the field table is in `docs/design.md`, section 2."""
    return TensorDict(
        {name: torch.full((n_hosts, n_slots), value, dtype=dtype) for name, (dtype, value) in _FIELDS.items()},
        batch_size=[n_hosts, n_slots],
    )
