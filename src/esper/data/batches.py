"""Batches for all hosts at once: keyed order, keyed augmentation, nothing that waits for a device.

Letters: `N` hosts of a run, `n` hosts of one device group, `B` samples, `M` samples of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esper import keys as k
from esper.config_fields import Family
from esper.data.family import lessons
from esper.data.splits import Split, Splits, chosen

Batch = tuple[Tensor, Tensor]

PADDING = 4
_OFFSETS = 2 * PADDING + 1
MIN_CALIBRATION = 256


def require_batches(splits: Splits, batch_size: int) -> None:
    """Raise ValueError unless the training split fills at least one batch (partial training batches are dropped)."""
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; it must be at least 1")
    if len(splits.train) < batch_size:
        raise ValueError(
            f"batch_size: {batch_size}, but the training split has {len(splits.train)} samples, no full batch; "
            f"use at least {batch_size} training samples or a batch_size of at most {len(splits.train)}"
        )


def augment(x: Tensor, key: Tensor) -> Tensor:
    """Random crop after zero padding by 4, then a random horizontal flip, of stored images.

    `x` is `[n, B, C, H, W]` of any dtype, `key` int64 `[n, B]`: one draw per sample, whatever else is in the batch.
    """
    channels, height, width = x.shape[-3:]
    draw = k.integers(key, 2 * _OFFSETS**2)
    flip, top, left = draw % 2, draw // 2 % _OFFSETS, draw // (2 * _OFFSETS)
    rows = torch.arange(height, device=x.device) + top.unsqueeze(-1)
    columns = torch.arange(width, device=x.device)
    columns = torch.where(flip.unsqueeze(-1).bool(), width - 1 - columns, columns) + left.unsqueeze(-1)
    stride = width + 2 * PADDING
    pixel = (rows.unsqueeze(-1) * stride + columns.unsqueeze(-2)).flatten(0, 1).flatten(1)
    padded = F.pad(x.flatten(0, 1), (PADDING,) * 4).flatten(2)
    return padded.gather(2, pixel.unsqueeze(1).expand(-1, channels, -1)).view(x.shape)


@dataclass(frozen=True)
class SharedBatchIterator:
    """One epoch of training batches for every host of the run (plan step 8).

    `splits[g]` and `keys[g]` (int64 `[n]`, the hosts' keys of this episode) belong to device group `g`. Every batch
    is a list with one `(x [n, B, ...], y [n, B] or [n, B, L])` per group, so a consumer issues batch `t` on all
    devices before batch `t + 1`. Each host sees the whole training split once, in an order (and augmentation) that
    depends only on its key and the epoch: neither on the other hosts nor on the grouping, and the augmentation of a
    sample not on its batch. The last partial batch is dropped. With a `family`, each host goes through its own part of
    the split instead, again and again in as many batches, with the labels that it is taught.

    Raises ValueError when groups, keys and devices do not match, when the split fills no batch, or when tokens would be
    augmented.
    """

    splits: Sequence[Splits]
    keys: Sequence[Tensor]
    batch_size: int
    epoch: int
    augment: bool = False
    dtype: torch.dtype = torch.float32
    family: Family | None = None

    def __post_init__(self) -> None:
        if not self.splits or len(self.splits) != len(self.keys):
            raise ValueError(f"keys: {len(self.keys)} groups for {len(self.splits)} splits; one each, at least one")
        for group, (splits, key) in enumerate(zip(self.splits, self.keys, strict=True)):
            require_batches(splits, self.batch_size)
            if len(splits.train) != len(self.splits[0].train):
                raise ValueError(
                    f"splits: group {group} has {len(splits.train)} training samples, group 0 has "
                    f"{len(self.splits[0].train)}; every group must hold the same data"
                )
            if key.dim() != 1 or key.device != splits.device:
                raise ValueError(
                    f"keys: group {group} is {list(key.shape)} on {key.device}; "
                    f"one key per host, [n], on {splits.device} is needed"
                )
            if self.augment and not splits.is_image:
                raise ValueError("augment: True, but tokens cannot be cropped and flipped; use False")

    def __len__(self) -> int:
        """Batches of the epoch."""
        return len(self.splits[0].train) // self.batch_size

    def __iter__(self) -> Iterator[list[Batch]]:
        epochs = [self._epoch(splits, key) for splits, key in zip(self.splits, self.keys, strict=True)]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield [
                self._pick(splits, epoch, part, key)
                for splits, epoch, key in zip(self.splits, epochs, self.keys, strict=True)
            ]

    def _epoch(self, splits: Splits, key: Tensor) -> _Epoch:
        order_key = k.fold(key, k.Purpose.ORDER, self.epoch)
        if self.family is None:
            order = k.permutation(order_key, len(splits.train))
            return _Epoch(order, order, _targets(splits.train, order))
        taught = lessons(self.family, splits.train, key)
        order, passes = taught.order(order_key)
        targets = _targets(splits.train, order) if taught.labels is None else taught.labels.gather(1, order)
        return _Epoch(order, order + passes * len(splits.train), targets)

    def _pick(self, splits: Splits, epoch: _Epoch, part: slice, key: Tensor) -> Batch:
        """The batch that is `part` of the epoch of one group, whose hosts have `key` `[n]`."""
        samples, train = epoch.samples[:, part], splits.train
        if self.augment:
            keys = k.fold(k.fold(key, k.Purpose.AUGMENT, self.epoch).unsqueeze(-1), epoch.meetings[:, part])
            x = splits.prepare(augment(chosen(train.inputs, samples), keys), self.dtype)
        else:
            x = splits.pick(train, samples, self.dtype)
        y = chosen(train.targets, samples) if epoch.targets is None else epoch.targets[:, part]
        return x, y.to(torch.int64)


class _Epoch(NamedTuple):
    """One epoch of a group: the samples in order, int64 `[n, M]`; a number for each sample in each pass, which keys its
    augmentation; and the targets in that order `[n, M]`, None for tokens, of which there are too many."""

    samples: Tensor
    meetings: Tensor
    targets: Tensor | None


def _targets(split: Split, order: Tensor) -> Tensor | None:
    return chosen(split.targets, order) if split.targets.dim() == 1 else None


def evaluation_batches(
    splits: Splits, split: Split, batch_size: int, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """`split` (validation or test of `splits`) in stored order, `(x [B, ...], y [B] or [B, L])` for all hosts.

    The last partial batch is kept, so every sample counts exactly once.
    """
    for x, y in zip(split.inputs.split(batch_size), split.targets.split(batch_size), strict=True):
        yield splits.prepare(x, dtype), y.to(torch.int64)


def calibration_batch(splits: Splits, key: Tensor, batch_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The run's one fixed batch of training inputs `[min(M, max(batch_size, 256)), ...]`, not augmented.

    `key` is the run's key (scalar); BatchNorm statistics of every coalition are estimated on this batch.
    """
    size = min(len(splits.train), max(batch_size, MIN_CALIBRATION))
    chosen = k.permutation(k.fold(key, k.Purpose.CALIBRATION), len(splits.train))[:size].to(splits.device)
    return splits.prepare(splits.train.inputs.index_select(0, chosen), dtype)
