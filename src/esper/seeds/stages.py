"""Stages of a seed's life, the gates between them and their constants (plan steps 3 and 4).

Codes are observation values, so they are part of the contract; 5 and gate level 4 stay vacant.
"""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """Stage codes of a slot."""

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10


class Gate(IntEnum):
    """Gate levels."""

    G0 = 0
    G1 = 1
    G2 = 2
    G3 = 3
    G5 = 5


TRANSITIONS: dict[Stage, tuple[Stage, ...]] = {
    Stage.UNKNOWN: (Stage.DORMANT,),
    Stage.DORMANT: (Stage.GERMINATED,),
    Stage.GERMINATED: (Stage.TRAINING, Stage.CULLED),
    Stage.TRAINING: (Stage.BLENDING, Stage.CULLED),
    Stage.BLENDING: (Stage.PROBATIONARY, Stage.CULLED),
    Stage.PROBATIONARY: (Stage.FOSSILIZED, Stage.CULLED),
    Stage.FOSSILIZED: (),
    Stage.CULLED: (Stage.EMBARGOED,),
    Stage.EMBARGOED: (Stage.RESETTING,),
    Stage.RESETTING: (Stage.DORMANT,),
}
"""Legal successors, the successful one first."""

GATE_OF: dict[Stage, Gate] = {
    Stage.GERMINATED: Gate.G0,
    Stage.TRAINING: Gate.G1,
    Stage.BLENDING: Gate.G2,
    Stage.PROBATIONARY: Gate.G3,
    Stage.FOSSILIZED: Gate.G5,
}
"""The gate that guards entry into a stage."""

OCCUPIED = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY, Stage.FOSSILIZED)
"""A seed's parameters exist."""
CULLABLE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY)
"""A seed that can still be removed."""
BLENDED = (Stage.BLENDING, Stage.PROBATIONARY, Stage.FOSSILIZED)
"""A seed that takes part in the forward value: a live slot of a coalition."""
FAILED = (Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING)
"""The cull tail."""

BLENDS = ("linear", "sigmoid", "gated")
INCUBATIONS = ("straight_through", "shadow", "none")

MIN_TRAINING_IMPROVEMENT = 0.5  # percentage points, G2 when gates are strict
MIN_STAGE_EPOCHS = 3  # G2 and G3
MIN_GRADIENT_RATIO = 0.05  # G2
ALPHA_COMPLETE = 0.95  # G3
MIN_FOSSILIZE_CONTRIBUTION = 1.0  # percentage points, G5
MIN_CULL_AGE = 1  # epochs
BLENDING_EPOCHS = 5
MIN_PROBATION_EPOCHS = 5


def dwell_epochs(max_epochs: int, fraction: float) -> int:
    """Least epochs in TRAINING: the task's share of the episode, at least one; it scales with the run."""
    return max(1, int(max_epochs * fraction))


def probation_epochs(max_epochs: int) -> int:
    """Epochs in PROBATIONARY after which an undecided seed is culled: a tenth of the episode, at least five."""
    return max(MIN_PROBATION_EPOCHS, max_epochs // 10)
