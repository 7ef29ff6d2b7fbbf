"""What growing costs, in floating-point operations counted from shapes.

A multiply-add is two operations. Only convolutions, linear maps and products of attention count, as in
`torch.utils.flop_counter`, which the tests hold this module against; normalisation, activations, pooling and the
optimiser do not. Letters: `C` channels, `L` positions, `D` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from esper.growth.grown import Fossil, parts
from esper.growth.plan import HostPlan, Mode, SlotPlan, live_slots, make_plan, shadow_plan
from esper.growth.spec import GrowthSpec
from esper.hosts.base import Host
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds.blueprints import registry

FLOPS = 2
"""Operations of a multiply-add."""
TRAINING = 3
"""Forward passes that a training step costs: the forward itself, and gradients by features and by weights."""

Shape = tuple[int, ...]
"""One sample's features: `(C, H, W)` or `(L, D)`; its input `(C, H, W)` or `(L,)`."""


def blocks_macs(host: Host, shape: Shape, start: int, stop: int) -> tuple[int, Shape]:
    """Multiply-adds of blocks `start ... stop - 1` on one sample whose features have `shape`, and the shape behind
    them. Fossils built into a grown host count as blocks. Raises TypeError for a host of someone else's."""
    base, fossils = parts(host)
    total = 0
    for i in range(start, stop):
        macs, shape = _cnn_block(base, i, shape) if isinstance(base, CNNHost) else _transformer_block(base, shape)
        total += macs + sum(_fossil_macs(host, fossil, shape) for fossil in fossils if fossil.after == i + 1)
    return total, shape


def embedded(host: Host, inputs: Shape) -> Shape:
    """The features before the first block of an input; embedding it costs no multiply-add."""
    base, _ = parts(host)
    return (*inputs, base.n_embd) if isinstance(base, TransformerHost) else inputs


def head_macs(host: Host, shape: Shape) -> int:
    """Multiply-adds of the head on one sample's last features."""
    base, _ = parts(host)
    if isinstance(base, TransformerHost):
        return prod(shape) * base.vocab_size
    return shape[0] * base.num_classes


def seed_macs(topology: str, blueprint: str, shape: Shape, gated: bool = False) -> int:
    """Multiply-adds of a seed on one sample's features, with its gate if it has one. A blueprint that does not come
    with Esper is run once under torch's own counter."""
    formula = _FORMULAS.get((topology, blueprint))
    body = _counted(topology, blueprint, shape) if formula is None else formula(shape)
    return body + (_gate_macs(topology, shape) if gated else 0)


def _cnn_block(host: CNNHost, block: int, shape: Shape) -> tuple[int, Shape]:
    inputs, height, width = shape
    outputs = host.channels(block)
    pooled = host.n_blocks if host.pool_layers is None else host.pool_layers
    pool = 2 if block < pooled else 1
    return 9 * inputs * outputs * height * width, (outputs, height // pool, width // pool)


def _transformer_block(host: TransformerHost, shape: Shape) -> tuple[int, Shape]:
    return _attention(shape) + _perceptron(shape), shape


def _attention(shape: Shape) -> int:
    """Queries, keys, values and output `4 D D` for each position; scores and mixture `2 L D`."""
    length, width = shape
    return length * (4 * width * width + 2 * length * width)


def _perceptron(shape: Shape) -> int:
    length, width = shape
    return length * 8 * width * width


def _convolution(shape: Shape, kernel: int, times: int = 1) -> int:
    channels, height, width = shape
    return times * kernel * channels * channels * height * width


def _squeeze(shape: Shape) -> int:
    return 2 * shape[0] * max(1, shape[0] // 4)


_FORMULAS: dict[tuple[str, str], Callable[[Shape], int]] = {
    ("cnn", "noop"): lambda shape: 0,
    ("cnn", "norm"): lambda shape: 0,
    ("cnn", "attention"): _squeeze,
    ("cnn", "depthwise"): lambda shape: 9 * prod(shape) + _convolution(shape, 1),
    ("cnn", "conv_light"): lambda shape: _convolution(shape, 9),
    ("cnn", "conv_heavy"): lambda shape: _convolution(shape, 9, 2),
    ("cnn", "conv_expand"): lambda shape: _convolution(shape, 9, 8),
    ("transformer", "noop"): lambda shape: 0,
    ("transformer", "norm"): lambda shape: 0,
    ("transformer", "lora"): lambda shape: 16 * prod(shape),
    ("transformer", "attention"): _attention,
    ("transformer", "mlp"): _perceptron,
}


def _gate_macs(topology: str, shape: Shape) -> int:
    """C to max(1, C // 4) to one: once for an image, at every position of a sequence."""
    times, channels = (1, shape[0]) if topology == "cnn" else shape
    hidden = max(1, channels // 4)
    return times * (hidden * channels + hidden)


def _fossil_macs(host: Host, fossil: Fossil, shape: Shape) -> int:
    return seed_macs(host.topology, fossil.blueprint, shape, fossil.gated)


@lru_cache(maxsize=256)
def _counted(topology: str, blueprint: str, shape: Shape) -> int:
    kind = registry.get(topology, blueprint)
    channels = shape[0] if topology == "cnn" else shape[-1]
    body = kind.init(torch.zeros(1, dtype=torch.int64), channels, torch.float32)[0]
    with FlopCounterMode(display=False) as counter:
        kind.apply(body.to_dict(), torch.zeros(1, *shape))
    return counter.get_total_flops() // FLOPS


@dataclass(frozen=True)
class Costs:
    """What an epoch of one host costs, by its plan; of the widest, where hosts differ. `inputs` is the shape of a
    sample; `trained` samples are trained on in an epoch, `scored` are scored, and `calibrating` go through every
    coalition before that."""

    spec: GrowthSpec
    inputs: Shape
    trained: int
    scored: int
    calibrating: int

    @cached_property
    def _walk(self) -> tuple[tuple[tuple[int, Shape], ...], int]:
        """For each slot the multiply-adds of the blocks up to it and the features there; then those behind the last."""
        host, shape, done = self.spec.host, embedded(self.spec.host, self.inputs), 0
        levels = []
        for place in self.spec.sites:
            macs, shape = blocks_macs(host, shape, done, place.boundary)
            levels.append((macs, shape))
            done = place.boundary
        macs, shape = blocks_macs(host, shape, done, host.depth)
        return tuple(levels), macs + head_macs(host, shape)

    def forward(self, row: HostPlan) -> int:
        """Multiply-adds of one sample's forward pass, with every seed of the plan that is computed in it."""
        levels, rest = self._walk
        shadowless = [None if entry is None or entry.mode is Mode.SHADOW else entry for entry in row]
        return rest + sum(
            macs + self._seed(entry, shape) for (macs, shape), entry in zip(levels, shadowless, strict=True)
        )

    def training(self, row: HostPlan) -> int:
        """FLOPs of an epoch's training. A pass that trains something costs three forward passes, also where part of it
        is held fixed (frozen fossils, the second pass of shadowed seeds): there it is an upper bound."""
        second = shadow_plan(row)
        macs = self.forward(row) + (0 if second is None else self.forward(second))
        return FLOPS * TRAINING * macs * self.trained

    def evaluation(self, row: HostPlan) -> int:
        """FLOPs of scoring all coalitions of the plan, which share everything before they part."""
        levels, rest = self._walk
        branches, macs = 1, 0
        live = live_slots(row)
        for j, (blocks, shape) in enumerate(levels):
            macs += branches * blocks
            if j in live:
                macs += branches * self._seed(row[j], shape)
                branches *= 2
        return FLOPS * (macs + branches * rest) * (self.scored + self.calibrating)

    def _seed(self, entry: SlotPlan | None, shape: Shape) -> int:
        if entry is None:
            return 0
        return seed_macs(self.spec.host.topology, entry.blueprint, shape, entry.uses_gate)


class Ledger:
    """Adds up what hosts cost, FLOPs `[N]` (int64): `training`, and `evaluation` with all coalitions. Everything that
    ran counts, whether its seed was kept or culled. `reset` is called once an episode, `add` with every step."""

    def __init__(self, costs: Costs, n_hosts: int) -> None:
        self._spec = costs.spec
        self._shapes = [replace(costs, spec=spec) for spec in costs.spec.shapes]
        self.training = torch.zeros(n_hosts, dtype=torch.int64)
        self.evaluation = torch.zeros(n_hosts, dtype=torch.int64)

    def reset(self, records: TensorDict, keys: Tensor) -> None:
        """Enter the validation pass with which an episode begins, by slot records `[N, S]` and keys `[N]` of its
        hosts."""
        self.evaluation += self._of_each(records, keys, Costs.evaluation)

    def add(self, result: TensorDict) -> None:
        """Enter one step of all hosts; `result` is what `GrowthEnv` hands its observer."""
        self.training += self._of_each(result["lived"], result["key"], Costs.training)
        self.evaluation += self._of_each(result["lived"], result["key"], Costs.evaluation)

    def _of_each(self, records: TensorDict, keys: Tensor, cost: Callable[[Costs, HostPlan], int]) -> Tensor:
        """The cost of every host, int64 `[N]`; equal plans of equal shapes are counted once."""
        rows = list(zip(self._spec.shape_of(keys).tolist(), make_plan(records, self._spec), strict=True))
        known = {(shape, plan): cost(self._shapes[shape], plan) for shape, plan in set(rows)}
        return torch.tensor([known[row] for row in rows])

    @property
    def total(self) -> Tensor:
        """Training and evaluation, `[N]`."""
        return self.training + self.evaluation
