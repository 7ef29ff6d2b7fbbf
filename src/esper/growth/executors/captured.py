"""The captured executor: the stacked program with fused kernels, recorded as CUDA graphs and replayed.

A step is the stacked executor's own step. Recording it fixes where its inputs and its state lie; each batch is copied
there and replayed without Python. The program depends on how many seats and branches it has room for, not on the plan:
a plan that fits is data, one that does not has a larger program recorded. For image hosts, whose kernels skip free
seats and rows, that has room to spare, so that recordings soon cease.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth.executors import coalitions
from esper.growth.executors.base import Rooms
from esper.growth.executors.coalitions import Room, Scoring
from esper.growth.executors.seating import Capacity, as_table, enlarged, fits
from esper.growth.executors.stacked import StackedExecutor, Training
from esper.growth.plan import Plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import leaves, tree_map
from esper.hosts.base import Tree
from esper.recording import uncollected
from esper.values import upload

Pool = Any
"""A handle of memory that recordings share."""


@dataclass
class _Trainer:
    """The training program: static state, static inputs, a recording with and without measuring, and the memory that
    both share. Memory is the program's own, because it goes when the last of its recordings does."""

    carry: Training
    pool: Pool = field(default_factory=torch.cuda.graph_pool_handle)
    inputs: tuple[Tensor, ...] = ()
    graphs: dict[bool, torch.cuda.CUDAGraph] = field(default_factory=dict)
    norms: Tree = field(default_factory=dict)


@dataclass
class _Scorer:
    """The scoring program: static state, the recording that prepares it, the one that scores a batch, and the memory
    that both share."""

    carry: Scoring
    pool: Pool = field(default_factory=torch.cuda.graph_pool_handle)
    prepare: torch.cuda.CUDAGraph | None = None
    score: torch.cuda.CUDAGraph | None = None


class CapturedExecutor:
    """Runs all hosts of one CUDA `device` as one recorded program; see `Executor` for the contract.

    One epoch is in flight at a time: a carry is the program's static state. `recorded` counts recordings.
    """

    def __init__(self, spec: GrowthSpec, device: torch.device, kernels: bool = True) -> None:
        self.spec, self.device = spec, device
        self.stacked = StackedExecutor(spec, device, kernels)
        self.recorded = 0
        self._stream = torch.cuda.Stream(device)
        self._trainer: _Trainer | None = None
        self._scorer: _Scorer | None = None
        self._seats: Capacity | None = None
        self._room: Room | None = None
        self._buffers: dict[Hashable, Tensor] = {}

    @property
    def rooms(self) -> Rooms:
        rooms: Rooms = {} if self._seats is None else {"seats": self._seats}
        return rooms if self._room is None else {**rooms, "seeds": self._room.seeds, "branches": self._room.branches}

    def reserve(self, rooms: Rooms) -> None:
        slots, kinds = len(self.spec.slots), len(self.spec.blueprints)
        for name, room in rooms.items():
            if name not in ("seats", "seeds", "branches") or [len(row) for row in room] != [kinds] * slots:
                raise ValueError(f"rooms: {name}: {room}; must be seats, seeds or branches, {slots} rows of {kinds}")
        if ("seeds" in rooms) != ("branches" in rooms):
            raise ValueError(f"rooms: {', '.join(rooms)}; seeds and branches go together")
        seeds, branches = (sum(rooms.get(name, ()), ()) for name in ("seeds", "branches"))
        if any(b and not s for s, b in zip(seeds, branches, strict=True)):
            raise ValueError(f"rooms: branches: {rooms['branches']}; a branch needs room for a seed")
        self._forget()
        self._retire()
        self._seats = rooms.get("seats")
        self._room = Room(rooms["seeds"], rooms["branches"]) if "seeds" in rooms else None

    def begin(self, growth: TensorDict, plan: Plan) -> _Trainer:
        table, held = as_table(plan, self.spec), self._trainer
        wanted = self.stacked.seats_for(table)
        if held is not None and fits(wanted, held.carry.seating.capacity):
            fresh = self.stacked.start(growth, table, held.carry.seating.capacity, held.carry)
            _copy(_state(held.carry), _state(fresh))
            held.carry.table, held.carry.seating = table, fresh.seating
            held.carry.norms, held.carry.steps, held.carry.seen, held.carry.told = {}, 0, 0, list
            return held
        held = None
        self._forget()
        spare = [len(plan)] * len(self.spec.slots) if self._spares else None
        self._seats = enlarged(wanted, self._seats, spare)
        self._trainer = _Trainer(self.stacked.start(growth, table, self._seats))
        return self._trainer

    def train_step(
        self, carry: _Trainer, x: Tensor, y: Tensor, host_lr: Tensor, seed_lr: Tensor, keys: Tensor, measure: bool
    ) -> _Trainer:
        rates = upload(torch.stack((host_lr, seed_lr)), self.device)
        given = (x, y, rates[0], rates[1], keys)
        if not carry.inputs:
            carry.inputs = tuple(self._buffer(("train", i), t) for i, t in enumerate(given))
        _copy(carry.inputs, given)
        if measure not in carry.graphs:
            carry.graphs[measure] = self._record_step(carry, measure)
        carry.graphs[measure].replay()
        carry.carry.steps += 1
        carry.carry.seen += y[0].numel()
        if measure:
            carry.carry.norms = tree_map(torch.Tensor.clone, carry.norms)
        return carry

    def finish(self, carry: _Trainer, growth: TensorDict) -> TensorDict:
        own = _own_results(carry.carry)
        finished = self.stacked.finish(own, growth)
        carry.carry.told = own.told
        return finished

    def measured(self, carry: _Trainer) -> TensorDict:
        return self.stacked.measured(carry.carry)

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> _Scorer:
        table, scorer = as_table(plan, self.spec).only_live(), self._scorer
        wanted = coalitions.room_for(self.spec, table)
        if scorer is not None and scorer.carry.tree.room.holds(wanted):
            fresh = self.stacked.start_evaluation(growth, table, scorer.carry.tree.room, scorer.carry)
            _copy(_scored(scorer.carry), _scored(fresh))
            scorer.carry.tree, scorer.carry.seating, scorer.carry.seen = fresh.tree, fresh.seating, 0
        else:
            self._room = coalitions.enlarged_room(wanted, self._room, len(plan) if self._spares else None)
            scorer = None
            self._retire()
            self._scorer = scorer = _Scorer(_owned(self.stacked.start_evaluation(growth, table, self._room)))
        x = None
        if calibration is not None:
            x = self._buffer("calibration", calibration)
            x.copy_(calibration)
        if scorer.prepare is None:
            carry = scorer.carry
            scorer.prepare = self._record(lambda: self.stacked.prepare(carry, x), [], scorer.pool)
        scorer.prepare.replay()
        return scorer

    def evaluate_step(self, carry: _Scorer, x: Tensor, y: Tensor) -> _Scorer:
        usual = self._buffers.get("x")
        if usual is None or usual.shape == x.shape:
            static = self._buffer("x", x), self._buffer("y", y)
            _copy(static, (x, y))
            if carry.score is None:
                counts = [carry.carry.correct, carry.carry.differ, carry.carry.loss]
                carry.score = self._record(lambda: self._add_scores(carry.carry, *static), counts, carry.pool)
            carry.score.replay()
        else:
            with torch.cuda.device(self.device):
                self._add_scores(carry.carry, x, y)
        carry.carry.seen += y[0].numel()
        return carry

    def finish_evaluation(self, carry: _Scorer) -> TensorDict:
        return self.stacked.finish_evaluation(carry.carry)

    def _record_step(self, trainer: _Trainer, measure: bool) -> torch.cuda.CUDAGraph:
        def step() -> None:
            x, y, host_lr, seed_lr, keys = trainer.inputs
            after = self.stacked.train_step(copy.copy(trainer.carry), x, y, host_lr, seed_lr, keys, measure)
            _copy(_state(trainer.carry), _state(after))
            if measure:
                trainer.norms = after.norms

        return self._record(step, _state(trainer.carry), trainer.pool)

    def _add_scores(self, carry: Scoring, x: Tensor, y: Tensor) -> None:
        with torch.no_grad(), self.stacked.operators():
            right, differ, loss = coalitions.score(self.spec, carry, x, y)
            carry.correct.add_(right)
            carry.differ.add_(differ)
            carry.loss.add_(loss)

    def _buffer(self, name: Hashable, like: Tensor) -> Tensor:
        """The static input of this name, made when it is first needed in this shape."""
        held = self._buffers.get(name)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            held = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            self._buffers[name] = held
        return held

    @property
    def _spares(self) -> bool:
        """Whether spare room is worth having: where something skips it, and the kernels are those of image hosts."""
        return self.stacked.kernels and self.spec.host.topology == "cnn"

    def _forget(self) -> None:
        """Let the training program go, once the device is done with it."""
        if self._trainer is not None:
            torch.cuda.synchronize(self.device)
            self._trainer = None

    def _retire(self) -> None:
        """Let the scoring program go, once the device is done with it."""
        if self._scorer is not None:
            torch.cuda.synchronize(self.device)
            self._scorer = None

    def _record(self, step: Callable[[], Any], state: Sequence[Tensor], pool: Pool) -> torch.cuda.CUDAGraph:
        """Record a step. It runs once before, because libraries and kernels load lazily; `state` is what that must not
        change."""
        self.recorded += 1
        graph = torch.cuda.CUDAGraph()
        # Programs that nobody uses any more, of other executors too, hold gigabytes until they are collected.
        gc.collect()
        with uncollected(), self._aside():
            before = [tensor.detach().clone() for tensor in state]
            step()
            _copy(state, before)
            # Nothing that lies in caches can be given back while a recording is made.
            del before
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """A stream of our own, as recording needs, in order with the caller's."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def _state(carry: Training) -> list[Tensor]:
    """Everything a step reads and the next step continues from, in a fixed order."""
    host = [carry.seats, carry.params, carry.moments, *leaves(carry.statistics)]
    return [*host, carry.alpha, carry.loss, carry.correct, *carry.scale.values()]


def _own_results(carry: Training) -> Training:
    """The carry with copies of what `finish` hands on, which the next epoch does not overwrite."""
    statistics = tree_map(torch.Tensor.clone, carry.statistics)
    return replace(carry, statistics=statistics, scale={name: t.clone() for name, t in carry.scale.items()})


def _scored(carry: Scoring) -> list[Tensor]:
    """Everything scoring reads and counts, in a fixed order."""
    host = [leaf for tree in (carry.params, carry.statistics) for leaf in leaves(tree)]
    return [carry.data, carry.seats, *host, carry.seeds, carry.alpha, carry.correct, carry.differ, carry.loss]


def _owned(carry: Scoring) -> Scoring:
    """The same with tensors of its own, so that filling them touches no growth state."""
    params, statistics = (tree_map(torch.Tensor.clone, tree) for tree in (carry.params, carry.statistics))
    return replace(carry, params=params, statistics=statistics, alpha=carry.alpha.clone())


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Fill `targets` with `values`, in as few launches as there are types."""
    pairs = [(a, b) for a, b in zip(targets, values, strict=True) if a is not b]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
