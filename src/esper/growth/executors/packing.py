"""All parameters of a stack of hosts and their seeds in one vector: one operation updates them all.

Every leaf is `[rows, ...]` and lies in the vector as a whole, so that it can be read without moving it. Rows are
numbered through the stack: hosts first, then the seats of every slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.growth.trees import leaves, like, tree_map
from esper.hosts.base import Tree


@dataclass(frozen=True)
class Layout:
    """How the vector is cut into leaves: the tree they form, the shape of each, and the number of its first row."""

    tree: Tree
    shapes: tuple[torch.Size, ...]
    first: tuple[int, ...]

    def pieces(self, packed: Tensor) -> list[Tensor]:
        """The leaves `[rows, ...]` of `packed` `[T]`, as views."""
        parts = packed.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def open(self, packed: Tensor) -> dict[str, Any]:
        """The tree of the leaves, as views."""
        return like(self.tree, iter(self.pieces(packed)))

    def rows(self, device: torch.device) -> Tensor:
        """The row each number of the vector belongs to, int32 `[T]`: a vector may have a hundred million."""
        found = [
            torch.arange(first, first + shape[0], dtype=torch.int32).repeat_interleave(shape[1:].numel())
            for shape, first in zip(self.shapes, self.first, strict=True)
        ]
        return torch.cat([torch.zeros(0, dtype=torch.int32), *found]).to(device)


def layout(parts: Sequence[tuple[Tree, int]], tree: Tree) -> Layout:
    """The layout of `tree`, which is made of `parts` in order: subtrees, each with the number of its first row."""
    shapes = [(leaf.shape, first) for part, first in parts for leaf in leaves(part)]
    # Of the tree only the names are wanted; its tensors would be kept as long as the layout.
    return Layout(
        tree_map(lambda leaf: leaf.new_empty(0), tree),
        tuple(shape for shape, _ in shapes),
        tuple(first for _, first in shapes),
    )


def pack(tree: Tree) -> Tensor:
    """The leaves of a tree as one vector `[T]`, a copy."""
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves(tree)])
