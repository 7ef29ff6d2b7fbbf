"""What a controller is told of each host: a pure function, and on a GPU one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.environment.masks import action_masks
from esper.environment.observation import ObservationSettings, observe
from esper.keys import Purpose
from esper.recording import recorded


def view(records: TensorDict, tracker: TensorDict, keys: Tensor, settings: ObservationSettings) -> TensorDict:
    """What to decide by, `[N]`: `observation` `[N, D]`, the masks, and `key`, from which a controller draws in this
    epoch. Of slot records `[N, S]`, a tracker `[N]` and the hosts' keys, int64 `[N]`."""
    told = action_masks(records, settings)
    told["observation"] = observe(records, tracker, settings)
    told["key"] = k.fold(keys, Purpose.POLICY, tracker["epoch"])
    return told


class _Program(NamedTuple):
    """A recording, the bytes it reads and what it fills."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    told: TensorDict


class View:
    """`view` on a device, of what lies on the CPU.

    On a CUDA device it is recorded as a CUDA graph and replayed, with all it reads sent there in one piece: some two
    hundred small operations take as long as one. There it is computed, so an observation may differ from that of a CPU
    in the last bit of its logarithms.
    """

    def __init__(self, settings: ObservationSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._program: _Program | None = None

    def __call__(self, records: TensorDict, tracker: TensorDict, keys: Tensor, host_parameters: Tensor) -> TensorDict:
        """For hosts with so many parameters, int64 `[N]`."""
        if self._device.type == "cpu":
            return view(records, tracker, keys, replace(self._settings, host_parameters=host_parameters))
        leaves = [*records.values(), *tracker.values(), keys, host_parameters]
        packed = _packed(leaves).pin_memory()
        if self._program is None:
            self._program = self._record(packed.to(self._device), leaves, records, tracker)
        self._program.given.copy_(packed, non_blocking=True)
        self._program.graph.replay()
        return self._program.told.clone()

    def _record(self, given: Tensor, leaves: Sequence[Tensor], records: TensorDict, tracker: TensorDict) -> _Program:
        there = iter(_unpacked(given, leaves))
        own, signals = (
            TensorDict({name: next(there) for name, _ in part.items()}, batch_size=part.batch_size, device=self._device)
            for part in (records, tracker)
        )
        keys, settings = next(there), replace(self._settings, host_parameters=next(there))
        graph, told = recorded(lambda: view(own, signals, keys, settings), self._device)
        return _Program(graph, given, told)


def _packed(leaves: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors, those with wide elements first, so that every one is aligned."""
    return torch.cat([leaf.reshape(-1).view(torch.uint8) for leaf in sorted(leaves, key=_wide_first)])


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the shapes and types of `like` that lie in `packed`, in the order of `like`."""
    order = sorted(range(len(like)), key=lambda i: _wide_first(like[i]))
    parts = packed.split([like[i].numel() * like[i].itemsize for i in order])
    found = {i: part.view(like[i].dtype).view(like[i].shape) for i, part in zip(order, parts, strict=True)}
    return [found[i] for i in range(len(like))]


def _wide_first(leaf: Tensor) -> int:
    return -leaf.itemsize
