"""The life of a seed as pure functions over slot records `[N, S]` (plan steps 2 to 4 and 6).

The order inside one environment step: `apply_action` (what the controller asked for), then an epoch of training and
validation whose measurements enter through `record_epoch`, then `tick` (what happens by itself). Every stage change
goes through `_enter`, so every path keeps the same books.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds import blending, gates, stages
from esper.seeds.actions import BLEND, BLUEPRINT, OP, SLOT, Op
from esper.seeds.slots import Fields, emptied
from esper.seeds.stages import Stage
from esper.values import assembled, constant


@dataclass(frozen=True)
class LifecycleRules:
    """What a run fixes about its seeds' lives. Durations are epochs; horizons scale with `max_epochs`."""

    max_epochs: int
    blending_epochs: int = stages.BLENDING_EPOCHS
    train_to_blend_fraction: float = 0.1
    strict_gates: bool = True
    incubation: str = "straight_through"
    embargo_epochs: int = 0
    max_seeds: int | None = None

    @property
    def dwell(self) -> int:
        return stages.dwell_epochs(self.max_epochs, self.train_to_blend_fraction)

    @property
    def probation(self) -> int:
        return stages.probation_epochs(self.max_epochs)


def put(records: TensorDict, mask: Tensor, **values: Tensor | float | int | bool) -> TensorDict:
    """Records with `values` written where `mask` `[N, S]` is True."""
    return _records(_put(dict(records.items()), mask, **values), records)


def clear(records: TensorDict, mask: Tensor) -> TensorDict:
    """Empty the masked slots; only the number of seeds ever planted survives."""
    return records if _nowhere(mask) else _records(emptied(dict(records.items()), mask), records)


def _records(fields: Fields, like: TensorDict) -> TensorDict:
    return assembled(fields, like.batch_size, like.device)


def _put(fields: Fields, mask: Tensor, **values: Tensor | float | int | bool) -> Fields:
    if _nowhere(mask):
        return fields
    written = dict(fields)
    for name, value in values.items():
        old = fields[name]
        new = value.to(old.dtype) if isinstance(value, Tensor) else constant(value, old.dtype, old.device)
        written[name] = torch.where(mask, new, old)
    return written


def _nowhere(mask: Tensor) -> bool:
    """Whether a mask is empty; most are, in most epochs."""
    return not mask.any()


def _enter(fields: Fields, mask: Tensor, stage: Stage) -> Fields:
    """Move the masked slots to `stage` and start its books."""
    return _put(
        fields,
        mask,
        previous_stage=fields["stage"],
        previous_epochs_in_stage=fields["epochs_in_stage"],
        stage=stage,
        epochs_in_stage=0,
        accuracy_at_stage_start=fields["accuracy_current"],
    )


def _start_blending(fields: Fields, mask: Tensor, rules: LifecycleRules) -> Fields:
    if _nowhere(mask):
        return fields
    step = torch.ones_like(fields["ramp_step"])
    return _put(
        _enter(fields, mask, Stage.BLENDING),
        mask,
        ramp_step=step,
        alpha=blending.ramp(step, rules.blending_epochs, fields["blend"]),
        accuracy_at_blending_start=fields["accuracy_current"],
    )


def _cull(fields: Fields, mask: Tensor) -> Fields:
    """The masked seeds are gone: the slot shows CULLED until the tick walks it on."""
    if _nowhere(mask):
        return fields
    return _put(
        emptied(fields, mask),
        mask,
        stage=Stage.CULLED,
        previous_stage=fields["stage"],
        previous_epochs_in_stage=fields["epochs_in_stage"],
    )


def apply_action(
    records: TensorDict,
    action: Tensor,
    rules: LifecycleRules,
    parameters: Tensor,
    accuracy: Tensor,
) -> tuple[TensorDict, TensorDict]:
    """Carry out one action per host.

    Args:
        records: `[N, S]`.
        action: int64 `[N, 4]` in the order of `HEADS`; the slot is an index of the run's slots, -1 for none of them.
        rules: the run's rules.
        parameters: int64 `[S, blueprints, blends]` or `[N, S, blueprints, blends]`, trainable parameters of each
            possible seed.
        accuracy: `[N]` last validation accuracy, percentage points.

    Returns:
        The new records and the outcome, a TensorDict `[N]` with `op`, `slot`, `success` and the bool masks `[N, S]`
        `germinated`, `culled`, `fossilized`. An action that is not possible changes nothing and has success False.
    """
    n_hosts, n_slots = records.batch_size
    kinds, blends = parameters.shape[-2:]
    op, slot = action[:, OP], action[:, SLOT]
    target = torch.arange(n_slots, device=slot.device) == slot[:, None]

    def chosen(kind: Op, possible: Tensor) -> Tensor:
        return target & (op == kind)[:, None] & possible

    germinated = chosen(Op.GERMINATE, gates.may_germinate(records, rules.max_seeds))
    culled = chosen(Op.CULL, gates.may_cull(records))
    fossilized = chosen(Op.FOSSILIZE, gates.may_fossilize(records))

    blueprint, blend = action[:, BLUEPRINT, None], action[:, BLEND, None]
    known = (blueprint >= 0) & (blueprint < kinds) & (blend >= 0) & (blend < blends)
    germinated = germinated & known
    row, index = torch.arange(n_hosts, device=slot.device)[:, None], torch.arange(n_slots, device=slot.device)
    table = parameters.expand(n_hosts, n_slots, kinds, blends)
    size = table[row, index, blueprint.clamp(0, kinds - 1), blend.clamp(0, blends - 1)]

    fields = _put(
        dict(records.items()),
        germinated,
        blueprint=blueprint.expand_as(germinated),
        blend=blend.expand_as(germinated),
        parameters=size,
        planted=records["planted"] + 1,
        accuracy_at_germination=accuracy[:, None].expand_as(germinated),
        accuracy_current=accuracy[:, None].expand_as(germinated),
        healthy=True,
        gradient_health=1.0,
    )
    fields = _enter(fields, germinated, Stage.GERMINATED)
    fields = _enter(fields, gates.g1(fields), Stage.TRAINING)
    if rules.incubation == "none":
        fields = _start_blending(fields, germinated, rules)
    fields = _cull(fields, culled)
    fields = _enter(fields, fossilized, Stage.FOSSILIZED)

    outcome = {
        "op": op,
        "slot": slot,
        "success": (op == Op.WAIT) | germinated.any(1) | culled.any(1) | fossilized.any(1),
        "germinated": germinated,
        "culled": culled,
        "fossilized": fossilized,
    }
    return _records(fields, records), assembled(outcome, records.batch_size[:1])


def record_epoch(
    records: TensorDict,
    accuracy: Tensor,
    contribution: Tensor,
    contribution_se: Tensor,
    gradients: TensorDict,
    healthy: Tensor,
) -> TensorDict:
    """Enter one epoch's measurements.

    Args:
        accuracy: `[N]` validation accuracy, percentage points.
        contribution, contribution_se: `[N, S]` percentage points, nan where not measured; an old measurement is
            kept and ages.
        gradients: TensorDict `[N, S]` with `norm`, `ratio`, `health` of the last training batch; nan where none was
            taken.
        healthy: bool `[N, S]`, all parameters of the seed finite.
    """
    fields = dict(records.items())
    alive = gates.in_stage(fields, stages.OCCUPIED)
    first = alive & (fields["age"] == 0)
    current = accuracy[:, None].expand_as(alive)
    fields = _put(fields, first, accuracy_initial=current, accuracy_at_stage_start=current, accuracy_best=current)
    fields = _put(
        fields,
        alive,
        accuracy_current=current,
        accuracy_best=torch.maximum(fields["accuracy_best"], current),
        age=fields["age"] + 1,
        epochs_in_stage=fields["epochs_in_stage"] + 1,
        healthy=healthy,
    )
    measured = alive & ~contribution.isnan()
    stale = alive & ~measured & (fields["contribution_age"] >= 0)
    fields = _put(fields, stale, contribution_age=fields["contribution_age"] + 1)
    fields = _put(fields, measured, contribution=contribution, contribution_se=contribution_se, contribution_age=0)
    norm, ratio, health = (gradients[name] for name in ("norm", "ratio", "health"))
    old = fields["gradient_ratio"]
    smoothed = torch.where(old.isnan(), ratio, 0.9 * old + 0.1 * ratio)
    felt = alive & ~norm.isnan()
    fields = _put(fields, felt, gradient_norm=norm, gradient_ratio=smoothed, gradient_health=health)
    return _records(fields, records)


def tick(records: TensorDict, rules: LifecycleRules) -> tuple[TensorDict, Tensor]:
    """The mechanical clock, once per epoch after validation. Never fossilises.

    TRAINING moves on after its dwell through G2; BLENDING climbs its ramp and then leaves through G3, retrying every
    epoch; PROBATIONARY culls a seed whose contribution is not positive or whose time is up; the cull tail walks on.

    Returns:
        The new records and the bool mask `[N, S]` of seeds that were culled here.
    """
    before = fields = dict(records.items())
    stage, in_stage = before["stage"], before["epochs_in_stage"]
    ready = (stage == Stage.TRAINING) & (in_stage >= rules.dwell) & gates.g2(before, rules.strict_gates)
    fields = _start_blending(fields, ready, rules)

    blending_now = stage == Stage.BLENDING
    ramp_done = before["ramp_step"] >= rules.blending_epochs
    step = before["ramp_step"] + 1
    fields = _put(
        fields,
        blending_now & ~ramp_done,
        ramp_step=step,
        alpha=blending.ramp(step, rules.blending_epochs, before["blend"]),
    )
    done = blending_now & ramp_done & gates.g3(before)
    fields = _put(_enter(fields, done, Stage.PROBATIONARY), done, alpha=1.0)

    probation = stage == Stage.PROBATIONARY
    culled = probation & ((before["contribution"] <= 0.0) | (in_stage >= rules.probation))
    fields = _walk_tail(_cull(fields, culled), rules.embargo_epochs)
    return _records(fields, records), culled


def _walk_tail(fields: Fields, embargo_epochs: int) -> Fields:
    """CULLED -> EMBARGOED, where a slot stays for `embargo_epochs` steps, then through RESETTING, which takes no time,
    to DORMANT."""
    fresh, waiting = fields["stage"] == Stage.CULLED, fields["stage"] == Stage.EMBARGOED
    fields = _put(_enter(fields, fresh, Stage.EMBARGOED), fresh, embargo=embargo_epochs)
    fields = _put(fields, waiting, embargo=fields["embargo"] - 1)
    over = (fields["stage"] == Stage.EMBARGOED) & (fields["embargo"] <= 0)
    # All else was emptied when the seed went.
    return _put(
        fields,
        over,
        stage=Stage.DORMANT,
        previous_stage=Stage.UNKNOWN,
        epochs_in_stage=0,
        previous_epochs_in_stage=0,
        embargo=0,
    )


def seed_parameters(
    channels: tuple[int, ...], body_counts: Callable[[int], list[int]], device: torch.device | None = None
) -> Tensor:
    """The table `parameters` of `apply_action`: int64 `[S, blueprints, blends]`, the gate included where it is used."""
    table = []
    for c in channels:
        gate = [blending.gate_parameter_count(c) if b == blending.GATED else 0 for b in range(len(stages.BLENDS))]
        table.append([[count + extra for extra in gate] for count in body_counts(c)])
    return torch.tensor(table, dtype=torch.int64, device=device)
