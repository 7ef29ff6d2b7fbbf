"""TensorDicts on their way between processes: trees of NumPy arrays, order of keys kept.

Pickling hundreds of small tensors one by one takes ten times as long as pickling arrays, whose memory travels as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase


class Packed(NamedTuple):
    """A TensorDict without tensors: `items` are arrays, or packed values again."""

    batch: tuple[int, ...]
    items: dict[str, Any]


def pack(value: TensorDictBase) -> Packed:
    """`value`, from whatever device, as arrays."""
    return Packed(
        tuple(value.batch_size),
        {
            key: pack(item) if isinstance(item, TensorDictBase) else item.detach().cpu().numpy()
            for key, item in value.items()
        },
    )


def unpack(packed: Packed) -> TensorDict:
    """What was packed, in memory of its own on the CPU."""
    items = {
        key: unpack(item) if isinstance(item, Packed) else torch.from_numpy(np.array(item))
        for key, item in packed.items.items()
    }
    return TensorDict(items, batch_size=packed.batch)
