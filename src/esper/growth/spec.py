"""What a run fixes about growing: the host, its slots, what can be planted, and how all of it trains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from esper.growth.governor import GovernorSettings
from esper.hosts.base import Host, Site, site
from esper.hosts.padded import shape_of, shapes
from esper.seeds.bank import BankLayout
from esper.seeds.blueprints import registry
from esper.seeds.blueprints.registry import Blueprint
from esper.seeds.lifecycle import LifecycleRules, seed_parameters


@dataclass(frozen=True)
class GrowthSpec:
    """Static facts of a run; hashable, shared by every function that grows hosts.

    `slots` are in forward order; `blueprints` are the names the controller may plant, in the order of its blueprint
    head. Learning rates are per epoch of the schedule and live in the state (`rates`), because hosts may differ in
    them.
    """

    host: Host
    slots: tuple[str, ...]
    blueprints: tuple[str, ...]
    rules: LifecycleRules
    momentum: float = 0.9
    host_weight_decay: float = 5e-4
    seed_weight_decay: float = 0.0
    lr_schedule: str = "cosine"
    freeze_fossils: bool = False
    coalition_statistics: str = "recalibrated"
    amp: str = "off"
    governor: GovernorSettings = field(default_factory=GovernorSettings)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The run's slots as places in the host, in forward order."""
        places = tuple(site(self.host, name) for name in self.slots)
        if [p.boundary for p in places] != sorted({p.boundary for p in places}):
            raise ValueError(f"slots: {self.slots}; must be distinct and in forward order")
        return places

    @cached_property
    def kinds(self) -> tuple[Blueprint, ...]:
        """The blueprints themselves."""
        return tuple(registry.get(self.host.topology, name) for name in self.blueprints)

    @cached_property
    def bank(self) -> BankLayout:
        """Where every possible seed lies in the bank."""
        return BankLayout(self.host, self.slots, self.blueprints)

    @cached_property
    def _leaves(self) -> tuple[int, int]:
        """Numbers in one host's parameters and in its statistics."""
        parts = self.host.init(torch.zeros(1, dtype=torch.int64))
        params, statistics = (sum(leaf.numel() for leaf in part.values(True, True)) for part in parts)
        return params, statistics

    @property
    def host_parameters(self) -> int:
        """Trainable parameters of one ungrown host; of the widest where they differ."""
        return self._leaves[0]

    @cached_property
    def shapes(self) -> tuple[GrowthSpec, ...]:
        """The same for every shape that hosts may have, each without padding."""
        return tuple(replace(self, host=host) for host in shapes(self.host))

    def shape_of(self, keys: Tensor) -> Tensor:
        """Which of `shapes` the hosts with `keys` `[N]` have, int64 `[N]` on the CPU."""
        if len(self.shapes) == 1:
            return torch.zeros(keys.shape, dtype=torch.int64)
        return shape_of(self.host, keys)

    def parameters_of(self, keys: Tensor) -> Tensor:
        """Trainable parameters of the ungrown hosts with `keys` `[N]`, dead ones not counted; int64 `[N]` on the
        CPU."""
        if len(self.shapes) == 1:
            return torch.full(keys.shape, self.host_parameters)
        return torch.tensor([spec.host_parameters for spec in self.shapes])[self.shape_of(keys)]

    def seed_parameters_of(self, keys: Tensor) -> Tensor:
        """Trainable parameters of each possible seed of the hosts with `keys` `[N]`, int64 `[N, S, blueprints, blends]`
        on the CPU."""
        return self._seed_parameters[self.shape_of(keys)]

    @cached_property
    def _seed_parameters(self) -> Tensor:
        """The same by shape, `[shapes, S, blueprints, blends]`."""
        tables = [
            seed_parameters(
                tuple(place.channels for place in spec.sites),
                lambda c: [registry.parameter_count(kind, c) for kind in self.kinds],
            )
            for spec in self.shapes
        ]
        return torch.stack(tables)

    @property
    def has_statistics(self) -> bool:
        """Whether hosts keep running statistics, so that coalitions need a calibration batch."""
        return self._leaves[1] > 0
