"""Groups of hosts with the same seed in the same slot: how a slot's rows are split, gathered and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth.plan import Plan, SlotPlan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts.base import Tree

Address = tuple[int, SlotPlan]
"""A group: the slot's index and what runs in it."""
Seeds = dict[Address, dict[str, Any]]
"""Stacked parameters `{body, gate}` of each group; leaves `[members, ...]`."""


@dataclass(frozen=True)
class Split:
    """How the rows of one slot fall into groups.

    `order` lists bypassed rows first, then the rows of each group, `sizes` how many of each; `inverse` undoes it.
    `members` and `rows` are the rows of each group, as numbers and as (views of) index tensors.
    """

    entries: tuple[SlotPlan, ...]
    members: tuple[tuple[int, ...], ...]
    rows: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    order: Tensor
    inverse: Tensor


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    """An int64 index tensor, sent to the device without waiting for it."""
    return upload(torch.tensor(rows, dtype=torch.int64), device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; a CUDA device is not waited for."""
    if device.type == "cpu" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def split_slot(entries: Sequence[SlotPlan | None], device: torch.device) -> Split:
    """Group equal entries of one slot; groups in order of first appearance."""
    groups: dict[SlotPlan, list[int]] = {}
    rest: list[int] = []
    for row, entry in enumerate(entries):
        (rest if entry is None else groups.setdefault(entry, [])).append(row)
    order = rest + [row for rows in groups.values() for row in rows]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    both = index(order + inverse, device)
    forth, back = both[: len(order)], both[len(order) :]
    sizes = (len(rest), *(len(rows) for rows in groups.values()))
    members = tuple(tuple(rows) for rows in groups.values())
    return Split(tuple(groups), members, tuple(forth.split(sizes)[1:]), sizes, forth, back)


def split_plan(plan: Plan, device: torch.device) -> list[Split]:
    """One split per slot."""
    return [split_slot(column, device) for column in zip(*plan, strict=True)]


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient is another selection, not a scattered sum as for any other index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def apply_groups(split: Split, h: Tensor, function: Callable[[SlotPlan, Tensor, Tensor], Tensor]) -> Tensor:
    """Features `h` `[N, ...]` with `function(entry, rows, features)` applied to every group."""
    if not split.entries:
        return h
    rest, *parts = _Permute.apply(h, split.order, split.inverse).split(split.sizes)
    changed = [function(*group) for group in zip(split.entries, split.rows, parts, strict=True)]
    result: Tensor = _Permute.apply(torch.cat([rest, *changed]), split.inverse, split.order)
    return result


def gather(spec: GrowthSpec, bank: TensorDict, splits: Sequence[Split], *, moments: bool) -> tuple[Seeds, Seeds]:
    """The seeds a plan needs, stacked by group, and (when asked for) their moments."""
    params: Seeds = {}
    found: Seeds = {}
    for j, (slot, split) in enumerate(zip(spec.slots, splits, strict=True)):
        for entry, rows in zip(split.entries, split.rows, strict=True):
            kind = as_tree(bank[slot, entry.blueprint])
            params[j, entry] = select(kind["params"], rows)
            if moments:
                found[j, entry] = select(kind["moments"], rows)
    return params, found


def scatter(
    spec: GrowthSpec, bank: TensorDict, params: Seeds, moments: Seeds, members: dict[Address, Tensor]
) -> TensorDict:
    """A bank with the groups' seeds and moments written back; untouched entries are shared."""
    trees: dict[tuple[str, str], dict[str, Any]] = {}
    for (j, entry), rows in members.items():
        where = (spec.slots[j], entry.blueprint)
        kind = trees.get(where) or as_tree(bank[where])
        trees[where] = {
            "params": _write(kind["params"], rows, leaves(params[j, entry])),
            "moments": _write(kind["moments"], rows, leaves(moments[j, entry])),
        }
    result = bank.clone(recurse=False)
    for slot in {slot for slot, _ in trees}:
        result[slot] = bank[slot].clone(recurse=False)
    for (slot, name), tree in trees.items():
        result[slot][name] = as_tensordict(tree, list(bank.batch_size))
    return result


def _write(tree: Tree, rows: Tensor, values: Sequence[Tensor]) -> dict[str, Any]:
    written = [leaf.index_copy(0, rows, v.detach()) for leaf, v in zip(leaves(tree), values, strict=True)]
    return like(tree, iter(written))


def select(tree: Tree, rows: Tensor) -> dict[str, Any]:
    """The rows of every leaf."""
    return tree_map(lambda leaf: leaf.index_select(0, rows), tree)


def by_group(flat: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Cut a flat list into consecutive pieces of the given lengths."""
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [list(flat[a:b]) for a, b in pairwise(ends)]
