"""A generated image task in CIFAR's shape: learnable, with head-room, and reproducible to the last byte."""

from __future__ import annotations

import torch
from torch import Tensor

from esper import keys as k
from esper.data.splits import Split, Splits, channel_moments

CLASSES = 10
SIZE = 32
_VARIANTS = 4
_CELLS = 8
_CONTRAST = 18
_CHUNK = 1024
_PATTERN, _SAMPLE, _LABEL, _VARIANT, _SHIFT, _NOISE = range(6)


def load_synthetic(key: Tensor, n_train: int = 10_240, n_validation: int = 2_048, n_test: int = 2_048) -> Splits:
    """Noisy, randomly shifted class textures 3x32x32 in ten classes.

    A class has four textures of 8x8 coloured cells; a sample is one of them rolled by a random offset, under noise
    stronger than the texture. Everything is integer arithmetic on keyed bits, and sample `i` of a split does not
    depend on the sizes. Raises ValueError for a size below 1.
    """
    sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size} samples; at least 1 is needed")
    key = k.fold(key, k.Purpose.DATA)
    train, validation, test = (_samples(key, part, size) for part, size in enumerate(sizes.values()))
    return Splits(train, validation, test, *channel_moments(train.inputs))


def _samples(key: Tensor, part: int, size: int) -> Split:
    cells = k.integers(k.fold(key, _PATTERN), 3, CLASSES, _VARIANTS, 3, _CELLS, _CELLS) - 1
    scale = SIZE // _CELLS
    textures = (
        (cells * _CONTRAST).to(torch.int16).repeat_interleave(scale, -1).repeat_interleave(scale, -2).flatten(0, 1)
    )
    sample_keys = k.host_keys(k.fold(key, _SAMPLE, part), size)
    labels = k.integers(k.fold(sample_keys, _LABEL), CLASSES)
    chosen = labels * _VARIANTS + k.integers(k.fold(sample_keys, _VARIANT), _VARIANTS)
    shifts = k.integers(k.fold(sample_keys, _SHIFT), SIZE, 2)
    images = [
        _render(textures, chosen[rows], shifts[rows], k.fold(sample_keys[rows], _NOISE))
        for rows in torch.arange(size).split(_CHUNK)
    ]
    return Split(torch.cat(images), labels)


def _render(textures: Tensor, chosen: Tensor, shifts: Tensor, noise_keys: Tensor) -> Tensor:
    """uint8 `[m, 3, 32, 32]`: rolled textures plus triangular noise from two random bytes per pixel."""
    axis = torch.arange(SIZE)
    rows = (axis + shifts[:, :1]) % SIZE
    columns = (axis + shifts[:, 1:]) % SIZE
    channel = torch.arange(3).view(1, 3, 1, 1)
    signal = textures[chosen.view(-1, 1, 1, 1), channel, rows[:, None, :, None], columns[:, None, None, :]]
    noise = k.bits(noise_keys, 2 * 3 * SIZE * SIZE // 8).view(torch.uint8).view(-1, 2, 3, SIZE, SIZE)
    first, second = noise.to(torch.int16).unbind(1)
    return (128 + signal + (first + second - 255) // 2).clamp(0, 255).to(torch.uint8)
