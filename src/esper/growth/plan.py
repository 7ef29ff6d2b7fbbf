"""The plan of an epoch: which host has which seed where, and in which mode it runs.

The lifecycle changes only between epochs, so the slot table is read once and everything that follows is static. Equal
plans are equal values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

from tensordict import TensorDict

from esper.growth.spec import GrowthSpec
from esper.seeds import blending, stages
from esper.seeds.stages import Stage


class Mode(Enum):
    """How a seed takes part in the forward pass."""

    STRAIGHT_THROUGH = "straight_through"
    """Value of the host alone; the seed sees detached features and receives the full output gradient."""
    SHADOW = "shadow"
    """Not in the forward at all; it learns on a second pass, fully inserted into a network held fixed."""
    BLEND = "blend"
    """`h + alpha (s - h)`; host and seed adapt together."""


@dataclass(frozen=True)
class SlotPlan:
    """One live seed: its blueprint's name, its mode, whether a gate scales its alpha, whether it still learns."""

    blueprint: str
    mode: Mode
    gated: bool = False
    frozen: bool = False

    @property
    def uses_gate(self) -> bool:
        """Whether the seed's gate takes part; a straight-through seed has no alpha to scale."""
        return self.gated and self.mode is not Mode.STRAIGHT_THROUGH


HostPlan = tuple[SlotPlan | None, ...]
"""One entry per slot; None is a bypass: the slot is not computed at all."""
Plan = tuple[HostPlan, ...]
"""One entry per host."""


def make_plan(records: TensorDict, spec: GrowthSpec) -> Plan:
    """Read the slot records `[N, S]` once and turn them into a plan."""
    stage, blueprint, blend = (records[name].tolist() for name in ("stage", "blueprint", "blend"))
    incubation = None if spec.rules.incubation == "none" else Mode(spec.rules.incubation)

    @cache
    def slot(s: int, b: int, f: int) -> SlotPlan | None:
        gated = f == blending.GATED
        if s == Stage.TRAINING and incubation is not None:
            return SlotPlan(spec.blueprints[b], incubation, gated)
        if s in stages.BLENDED:
            frozen = spec.freeze_fossils and s == Stage.FOSSILIZED
            return SlotPlan(spec.blueprints[b], Mode.BLEND, gated, frozen)
        return None

    return tuple(
        tuple(slot(*cell) for cell in zip(*row, strict=True)) for row in zip(stage, blueprint, blend, strict=True)
    )


def inserted(entry: SlotPlan) -> SlotPlan:
    """A shadowed seed as it runs in its own pass, fully inserted; any other entry as it is."""
    return replace(entry, mode=Mode.BLEND) if entry.mode is Mode.SHADOW else entry


def shadow_plan(plan: HostPlan) -> HostPlan | None:
    """The plan of the second pass in which shadowed seeds learn, or None when there is none."""
    if not any(entry is not None and entry.mode is Mode.SHADOW for entry in plan):
        return None
    return tuple(None if entry is None else inserted(entry) for entry in plan)


def live_slots(plan: HostPlan) -> tuple[int, ...]:
    """Slots whose seeds take part in the forward value: the players of the coalitions."""
    return tuple(j for j, entry in enumerate(plan) if entry is not None and entry.mode is Mode.BLEND)


def coalitions(plan: HostPlan) -> tuple[int, ...]:
    """Bit sets (bit `j` = slot `j`) of all coalitions of the live slots, ascending."""
    sets = [0]
    for j in live_slots(plan):
        sets += [members | (1 << j) for members in sets]
    return tuple(sorted(sets))
