"""The seeds on the seats of a stack: fetched from the bank, run, and put back.

All their numbers form one vector, and each comes from a fixed column of the bank. Only the row, the host whose seed
sits there, changes with the plan; so one operation fetches all seeds, and one puts them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from esper.growth.executors.seating import Capacity
from esper.growth.spec import GrowthSpec
from esper.growth.trees import leaves, like, tree_map
from esper.hosts import ops
from esper.hosts.base import Tree
from esper.seeds import blending

SlotSeeds = dict[str, Any]
"""The seeds of one slot: `gate`, leaves `[R, ...]`, and `body` by blueprint, leaves `[seats, ...]`."""


def seat_columns(spec: GrowthSpec, capacity: Capacity, device: torch.device) -> dict[str, SlotSeeds]:
    """The seeds on all seats, by slot, each number replaced by the bank's column it lies in, int32. A slot without
    seats has nothing."""
    number = torch.arange(spec.bank.width, dtype=torch.int32, device=device)
    found: dict[str, SlotSeeds] = {}
    for slot, rooms in zip(spec.slots, capacity, strict=True):
        gates, body = [], {}
        for name, room in zip(spec.blueprints, rooms, strict=True):
            if room:
                kind = _repeated(spec.bank.kinds[slot, name].open(number), room)
                gates.append(kind["gate"])
                body[name] = kind["body"]
        if gates:
            stacked = [torch.cat(group) for group in zip(*map(leaves, gates), strict=True)]
            found[slot] = {"gate": like(gates[0], iter(stacked)), "body": body}
    return found


def _repeated(tree: Tree, room: int) -> dict[str, Any]:
    return tree_map(lambda leaf: leaf.expand(room, *leaf.shape), tree)


def numbered(spec: GrowthSpec, seeds: dict[str, SlotSeeds], capacity: Capacity, first: int) -> list[tuple[Tree, int]]:
    """The parts of `seat_columns`'s result in the order of their leaves, each with the number of its first row; seats
    are numbered from `first` on."""
    parts: list[tuple[Tree, int]] = []
    for slot, rooms in zip(spec.slots, capacity, strict=True):
        if slot in seeds:
            parts.append((seeds[slot]["gate"], first))
        for name, room in zip(spec.blueprints, rooms, strict=True):
            if room:
                parts.append((seeds[slot]["body"][name], first))
            first += room
    return parts


def addresses(owner: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Where numbers in `columns` `[T]` lie in a bank of that `width`, counted from its first number: int64 `[T]`. They
    belong to the last `T` of `rows`, and row `r` to host `owner[r]`."""
    return (owner * width).index_select(0, rows[rows.shape[0] - columns.shape[0] :]) + columns


def fetch(matrix: Tensor, address: Tensor) -> Tensor:
    """The numbers `[T]` at `address` in a matrix of the bank."""
    return matrix.flatten().index_select(0, address)


def put_back(matrix: Tensor, address: Tensor, values: Tensor) -> Tensor:
    """A matrix of the bank with `values` `[T]` at `address`; those behind its end, of free seats, go nowhere."""
    # To one place too many: to leave them out, it had to be known how many they are, and the device be waited for.
    longer = torch.cat([matrix.flatten(), matrix.new_zeros(1)])
    return longer.scatter_(0, address.clamp(max=matrix.numel()), values)[:-1].view_as(matrix)


def select(tree: Tree, rows: Tensor) -> dict[str, Any]:
    """The rows of every leaf."""
    return tree_map(lambda leaf: leaf.index_select(0, rows), tree)


def grow(spec: GrowthSpec, seeds: SlotSeeds, capacity: Sequence[int], active: Tensor, features: Tensor) -> Tensor:
    """What the seeds of a slot make of `features` `[R, ...]`, each blueprint over its seats."""
    grown = []
    parts = zip(spec.kinds, capacity, features.split(list(capacity)), active.split(list(capacity)), strict=True)
    for kind, room, part, flags in parts:
        if room:
            with ops.active(flags):
                grown.append(vmap(kind.apply)(seeds["body"][kind.name], part))
    return torch.cat(grown)


def strength(seeds: SlotSeeds, alpha: Tensor, gated: Tensor, features: Tensor) -> Tensor:
    """How much of each seed is blended in, `[R, B]` (sequences `[R, B, L]`): `alpha` `[R]`, times its gate where
    `gated` `[R]`."""
    pooled = features
    if features.dim() == 5:
        with ops.active(gated):
            pooled = vmap(ops.spatial_mean)(features)
    value = vmap(blending.gate_value)(seeds["gate"], pooled).squeeze(-1)
    wide = (slice(None), *[None] * (value.dim() - 1))
    return alpha[wide] * torch.where(gated[wide] > 0, value, torch.ones_like(value))
