"""All parameters of a stack of hosts or seeds in one matrix, a row per host: one operation updates them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from esper.growth.trees import leaves, like
from esper.hosts.base import Tree


@dataclass(frozen=True)
class Layout:
    """How a packed row is cut into leaves: the tree they form and the shape of each."""

    tree: Tree
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes]

    def pieces(self, packed: Tensor) -> list[Tensor]:
        """The leaves `[N, ...]` of `packed` `[N, P]`, as views."""
        parts = packed.split(self.sizes, dim=1)
        pairs = zip(parts, self.shapes, strict=True)
        return [part.unflatten(1, shape) if shape else part[:, 0] for part, shape in pairs]

    def open(self, packed: Tensor) -> dict[str, Any]:
        """The tree of the leaves, as views."""
        return like(self.tree, iter(self.pieces(packed)))

    def contiguous(self, packed: Tensor) -> dict[str, Any]:
        """The tree of the leaves, each with memory of its own."""
        return like(self.tree, (piece.detach().contiguous() for piece in self.pieces(packed)))


def layout(tree: Tree) -> Layout:
    """The layout of a tree whose leaves are `[N, ...]`."""
    return Layout(tree, tuple(leaf.shape[1:] for leaf in leaves(tree)))


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Leaves `[N, ...]` as one matrix `[N, P]`, a copy."""
    return torch.cat([tensor.detach().reshape(tensor.shape[0], -1) for tensor in tensors], dim=1)
