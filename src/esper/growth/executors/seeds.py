"""The seeds on the seats of a stack: fetched from the bank, run, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from esper.growth.executors.seating import Capacity, Seating, Seats, upload
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts import ops
from esper.hosts.base import Tree
from esper.seeds import blending
from esper.values import changed

SlotSeeds = dict[str, Any]
"""The seeds of one slot: `gate`, leaves `[R, ...]`, and `body` by blueprint, leaves `[seats, ...]`."""


def gather(spec: GrowthSpec, bank: TensorDict, seats: Sequence[Seats], part: str) -> dict[str, SlotSeeds]:
    """The `params` or `moments` of the seeds on all seats, by slot. A slot without seats has nothing; a free seat has
    copies of something."""
    found: dict[str, SlotSeeds] = {}
    for slot, place in zip(spec.slots, seats, strict=True):
        gates, body = [], {}
        for name, room, source in zip(spec.blueprints, place.capacity, place.source.split(place.capacity), strict=True):
            if room:
                kind = select(as_tree(bank[slot, name, part]), source)
                gates.append(kind["gate"])
                body[name] = kind["body"]
        if gates:
            stacked = [torch.cat(group) for group in zip(*map(leaves, gates), strict=True)]
            found[slot] = {"gate": like(gates[0], iter(stacked)), "body": body}
    return found


def numbered(spec: GrowthSpec, seeds: dict[str, SlotSeeds], capacity: Capacity, first: int) -> list[tuple[Tree, int]]:
    """The parts of `gather`'s result in the order of their leaves, each with the number of its first row; seats are
    numbered from `first` on."""
    parts: list[tuple[Tree, int]] = []
    for slot, rooms in zip(spec.slots, capacity, strict=True):
        if slot in seeds:
            parts.append((seeds[slot]["gate"], first))
        for name, room in zip(spec.blueprints, rooms, strict=True):
            if room:
                parts.append((seeds[slot]["body"][name], first))
            first += room
    return parts


def scatter(spec: GrowthSpec, bank: TensorDict, seating: Seating, params: Tree, moments: Tree) -> TensorDict:
    """A bank with the seeds of all taken seats written back; entries without a seed are shared."""
    written: dict[str, TensorDict] = {}
    for slot, rooms, groups in zip(spec.slots, seating.capacity, seating.members, strict=True):
        entries, first = {}, 0
        for name, room, members in zip(spec.blueprints, rooms, groups, strict=True):
            if members.numel():
                kind = as_tree(bank[slot, name])
                parts = {
                    part: _written(kind[part], members, _seated(tree[slot], name, first))
                    for part, tree in (("params", params), ("moments", moments))
                }
                entries[name] = as_tensordict(parts, list(bank.batch_size))
            first += room
        if entries:
            written[slot] = changed(bank[slot], **entries)
    return changed(bank, **written)


def _seated(seeds: SlotSeeds, name: str, first: int) -> Tree:
    """The seeds of one blueprint as the bank keeps them; their gates begin at seat `first`."""
    return {"body": seeds["body"][name], "gate": tree_map(lambda leaf: leaf[first:], seeds["gate"])}


def _written(tree: Tree, members: Tensor, values: Tree) -> dict[str, Any]:
    """A tree of the bank with the first seats of `values` written to the hosts `members`."""
    old, new, count = leaves(tree), leaves(values), members.shape[0]
    rows = upload(members, old[0].device)
    return like(tree, (a.index_copy(0, rows, b[:count].detach()) for a, b in zip(old, new, strict=True)))


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
    pooled = features.mean(dim=(-2, -1)) if features.dim() == 5 else features
    value = vmap(blending.gate_value)(seeds["gate"], pooled).squeeze(-1)
    wide = (slice(None), *[None] * (value.dim() - 1))
    return alpha[wide] * torch.where(gated[wide] > 0, value, torch.ones_like(value))
