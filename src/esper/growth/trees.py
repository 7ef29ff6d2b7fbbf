"""Nested mappings of tensors: flatten, rebuild, slice. The glue between TensorDicts and plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from esper.hosts.base import Tree


def leaves(tree: Tree) -> list[Tensor]:
    """Leaves in key order of insertion, depth first."""
    found: list[Tensor] = []
    for value in tree.values():
        found.extend([value] if isinstance(value, Tensor) else leaves(value))
    return found


def like(tree: Tree, values: Iterator[Tensor]) -> dict[str, Any]:
    """A tree of the same shape whose leaves are taken from `values` in order."""
    return {name: next(values) if isinstance(value, Tensor) else like(value, values) for name, value in tree.items()}


def tree_map(function: Callable[[Tensor], Tensor], tree: Tree) -> dict[str, Any]:
    """Apply `function` to every leaf."""
    return {
        name: function(value) if isinstance(value, Tensor) else tree_map(function, value)
        for name, value in tree.items()
    }


def as_tree(td: TensorDict) -> dict[str, Any]:
    """A TensorDict as nested dicts of its own tensors (no copies)."""
    return {
        name: value if isinstance(value, Tensor) else as_tree(value)
        for name, value in ((key, td.get(key)) for key in td.keys())  # noqa: SIM118
    }


def as_tensordict(tree: Tree, batch_size: list[int]) -> TensorDict:
    """Nested dicts as a TensorDict with every level of batch size `batch_size`."""
    return TensorDict(
        {
            name: value if isinstance(value, Tensor) else as_tensordict(value, batch_size)
            for name, value in tree.items()
        },
        batch_size=batch_size,
    )
