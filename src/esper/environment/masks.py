"""What a controller may ask for: an (op, slot) pair is allowed exactly when the lifecycle would accept it now (plan
step 6).

Nothing else is ever masked: no rule of thumb about plateaus, timing or stability hides a choice from the controller.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict

from esper.environment.observation import ObservationSettings
from esper.seeds import gates
from esper.seeds.actions import MAX_BLUEPRINTS, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS


def action_masks(records: TensorDict, settings: ObservationSettings) -> TensorDict:
    """The masks of every head, a TensorDict `[N]`, True where allowed.

    Args:
        records: `[N, S]`.
        settings: the run's slots, number of blueprints and limit of seeds.

    Returns:
        `mask_op` `[N, 4]`, `mask_slot` `[N, 4, 3]` (row = op, column = slot of the fixed layout; row WAIT marks the
        enabled slots), `mask_blueprint` `[N, 5]`, `mask_blend` `[N, 3]`. WAIT is always allowed.
    """
    n_hosts = records.batch_size[0]
    device = records["stage"].device
    every = torch.ones_like(records["stage"], dtype=torch.bool)
    accepted = {
        Op.WAIT: every,
        Op.GERMINATE: gates.may_germinate(records, settings.max_seeds),
        Op.CULL: gates.may_cull(records),
        Op.FOSSILIZE: gates.may_fossilize(records),
    }
    by_op = torch.stack([accepted[op] for op in Op], dim=1)
    mask_slot = torch.zeros(n_hosts, len(Op), len(LAYOUT), dtype=torch.bool, device=device)
    for place, name in enumerate(LAYOUT):
        if name in settings.slots:
            mask_slot[:, :, place] = by_op[:, :, settings.slots.index(name)]
    kinds = torch.arange(MAX_BLUEPRINTS, device=device) < settings.n_blueprints
    return TensorDict(
        {
            "mask_op": mask_slot.any(dim=2),
            "mask_slot": mask_slot,
            "mask_blueprint": kinds.expand(n_hosts, -1).clone(),
            "mask_blend": torch.ones(n_hosts, len(BLENDS), dtype=torch.bool, device=device),
        },
        batch_size=[n_hosts],
    )
