"""Run a host from one slot boundary to another.

A slot's boundary lies after its block and after that block's pooling; features at a boundary are what a seed there
receives and returns (plan step 2).
"""

from __future__ import annotations

from torch import Tensor

from esper.hosts.base import Host, Tree, site


def forward_to_segment(
    host: Host,
    params: Tree,
    statistics: Tree,
    segment: str,
    x: Tensor,
    from_segment: str | None = None,
    *,
    momentum: float | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tree]:
    """Features at the boundary of `segment`, and the statistics.

    `x` is the network's input, or the features at the boundary of `from_segment` when that is given; then only the
    blocks between the two run. `momentum` and `key` are those of `Host.run_blocks`. Raises ValueError for a name the
    host does not have (listing those it has) and when `segment` does not lie after `from_segment`.
    """
    stop = site(host, segment).boundary
    if from_segment is None:
        return host.run_blocks(params, statistics, host.embed(params, x, key), 0, stop, momentum=momentum, key=key)
    start = site(host, from_segment).boundary
    if stop <= start:
        raise ValueError(
            f"segment: {segment!r} (after block {stop}) does not lie after from_segment {from_segment!r} "
            f"(after block {start}); legal order is {', '.join(s.name for s in host.sites)}"
        )
    return host.run_blocks(params, statistics, x, start, stop, momentum=momentum, key=key)


def forward_from_segment(
    host: Host,
    params: Tree,
    statistics: Tree,
    segment: str,
    h: Tensor,
    *,
    momentum: float | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tree]:
    """Logits from features `h` at the boundary of `segment`, and the statistics.

    Runs every block after the boundary, then the head. Raises ValueError for a name the host does not have.
    """
    start = site(host, segment).boundary
    h, statistics = host.run_blocks(params, statistics, h, start, host.depth, momentum=momentum, key=key)
    return host.head(params, h), statistics
