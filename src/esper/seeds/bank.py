"""The seed bank: parameters and moments of every possible seed, two matrices `[N, W]` with a row for each host.

Every kind of seed has columns of its own in every slot. Storage covers all of them, computation never does: executors
fetch what a plan needs. Seeds that do not exist are zero, with zero moments, so that nothing can leak from one seed to
the next one planted in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts.base import Host, site
from esper.hosts.init import drawn_on
from esper.hosts.padded import assemble, shape_of, shapes
from esper.keys import Purpose
from esper.seeds import blending
from esper.seeds.blueprints import registry
from esper.values import changed, upload


@dataclass(frozen=True)
class Kind:
    """One kind of seed in one slot: its `columns`, and a tree `{body, gate}` with the shapes of its leaves, which lie
    there one after the other."""

    columns: slice
    shapes: dict[str, Any]

    def open(self, rows: Tensor) -> dict[str, Any]:
        """The seed of this kind in rows `[..., W]` of the bank: a tree of views, every leaf `[..., *shape]`."""
        sizes = [shape.numel() for shape in _leaves(self.shapes)]
        parts = iter(rows[..., self.columns].split(sizes, dim=-1))

        def fill(shapes: dict[str, Any]) -> dict[str, Any]:
            return {
                name: fill(shape) if isinstance(shape, dict) else next(parts).view((*rows.shape[:-1], *shape))
                for name, shape in shapes.items()
            }

        return fill(self.shapes)


@dataclass(frozen=True)
class BankLayout:
    """Which columns of the bank belong to which kind of seed: slot by slot, in each blueprint by blueprint."""

    host: Host
    slots: tuple[str, ...]
    blueprints: tuple[str, ...]

    @cached_property
    def kinds(self) -> dict[tuple[str, str], Kind]:
        """Every kind of seed by slot and blueprint, in order of columns."""
        found, start = {}, 0
        for slot in self.slots:
            for name in self.blueprints:
                seed = fresh_seed(self.host, slot, name, torch.zeros(1, dtype=torch.int64), torch.float32)
                tree = _shapes(seed)
                stop = start + sum(shape.numel() for shape in _leaves(tree))
                found[slot, name] = Kind(slice(start, stop), tree)
                start = stop
        return found

    @cached_property
    def width(self) -> int:
        """W, the numbers in one row."""
        return self.columns(self.slots[-1]).stop

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How many columns belong to each slot."""
        return tuple(columns.stop - columns.start for columns in map(self.columns, self.slots))

    def columns(self, slot: str) -> slice:
        """The columns of everything that can be planted in a slot."""
        first, last = (self.kinds[slot, self.blueprints[i]].columns for i in (0, -1))
        return slice(first.start, last.stop)

    def open(self, matrix: Tensor) -> TensorDict:
        """The whole bank as `{slot: {blueprint: {body, gate}}}`, views of `matrix` `[N, W]`, every leaf `[N, ...]`."""
        tree = {slot: {name: self.kinds[slot, name].open(matrix) for name in self.blueprints} for slot in self.slots}
        return TensorDict(tree, batch_size=matrix.shape[:1])


def _shapes(seed: TensorDict) -> dict[str, Any]:
    return {name: part.shape[1:] if isinstance(part, Tensor) else _shapes(part) for name, part in seed.items()}


def _leaves(tree: dict[str, Any] | TensorDict) -> Iterator[Any]:
    """The leaves in order of insertion, depth first."""
    for part in tree.values():
        yield from _leaves(part) if isinstance(part, dict | TensorDict) else (part,)


def fresh_seed(host: Host, slot: str, blueprint: str, keys: Tensor, dtype: torch.dtype) -> TensorDict:
    """Initial parameters `{body, gate}` of one kind of seed for `keys` `[N]`."""
    body, gate = _fresh_body(host, slot, blueprint, keys, dtype), _fresh_gate(host, slot, keys, dtype)
    return TensorDict({"body": body, "gate": gate}, batch_size=keys.shape)


def _fresh_body(host: Host, slot: str, blueprint: str, keys: Tensor, dtype: torch.dtype) -> TensorDict:
    return registry.get(host.topology, blueprint).init(k.fold(keys, 0), site(host, slot).channels, dtype)


def _fresh_gate(host: Host, slot: str, keys: Tensor, dtype: torch.dtype) -> TensorDict:
    return blending.gate_init(k.fold(keys, 1), site(host, slot).channels, dtype)


def empty_bank(layout: BankLayout, n_hosts: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> TensorDict:
    """A bank without seeds."""
    params = torch.zeros(n_hosts, layout.width, dtype=dtype, device=device)
    return TensorDict({"params": params, "moments": params.clone()}, batch_size=[n_hosts])


def seed_keys(host_key: Tensor, slot_index: int, planted: Tensor) -> Tensor:
    """Keys `[N]` of the seed that was the `planted`-th in this slot."""
    return k.fold(host_key, Purpose.SEED, slot_index, planted)


def plant(
    bank: TensorDict, layout: BankLayout, germinated: Tensor, records: TensorDict, host_key: Tensor
) -> TensorDict:
    """Write fresh parameters and zero moments where `germinated` `[N, S]`; every other number keeps its bits.

    Weights are the same on every device. A seed in a padded host is padded alike.
    """
    if not germinated.any():
        return bank
    params, moments = bank["params"].clone(), bank["moments"].clone()
    for j in range(len(layout.slots)):
        hosts = germinated[:, j].nonzero().squeeze(1)
        if hosts.numel() == 0:
            continue
        blueprint = records["blueprint"][hosts, j]
        wanted = {layout.blueprints[b]: (blueprint == b).nonzero().squeeze(1) for b in blueprint.unique().tolist()}
        for columns, rows, fresh in fresh_seeds(
            layout, j, wanted, host_key[hosts], records["planted"][hosts, j], params
        ):
            places = upload(hosts[rows], params.device)
            params[:, columns].index_copy_(0, places, fresh)
            moments[:, columns].index_fill_(0, places, 0)
    return changed(bank, params=params, moments=moments)


def fresh_seeds(
    layout: BankLayout, j: int, wanted: Mapping[str, Tensor], host_key: Tensor, planted: Tensor, like: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """What would be planted in slot `j` of hosts with keys `[n]` as the `planted`-th `[n]` seed there.

    `wanted` says of which kinds and for which of the hosts (int64 rows). Yields for each kind its columns in the bank,
    those rows and the seeds, a matrix of the kind of `like`, on its device.
    """
    slot, keys = layout.slots[j], seed_keys(host_key, j, planted)
    # Gates are drawn for all blueprints at once, because many small draws take long.
    gate = partial(_fresh_gate, slot=slot, dtype=like.dtype)
    gates = torch.cat(_drawn(layout.host, host_key, keys, gate, like.device), dim=1)
    for name, rows in wanted.items():
        init = partial(_fresh_body, slot=slot, blueprint=name, dtype=like.dtype)
        body = _drawn(layout.host, host_key[rows], keys[rows], init, like.device)
        seeds = torch.cat([*body, gates.index_select(0, rows.to(like.device))], dim=1)
        yield layout.kinds[slot, name].columns, rows, seeds


def _drawn(host: Host, of: Tensor, keys: Tensor, init: Callable[..., TensorDict], device: torch.device) -> list[Tensor]:
    """The leaves, as `[n, d]` on `device`, of part of a seed for each of `keys` `[n]`, which belong to the hosts with
    keys `of` `[n]`. `init(host=, keys=)` makes them for one shape of hosts; a narrow host's are padded."""
    with drawn_on(device):
        part = init(host=host, keys=keys)
        if len(shapes(host)) > 1:
            part = assemble(shapes(host), shape_of(host, of), part, lambda own, rows: init(host=own, keys=keys[rows]))
    return [leaf.reshape(keys.shape[0], -1).to(device) for leaf in _leaves(part)]


def uproot(bank: TensorDict, layout: BankLayout, removed: Tensor) -> TensorDict:
    """Zero everything in the slots where `removed` `[N, S]`."""
    if not removed.any():
        return bank
    there = upload(removed, bank["params"].device)
    slots = zip(there.split(1, dim=1), layout.widths, strict=True)
    gone = torch.cat([slot.expand(-1, width) for slot, width in slots], dim=1)
    return changed(bank, **{name: matrix.masked_fill(gone, 0) for name, matrix in bank.items()})
