"""What a controller sees of each host: 50 numbers, 80 with telemetry (plan step 6).

`FEATURES` is the one table of names, indices and scales. Every number is of order one by construction and finite
whatever happened to the host. Slots appear in the fixed layout (early, mid, late); a slot that is empty or not part
of the run is zero.

A contribution of 0 and one that was never measured share the number 0, but the slot's alpha tells them apart in both
widths: nothing is measured at alpha 0 and at the first step of a blending ramp, everything is from the second step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.environment.signals import HISTORY
from esper.seeds import gates
from esper.seeds.actions import MAX_BLUEPRINTS
from esper.seeds.reports import TELEMETRY, stage_feature, telemetry_features
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import OCCUPIED

CONTRIBUTION_SCALE = 10.0
"""Percentage points at which contributions saturate, unless a run says otherwise."""
MAX_PLATEAU = 10
"""Epochs at which the plateau counter saturates."""
_MAX_LOSS = 100.0
_MAX_GROWTH = 10.0
_DELTA_POINTS = 10.0


@dataclass(frozen=True)
class FeatureSpec:
    """One number of the observation: its name, its index, how it is scaled, and what it says."""

    name: str
    index: int
    scale: str
    description: str


_LOSS = "log(1 + x), x within 0..100; 100 where not finite"
_PERCENT = "/ 100"
_BASE = (
    ("epoch", "/ max_epochs", "epochs trained in this episode"),
    ("step", "log(1 + x) / log(1 + max_epochs)", "the same on a scale that resolves the early epochs"),
    ("train_loss", _LOSS, "mean training loss of the epoch, nats"),
    ("val_loss", _LOSS, "validation loss, nats"),
    ("loss_delta", "asinh(10 x)", "previous minus present validation loss; positive is improvement"),
    ("train_accuracy", _PERCENT, "training accuracy of the epoch"),
    ("val_accuracy", _PERCENT, "validation accuracy"),
    ("accuracy_delta", "/ 10, within -1..1", "present minus previous validation accuracy, percentage points"),
    ("plateau_epochs", "/ 10, at most 1", "consecutive epochs without a gain"),
    ("best_val_accuracy", _PERCENT, "best validation accuracy so far"),
    ("best_val_loss", _LOSS, "least validation loss so far"),
    *((f"val_loss_{HISTORY - 1 - i}_ago", _LOSS, "validation loss; 0 before the episode") for i in range(HISTORY)),
    *((f"val_accuracy_{HISTORY - 1 - i}_ago", _PERCENT, "validation accuracy") for i in range(HISTORY)),
    ("growth", "/ host parameters, at most 10", "parameters of all seeds"),
    ("utilisation", "/ max_seeds", "seeds, fossils included; 0 without a limit"),
)
_SLOT = (
    ("active", "0 or 1", "a seed lives here, fossils included"),
    ("stage", "(x - 1) / 6", "stage code"),
    ("alpha", "as it is", "share of the seed in the forward value"),
    (
        "contribution",
        "/ contribution_scale, within -1..1",
        "percentage points lost without the seed; 0 if never measured",
    ),
    *((f"blueprint_{b}", "0 or 1", f"the seed is of the run's blueprint {b}") for b in range(MAX_BLUEPRINTS)),
)
_TELEMETRY = {
    "gradient_norm": ("/ 10, at most 1", "L2 norm of the seed's gradient, last batch"),
    "gradient_health": ("as it is", "1 for no vanishing or exploding tensors, down to 0"),
    "vanishing": ("0 or 1", "measured and below 1e-7"),
    "exploding": ("0 or 1", "above 100"),
    "epochs_in_stage": ("/ 50, at most 1", "epochs trained in this stage"),
    "accuracy": (_PERCENT, "validation accuracy"),
    "accuracy_delta": ("/ 10, within -1..1", "percentage points since the stage began"),
    "stage": ("(x - 1) / 6", "stage code"),
    "alpha": ("as it is", "share of the seed in the forward value"),
    "progress": ("epoch / max_epochs", "part of the episode that is over"),
}


def _table() -> tuple[FeatureSpec, ...]:
    rows = list(_BASE)
    rows += [(f"{slot}.{name}", scale, text) for slot in LAYOUT for name, scale, text in _SLOT]
    rows += [(f"{slot}.telemetry.{name}", *_TELEMETRY[name]) for slot in LAYOUT for name in TELEMETRY]
    return tuple(FeatureSpec(name, i, scale, text) for i, (name, scale, text) in enumerate(rows))


FEATURES = _table()
"""All 80 features in order; the narrow observation is the first 50."""
INDEX = {feature.name: feature.index for feature in FEATURES}

_SLOTS_AT = len(_BASE)
_TELEMETRY_AT = _SLOTS_AT + len(LAYOUT) * len(_SLOT)


@dataclass(frozen=True)
class ObservationSettings:
    """What a run fixes about its observations and masks.

    Attributes:
        slots: names of the run's slots, in order.
        n_blueprints: blueprints of the run, 1 to 5.
        max_epochs: epochs of an episode.
        host_parameters: trainable parameters of every host, or int64 `[N]`.
        max_seeds: seeds a host may have at once, fossils included; None for no limit.
        use_telemetry: 80 features instead of 50.
        contribution_scale: percentage points at which contributions saturate.

    Raises ValueError for slots that are missing or repeated and for numbers out of range.
    """

    slots: tuple[str, ...]
    n_blueprints: int
    max_epochs: int
    host_parameters: int | Tensor
    max_seeds: int | None = None
    use_telemetry: bool = True
    contribution_scale: float = CONTRIBUTION_SCALE

    def __post_init__(self) -> None:
        if not self.slots or len(set(self.slots)) != len(self.slots):
            raise ValueError(f"slots: {self.slots}; must name at least one slot and none twice")
        if not 1 <= self.n_blueprints <= MAX_BLUEPRINTS:
            raise ValueError(f"n_blueprints: {self.n_blueprints}; must be 1..{MAX_BLUEPRINTS}")
        for name in ("max_epochs", "host_parameters"):
            if int(torch.as_tensor(getattr(self, name)).min()) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; must be at least 1")

    @property
    def width(self) -> int:
        """Number of features D."""
        return len(FEATURES) if self.use_telemetry else _TELEMETRY_AT


def observe(records: TensorDict, tracker: TensorDict, settings: ObservationSettings) -> Tensor:
    """The observation `[N, D]` of records `[N, S]` and tracker `[N]`, float32, always finite."""
    live = gates.in_stage(records, OCCUPIED)
    progress = tracker["epoch"].to(torch.float32) / settings.max_epochs
    blocks = [_base(records, live, tracker, settings), *_in_layout(_slot_state(records, live, settings), settings)]
    if settings.use_telemetry:
        telemetry = torch.where(live[..., None], telemetry_features(records, progress), 0.0)
        blocks += _in_layout(telemetry, settings)
    return torch.cat(blocks, dim=1).nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)


def feature_mask(observation: Tensor) -> Tensor:
    """Which numbers are measurements, bool of the shape `[..., D]` of `observation`.

    False are the features of an empty slot, which are zero by construction; its `active` flag is a fact and stays True.
    """
    mask = torch.ones_like(observation, dtype=torch.bool)
    for place, slot in enumerate(LAYOUT):
        active = observation[..., INDEX[f"{slot}.active"], None] > 0
        first = _SLOTS_AT + place * len(_SLOT)
        mask[..., first + 1 : first + len(_SLOT)] = active
        if observation.shape[-1] > _TELEMETRY_AT:
            first = _TELEMETRY_AT + place * len(TELEMETRY)
            mask[..., first : first + len(TELEMETRY)] = active
    return mask


def feature(observation: Tensor, name: str) -> Tensor:
    """One feature `[...]` of observations `[..., D]` by name; `FEATURES` lists the names."""
    return observation[..., INDEX[name]]


def loss_feature(loss: Tensor) -> Tensor:
    """Losses on the scale of the observation."""
    return loss.nan_to_num(nan=_MAX_LOSS, posinf=_MAX_LOSS, neginf=_MAX_LOSS).clamp(0.0, _MAX_LOSS).log1p()


def _base(records: TensorDict, live: Tensor, tracker: TensorDict, settings: ObservationSettings) -> Tensor:
    epoch = tracker["epoch"].to(torch.float32)
    seeds = live.sum(dim=1).to(torch.float32)
    growth = torch.where(live, records["parameters"], 0).sum(dim=1).to(torch.float32) / settings.host_parameters
    columns = (
        epoch / settings.max_epochs,
        epoch.log1p() / math.log1p(settings.max_epochs),
        loss_feature(tracker["train_loss"]),
        loss_feature(tracker["val_loss"]),
        (10.0 * tracker["loss_delta"]).clamp(-_MAX_LOSS, _MAX_LOSS).asinh(),
        tracker["train_accuracy"] / 100.0,
        tracker["val_accuracy"] / 100.0,
        (tracker["accuracy_delta"] / _DELTA_POINTS).clamp(-1.0, 1.0),
        tracker["plateau_epochs"].clamp(max=MAX_PLATEAU) / MAX_PLATEAU,
        tracker["best_val_accuracy"] / 100.0,
        loss_feature(tracker["best_val_loss"]),
        *loss_feature(tracker["loss_history"]).unbind(dim=1),
        *(tracker["accuracy_history"] / 100.0).unbind(dim=1),
        growth.clamp(max=_MAX_GROWTH),
        seeds / settings.max_seeds if settings.max_seeds else torch.zeros_like(seeds),
    )
    return torch.stack(columns, dim=1)


def _slot_state(records: TensorDict, live: Tensor, settings: ObservationSettings) -> Tensor:
    contribution = (records["contribution"] / settings.contribution_scale).clamp(-1.0, 1.0)
    kinds = torch.arange(MAX_BLUEPRINTS, device=live.device)
    columns = (
        torch.ones_like(contribution),
        stage_feature(records["stage"]),
        records["alpha"],
        contribution.nan_to_num(nan=0.0),
        *(records["blueprint"][..., None] == kinds).to(torch.float32).unbind(dim=-1),
    )
    return torch.where(live[..., None], torch.stack(columns, dim=-1), 0.0)


def _in_layout(features: Tensor, settings: ObservationSettings) -> list[Tensor]:
    """The rows of `features` `[N, S, F]` that belong to the layout, in its order; zeros for slots the run lacks."""
    nothing = torch.zeros_like(features[:, 0])
    return [features[:, settings.slots.index(name)] if name in settings.slots else nothing for name in LAYOUT]
