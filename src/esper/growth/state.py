"""The growth state of a group of hosts: fresh hosts, empty slots."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.growth import precision
from esper.growth.governor import fresh_governor, take_snapshot
from esper.growth.spec import GrowthSpec
from esper.hosts.init import drawn_on
from esper.keys import Purpose
from esper.seeds.bank import empty_bank
from esper.seeds.slots import empty_records
from esper.values import changed

_COMPUTED = ("host", "seeds", "loss_scale", "scale_age")
"""What training computes with. All else (slots, rates, governor, key, epoch) is books, read and written on the CPU."""


def fresh_growth(
    spec: GrowthSpec,
    keys: Tensor,
    host_lr: Tensor,
    seed_lr: Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TensorDict:
    """Fresh hosts for `keys` `[N]` with base learning rates `[N]`: the TensorDict of `docs/design.md`, section 2.

    Initial weights are the same whatever the device; they are drawn there. Only what is computed with is on `device`
    (`placed`). The first snapshot is of this state, its metrics nan until they are measured.
    """
    n, device = keys.shape[0], torch.device(device)
    keys = keys.cpu()
    with drawn_on(device):
        params, statistics = spec.host.init(k.fold(keys, Purpose.HOST), dtype)
    state = TensorDict(
        {
            "host": TensorDict(
                {"params": params, "statistics": statistics, "moments": torch.zeros_like(params)}, batch_size=[n]
            ),
            "seeds": empty_bank(spec.bank, n, dtype, device),
            "slots": empty_records(n, len(spec.slots)),
            "rates": TensorDict({"host": host_lr.double(), "seed": seed_lr.double()}, batch_size=[n]),
            "governor": fresh_governor(n, spec.governor),
            "key": keys,
            "epoch": torch.zeros(n, dtype=torch.int64),
            **precision.fresh_scale(spec.amp, n),
        },
        batch_size=[n],
    )
    there = placed(state, device)
    return take_snapshot(there, spec.bank, _unmeasured(n, len(spec.slots)), torch.ones(n, dtype=torch.bool))


def placed(growth: TensorDict, device: torch.device | str) -> TensorDict:
    """Growth with what is computed with on `device`; the books stay where they are."""
    there = {name: value.to(device) for name, value in growth.items() if name in _COMPUTED}
    if "snapshot" in growth.keys():  # noqa: SIM118
        there["snapshot"] = placed(growth["snapshot"], device)
    return changed(growth, **there)


def _unmeasured(n_hosts: int, n_slots: int) -> TensorDict:
    """The metrics of an epoch (`esper.growth.step`) before any was measured."""
    shapes: dict[str, tuple[int, ...]] = {"val_loss": (), "val_accuracy": (), "coalitions": (2**n_slots,)}
    shapes |= {"train_loss": (), "train_accuracy": ()}
    return TensorDict(
        {name: torch.full((n_hosts, *shape), math.nan) for name, shape in shapes.items()}, batch_size=[n_hosts]
    )
