"""What a host is: pure functions over one host's parameters.

Parameters and statistics are nested mappings of tensors without the leading `N`; executors add it by looping or with
vmap. A host is a frozen record of its shape, so it can be a key of a cache and a static argument of a compiled
function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

Tree = Mapping[str, Any]
"""A nested mapping of tensors: one host's (or one seed's) parameters, statistics or moments."""


@dataclass(frozen=True)
class Site:
    """A place where a seed can grow: after `boundary` blocks, on features with `channels` channels."""

    name: str
    boundary: int
    channels: int


class Host(Protocol):
    """The contract of every host (plan step 2). All methods are pure; none of them sees the leading `N`."""

    @property
    def topology(self) -> str:
        """Which blueprints fit: `"cnn"` or `"transformer"`."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every slot this host offers, in forward order."""
        ...

    @property
    def depth(self) -> int:
        """Number of blocks."""
        ...

    def init(self, keys: Tensor, dtype: torch.dtype = torch.float32) -> tuple[TensorDict, TensorDict]:
        """Parameters and statistics for `keys` `[N]`; every leaf is `[N, ...]`."""
        ...

    def embed(self, params: Tree, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Features `h` before the first block. `key` (scalar int64) draws dropout; None means evaluation."""
        ...

    def run_blocks(
        self,
        params: Tree,
        statistics: Tree,
        h: Tensor,
        start: int,
        stop: int,
        *,
        momentum: float | None,
        key: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:
        """Blocks `start ... stop - 1`. `momentum` None evaluates with `statistics`; a number normalises by the batch
        and returns statistics moved by that share (1.0 replaces them). Returns the features and all statistics."""
        ...

    def head(self, params: Tree, h: Tensor) -> Tensor:
        """Logits `[B, classes]` or `[B, L, vocabulary]`."""
        ...


def site(host: Host, name: str) -> Site:
    """The site called `name`. Raises ValueError naming the sites this host has."""
    for candidate in host.sites:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown slot {name!r}; this host has {', '.join(s.name for s in host.sites)}")
