"""Slot order and the layout of slot records. Every module that lists slots asks `ordered_slots`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TypeAlias

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds.stages import Stage

LAYOUT = ("early", "mid", "late")
"""The policy's fixed three-slot layout; hosts may offer any number of slots under any names."""


def ordered_slots(enabled: Iterable[str], order: tuple[str, ...] = LAYOUT) -> tuple[str, ...]:
    """The enabled slots in canonical order, without duplicates and without names that `order` lacks (plan step 6)."""
    present = set(enabled)
    return tuple(name for name in order if name in present)


Fields: TypeAlias = dict[str, Tensor]
"""Slot records `[N, S]` while a step rewrites them; to make a TensorDict takes as long as the arithmetic."""

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


def emptied(fields: Fields, mask: Tensor) -> Fields:
    """Fields of which the slots in `mask` `[N, S]` hold nothing; only the number of seeds ever planted survives."""
    kept = dict(fields)
    for names, empty in _by_type(mask.device):
        # One operation for all fields of a type, instead of one for each.
        together = torch.stack([fields[name] for name in names])
        kept |= zip(names, torch.where(mask, empty, together).unbind(), strict=True)
    return kept


@cache
def _by_type(device: torch.device) -> list[tuple[tuple[str, ...], Tensor]]:
    """What an empty slot forgets: the fields of each type and what they are then, `[fields, 1, 1]`."""
    found = []
    for wanted in dict.fromkeys(dtype for dtype, _ in _FIELDS.values()):
        fields = {n: value for n, (dtype, value) in _FIELDS.items() if dtype == wanted and n != "planted"}
        empty = torch.tensor(list(fields.values()), dtype=wanted, device=device)
        found.append((tuple(fields), empty[:, None, None]))
    return found


def empty_records(n_hosts: int, n_slots: int) -> TensorDict:
    """Records `[N, S]` of slots that hold nothing; the field table is in `docs/design.md`, section 2."""
    return TensorDict(
        {name: torch.full((n_hosts, n_slots), value, dtype=dtype) for name, (dtype, value) in _FIELDS.items()},
        batch_size=[n_hosts, n_slots],
    )
