"""The action vocabulary: one place for the op table and the order of the heads (plan steps 6 and 11)."""

from __future__ import annotations

from enum import IntEnum

import torch


class Op(IntEnum):
    """What the controller can ask of one slot in one epoch."""

    WAIT = 0
    GERMINATE = 1
    CULL = 2
    FOSSILIZE = 3


HEADS = ("slot", "blueprint", "blend", "op")
"""Columns of an action `[N, 4]` and order of the heads everywhere."""

SLOT, BLUEPRINT, BLEND, OP = range(4)

RELEVANT = torch.tensor(
    [
        [False, False, False, True],
        [True, True, True, True],
        [True, False, False, True],
        [True, False, False, True],
    ]
)
"""`RELEVANT[op, head]`: whether the head matters for the op. Irrelevant heads count nowhere."""

MAX_BLUEPRINTS = 5
"""Width of the blueprint head and of the one-hot in the observation."""
