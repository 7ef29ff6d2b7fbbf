"""The loop executor: one host after the other, each on one core. The fastest way on a CPU, and the oracle.

Convolutions of many small hosts gain nothing from batching on a CPU (they are bound by arithmetic and large
temporaries cost page faults), so hosts stay separate, in channels_last layout, and are spread over worker threads
with one intra-op thread each. A host's numbers therefore never depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth import optim, precision
from esper.growth.executors import base
from esper.growth.executors.packing import pack
from esper.growth.forward import (
    BATCHNORM_MOMENTUM,
    coalition_logits,
    correct,
    forward,
    mean_loss,
    shadow_loss,
    tensor_norms,
)
from esper.growth.plan import HostPlan, Mode, Plan, SlotPlan, live_slots
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts.base import Tree
from esper.values import changed


@dataclass
class _Training:
    """One host's share of the carry."""

    plan: HostPlan
    params: dict[str, Any]
    statistics: Tree
    moments: list[Tensor]
    seeds: list[Any]  # one tree per slot, None where the plan has none
    seed_moments: list[list[Tensor]]
    alpha: list[Tensor]
    scale: list[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    seen: int = 0
    norm: Tensor | None = None
    seed_norms: dict[int, Tensor] = field(default_factory=dict)
    pending: Future[None] | None = None

    def settle(self) -> None:
        """Wait for the step under way, if any; its errors surface here."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None


@dataclass
class _Scoring:
    plan: HostPlan
    params: Tree
    statistics: Tree
    seeds: list[dict[str, Any] | None]
    alpha: list[Tensor]
    branch_statistics: dict[tuple[int, int], Tree] = field(default_factory=dict)
    loss: float = 0.0
    correct: dict[int, int] = field(default_factory=dict)
    differ: dict[int, int] = field(default_factory=dict)
    seen: int = 0


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        workers, thread_name_prefix="esper-hosts", initializer=torch.set_num_threads, initargs=(1,)
    )


@dataclass(frozen=True)
class LoopExecutor(base.Roomless):
    """Runs hosts one by one on `workers` threads; see `Executor` for the contract."""

    spec: GrowthSpec
    workers: int = 1

    def begin(self, growth: TensorDict, plan: Plan) -> list[_Training]:
        host, bank, alphas = growth["host"], growth["seeds"], _alphas(growth)
        kinds = self.spec.bank.kinds

        def start(i: int) -> _Training:
            params = tree_map(_leaf, as_tree(host["params"][i]))
            seeds, moments = [], []
            for slot, entry in zip(self.spec.slots, plan[i], strict=True):
                kind = None if entry is None else kinds[slot, entry.blueprint]
                seeds.append(None if kind is None else tree_map(_leaf, kind.open(bank["params"][i])))
                moments.append([] if kind is None else [m.clone() for m in leaves(kind.open(bank["moments"][i]))])
            return _Training(
                plan[i],
                params,
                as_tree(host["statistics"][i]),
                [m.clone() for m in leaves(as_tree(host["moments"][i]))],
                seeds,
                moments,
                list(alphas[i]),
                [growth[name][i] for name in precision.fresh_scale(self.spec.amp, 1)],
            )

        return [start(i) for i in range(len(plan))]

    def train_step(
        self,
        carry: list[_Training],
        x: Tensor,
        y: Tensor,
        host_lr: Tensor,
        seed_lr: Tensor,
        keys: Tensor,
        measure: bool,
    ) -> list[_Training]:
        rates, seed_rates = host_lr.tolist(), seed_lr.tolist()

        def work(i: int) -> None:
            _train_host(self.spec, carry[i], _layout(x[i]), y[i], rates[i], seed_rates[i], keys[i], measure)

        for i, host in enumerate(carry):
            if self.workers == 1:
                work(i)
            else:
                # Returns while the hosts still compute, so that the next batch is made meanwhile; one step at a time
                # each.
                host.settle()
                host.pending = _pool(self.workers).submit(work, i)
        return carry

    def finish(self, carry: list[_Training], growth: TensorDict) -> TensorDict:
        n = len(carry)
        for training in carry:
            training.settle()
        host = TensorDict(
            {
                "params": _stack([c.params for c in carry]),
                "statistics": _stack([c.statistics for c in carry]),
                "moments": _stack([like(c.params, iter(c.moments)) for c in carry]),
            },
            batch_size=[n],
        )
        scales = zip(precision.fresh_scale(self.spec.amp, 1), zip(*(c.scale for c in carry), strict=True), strict=False)
        scale = {name: torch.stack(values) for name, values in scales}
        return changed(growth, host=host, seeds=self._banked(carry, growth["seeds"]), **scale)

    def measured(self, carry: list[_Training]) -> TensorDict:
        result = base.empty_measurements(len(carry), len(carry[0].plan))
        for i, c in enumerate(carry):
            result["loss"][i] = torch.stack(c.losses).double().mean()
            result["correct"][i] = torch.stack(c.correct).sum()
            result["seen"][i] = c.seen
            if c.norm is not None:
                result["host_norm"][i] = c.norm.norm()
            for j, norms in c.seed_norms.items():
                result["seed_norm"][i, j] = norms.norm()
                entry = c.plan[j]
                if entry is not None:
                    # A gate that does not take part has no gradient and does not count; its tensors are the last.
                    counted = norms if entry.uses_gate else norms[: len(leaves(c.seeds[j]["body"]))]
                    result["seed_health"][i, j] = base.gradient_health(counted)
        return result

    def _banked(self, carry: list[_Training], bank: TensorDict) -> TensorDict:
        """`bank` with the seeds of all hosts put back."""
        if not any(any(training.plan) for training in carry):
            return bank
        params, moments = bank["params"].clone(), bank["moments"].clone()
        for i, training in enumerate(carry):
            for j, (slot, entry) in enumerate(zip(self.spec.slots, training.plan, strict=True)):
                if entry is not None:
                    columns = self.spec.bank.kinds[slot, entry.blueprint].columns
                    params[i, columns] = pack(training.seeds[j])
                    moments[i, columns] = pack(like(training.seeds[j], iter(training.seed_moments[j])))
        return changed(bank, params=params, moments=moments)

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> list[_Scoring]:
        host, bank, alphas = growth["host"], growth["seeds"], _alphas(growth)
        x = None if calibration is None else _layout(calibration)
        carry: list[_Scoring] = []
        for i, row in enumerate(plan):
            seeds = [
                None if entry is None else self.spec.bank.kinds[slot, entry.blueprint].open(bank["params"][i])
                for slot, entry in zip(self.spec.slots, row, strict=True)
            ]
            params = as_tree(host["params"][i])
            carry.append(_Scoring(row, params, as_tree(host["statistics"][i]), seeds, list(alphas[i])))
        if x is not None:
            self._each(lambda i: _calibrate_host(self.spec, carry[i], x), len(carry))
        return carry

    def evaluate_step(self, carry: list[_Scoring], x: Tensor, y: Tensor) -> list[_Scoring]:
        x = _layout(x)
        self._each(lambda i: _score_host(self.spec, carry[i], x, y[i]), len(carry))
        return carry

    def finish_evaluation(self, carry: list[_Scoring]) -> TensorDict:
        n_slots = len(self.spec.slots)
        scores = base.empty_scores(len(carry), n_slots)
        for i, c in enumerate(carry):
            live = sum(1 << j for j in live_slots(c.plan))
            scores["loss"][i], scores["seen"][i] = c.loss, c.seen
            for members in range(2**n_slots):
                scores["correct"][i, members] = c.correct[members & live]
            for j, count in c.differ.items():
                scores["differ"][i, j] = count
        return scores

    def _each(self, work: Callable[[int], None], n: int) -> None:
        """Run `work` for every host; errors surface here."""
        if self.workers == 1:
            for i in range(n):
                work(i)
        else:
            list(_pool(self.workers).map(work, range(n)))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _alphas(growth: TensorDict) -> Tensor:
    """The alphas `[N, S]`, beside the parameters and of their type."""
    weight = leaves(as_tree(growth["host", "params"]))[0]
    alpha: Tensor = growth["slots", "alpha"].to(weight.device, weight.dtype)
    return alpha


def _layout(x: Tensor) -> Tensor:
    """Images in channels_last, where CPU convolutions are fastest; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _stack(trees: Sequence[Any]) -> TensorDict:
    stacked = [torch.stack(group).detach() for group in zip(*(leaves(tree) for tree in trees), strict=True)]
    return as_tensordict(like(trees[0], iter(stacked)), [len(trees)])


def _train_host(
    spec: GrowthSpec, host: _Training, x: Tensor, y: Tensor, lr: float, seed_lr: float, key: Tensor, measure: bool
) -> None:
    plan, learning = host.plan, _learning(host.plan)
    with precision.autocast(spec.amp, x.device):
        logits, statistics = forward(
            spec, plan, host.params, host.statistics, host.seeds, host.alpha, x, momentum=BATCHNORM_MOMENTUM, key=key
        )
        loss = mean_loss(logits, y)
        total = loss + shadow_loss(spec, plan, host.params, host.statistics, host.seeds, host.alpha, x, y, key)
    if host.scale:
        total = total * host.scale[0]
    host_leaves = leaves(host.params)
    seed_leaves = [leaves(host.seeds[j]) for j in learning]
    wanted = host_leaves + [leaf for group in seed_leaves for leaf in group]
    grads = list(torch.autograd.grad(total, wanted, materialize_grads=True))
    host.losses.append(loss.detach())
    host.correct.append(correct(logits, y).sum())
    host.seen += y.numel()
    host_grads, *seed_grads = _by_group(grads, [len(host_leaves), *map(len, seed_leaves)])
    with torch.no_grad():
        ok, fine = True, [True] * len(learning)
        if host.scale:
            host_grads, seed_grads, ok, fine = _checked(host, learning, host_grads, seed_grads)
        if measure:
            host.norm = tensor_norms(host_grads)
            host.seed_norms = dict(zip(learning, map(tensor_norms, seed_grads), strict=True))
        for j, group, group_grads, good in zip(learning, seed_leaves, seed_grads, fine, strict=True):
            if not good:
                continue
            params, host.seed_moments[j] = optim.sgd(
                group,
                group_grads,
                host.seed_moments[j],
                seed_lr,
                momentum=spec.momentum,
                weight_decay=spec.seed_weight_decay,
            )
            host.seeds[j] = like(host.seeds[j], (p.requires_grad_() for p in params))
        if not ok:
            return
        params, host.moments = optim.sgd(
            host_leaves, host_grads, host.moments, lr, momentum=spec.momentum, weight_decay=spec.host_weight_decay
        )
        host.params = like(host.params, (p.requires_grad_() for p in params))
    host.statistics = statistics


def _checked(
    host: _Training, learning: list[int], host_grads: list[Tensor], seed_grads: list[list[Tensor]]
) -> tuple[list[Tensor], list[list[Tensor]], bool, list[bool]]:
    """Unscaled gradients, zero where a step is skipped; whether the host steps and whether each seed does.

    An incubating seed reaches nobody, so its overflow is its own; host and blended seeds share theirs and the scale.
    """
    host_grads, *seed_grads = (precision.unscale(group, host.scale[0]) for group in (host_grads, *seed_grads))
    shared = [g for j, group in zip(learning, seed_grads, strict=True) if _blends(host.plan[j]) for g in group]
    finite = precision.all_finite([*host_grads, *shared], 0)
    host.scale = list(precision.adapt(host.scale[0], host.scale[1], finite))
    ok = bool(finite)
    fine = [ok and bool(precision.all_finite(group, 0)) for group in seed_grads]

    def kept(group: list[Tensor], good: bool) -> list[Tensor]:
        return group if good else [torch.zeros_like(g) for g in group]

    return kept(host_grads, ok), [kept(g, good) for g, good in zip(seed_grads, fine, strict=True)], ok, fine


def _blends(entry: SlotPlan | None) -> bool:
    return entry is not None and entry.mode is Mode.BLEND


def _learning(plan: HostPlan) -> list[int]:
    return [j for j, entry in enumerate(plan) if entry is not None and not entry.frozen]


def _calibrate_host(spec: GrowthSpec, host: _Scoring, x: Tensor) -> None:
    """Estimate the statistics of every branch of the coalition tree on one batch."""

    def segment(level: int, members: int, h: Tensor, start: int, stop: int) -> Tensor:
        h, statistics = spec.host.run_blocks(host.params, host.statistics, h, start, stop, momentum=1.0)
        host.branch_statistics[level, members] = statistics
        return h

    with torch.no_grad(), precision.autocast(spec.amp, x.device):
        coalition_logits(spec, host.plan, host.params, host.seeds, host.alpha, x, segment)


def _score_host(spec: GrowthSpec, host: _Scoring, x: Tensor, y: Tensor) -> None:
    def segment(level: int, members: int, h: Tensor, start: int, stop: int) -> Tensor:
        statistics = host.branch_statistics.get((level, members), host.statistics)
        return spec.host.run_blocks(host.params, statistics, h, start, stop, momentum=None)[0]

    with torch.no_grad(), precision.autocast(spec.amp, x.device):
        logits = coalition_logits(spec, host.plan, host.params, host.seeds, host.alpha, x, segment)
        live = live_slots(host.plan)
        everyone = sum(1 << j for j in live)
        right = {members: correct(out, y) for members, out in logits.items()}
        for members, hits in right.items():
            host.correct[members] = host.correct.get(members, 0) + int(hits.sum())
        for j in live:
            changed = int((right[everyone] != right[everyone & ~(1 << j)]).sum())
            host.differ[j] = host.differ.get(j, 0) + changed
        host.loss += float(mean_loss(logits[everyone], y)) * y.numel()
        host.seen += y.numel()


def _by_group(flat: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Cut a flat list into consecutive pieces of the given lengths."""
    rest = iter(flat)
    return [list(islice(rest, size)) for size in sizes]
