"""The baseline of the benches: hosts as ordinary contiguous `nn.Module`s, trained and validated one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainSeed(nn.Module):
    """The conv_light seed as a module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(max(1, channels // 16), channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class PlainHost(nn.Module):
    """Three blocks of conv, BatchNorm, ReLU and pooling with, optionally, a fully blended seed behind the second."""

    def __init__(self, in_channels: int, classes: int, base: int, seeded: bool) -> None:
        super().__init__()
        widths = [in_channels, base, 2 * base, 4 * base]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.seed = PlainSeed(widths[2]) if seeded else None
        self.head = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor, with_seed: bool = True) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
            if i == 1 and self.seed is not None and with_seed:
                x = self.seed(x)
        return self.head(x.mean(dim=(2, 3)))


def epoch(
    hosts: list[PlainHost],
    optimisers: list[torch.optim.Optimizer],
    batches: list[Iterator[tuple[Tensor, Tensor]]],
    validation: list[tuple[Tensor, Tensor]],
) -> list[int]:
    """Train every host on its batches, then count its right answers, with and without its seed if it has one."""
    for host, optimiser, stream in zip(hosts, optimisers, batches, strict=True):
        host.train()
        for x, y in stream:
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(host(x), y).backward()
            optimiser.step()
    right = []
    with torch.no_grad():
        for host in hosts:
            host.eval()
            count = 0
            for x, y in validation:
                for with_seed in (True, False) if host.seed is not None else (True,):
                    count += int((host(x, with_seed).argmax(1) == y).sum())
            right.append(count)
    return right
