"""Gates: batched predicates over slot records `[N, S]` that guard entry into a stage (plan steps 3 and 4)."""

from __future__ import annotations

from functools import cache

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds import stages
from esper.seeds.slots import Fields
from esper.seeds.stages import Stage


def g1(records: TensorDict | Fields) -> Tensor:
    """Into TRAINING: the slot holds a germinated seed."""
    return records["stage"] == Stage.GERMINATED


def g2(records: TensorDict | Fields, strict: bool) -> Tensor:
    """Into BLENDING: finite, old enough in its stage and active enough, by the measured gradient ratio; `strict` also
    asks that the network improved by half a percentage point during the stage. An unmeasured ratio (nan) does not
    pass."""
    old_enough = records["epochs_in_stage"] >= stages.MIN_STAGE_EPOCHS
    active = records["gradient_ratio"] >= stages.MIN_GRADIENT_RATIO
    passed = records["healthy"] & old_enough & active
    if strict:
        gain = records["accuracy_current"] - records["accuracy_at_stage_start"]
        passed = passed & (gain >= stages.MIN_TRAINING_IMPROVEMENT)
    return passed


def g3(records: TensorDict | Fields) -> Tensor:
    """Into PROBATIONARY: blended for long enough and practically all the way."""
    return (records["epochs_in_stage"] >= stages.MIN_STAGE_EPOCHS) & (records["alpha"] >= stages.ALPHA_COMPLETE)


def g5(records: TensorDict | Fields) -> Tensor:
    """Into FOSSILIZED: healthy and worth a percentage point by measurement; never measured (nan) does not pass."""
    return records["healthy"] & (records["contribution"] >= stages.MIN_FOSSILIZE_CONTRIBUTION)


def may_fossilize(records: TensorDict | Fields) -> Tensor:
    """Slots where FOSSILIZE would succeed."""
    return (records["stage"] == Stage.PROBATIONARY) & g5(records)


def may_cull(records: TensorDict | Fields) -> Tensor:
    """Slots where CULL would succeed: a removable seed that has lived at least one epoch."""
    return in_stage(records, stages.CULLABLE) & (records["age"] >= stages.MIN_CULL_AGE)


def may_germinate(records: TensorDict | Fields, max_seeds: int | None) -> Tensor:
    """Slots where GERMINATE would succeed: empty, and the host's seeds (fossils included) below `max_seeds`."""
    empty = records["stage"] == Stage.DORMANT
    if max_seeds is None:
        return empty
    return empty & (in_stage(records, stages.OCCUPIED).sum(dim=1, keepdim=True) < max_seeds)


def in_stage(records: TensorDict | Fields, group: tuple[Stage, ...]) -> Tensor:
    """Whether each slot's stage is one of `group`."""
    stage = records["stage"]
    return _members(group, stage.device)[stage]


@cache
def _members(group: tuple[Stage, ...], device: torch.device) -> Tensor:
    """Whether each stage code is in `group`; one look into a table is faster than a comparison for each."""
    return torch.tensor([code in group for code in range(max(Stage) + 1)], device=device)
