"""Rules of thumb as a controller: grow when the host stands still, keep what pays, drop what hurts (plan step 7).

Every seed of a host is considered at every step and the most pressing thing is done: fossilise the seed that
contributes most, else cull the one that hurts most, else plant in the first free slot. It reads nothing but the
observation and the masks; what they do not say (whether the host has settled, how long a seed has been in its stage,
which kinds failed) it remembers in its carry, so it works at both observation widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from esper.control.simple import Controller, assemble
from esper.environment.observation import CONTRIBUTION_SCALE, MAX_PLATEAU, feature
from esper.seeds.actions import MAX_BLUEPRINTS, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage


@dataclass(frozen=True)
class HeuristicSettings:
    """The thresholds. Durations are epochs, accuracies percentage points.

    Attributes:
        max_epochs: epochs of an episode.
        plateau_epochs: epochs without a gain before planting.
        min_epoch: no planting before this epoch.
        settled_improvement, settled_epochs: the host has settled after so many epochs of a smaller relative loss gain.
        embargo: no planting for so long after a seed was lost.
        patience, max_drop: a seed is culled after so long in a stage if accuracy fell by more than this in it.
        penalty, decay, skip: losing a seed adds `penalty` to its blueprint; it decays every epoch by the factor
            `decay`, and a blueprint is passed over at or above `skip`. The defaults pass it over for 7 epochs after
            one loss, longer than the embargo, and longer after more.
        contribution_scale: the run's, in which observations show contributions.
    """

    max_epochs: int
    plateau_epochs: int = 3
    min_epoch: int = 5
    settled_improvement: float = 0.03
    settled_epochs: int = 3
    embargo: int = 5
    patience: int = 5
    max_drop: float = 2.0
    penalty: float = 2.0
    decay: float = 0.9
    skip: float = 1.0
    contribution_scale: float = CONTRIBUTION_SCALE


def heuristic(settings: HeuristicSettings) -> Controller:
    """The controller of these rules."""

    def init(n_hosts: int) -> TensorDict:
        slots = len(LAYOUT)
        count = torch.zeros(n_hosts, dtype=torch.int64)
        return TensorDict(
            {
                "stage": torch.full((n_hosts, slots), int(Stage.DORMANT)),
                "epochs_in_stage": torch.zeros(n_hosts, slots, dtype=torch.int64),
                "accuracy_at_stage_start": torch.zeros(n_hosts, slots),
                "blueprint": torch.zeros(n_hosts, slots, dtype=torch.int64),
                "penalty": torch.zeros(n_hosts, MAX_BLUEPRINTS),
                "since_loss": torch.full_like(count, settings.embargo),
                "settled": count,
                "pointer": count.clone(),
            },
            batch_size=[n_hosts],
        )

    def act(td: TensorDictBase, carry: TensorDict) -> tuple[Tensor, TensorDict]:
        carry = _remember(td["observation"], carry, settings)
        action, blueprint = _decide(td, carry, settings)
        planted = (action[:, -1] == Op.GERMINATE) & td["mask_op"][:, Op.GERMINATE]
        kinds = td["mask_blueprint"].sum(dim=1)
        return action, carry.update({"pointer": torch.where(planted, (blueprint + 1) % kinds, carry["pointer"])})

    return Controller(init, act)


def _per_slot(observation: Tensor, name: str) -> Tensor:
    return torch.stack([feature(observation, f"{slot}.{name}") for slot in LAYOUT], dim=1)


def _remember(observation: Tensor, carry: TensorDict, settings: HeuristicSettings) -> TensorDict:
    """The carry after looking at one more observation."""
    accuracy = 100.0 * feature(observation, "val_accuracy")[:, None]
    codes = 1 + (6 * _per_slot(observation, "stage")).round().to(torch.int64)
    present = _per_slot(observation, "active") > 0
    stage = torch.where(present, codes, int(Stage.DORMANT))
    changed = stage != carry["stage"]
    # A new seed has lived an epoch by the time it is first seen; a stage that was entered by the clock starts now.
    fresh = (carry["stage"] == Stage.DORMANT).to(torch.int64)
    lost = (carry["stage"] != Stage.DORMANT) & (stage == Stage.DORMANT)

    kinds = torch.stack([_per_slot(observation, f"blueprint_{b}") for b in range(MAX_BLUEPRINTS)], dim=-1)
    failed = torch.nn.functional.one_hot(carry["blueprint"], MAX_BLUEPRINTS) * lost[..., None]
    before, now = (feature(observation, f"val_loss_{ago}_ago").expm1() for ago in (1, 0))
    stable = (before > 0) & (before - now < settings.settled_improvement * before) & (now < 1.5 * before)
    settled = torch.where(stable, carry["settled"] + 1, 0)
    settled = torch.where(carry["settled"] >= settings.settled_epochs, carry["settled"], settled)
    return TensorDict(
        {
            "stage": stage,
            "epochs_in_stage": torch.where(changed, fresh, carry["epochs_in_stage"] + 1),
            "accuracy_at_stage_start": torch.where(changed, accuracy, carry["accuracy_at_stage_start"]),
            "blueprint": torch.where(present, kinds.argmax(dim=-1), carry["blueprint"]),
            "penalty": settings.decay * carry["penalty"] + settings.penalty * failed.sum(dim=1),
            "since_loss": torch.where(lost.any(dim=1), 0, carry["since_loss"] + 1),
            "settled": settled,
            "pointer": carry["pointer"],
        },
        batch_size=carry.batch_size,
    )


def _decide(td: TensorDictBase, carry: TensorDict, settings: HeuristicSettings) -> tuple[Tensor, Tensor]:
    """The action `[N, 4]` and the blueprint `[N]` it would plant."""
    observation, slot_mask = td["observation"], td["mask_slot"]
    contribution = settings.contribution_scale * _per_slot(observation, "contribution")
    drop = carry["accuracy_at_stage_start"] - 100.0 * feature(observation, "val_accuracy")[:, None]
    stage = carry["stage"]
    growing = (stage == Stage.TRAINING) | (stage == Stage.BLENDING)
    worse = growing & (carry["epochs_in_stage"] >= settings.patience) & (drop > settings.max_drop)
    useless = (stage == Stage.PROBATIONARY) & (contribution <= 0)

    keep = slot_mask[:, Op.FOSSILIZE] & (contribution > 0)
    cull = slot_mask[:, Op.CULL] & (worse | useless)
    plateau = MAX_PLATEAU * feature(observation, "plateau_epochs")
    epoch = (settings.max_epochs * feature(observation, "epoch")).round()
    ready = (
        (carry["since_loss"] >= settings.embargo)
        & (carry["settled"] >= settings.settled_epochs)
        & (epoch >= settings.min_epoch)
        & (plateau >= settings.plateau_epochs - 0.5)
    )
    plant = slot_mask[:, Op.GERMINATE] & ready[:, None]

    harm = torch.where(useless, -contribution, drop)
    first = torch.arange(len(LAYOUT), 0, -1, device=stage.device).expand_as(contribution)
    op = torch.zeros_like(carry["settled"])
    slot = torch.zeros_like(op)
    for kind, possible, urgency in (
        (Op.GERMINATE, plant, first.to(harm.dtype)),
        (Op.CULL, cull, harm),
        (Op.FOSSILIZE, keep, contribution),
    ):
        wanted = possible.any(dim=1)
        best = torch.where(possible, urgency, -torch.inf).argmax(dim=1)
        op, slot = torch.where(wanted, int(kind), op), torch.where(wanted, best, slot)
    blueprint = _next_blueprint(td["mask_blueprint"], carry, settings)
    blend = td["mask_blend"].to(torch.int64).argmax(dim=1)
    return assemble(slot, blueprint, blend, op), blueprint


def _next_blueprint(mask: Tensor, carry: TensorDict, settings: HeuristicSettings) -> Tensor:
    """The next blueprint in turn that did not just fail; if all did, the least penalised."""
    turn = (torch.arange(MAX_BLUEPRINTS, device=mask.device) - carry["pointer"][:, None]) % MAX_BLUEPRINTS
    penalty = torch.where(mask, carry["penalty"], torch.inf)
    good = penalty < settings.skip
    in_turn = torch.where(good, turn, MAX_BLUEPRINTS).argmin(dim=1)
    return torch.where(good.any(dim=1), in_turn, penalty.argmin(dim=1))
