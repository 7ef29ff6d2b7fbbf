"""State values that shape the reward: how far a seed has come, and what it has been shown to be worth."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds.stages import GATE_OF, TRANSITIONS, Stage, probation_epochs

POTENTIAL_FIELDS = (
    "stage",
    "epochs_in_stage",
    "contribution",
    "accuracy_current",
    "accuracy_initial",
    "accuracy_at_germination",
)
"""What `stage_potential` and `credited` read of slot records."""
_POTENTIAL = {
    Stage.GERMINATED: 1.0,
    Stage.TRAINING: 2.0,
    Stage.BLENDING: 3.5,
    Stage.PROBATIONARY: 5.5,
    Stage.FOSSILIZED: 6.0,
}
MAX_POTENTIAL = max(_POTENTIAL.values())
MAX_ATTRIBUTION = 10.0
"""Percentage points at which the worth of one seed saturates."""
_WITHIN = 0.9  # of the way to the next stage that waiting inside a stage can earn; below 1, advancing always pays


def _tables() -> tuple[Tensor, Tensor]:
    """Potential of each stage code, and the rise to its successor."""
    potential = [_POTENTIAL.get(stage, 0.0) for stage in Stage]
    size = max(Stage) + 1
    base, rise = torch.zeros(size), torch.zeros(size)
    for stage, value in zip(Stage, potential, strict=True):
        base[stage] = value
        following = [s for s in TRANSITIONS[stage] if s in GATE_OF]
        if value > 0 and following:
            rise[stage] = _POTENTIAL[following[0]] - value
    return base, rise


_BASE, _RISE = _tables()


def stage_potential(records: TensorDict, max_epochs: int) -> Tensor:
    """How far the seed in each slot has come, `[N, S]`, 0..6; 0 for a slot without a seed.

    Epochs in a stage add up to nine tenths of the rise to the next one, spread over the probation time of the run, so a
    transition raises the potential whenever it comes.
    """
    stage = records["stage"]
    share = (records["epochs_in_stage"] / probation_epochs(max_epochs)).clamp(max=1.0)
    value: Tensor = _BASE.to(stage.device)[stage] + _WITHIN * share * _RISE.to(stage.device)[stage]
    return value


def bounded_attribution(contribution: Tensor, improvement: Tensor, progress: Tensor) -> Tensor:
    """What part of a measured contribution is credited to the seed, 0..10 percentage points; 0 where it is not
    positive.

    Removing a seed the host has come to lean on costs more than the seed ever added, so credit is held to what the
    network gained: the geometric mean of contribution and `progress` (accuracy since the seed was planted), at most
    the contribution. It is discounted if accuracy fell over the seed's life (`improvement` < 0), and reduced if the
    contribution is out of proportion to it. All shapes equal, percentage points; a nan contribution is worth 0.
    """
    discount = torch.where(improvement >= 0, 1.0, torch.sigmoid(10.0 * improvement))
    gain = progress.clamp(min=0.0)
    credit = torch.where(contribution >= gain, (gain * contribution.clamp(min=0.0)).sqrt(), contribution) * discount
    ratio = contribution / improvement.clamp(min=0.1)
    excess = torch.where(
        improvement > 0.1,
        (0.1 * (ratio - 5.0) / 5.0).clamp(0.0, 0.3),
        0.3 * (contribution / 10.0).clamp(max=1.0),
    )
    suspicious = (contribution > 1.0) & (discount >= 0.5)
    value = (credit - torch.where(suspicious, excess, 0.0)).clamp(0.0, MAX_ATTRIBUTION)
    return torch.where(contribution > 0, value, torch.zeros_like(value))


def credited(records: TensorDict) -> Tensor:
    """The bounded attribution of every slot's seed by its last measurement, `[N, S]`; 0 where there is none."""
    current = records["accuracy_current"]
    return bounded_attribution(
        records["contribution"], current - records["accuracy_initial"], current - records["accuracy_at_germination"]
    )
