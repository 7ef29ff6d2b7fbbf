"""What a controller is told of each host: a pure function, and on a GPU a recording of it."""

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
from esper.values import sendable


def view(records: TensorDict, tracker: TensorDict, keys: Tensor, settings: ObservationSettings) -> TensorDict:
    """What to decide by, `[N]`: `observation` `[N, D]`, the masks, and `key`, from which a controller draws in this
    epoch. Of slot records `[N, S]`, a tracker `[N]` and the hosts' keys, int64 `[N]`."""
    told = action_masks(records, settings)
    told["observation"] = observe(records, tracker, settings)
    told["key"] = k.fold(keys, Purpose.POLICY, tracker["epoch"])
    return told


class _Program(NamedTuple):
    """A recording, the fields of records and tracker that it reads and where, by type, and what it fills."""

    graph: torch.cuda.CUDAGraph
    fields: tuple[list[str], list[str]]
    given: dict[torch.dtype, Tensor]
    told: TensorDict


class View:
    """`view` on a device, of what lies on the CPU.

    On a CUDA device it is recorded as a CUDA graph and replayed, and what it reads is sent there in one piece for each
    type: a hundred and fifty small operations take longer. An observation made there may differ from that of a CPU in
    its last bits.
    """

    def __init__(self, settings: ObservationSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._program: _Program | None = None

    def __call__(self, records: TensorDict, tracker: TensorDict, keys: Tensor, host_parameters: Tensor) -> TensorDict:
        """The arguments and the result are those of `view`, of hosts with so many parameters, int64 `[N]`."""
        if self._device.type == "cpu":
            return view(records, tracker, keys, replace(self._settings, host_parameters=host_parameters))
        parts = dict(records.items()), dict(tracker.items())
        if self._program is None:
            self._program = self._record(parts, records.batch_size, keys, host_parameters)
        leaves = [part[name] for part, names in zip(parts, self._program.fields, strict=True) for name in names]
        for dtype, given in packed([*leaves, keys, host_parameters]).items():
            self._program.given[dtype].copy_(sendable(given), non_blocking=True)
        self._program.graph.replay()
        return self._program.told.clone()

    def _record(
        self, parts: tuple[dict[str, Tensor], dict[str, Tensor]], shape: torch.Size, keys: Tensor, sizes: Tensor
    ) -> _Program:
        leaves = [*(leaf for part in parts for leaf in part.values()), keys, sizes]
        given = {dtype: together.to(self._device) for dtype, together in packed(leaves).items()}
        there = iter(unpacked(given, leaves))
        records, tracker = (
            TensorDict({name: next(there) for name in part}, batch_size=size, device=self._device)
            for part, size in zip(parts, (shape, shape[:1]), strict=True)
        )
        keys, settings = next(there), replace(self._settings, host_parameters=next(there))
        graph, told = recorded(lambda: view(records, tracker, keys, settings), self._device)
        return _Program(graph, (list(parts[0]), list(parts[1])), given, told)


def packed(leaves: Sequence[Tensor]) -> dict[torch.dtype, Tensor]:
    """Tensors `[N, ...]` side by side, `[N, D]` for each of their types."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.dtype, []).append(leaf if leaf.dim() == 2 else leaf.reshape(len(leaf), -1))
    return {dtype: torch.cat(group, dim=1) for dtype, group in groups.items()}


def unpacked(together: dict[torch.dtype, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of what was `packed`, of the shapes and types of `like` and in its order, as views."""
    start, found = dict.fromkeys(together, 0), []
    for leaf in like:
        stop = start[leaf.dtype] + leaf[0].numel()
        found.append(together[leaf.dtype][:, start[leaf.dtype] : stop].view(leaf.shape))
        start[leaf.dtype] = stop
    return found
