"""The captured executor: the stacked program with fused kernels, recorded once per plan as CUDA graphs and replayed.

A step is the stacked executor's own step. Recording it fixes where its inputs and its state lie; each batch is copied
there and replayed without Python. A new plan costs one recording of a step, not a compilation, because the kernels do
not depend on the plan. Recordings share one pool of memory: they run one after the other and leave nothing in it.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth import precision
from esper.growth.executors import coalitions
from esper.growth.executors.coalitions import Coalitions, Scoring, lay_out
from esper.growth.executors.groups import split_plan, upload
from esper.growth.executors.stacked import StackedExecutor, Training
from esper.growth.plan import Plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import leaves, like
from esper.hosts.ops import fused


@dataclass
class _Trainer:
    """One plan's training step: static state, static inputs, and a recording with and without measuring."""

    carry: Training
    inputs: tuple[Tensor, ...]
    growth: TensorDict
    graphs: dict[bool, torch.cuda.CUDAGraph] = field(default_factory=dict)
    norms: dict[Any, Tensor] = field(default_factory=dict)


@dataclass
class _Scorer:
    """One plan's scoring: static state, the recording that calibrates it and the one that scores a batch."""

    tree: Coalitions
    carry: Scoring
    calibrate: torch.cuda.CUDAGraph | None = None
    score: torch.cuda.CUDAGraph | None = None


class CapturedExecutor:
    """Runs all hosts of one CUDA `device` as one recorded program; see `Executor` for the contract.

    Keeps recordings of the `plans` latest plans. One epoch of a plan is in flight at a time: a carry is the static
    state of its plan's recording. `counts` tells how many steps were recorded, replayed from an earlier recording of
    the same plan, and run once eagerly because something in them was new.
    """

    def __init__(self, spec: GrowthSpec, device: torch.device, plans: int = 16, kernels: bool = True) -> None:
        self.spec, self.device, self.plans = spec, device, plans
        self.stacked = StackedExecutor(spec, device, kernels)
        self.counts = {"recorded": 0, "reused": 0, "warmed": 0}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._trainers: OrderedDict[Plan, _Trainer] = OrderedDict()
        self._scorers: OrderedDict[Plan, _Scorer] = OrderedDict()
        self._buffers: dict[Hashable, Tensor] = {}
        self._evaluation: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._seen: set[Hashable] = set()

    def begin(self, growth: TensorDict, plan: Plan) -> _Trainer:
        trainer = self._trainers.get(plan)
        splits = split_plan(plan, self.device) if trainer is None else trainer.carry.splits
        fresh = self.stacked.start(growth, plan, splits)
        if trainer is None:
            trainer = _Trainer(fresh, (), growth)
            _remember(self._trainers, plan, trainer, self.plans)
        else:
            self.counts["reused"] += 1
            self._trainers.move_to_end(plan)
            _copy(_state(trainer.carry), _state(fresh))
            trainer.carry.steps = trainer.carry.seen = 0
            trainer.growth = growth
        return trainer

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
            carry.carry.norms = {name: norms.clone() for name, norms in carry.norms.items()}
            if self._evaluation is not None and carry.carry.plan not in self._scorers:
                # The device still has the epoch's replays to do, so recording the evaluation now costs no time.
                self._scorer(carry.growth, carry.carry.plan)
        return carry

    def finish(self, carry: _Trainer, growth: TensorDict) -> tuple[TensorDict, TensorDict]:
        return self.stacked.finish(_frozen(carry.carry), growth)

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> _Scorer:
        known = plan in self._scorers
        scorer = self._scorers[plan] if known else self._scorer(growth, plan)
        fresh = self.stacked.start_evaluation(growth, plan, scorer.tree)
        _copy(_scored(scorer.carry), _scored(fresh))
        scorer.carry.seen = 0
        if calibration is not None:
            buffer = self._buffer("calibration", calibration)
            buffer.copy_(calibration)
            if scorer.calibrate is None:
                scorer.calibrate = self._record_calibration(scorer, buffer)
            scorer.calibrate.replay()
        self._scorers.move_to_end(plan)
        return scorer

    def evaluate_step(self, carry: _Scorer, x: Tensor, y: Tensor) -> _Scorer:
        if self._evaluation is None:
            buffers = self._buffer("x", x), self._buffer("y", y)
            self._evaluation = (*buffers, self._buffers.get("calibration"))
        usual = self._evaluation[:2]
        if x.shape == usual[0].shape:
            _copy(usual, (x, y))
            if carry.score is None:
                carry.score = self._record_score(carry, *usual)
            carry.score.replay()
        else:
            with torch.no_grad():
                self._add_scores(carry.carry, x, y)
        carry.carry.seen += y.numel()
        return carry

    def finish_evaluation(self, carry: _Scorer) -> TensorDict:
        return self.stacked.finish_evaluation(carry.carry)

    def _scorer(self, growth: TensorDict, plan: Plan) -> _Scorer:
        tree = lay_out(self.spec, plan, self.device)
        started = self.stacked.start_evaluation(growth, plan, tree)
        scorer = _Scorer(tree, _detached(started))
        _remember(self._scorers, plan, scorer, self.plans)
        if self._evaluation is not None:
            x, y, calibration = self._evaluation
            if calibration is not None:
                scorer.calibrate = self._record_calibration(scorer, calibration)
            scorer.score = self._record_score(scorer, x, y)
        return scorer

    def _record_step(self, trainer: _Trainer, measure: bool) -> torch.cuda.CUDAGraph:
        def step() -> Training:
            x, y, host_lr, seed_lr, keys = trainer.inputs
            return self.stacked.train_step(copy.copy(trainer.carry), x, y, host_lr, seed_lr, keys, measure)

        def recorded() -> None:
            after = step()
            _copy(_state(trainer.carry), _state(after))
            if measure:
                trainer.norms = after.norms

        shape = tuple(trainer.inputs[0].shape)
        self._warm([("train", measure, shape), *(("train", address, shape) for address in trainer.carry.seeds)], step)
        return self._record(recorded)

    def _record_calibration(self, scorer: _Scorer, x: Tensor) -> torch.cuda.CUDAGraph:
        def statistics() -> list[Tensor]:
            carry = self.stacked.calibrate(copy.copy(scorer.carry), x)
            return [leaf for tree in carry.statistics for leaf in leaves(tree)]

        def recorded() -> None:
            _copy([leaf for tree in scorer.carry.statistics for leaf in leaves(tree)], statistics())

        shape = tuple(x.shape)
        self._warm([("calibrate", address, shape) for address in (None, *scorer.carry.seeds)], statistics)
        return self._record(recorded)

    def _record_score(self, scorer: _Scorer, x: Tensor, y: Tensor) -> torch.cuda.CUDAGraph:
        shape = tuple(x.shape)
        self._warm(
            [("score", address, shape) for address in (None, *scorer.carry.seeds)],
            lambda: self.stacked.evaluate_step(copy.copy(scorer.carry), x, y),
        )
        return self._record(lambda: self._add_scores(scorer.carry, x, y))

    def _add_scores(self, carry: Scoring, x: Tensor, y: Tensor) -> None:
        with torch.no_grad(), precision.autocast(self.spec.amp, self.device), fused(self.stacked.kernels):
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

    def _warm(self, parts: list[Hashable], step: Callable[[], Any]) -> None:
        """Run a step once for nothing if it has a part never run before: libraries and kernels load lazily."""
        if self._seen.issuperset(parts):
            return
        self.counts["warmed"] += 1
        self._seen.update(parts)
        with self._aside():
            step()

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self.counts["recorded"] += 1
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        # Collecting an old recording while a new one is made would be an illegal operation inside it.
        gc.disable()
        try:
            with self._aside():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """A stream of our own, as recording needs, in order with the caller's."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def _remember(cache: OrderedDict[Plan, Any], plan: Plan, value: Any, size: int) -> None:
    cache[plan] = value
    while len(cache) > size:
        cache.popitem(last=False)


def _state(carry: Training) -> list[Tensor]:
    """Everything a step reads and the next step continues from, in a fixed order."""
    groups = [*carry.seeds.values(), *carry.seed_moments.values()]
    host = [carry.params, carry.moments, *leaves(carry.statistics)]
    return [*host, *groups, carry.alpha, carry.loss, carry.correct, *carry.scale.values()]


def _frozen(carry: Training) -> Training:
    """The carry with copies of all its tensors, which the next epoch does not overwrite."""
    copies = iter([tensor.detach().clone() for tensor in _state(carry)])
    return replace(
        carry,
        params=next(copies),
        moments=next(copies),
        statistics=like(carry.statistics, copies),
        seeds={address: next(copies) for address in carry.seeds},
        seed_moments={address: next(copies) for address in carry.seed_moments},
        alpha=next(copies),
        loss=next(copies),
        correct=next(copies),
        scale={name: next(copies) for name in carry.scale},
    )


def _scored(carry: Scoring) -> list[Tensor]:
    tensors = [leaf for tree in (*carry.params, *carry.statistics, *carry.seeds.values()) for leaf in leaves(tree)]
    return [*tensors, carry.alpha, carry.correct, carry.differ, carry.loss]


def _detached(carry: Scoring) -> Scoring:
    """The same with an alpha of its own, so that filling it in place touches no growth state."""
    result = copy.copy(carry)
    result.alpha = carry.alpha.clone()
    return result


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Fill `targets` with `values`, in as few launches as there are types."""
    pairs = [(a, b) for a, b in zip(targets, values, strict=True) if a is not b]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
