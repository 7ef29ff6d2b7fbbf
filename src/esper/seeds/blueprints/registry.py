"""Blueprints by name: what can be planted. Register your own with one call.

    register(Blueprint("swish", "cnn", init=..., apply=..., description="..."))

A blueprint is a pair of pure functions. `init(keys, channels, dtype)` returns parameters for `keys` `[N]`, every leaf
`[N, ...]`; `apply(params, x)` maps features to features of the same shape for one host. Neither has any other state.
Keys are on the CPU and leaves are moved to the hosts; those that `esper.hosts.init` makes are there already, so a leaf
is made of either the one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import catalogue
from esper.hosts.base import Tree

Init = Callable[[Tensor, int, torch.dtype], TensorDict]
Apply = Callable[[Tree, Tensor], Tensor]


@dataclass(frozen=True)
class Blueprint:
    """A kind of seed for hosts of one topology."""

    name: str
    topology: str
    init: Init
    apply: Apply
    description: str


_REGISTRY: dict[tuple[str, str], Blueprint] = {}


def register(blueprint: Blueprint) -> Blueprint:
    """Make a blueprint known under (topology, name). Raises ValueError if the name is taken."""
    address = (blueprint.topology, blueprint.name)
    if address in _REGISTRY:
        raise ValueError(f"blueprint {blueprint.name!r} is already registered for {blueprint.topology} hosts")
    _REGISTRY[address] = blueprint
    catalogue.add_blueprint(*address)
    return blueprint


def unregister(topology: str, name: str) -> None:
    """Forget a blueprint. Raises ValueError if it is unknown."""
    get(topology, name)
    del _REGISTRY[(topology, name)]
    catalogue.remove_blueprint(topology, name)


def names(topology: str) -> tuple[str, ...]:
    """Names registered for a topology, in order of registration."""
    return tuple(name for where, name in _REGISTRY if where == topology)


def get(topology: str, name: str) -> Blueprint:
    """Look a blueprint up. Raises ValueError listing the names the topology has."""
    try:
        return _REGISTRY[(topology, name)]
    except KeyError:
        available = ", ".join(names(topology)) or "none"
        raise ValueError(f"unknown blueprint {name!r} for {topology} hosts; available: {available}") from None


@lru_cache(maxsize=1024)
def parameter_count(blueprint: Blueprint, channels: int) -> int:
    """Trainable parameters of one seed (its gate not counted)."""
    params = blueprint.init(torch.zeros(1, dtype=torch.int64), channels, torch.float32)
    return sum(leaf.numel() for leaf in params.values(include_nested=True, leaves_only=True))
