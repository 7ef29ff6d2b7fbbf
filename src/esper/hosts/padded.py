"""Hosts of several widths in one stack: every host has the shape of the widest, and its surplus channels are dead.

A narrow host is the leading block of each leaf; everything else is zero. Nothing has to be masked while it runs: a dead
channel's filter is zero and so are scale and shift of its norm, so it is zero behind the ReLU, where no gradient
passes; what reads it is zero and gets a gradient of zero. So dead parameters stay exactly zero while they train.

Letters: `N` hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts.base import Host, Site, Tree
from esper.hosts.cnn import CNNHost
from esper.keys import Purpose
from esper.values import put_rows


@dataclass(frozen=True)
class PaddedHost:
    """CNN hosts of which each draws its `base_channels` from `widths`; `base` is the widest. A width that is listed
    twice is twice as likely. Raises ValueError if the widest is not as wide as `base`."""

    base: CNNHost
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if max(self.widths) != self.base.base_channels:
            raise ValueError(f"widths: {self.widths}; the greatest must be base's, {self.base.base_channels}")

    @property
    def topology(self) -> str:
        return self.base.topology

    @property
    def depth(self) -> int:
        return self.base.depth

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.base.sites

    @cached_property
    def shapes(self) -> tuple[CNNHost, ...]:
        """The hosts there are, one for each width."""
        return tuple(replace(self.base, base_channels=width) for width in self.widths)

    def drawn(self, keys: Tensor) -> Tensor:
        """Which of `shapes` a host is, int64 `[N]`, by the keys from which it is initialised."""
        return k.integers(k.fold(keys, Purpose.FAMILY), len(self.widths))

    def init(self, keys: Tensor, dtype: torch.dtype = torch.float32) -> tuple[TensorDict, TensorDict]:
        params, statistics = self.base.init(keys, dtype)
        which = self.drawn(keys)
        return assemble(self.shapes, which, params, lambda host, rows: host.init(keys[rows], dtype)[0]), statistics

    def embed(self, params: Tree, x: Tensor, key: Tensor | None = None) -> Tensor:
        return self.base.embed(params, x, key)

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
        return self.base.run_blocks(params, statistics, h, start, stop, momentum=momentum, key=key)

    def head(self, params: Tree, h: Tensor) -> Tensor:
        return self.base.head(params, h)


def shapes(host: Host) -> tuple[Host, ...]:
    """The hosts that a stack of `host` consists of: itself, unless they differ."""
    return host.shapes if isinstance(host, PaddedHost) else (host,)


def shape_of(host: Host, keys: Tensor) -> Tensor:
    """Which of `shapes(host)` the hosts with `keys` `[N]` are, int64 `[N]` on the keys' device."""
    return host.drawn(k.fold(keys, Purpose.HOST)) if isinstance(host, PaddedHost) else torch.zeros_like(keys)


def assemble(
    hosts: tuple[Host, ...], which: Tensor, like: TensorDict, init: Callable[[Host, Tensor], TensorDict]
) -> TensorDict:
    """Rows `[N]` of which each is made by the host that `which` `[N]` says, padded with zeros to the shapes of `like`.

    `init(host, rows)` makes the rows (int64 indices) of one host.
    """
    result = torch.zeros_like(like)
    for i in which.unique().tolist():
        rows = (which == i).nonzero().squeeze(1)
        result = put_rows(result, rows, _padded(init(hosts[i], rows), like))
    return result


def _padded(narrow: TensorDict, like: TensorDict) -> TensorDict:
    """`narrow` `[n]` with zeros behind, so that every leaf is shaped like that of `like` but for its rows."""

    def pad(small: Tensor, large: Tensor) -> Tensor:
        behind = [(0, b - a) for a, b in zip(small.shape[1:], large.shape[1:], strict=True)]
        return F.pad(small, [size for pair in reversed(behind) for size in pair])

    return TensorDict(
        {
            name: pad(part, like.get(name)) if isinstance(part, Tensor) else _padded(part, like.get(name))
            for name, part in narrow.items()
        },
        batch_size=narrow.batch_size,
    )
