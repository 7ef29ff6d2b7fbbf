"""Wider hosts without seeds, to compare grown networks of equal size with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from esper.errors import InputError
from esper.hosts.base import Host
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost

_MAX_WIDTH = 4096
_SEED_HEADS = 4
"""Heads of the attention seeds, which a width has to divide into though none is planted."""


def widened(host: Host, parameters: float) -> tuple[Host, int]:
    """The narrowest host of the same shape, at least as wide, with at least so many parameters; and its width (base
    channels or embedding). Raises InputError for a host that cannot be widened so far."""
    for width in _widths(host):
        wide = _of_width(host, width)
        if size(wide) >= parameters:
            return wide, width
    raise InputError([f"static-equal: {parameters:g} parameters: needs a width above {_MAX_WIDTH}"])


def size(host: Host) -> int:
    """Trainable parameters of one host."""
    params, _ = host.init(torch.zeros(1, dtype=torch.int64))
    return sum(leaf.numel() for leaf in params.values(True, True))


def _widths(host: Host) -> range:
    if type(host) is CNNHost:
        return range(host.base_channels, _MAX_WIDTH + 1)
    if type(host) is TransformerHost:
        return range(host.n_embd, _MAX_WIDTH + 1, math.lcm(host.n_head, _SEED_HEADS))
    raise InputError([f"static-equal: {type(host).__name__}: only a CNNHost or a TransformerHost can be widened"])


def _of_width(host: Host, width: int) -> Host:
    if isinstance(host, TransformerHost):
        return replace(host, n_embd=width)
    assert isinstance(host, CNNHost)
    return replace(host, base_channels=width)
