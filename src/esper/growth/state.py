"""The growth state of a group of hosts: fresh hosts, empty slots."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.growth.spec import GrowthSpec
from esper.keys import Purpose
from esper.seeds.bank import empty_bank
from esper.seeds.slots import empty_records


def fresh_growth(
    spec: GrowthSpec,
    keys: Tensor,
    host_lr: Tensor,
    seed_lr: Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TensorDict:
    """Fresh hosts for `keys` `[N]` with base learning rates `[N]`: the TensorDict of `docs/design.md`, section 2.

    Initial weights are drawn on the CPU and moved, so that they are the same whatever the device.
    """
    n = keys.shape[0]
    keys = keys.cpu()
    params, statistics = spec.host.init(k.fold(keys, Purpose.HOST), dtype)
    return TensorDict(
        {
            "host": TensorDict(
                {"params": params, "statistics": statistics, "moments": torch.zeros_like(params)}, batch_size=[n]
            ),
            "seeds": empty_bank(spec.host, spec.slots, spec.blueprints, keys, dtype),
            "slots": empty_records(n, len(spec.slots)),
            "rates": TensorDict({"host": host_lr.double(), "seed": seed_lr.double()}, batch_size=[n]),
            "key": keys,
            "epoch": torch.zeros(n, dtype=torch.int64),
        },
        batch_size=[n],
    ).to(device)
