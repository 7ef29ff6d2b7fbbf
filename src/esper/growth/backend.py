"""Where hosts grow: the interface between the environment and whatever trains its hosts.

The growth states are values that the environment holds; a backend takes them and gives new ones. `LocalBackend` is this
process and its devices, `esper.growth.ray_backend` is workers anywhere. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth import step
from esper.growth.executors.base import Rooms
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.step import EpochSettings, Shard


@dataclass(frozen=True)
class Place:
    """`size` hosts from host `first` on advance together on a kind of device (`"cpu"`, `"cuda"`) by an executor."""

    first: int
    size: int
    device: str
    executor: str

    @property
    def hosts(self) -> slice:
        return slice(self.first, self.first + self.size)


class Backend(Protocol):
    """See the module docstring. Growth states come and go as one TensorDict per place, in the order of hosts."""

    @property
    def places(self) -> tuple[Place, ...]:
        """How the hosts are shared out."""
        ...

    @property
    def settings(self) -> EpochSettings:
        """How an epoch runs."""
        ...

    def reset(self, keys: Tensor, host_lr: Tensor, seed_lr: Tensor) -> tuple[list[TensorDict], TensorDict]:
        """Fresh hosts; see `esper.growth.step.reset`."""
        ...

    def run_epoch(
        self,
        growth: Sequence[TensorDict],
        actions: Tensor,
        accuracy: Tensor,
        epoch: int,
        meanwhile: Callable[[], None] = step.idle,
    ) -> tuple[list[TensorDict], TensorDict]:
        """One epoch of all hosts; see `esper.growth.step.run_epoch`."""
        ...

    def replaced(self) -> Tensor:
        """Hosts, bool `[N]`, whose worker died since this was last asked; they went on unchanged on a new one."""
        ...

    def evaluate(self, growth: Sequence[TensorDict], part: str) -> TensorDict:
        """Scores `[N]` of one split; see `esper.growth.step.evaluate`."""
        ...

    def rooms(self) -> list[Rooms]:
        """What the executor of each place has room for."""
        ...

    def reserve(self, rooms: Sequence[Rooms]) -> None:
        """Have room for as much as `rooms` said. Raises ValueError if it does not fit."""
        ...

    def close(self) -> None:
        """Let go of whatever grows the hosts; nothing can be asked for afterwards."""
        ...


@dataclass(frozen=True)
class LocalBackend:
    """Grows hosts in this process, one shard per device."""

    spec: GrowthSpec
    shards: tuple[Shard, ...]
    settings: EpochSettings

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(Place(s.first, s.size, s.device.type, type(s.executor).__name__) for s in self.shards)

    def reset(self, keys: Tensor, host_lr: Tensor, seed_lr: Tensor) -> tuple[list[TensorDict], TensorDict]:
        return step.reset(self.spec, self.shards, self.settings, keys, host_lr, seed_lr)

    def run_epoch(
        self,
        growth: Sequence[TensorDict],
        actions: Tensor,
        accuracy: Tensor,
        epoch: int,
        meanwhile: Callable[[], None] = step.idle,
    ) -> tuple[list[TensorDict], TensorDict]:
        return step.run_epoch(self.spec, self.shards, self.settings, growth, actions, accuracy, epoch, meanwhile)

    def replaced(self) -> Tensor:
        return torch.zeros(sum(shard.size for shard in self.shards), dtype=torch.bool)

    def evaluate(self, growth: Sequence[TensorDict], part: str) -> TensorDict:
        plans = [make_plan(g["slots"], self.spec) for g in growth]
        return step.evaluate(self.shards, growth, plans, self.settings, part)

    def rooms(self) -> list[Rooms]:
        return [shard.executor.rooms for shard in self.shards]

    def reserve(self, rooms: Sequence[Rooms]) -> None:
        for shard, room in zip(self.shards, rooms, strict=True):
            shard.executor.reserve(room)

    def close(self) -> None:
        """Nothing to let go of."""
