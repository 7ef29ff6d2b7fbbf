"""Data sets as tensors on one device: three splits and the step from storage to network input.

Images are stored as uint8 `[M, C, H, W]`, token blocks as int32 `[M, L]`; batches are picked in storage form and
prepared afterwards, so an epoch moves a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from esper import keys as k


@dataclass(frozen=True)
class Split:
    """One part of a data set: `inputs` `[M, ...]` and int64 `targets` `[M]`, or int32 `[M, L]` for language."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    @cached_property
    def classes(self) -> int:
        """Number of classes among the targets. Raises ValueError for tokens, which have none."""
        if self.targets.dim() != 1:
            raise ValueError(f"targets: {list(self.targets.shape)}; classes need one target for a sample")
        return int(self.targets.max()) + 1

    def to(self, device: torch.device | str) -> Split:
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Splits:
    """A whole data set on one device (plan step 8).

    `mean` and `std` are float32 `[C, 1, 1]` in units of the stored pixels; both are None for tokens. Raises
    ValueError when a split is empty or its inputs and targets differ in number.
    """

    train: Split
    validation: Split
    test: Split
    mean: Tensor | None = None
    std: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            if len(split) == 0:
                raise ValueError(f"{name}: 0 samples; at least 1 is needed")
            if len(split) != split.targets.shape[0]:
                raise ValueError(
                    f"{name}: {len(split)} inputs but {split.targets.shape[0]} targets; they must be as many"
                )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: only one is given; images need both, tokens neither")

    @property
    def device(self) -> torch.device:
        """Where the data lies."""
        return self.train.inputs.device

    @property
    def is_image(self) -> bool:
        """Whether inputs are pixels (otherwise tokens)."""
        return self.mean is not None

    def to(self, device: torch.device | str) -> Splits:
        """A copy on `device` (the same tensors where they already lie there)."""
        return Splits(
            self.train.to(device),
            self.validation.to(device),
            self.test.to(device),
            None if self.mean is None else self.mean.to(device),
            None if self.std is None else self.std.to(device),
        )

    def limited(self, n_train: int) -> Splits:
        """The same data with only the first `n_train` training samples.

        Raises ValueError if the training split has fewer.
        """
        if n_train > len(self.train):
            raise ValueError(f"train_samples: {n_train}; the training split has {len(self.train)}")
        return replace(self, train=Split(self.train.inputs[:n_train], self.train.targets[:n_train]))

    def pick(self, split: Split, samples: Tensor, dtype: torch.dtype) -> Tensor:
        """The inputs of `samples` (int64, any shape) of one of the splits, prepared: `[*samples.shape, ...]`.

        A GPU fetches and normalises images in one go, to the same bits.
        """
        if self.mean is not None and self.std is not None and self.device.type == "cuda" and dtype is torch.float32:
            # Triton is there only where a GPU is.
            from esper.data.pick_kernel import pick

            return pick(split.inputs, samples, self.mean, self.std)
        return self.prepare(chosen(split.inputs, samples), dtype)

    def prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored images `[..., C, H, W]` as normalised `dtype`, or stored tokens `[..., L]` as int64 for any `dtype`.

        Subtracting the float32 mean promotes half-precision pixels, which are exact, so inputs are rounded once.
        """
        if self.mean is None or self.std is None:
            return x.to(torch.int64)
        return ((x.to(dtype) - self.mean) / self.std).to(dtype)


def chosen(rows: Tensor, samples: Tensor) -> Tensor:
    """The rows of `rows` `[M, ...]` that `samples` (int64, any shape) names: `[*samples.shape, ...]`."""
    return rows.index_select(0, samples.flatten()).unflatten(0, samples.shape)


def keyed_parts(inputs: Tensor, targets: Tensor, sizes: Mapping[str, int], key: Tensor) -> dict[str, Split]:
    """Disjoint random parts of `inputs` `[M, ...]` with the given sizes; a pure function of `key` (the run's key).

    Raises ValueError, before any draw, when a size is below 1 or the sizes need more than the `M` samples there are.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size} samples; at least 1 is needed")
    available, needed = int(inputs.shape[0]), sum(sizes.values())
    if needed > available:
        wanted = " + ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"{wanted}: {needed} samples are needed but the data set has {available}")
    order = k.permutation(k.fold(key, k.Purpose.SPLIT), available).to(inputs.device)
    parts: dict[str, Split] = {}
    start = 0
    for name, size in sizes.items():
        chosen = order[start : start + size]
        parts[name] = Split(inputs[chosen], targets[chosen])
        start += size
    return parts


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of uint8 `[M, C, H, W]`, two float32 `[C, 1, 1]` from exact sums."""
    pixels = images.transpose(0, 1).flatten(1).to(torch.int64)
    count = pixels.shape[1]
    mean = pixels.sum(1).to(torch.float64) / count
    variance = pixels.square().sum(1).to(torch.float64) / count - mean.square()
    return mean.float().view(-1, 1, 1), variance.sqrt().float().view(-1, 1, 1)
