"""Keyed randomness: every draw is a pure function of its key.

A key is an int64 tensor of any shape (usually `[N]`, one per host). `fold` derives new keys from (episode, host,
purpose, step, ...), the draw functions turn a key into numbers. Nothing is stored between draws, so a run resumes from
counters alone and host `i` draws the same numbers whatever the number of hosts, the device or the telemetry.

The generator is SplitMix64 (Steele, Lea & Flood 2014) used as a counter-based hash. It is integer arithmetic, hence
exact on every device; only `normal` goes through floating-point functions and is therefore always evaluated on the CPU.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


class Purpose(IntEnum):
    """What a key is for; folded in so that two purposes never share draws."""

    HOST = 1
    SEED = 2
    ORDER = 3
    AUGMENT = 4
    CALIBRATION = 5
    POLICY = 6
    SPLIT = 7
    DROPOUT = 8
    EPISODE = 9
    DATA = 10
    CONTROLLER = 11
    MINIBATCH = 12
    STATISTICS = 14
    FAMILY = 15


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's `>>` on int64 is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def root(seed: int) -> Tensor:
    """The key of a run, a scalar int64 tensor."""
    return _mix(torch.tensor(seed, dtype=torch.int64))


def fold(key: Tensor, *data: int | Tensor) -> Tensor:
    """Derive a key from `key` and each of `data` in turn; tensors broadcast against the key."""
    for item in data:
        mixed = _mix(item.to(torch.int64) + _GOLDEN) if isinstance(item, Tensor) else _mixed(int(item))
        key = _mix(key ^ mixed)
    return key


@lru_cache(maxsize=4096)
def _mixed(value: int) -> int:
    """What `fold` makes of a number before it meets the key; numbers recur, and a tensor for each would cost more."""
    return int(_mix(torch.tensor(value, dtype=torch.int64) + _GOLDEN))


def host_keys(key: Tensor, n_hosts: int, first: int = 0) -> Tensor:
    """Keys `[N]` of hosts `first ... first + N - 1`."""
    return fold(key, torch.arange(first, first + n_hosts, dtype=torch.int64, device=key.device))


def bits(key: Tensor, *shape: int) -> Tensor:
    """Random int64 of shape `[*key.shape, *shape]`."""
    count = 1
    for size in shape:
        count *= size
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=key.device) * _GOLDEN
    return _mix(_mix(key).unsqueeze(-1) + counter).reshape((*key.shape, *shape))


def uniform(key: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on [0, 1), `[*key.shape, *shape]`; 24 random bits, so exact in float32 and never rounded up to 1."""
    return (_shift(bits(key, *shape), 40).to(torch.float64) * 2.0**-24).to(dtype)


def normal(key: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, `[*key.shape, *shape]`, by the inverse distribution function in float64 on the CPU."""
    centred = (_shift(bits(key.cpu(), *shape), 12).to(torch.float64) + 0.5) * 2.0**-52
    return (torch.erfinv(2.0 * centred - 1.0) * 2.0**0.5).to(dtype).to(key.device)


def permutation(key: Tensor, n: int) -> Tensor:
    """A permutation of `0 ... n - 1` for each key, `[*key.shape, n]`."""
    return row_order(bits(key, n))


def row_order(values: Tensor) -> Tensor:
    """The order of every row of `values` `[..., n]`, equal entries in the order in which they stand."""
    return by_two_sorts(values) if values.is_cuda else values.argsort(dim=-1, stable=True)


def by_two_sorts(values: Tensor) -> Tensor:
    """`row_order` by two sorts of everything: a GPU sorts long rows one by one."""
    n = values.shape[-1]
    ranked = values.flatten().argsort(stable=True)
    return (ranked % n)[(ranked // n).argsort(stable=True)].view(values.shape)


def integers(key: Tensor, high: int, *shape: int) -> Tensor:
    """Integers in `[0, high)`, `[*key.shape, *shape]` (modulo bias below 2**-39 for any high a data set reaches)."""
    return _shift(bits(key, *shape), 1) % high
