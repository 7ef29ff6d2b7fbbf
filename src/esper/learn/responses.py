"""Does the controller respond to what seeds contribute? What it was about to do, by measured contribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from esper.control.distributions import FactoredActions
from esper.control.policy import RecurrentPolicy
from esper.control.transfer import Transferred
from esper.environment.observation import feature
from esper.seeds.actions import SLOT, Op
from esper.seeds.reports import stage_feature
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage

Learned = RecurrentPolicy | Transferred

EDGES = (-3.0, -1.0, 0.0, 1.0, 3.0)
"""Percentage points of contribution at which one bin ends and the next begins."""
BINS = ("below -3", "-3 to -1", "-1 to 0", "0 to 1", "1 to 3", "3 and more")
"""The bins, from harm to use."""


def responses(policy: RecurrentPolicy, rollout: TensorDictBase, scale: float) -> dict[str, float]:
    """Mean probability of each op by the contribution of a seed that is still undecided, over a rollout `[N, T]`.

    Counted is every slot of every step whose seed is blending or on probation and has a measured contribution. Keys are
    `response/<op>/<bin>` with the probability of WAIT and GERMINATE, and for CULL and FOSSILIZE that of aiming them at
    this very slot, and `response/slots/<bin>`, how many slots the means are over. Bins without any are left out.
    `scale` is the run's `contribution_scale`.
    """
    with torch.no_grad():
        actions, _ = policy.evaluate(rollout)
        probability = _by_slot(actions)
    contribution, counted = measured_contributions(rollout["observation"], scale)
    member = torch.nn.functional.one_hot(bin_of(contribution), len(BINS)).to(probability.dtype) * counted[..., None]
    size = member.flatten(0, -2).sum(0)
    means = torch.einsum("ntso,ntsb->ob", probability, member) / size.clamp(min=1)
    counts = dict(zip(BINS, size.tolist(), strict=True))
    by_op = {op.name: dict(zip(BINS, row, strict=True)) for op, row in zip(Op, means.tolist(), strict=True)}
    table = {"slots": counts, **by_op}
    return {f"response/{what}/{b}": row[b] for what, row in table.items() for b in BINS if counts[b] > 0}


class Aim(NamedTuple):
    """Undecided seeds `[n]` an op could have been aimed at: their contributions, percentage points, the probability of
    aiming it at this very seed, and whether it is on probation (bool), where it counts in full and is to be decided
    on. A seed that is still blended in contributes as much as its share lets it."""

    contribution: Tensor
    probability: Tensor
    probation: Tensor


def aimed(policy: Learned, rollout: TensorDictBase, scale: float) -> dict[str, Aim]:
    """What CULL and FOSSILIZE were worth doing, and how likely they were, over a rollout `[N, T]`: seeds and epochs in
    which the op is legal. `scale` is the run's `contribution_scale`.
    """
    with torch.no_grad():
        actions, _ = policy.evaluate(rollout)
        probability = _by_slot(actions)
    contribution, measured = measured_contributions(rollout["observation"], scale)
    probation = _in_stage(rollout["observation"], Stage.PROBATIONARY)
    found = {}
    for op in (Op.CULL, Op.FOSSILIZE):
        counted = measured & rollout["mask_slot"][..., op, :]
        found[op.name] = Aim(*(part[counted].cpu() for part in (contribution, probability[..., op], probation)))
    return found


def bin_of(contribution: Tensor) -> Tensor:
    """The index in `BINS` of contributions, percentage points, of any shape."""
    return torch.bucketize(contribution, torch.tensor(EDGES, device=contribution.device), right=True)


def measured_contributions(observation: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Contributions in points `[..., 3]` of the slots of the layout, and which were measured on an undecided seed.
    Those beyond `scale`, the run's `contribution_scale`, are seen as that.

    An observation shows 0 for a contribution that was never measured; on probation every one has been, before that one
    that is exactly 0 is not counted.
    """
    contribution = torch.stack([scale * feature(observation, f"{slot}.contribution") for slot in LAYOUT], -1)
    blending, probation = (_in_stage(observation, stage) for stage in (Stage.BLENDING, Stage.PROBATIONARY))
    return contribution, probation | (blending & (contribution != 0))


def _in_stage(observation: Tensor, stage: Stage) -> Tensor:
    """Which slots of the layout show this stage, bool `[..., 3]`."""
    shown = torch.stack([feature(observation, f"{slot}.stage") for slot in LAYOUT], -1)
    return (shown - stage_feature(torch.tensor(int(stage), device=shown.device))).abs() < 1e-4


def _by_slot(actions: FactoredActions) -> Tensor:
    """Probability of each op at each slot, `[N, T, 3, 4]`: op and slot together where the op has one, else the op."""
    columns = []
    for op in Op:
        share = actions.op.probs[..., op, None].expand(*actions.batch_shape, len(LAYOUT))
        if op in (Op.CULL, Op.FOSSILIZE):
            # Where the op is not legal no slot is; WAIT stands in, and its share is 0.
            asked = torch.where(actions.masks.op[..., op], int(op), int(Op.WAIT))
            share = share * actions.given(asked)[0].probs[..., SLOT, : len(LAYOUT)]
        columns.append(share)
    return torch.stack(columns, -1)
