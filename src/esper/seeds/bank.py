"""The seed bank: parameters and moments of every possible seed, `[N, ...]` per (slot, blueprint).

Storage covers every blueprint, computation never does: executors gather what a plan needs. Seeds that do not exist are
zero, with zero moments, so that nothing can leak from one seed to the next one planted in the same place.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts.base import Host, site
from esper.hosts.padded import assemble, shape_of, shapes
from esper.keys import Purpose
from esper.seeds import blending
from esper.seeds.blueprints import registry
from esper.values import changed, put_rows, zero_rows


def fresh_seed(host: Host, slot: str, blueprint: str, keys: Tensor, dtype: torch.dtype) -> TensorDict:
    """Initial parameters `{body, gate}` of one kind of seed for `keys` `[N]`."""
    channels = site(host, slot).channels
    return TensorDict(
        {
            "body": registry.get(host.topology, blueprint).init(k.fold(keys, 0), channels, dtype),
            "gate": blending.gate_init(k.fold(keys, 1), channels, dtype),
        },
        batch_size=keys.shape,
    )


def empty_bank(
    host: Host, slots: tuple[str, ...], blueprints: tuple[str, ...], keys: Tensor, dtype: torch.dtype
) -> TensorDict:
    """A bank without seeds."""
    n = keys.shape
    bank = {}
    for slot in slots:
        kinds = {}
        for name in blueprints:
            params = torch.zeros_like(fresh_seed(host, slot, name, keys, dtype))
            kinds[name] = TensorDict({"params": params, "moments": params.clone()}, batch_size=n)
        bank[slot] = TensorDict(kinds, batch_size=n)
    return TensorDict(bank, batch_size=n)


def seed_keys(host_key: Tensor, slot_index: int, planted: Tensor) -> Tensor:
    """Keys `[N]` of the seed that was the `planted`-th in this slot."""
    return k.fold(host_key, Purpose.SEED, slot_index, planted)


def plant(
    bank: TensorDict,
    host: Host,
    slots: tuple[str, ...],
    blueprints: tuple[str, ...],
    germinated: Tensor,
    records: TensorDict,
    host_key: Tensor,
) -> TensorDict:
    """Write fresh parameters and zero moments where `germinated` `[N, S]`; every other leaf keeps its bits.

    Weights are drawn on the CPU, so that they are the same on every device. A seed in a padded host is padded alike.
    """
    germinated, records, host_key = germinated.cpu(), records.cpu(), host_key.cpu()
    for j, slot in enumerate(slots):
        for b, name in enumerate(blueprints):
            rows = (germinated[:, j] & (records["blueprint"][:, j] == b)).nonzero().squeeze(1)
            if rows.numel() == 0:
                continue
            keys = seed_keys(host_key[rows], j, records["planted"][rows, j])
            leaf = next(iter(bank[slot, name].values(True, True)))
            fresh = _shaped_seed(host, slot, name, host_key[rows], keys, leaf.dtype).to(leaf.device)
            planted = TensorDict({"params": fresh, "moments": torch.zeros_like(fresh)}, batch_size=keys.shape)
            bank = write(bank, (slot, name), rows, planted)
    return bank


def _shaped_seed(host: Host, slot: str, name: str, host_key: Tensor, keys: Tensor, dtype: torch.dtype) -> TensorDict:
    """Seeds for `keys` `[n]` in the hosts with keys `host_key` `[n]`, each of its host's own shape."""
    whole = fresh_seed(host, slot, name, keys, dtype)
    if len(shapes(host)) == 1:
        return whole
    which = shape_of(host, host_key)
    return assemble(shapes(host), which, whole, lambda own, rows: fresh_seed(own, slot, name, keys[rows], dtype))


def uproot(bank: TensorDict, slots: tuple[str, ...], removed: Tensor, planted: Tensor) -> TensorDict:
    """Zero the seeds of the slots where `removed` `[N, S]`; `planted` int64 `[N, S]` are the blueprints that stood
    there, -1 for none, numbered as the bank lists them. All else in the bank is zero already."""
    kinds = torch.where(removed.cpu(), planted.cpu(), -1)
    for j, slot in enumerate(slots):
        names = list(bank[slot].keys())
        for b in kinds[:, j].unique().tolist():
            if b >= 0:
                rows = (kinds[:, j] == b).nonzero().squeeze(1)
                bank = changed(bank, **{slot: changed(bank[slot], **{names[b]: zero_rows(bank[slot, names[b]], rows)})})
    return bank


def write(bank: TensorDict, address: tuple[str, str], rows: Tensor, value: TensorDict) -> TensorDict:
    """A bank that differs from `bank` in the rows of one (slot, blueprint) entry; everything else is shared."""
    slot, name = address
    entry = put_rows(bank[slot, name], rows, value)
    return changed(bank, **{slot: changed(bank[slot], **{name: entry})})
