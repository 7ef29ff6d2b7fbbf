"""Small operations on state values. A state is never written to: a change is a new TensorDict that shares the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


def changed(value: TensorDict, **entries: Any) -> TensorDict:
    """A TensorDict that differs from `value` in some entries of its first level, or has some more, and shares all
    others.

    `entries` have the batch size of `value`. They are not checked: looking at every entry again takes 60
    microseconds of the 70 that a change of slot records would take, of which an epoch makes dozens.
    """
    return TensorDict._new_unsafe({**dict(value.items()), **entries}, batch_size=value.batch_size, device=value.device)


def assembled(entries: Mapping[str, Any], batch_size: Sequence[int], device: torch.device | None = None) -> TensorDict:
    """A TensorDict of entries that are known to fit; as with `changed`, they are not checked. A value among them that
    is itself made of entries is a TensorDict."""
    return TensorDict._new_unsafe(dict(entries), batch_size=torch.Size(batch_size), device=device)


@lru_cache(maxsize=1024)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor `[]`: small operations take twice as long with a Python number, which becomes one each
    time."""
    return torch.tensor(value, dtype=dtype, device=device)


def joined(parts: Sequence[TensorDict]) -> TensorDict:
    """The rows of all parts, one part after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def put_rows(value: TensorDict, rows: Tensor, new: TensorDict) -> TensorDict:
    """A TensorDict whose rows `rows` (int64, distinct) of every leaf are those of `new`."""
    return TensorDict(
        {
            name: leaf.index_copy(0, rows.to(leaf.device), new.get(name))
            if isinstance(leaf, Tensor)
            else put_rows(leaf, rows, new.get(name))
            for name, leaf in value.items()
        },
        batch_size=value.batch_size,
        device=value.device,
    )


def finite_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all numbers of a row are finite, for each of the tensors `[N, ...]`: bool `[N, len(tensors)]`."""
    flat = [tensor.reshape(tensor.shape[0], -1) for tensor in tensors]
    # Extremes are finite exactly if everything is, and take no memory.
    extremes = torch.stack([extreme for rows in flat for extreme in (rows.amax(dim=1), rows.amin(dim=1))], dim=1)
    return extremes.isfinite().unflatten(1, (-1, 2)).all(dim=2)


_TAKEN_AT_ONCE = 1 << 16
"""Bytes that CUDA takes from ordinary memory without waiting for the device; to pin them first takes twice as long."""


def sendable(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that can be copied to a CUDA device without waiting for it."""
    return tensor.pin_memory() if tensor.nbytes > _TAKEN_AT_ONCE else tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; a CUDA device is not waited for."""
    if device.type == "cpu" or tensor.is_cuda:
        return tensor.to(device)
    return sendable(tensor).to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Send tensors to the CPU. The result waits for them to arrive, but not for what their device is given to do after
    this; a CUDA device is not waited for here."""
    if not tensors[0].is_cuda:
        return lambda: list(tensors)
    arriving = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    sent = torch.cuda.Event()
    sent.record(torch.cuda.current_stream(tensors[0].device))

    def arrived() -> list[Tensor]:
        sent.synchronize()
        return arriving

    return arrived
