"""A grown network as the host of a new run: its fossils become part of the host, and its slots are free again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from esper.exported import ARCHITECTURE, FORMAT, WEIGHTS
from esper.growth.forward import graft
from esper.growth.plan import Mode, SlotPlan
from esper.hosts.base import Host, Site, Tree
from esper.hosts.cnn import CNNHost
from esper.hosts.padded import PaddedHost
from esper.hosts.transformer import TransformerHost
from esper.seeds import blending
from esper.seeds.blueprints import registry

HOSTS: dict[str, type[CNNHost] | type[TransformerHost]] = {"cnn": CNNHost, "transformer": TransformerHost}


@dataclass(frozen=True)
class Fossil:
    """One fossil in a host: which blueprint, after how many blocks, on how many channels, behind a gate or not."""

    slot: str
    after: int
    blueprint: str
    channels: int
    gated: bool


@dataclass(frozen=True)
class GrownHost:
    """A host with fossils built in; fossils at one place run in the order in which they grew.

    Every row starts from the weights in `source`, an exported folder; only the data and the seeds differ. Fossils train
    with the host, at its learning rate and weight decay. Parameters are `{base, grafts}`.
    """

    base: CNNHost | TransformerHost
    fossils: tuple[Fossil, ...]
    source: str

    @property
    def topology(self) -> str:
        return self.base.topology

    @property
    def depth(self) -> int:
        return self.base.depth

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.base.sites

    def init(self, keys: Tensor, dtype: torch.dtype = torch.float32) -> tuple[TensorDict, TensorDict]:
        n = keys.shape

        def rows(tree: TensorDict) -> TensorDict:
            def row(leaf: Tensor) -> Tensor:
                return leaf.to(keys.device, dtype).expand(*n, *leaf.shape[1:]).clone()

            spread: TensorDict = tree.apply(row, batch_size=n, filter_empty=False)
            return spread

        params, statistics = _stored(self)
        return rows(params), rows(statistics)

    def embed(self, params: Tree, x: Tensor, key: Tensor | None = None) -> Tensor:
        return self.base.embed(params["base"], x, key)

    def run_blocks(
        self,
        params: Tree,
        statistics: Tree,
        h: Tensor,
        start: int,
        stop: int,
        *,
        momentum: float | None,
        key: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:
        for place in sorted({fossil.after for fossil in self.fossils if start < fossil.after <= stop}):
            h, statistics = self.base.run_blocks(
                params["base"], statistics, h, start, place, momentum=momentum, key=key
            )
            start = place
            for i, fossil in enumerate(self.fossils):
                if fossil.after == place:
                    entry = SlotPlan(fossil.blueprint, Mode.BLEND, fossil.gated)
                    h = graft(self.topology, entry, params["grafts"][str(i)], torch.ones((), device=h.device), h)
        return self.base.run_blocks(params["base"], statistics, h, start, stop, momentum=momentum, key=key)

    def head(self, params: Tree, h: Tensor) -> Tensor:
        return self.base.head(params["base"], h)


def grown_start(path: str | Path) -> GrownHost:
    """The network in an exported folder as a host: give it to a `GrowthSpec` and the run starts from there.

    Raises OSError where a file is missing, and ValueError for another format or a blueprint nobody has registered.
    """
    folder = Path(path).resolve()
    architecture = json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8"))
    if architecture.get("format") != FORMAT:
        raise ValueError(f"format: {architecture.get('format')!r}; must be {FORMAT}")
    base = HOSTS[architecture["topology"]](**architecture["host"])
    fossils = tuple(
        Fossil(g["slot"], g["after"], g["blueprint"], g["channels"], g["gated"]) for g in architecture["grafts"]
    )
    for fossil in fossils:
        registry.get(base.topology, fossil.blueprint)
    return GrownHost(base, fossils, str(folder))


def parts(host: Host) -> tuple[CNNHost | TransformerHost, tuple[Fossil, ...]]:
    """The plain host inside a host (the widest of padded ones), and the fossils that are already part of it. Raises
    TypeError for a host of someone else's (a subclass too: it may compute something else), of which no module is
    known."""
    if isinstance(host, GrownHost):
        return host.base, host.fossils
    if isinstance(host, PaddedHost):
        return host.base, ()
    if isinstance(host, CNNHost | TransformerHost) and type(host) in HOSTS.values():
        return host, ()
    raise TypeError(f"host: {type(host).__name__}; must be a CNNHost, a TransformerHost or one grown from them")


def state_name(path: tuple[str, ...], available: Iterable[str]) -> str:
    """Where a leaf of a host's, a graft's or their statistics' tree lies in the state dict of the exported module.

    Trees name a layer's only tensor like the layer and a normalisation's tensors after what they normalise; modules
    have a layer for each. Raises KeyError if the module has no such tensor.
    """
    *head, last = path
    name, prefix = ".".join(path), "".join(f"{part}." for part in head)
    candidates = (
        name,
        f"{name}.weight",
        f"{prefix}norm.{last}",
        f"{prefix}norm.running_{last}",
        re.sub("_(weight|bias)$", r"_norm.\1", name),
        name.replace(".body.", ".body.leaves.", 1),
    )
    for candidate in candidates:
        if candidate in available:
            return candidate
    raise KeyError(f"{name}: the exported module has no such tensor")


def fresh_parts(base: Host, fossils: Iterable[Fossil]) -> tuple[TensorDict, TensorDict, dict[str, TensorDict]]:
    """Trees with one row and untrained values: the host's parameters and statistics, and each fossil's `{body, gate}`
    (no gate where it has none), by position."""
    key = torch.zeros(1, dtype=torch.int64)
    params, statistics = base.init(key)
    grafts = {}
    for i, fossil in enumerate(fossils):
        seed: dict[str, Any] = {
            "body": registry.get(base.topology, fossil.blueprint).init(key, fossil.channels, torch.float32)
        }
        if fossil.gated:
            seed["gate"] = blending.gate_init(key, fossil.channels, torch.float32)
        grafts[str(i)] = TensorDict(seed, batch_size=[1])
    return params, statistics, grafts


@lru_cache(maxsize=4)
def _stored(host: GrownHost) -> tuple[TensorDict, TensorDict]:
    """The weights in the folder as trees with one row."""
    state = load_file(Path(host.source) / WEIGHTS)

    def fill(tree: TensorDict, prefix: tuple[str, ...]) -> TensorDict:
        filled: TensorDict = tree.named_apply(
            lambda name, leaf: state[state_name((*prefix, *name), state)].unsqueeze(0),
            nested_keys=True,
            batch_size=[1],
            filter_empty=False,
        )
        return filled

    params, statistics, grafts = fresh_parts(host.base, host.fossils)
    filled = TensorDict({i: fill(tree, ("grafts", i)) for i, tree in grafts.items()}, batch_size=[1])
    return TensorDict({"base": fill(params, ()), "grafts": filled}, batch_size=[1]), fill(statistics, ())
