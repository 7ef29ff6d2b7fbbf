"""The stacked executor: all hosts of a device advance as one program, by vmap over the pure per-host functions.

Host blocks are the same for every host, so they run stacked over all `N`. Seeds differ, so each slot is split into
groups of the same (blueprint, mode, gate) and every group runs stacked over its members. Nothing inside a step waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from esper.growth import optim
from esper.growth.executors import base
from esper.growth.forward import BATCHNORM_MOMENTUM, correct, graft, mean_loss
from esper.growth.plan import Mode, Plan, SlotPlan, inserted, live_slots, shadow_plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts.base import Tree
from esper.seeds.bank import write

Seeds = dict[tuple[int, SlotPlan], dict[str, Any]]
"""Stacked parameters `{body, gate}` of each group, by (slot, plan entry); leaves `[members, ...]`."""


@dataclass(frozen=True)
class Split:
    """How the rows of one slot fall into groups: `rows[g]` for each group, `rest` for bypassed rows, and the
    permutation `inverse` that puts `[rest, *groups]` back in order."""

    entries: tuple[SlotPlan, ...]
    rows: tuple[Tensor, ...]
    rest: Tensor
    inverse: Tensor


def split_slot(entries: Sequence[SlotPlan | None], device: torch.device) -> Split:
    """Group equal entries of one slot; groups in order of first appearance."""
    groups: dict[SlotPlan, list[int]] = {}
    rest: list[int] = []
    for row, entry in enumerate(entries):
        (rest if entry is None else groups.setdefault(entry, [])).append(row)
    order = rest + [row for rows in groups.values() for row in rows]
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def index(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=device)

    return Split(tuple(groups), tuple(index(rows) for rows in groups.values()), index(rest), index(inverse))


@dataclass
class _Training:
    plan: Plan
    splits: list[Split]
    shadowed: bool
    params: dict[str, Any]
    statistics: Tree
    moments: list[Tensor]
    seeds: Seeds
    seed_moments: dict[tuple[int, SlotPlan], list[Tensor]]
    members: dict[tuple[int, SlotPlan], Tensor]
    alpha: Tensor
    loss: Tensor
    correct: Tensor
    steps: int = 0
    seen: int = 0
    norms: dict[Any, Tensor] | None = None


@dataclass
class _Scoring:
    levels: list[_Level]
    params: list[Tree]
    statistics: list[Tree]
    seeds: Seeds
    alpha: Tensor
    coalition: list[tuple[int, int]]
    correct: Tensor
    differ: Tensor
    loss: Tensor
    compare: tuple[Tensor, Tensor]
    everyone: Tensor
    seen: int = 0


@dataclass(frozen=True)
class _Level:
    """One slot of the coalition tree, by group: the rows that branch, where their seeds lie in the group's stack, and
    the hosts they belong to."""

    entries: tuple[SlotPlan, ...]
    rows: tuple[Tensor, ...]
    seats: tuple[Tensor, ...]
    owners: tuple[Tensor, ...]


@dataclass(frozen=True)
class StackedExecutor:
    """Runs all hosts as one stack on `device`; see `Executor` for the contract."""

    spec: GrowthSpec
    device: torch.device

    def begin(self, growth: TensorDict, plan: Plan) -> _Training:
        host, n = growth["host"], len(plan)
        splits = self._splits(plan)
        seeds, moments, members = self._gather(growth["seeds"], splits, _leaf)
        zeros = torch.zeros(n, dtype=torch.float64, device=self.device)
        return _Training(
            plan=plan,
            splits=splits,
            shadowed=any(shadow_plan(row) is not None for row in plan),
            params=tree_map(_leaf, as_tree(host["params"])),
            statistics=as_tree(host["statistics"]),
            moments=[m.clone() for m in leaves(as_tree(host["moments"]))],
            seeds=seeds,
            seed_moments=moments,
            members=members,
            alpha=growth["slots", "alpha"],
            loss=zeros,
            correct=torch.zeros(n, dtype=torch.int64, device=self.device),
        )

    def train_step(
        self, carry: _Training, x: Tensor, y: Tensor, host_lr: Tensor, seed_lr: Tensor, keys: Tensor, measure: bool
    ) -> _Training:
        logits, statistics = self._forward(
            carry.splits, carry.params, carry.statistics, carry.seeds, carry.alpha, x, keys
        )
        losses = vmap(mean_loss)(logits, y)
        total = losses.sum() + self._shadow_loss(carry, x, y, keys)
        learning = [address for address in carry.seeds if not address[1].frozen]
        host_leaves = leaves(carry.params)
        groups = [leaves(carry.seeds[address]) for address in learning]
        wanted = host_leaves + [leaf for group in groups for leaf in group]
        grads = list(torch.autograd.grad(total, wanted, materialize_grads=True))
        taken = iter(grads)
        host_grads = [next(taken) for _ in host_leaves]
        group_grads = [[next(taken) for _ in group] for group in groups]
        with torch.no_grad():
            if measure:
                carry.norms = {"host": stacked_norms(host_grads)}
                for address, wanted_grads in zip(learning, group_grads, strict=True):
                    carry.norms[address] = stacked_norms(wanted_grads)
            params, carry.moments = optim.sgd(
                host_leaves,
                host_grads,
                carry.moments,
                host_lr.to(self.device),
                momentum=self.spec.momentum,
                weight_decay=self.spec.host_weight_decay,
            )
            carry.params = like(carry.params, (p.requires_grad_() for p in params))
            rates = seed_lr.to(self.device)
            for address, group, wanted_grads in zip(learning, groups, group_grads, strict=True):
                params, carry.seed_moments[address] = optim.sgd(
                    group,
                    wanted_grads,
                    carry.seed_moments[address],
                    rates[carry.members[address]],
                    momentum=self.spec.momentum,
                    weight_decay=self.spec.seed_weight_decay,
                )
                carry.seeds[address] = like(carry.seeds[address], (p.requires_grad_() for p in params))
            carry.statistics = tree_map(torch.Tensor.detach, statistics)
            carry.loss = carry.loss + losses.detach().double()
            carry.correct = carry.correct + correct(logits, y).flatten(1).sum(1)
        carry.steps += 1
        carry.seen += y[0].numel()
        return carry

    def finish(self, carry: _Training, growth: TensorDict) -> tuple[TensorDict, TensorDict]:
        n = [len(carry.plan)]
        host = TensorDict(
            {
                "params": as_tensordict(tree_map(torch.Tensor.detach, carry.params), n),
                "statistics": as_tensordict(carry.statistics, n),
                "moments": as_tensordict(like(carry.params, iter(carry.moments)), n),
            },
            batch_size=n,
        )
        bank = growth["seeds"]
        for (j, entry), seed in carry.seeds.items():
            rows = carry.members[j, entry]
            value = {
                "params": as_tensordict(tree_map(torch.Tensor.detach, seed), [len(rows)]),
                "moments": as_tensordict(like(seed, iter(carry.seed_moments[j, entry])), [len(rows)]),
            }
            bank = write(bank, (self.spec.slots[j], entry.blueprint), rows, TensorDict(value, batch_size=[len(rows)]))
        return growth.clone(recurse=False).update({"host": host, "seeds": bank}), self._measurements(carry)

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> _Scoring:
        """Lay out the rows of the coalition tree: one per (host, coalition prefix), new ones appended at each slot."""
        live_plan = tuple(tuple(e if e is not None and e.mode is Mode.BLEND else None for e in row) for row in plan)
        seeds, _, members = self._gather(growth["seeds"], self._splits(live_plan), lambda leaf: leaf)
        rows = [(i, 0) for i in range(len(plan))]
        levels: list[_Level] = []
        hosts = [self._index([i for i, _ in rows])]
        for j in range(len(self.spec.slots)):
            branching = split_slot([live_plan[i][j] for i, _ in rows], self.device)
            seats, owners = [], []
            for entry, where in zip(branching.entries, branching.rows, strict=True):
                seat = {host: at for at, host in enumerate(members[j, entry].tolist())}
                parents = [rows[r] for r in where.tolist()]
                owners.append(self._index([i for i, _ in parents]))
                seats.append(self._index([seat[i] for i, _ in parents]))
                rows = rows + [(i, m | 1 << j) for i, m in parents]
            levels.append(_Level(branching.entries, branching.rows, tuple(seats), tuple(owners)))
            hosts.append(self._index([i for i, _ in rows]))
        params, statistics = as_tree(growth["host", "params"]), as_tree(growth["host", "statistics"])
        at = {row: r for r, row in enumerate(rows)}
        full = [sum(1 << j for j in live_slots(row)) for row in plan]
        pairs = [(i, j) for i, row in enumerate(plan) for j in live_slots(row)]
        carry = _Scoring(
            levels=levels,
            params=[select(params, h) for h in hosts],
            statistics=[select(statistics, h) for h in hosts],
            seeds=seeds,
            alpha=growth["slots", "alpha"],
            coalition=rows,
            correct=torch.zeros(len(rows), dtype=torch.int64, device=self.device),
            differ=torch.zeros(len(pairs), dtype=torch.int64, device=self.device),
            loss=torch.zeros(len(plan), dtype=torch.float64, device=self.device),
            compare=(
                self._index([at[i, full[i]] for i, _ in pairs]),
                self._index([at[i, full[i] & ~(1 << j)] for i, j in pairs]),
            ),
            everyone=self._index([at[i, members_] for i, members_ in enumerate(full)]),
        )
        if calibration is not None:
            with torch.no_grad():
                self._coalition_logits(carry, calibration, recalibrate=True)
        return carry

    def evaluate_step(self, carry: _Scoring, x: Tensor, y: Tensor) -> _Scoring:
        with torch.no_grad():
            logits = self._coalition_logits(carry, x, recalibrate=False)
            right = correct(logits, y.expand(logits.shape[0], *y.shape)).flatten(1)
            carry.correct = carry.correct + right.sum(1)
            carry.differ = carry.differ + (right[carry.compare[0]] != right[carry.compare[1]]).sum(1)
            losses = vmap(mean_loss, in_dims=(0, None))(logits[carry.everyone], y)
            carry.loss = carry.loss + losses.double() * y.numel()
        carry.seen += y.numel()
        return carry

    def finish_evaluation(self, carry: _Scoring) -> TensorDict:
        n, n_slots = len(carry.everyone), len(self.spec.slots)
        scores = base.empty_scores(n, n_slots)
        counts, differ = carry.correct.tolist(), carry.differ.tolist()
        by_row = dict(zip(carry.coalition, counts, strict=True))
        live = [carry.coalition[r][1] for r in carry.everyone.tolist()]
        scores["loss"][:] = carry.loss.cpu()
        scores["seen"][:] = carry.seen
        for i in range(n):
            for members in range(2**n_slots):
                scores["correct"][i, members] = by_row[i, members & live[i]]
        pairs = [(i, j) for i in range(n) for j in range(n_slots) if live[i] >> j & 1]
        for (i, j), count in zip(pairs, differ, strict=True):
            scores["differ"][i, j] = count
        return scores

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _splits(self, plan: Plan) -> list[Split]:
        return [split_slot([row[j] for row in plan], self.device) for j in range(len(self.spec.slots))]

    def _gather(
        self, bank: TensorDict, splits: list[Split], prepare: Callable[[Tensor], Tensor]
    ) -> tuple[Seeds, dict[tuple[int, SlotPlan], list[Tensor]], dict[tuple[int, SlotPlan], Tensor]]:
        """The seeds a plan needs, stacked by group, with their moments and the hosts they belong to."""
        seeds: Seeds = {}
        moments, members = {}, {}
        for j, (slot, split) in enumerate(zip(self.spec.slots, splits, strict=True)):
            for entry, rows in zip(split.entries, split.rows, strict=True):
                kind = bank[slot, entry.blueprint][rows]
                seeds[j, entry] = tree_map(prepare, as_tree(kind["params"]))
                moments[j, entry] = leaves(as_tree(kind["moments"]))
                members[j, entry] = rows
        return seeds, moments, members

    def _forward(
        self,
        splits: list[Split],
        params: Tree,
        statistics: Tree,
        seeds: Seeds,
        alpha: Tensor,
        x: Tensor,
        keys: Tensor,
        *,
        insert_shadows: bool = False,
    ) -> tuple[Tensor, Tree]:
        """Training logits `[N, B, ...]` of all hosts and their statistics."""
        host = self.spec.host
        h = vmap(host.embed)(params, x, keys)
        done = 0
        for j, place in enumerate(self.spec.sites):
            h, statistics = self._blocks(params, statistics, h, keys, done, place.boundary)
            done = place.boundary
            split = splits[j]
            if split.entries:
                grafted = [
                    self._graft(inserted(entry) if insert_shadows else entry, seeds[j, entry], alpha[rows, j], h[rows])
                    for entry, rows in zip(split.entries, split.rows, strict=True)
                ]
                h = torch.cat([h[split.rest], *grafted])[split.inverse]
        h, statistics = self._blocks(params, statistics, h, keys, done, host.depth)
        return vmap(host.head)(params, h), statistics

    def _blocks(
        self, params: Tree, statistics: Tree, h: Tensor, keys: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tree]:
        def run(p: Tree, s: Tree, features: Tensor, key: Tensor) -> tuple[Tensor, Tree]:
            return self.spec.host.run_blocks(p, s, features, start, stop, momentum=BATCHNORM_MOMENTUM, key=key)

        return vmap(run, randomness="error")(params, statistics, h, keys)

    def _graft(self, entry: SlotPlan, seed: Tree, alpha: Tensor, h: Tensor) -> Tensor:
        def one(params: Tree, a: Tensor, features: Tensor) -> Tensor:
            return graft(self.spec.host.topology, entry, params, a, features)

        return vmap(one)(seed, alpha, h)

    def _shadow_loss(self, carry: _Training, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Summed losses of the pass in which shadowed seeds learn, fully inserted into hosts held fixed."""
        if not carry.shadowed:
            return torch.zeros((), device=self.device)
        fixed = tree_map(torch.Tensor.detach, carry.params)
        alpha = carry.alpha.clone()
        seeds: Seeds = {}
        for (j, entry), seed in carry.seeds.items():
            if entry.mode is Mode.SHADOW:
                alpha[carry.members[j, entry], j] = 1.0
                seeds[j, entry] = seed
            else:
                seeds[j, entry] = tree_map(torch.Tensor.detach, seed)
        logits, _ = self._forward(carry.splits, fixed, carry.statistics, seeds, alpha, x, keys, insert_shadows=True)
        return vmap(mean_loss)(logits, y).sum()

    def _coalition_logits(self, carry: _Scoring, x: Tensor, *, recalibrate: bool) -> Tensor:
        """Logits `[R, B, ...]` of all rows of the tree; with `recalibrate` the rows' statistics become those of `x`."""
        host = self.spec.host
        momentum = 1.0 if recalibrate else None

        def blocks(level: int, h: Tensor, start: int, stop: int) -> Tensor:
            def run(p: Tree, s: Tree, features: Tensor) -> tuple[Tensor, Tree]:
                return host.run_blocks(p, s, features, start, stop, momentum=momentum)

            h, statistics = vmap(run)(carry.params[level], carry.statistics[level], h)
            if recalibrate:
                carry.statistics[level] = statistics
            return h

        h = vmap(lambda p: host.embed(p, x))(carry.params[0])
        done = 0
        for j, place in enumerate(self.spec.sites):
            h = blocks(j, h, done, place.boundary)
            done = place.boundary
            level = carry.levels[j]
            branches = [h]
            for entry, rows, seats, owners in zip(level.entries, level.rows, level.seats, level.owners, strict=True):
                seed = select(carry.seeds[j, entry], seats)
                branches.append(self._graft(entry, seed, carry.alpha[owners, j], h[rows]))
            h = torch.cat(branches)
        last = len(self.spec.sites)
        h = blocks(last, h, done, host.depth)
        return vmap(host.head)(carry.params[last], h)

    def _measurements(self, carry: _Training) -> TensorDict:
        result = base.empty_measurements(len(carry.plan), len(self.spec.slots))
        result["loss"][:] = (carry.loss / max(1, carry.steps)).cpu()
        result["correct"][:] = carry.correct.cpu()
        result["seen"][:] = carry.seen
        for address, norms in (carry.norms or {}).items():
            norms = norms.cpu()
            if address == "host":
                result["host_norm"][:] = norms.norm(dim=0)
                continue
            rows, j = carry.members[address].cpu(), address[0]
            result["seed_norm"][rows, j] = norms.norm(dim=0)
            result["seed_health"][rows, j] = base.gradient_health(
                (norms < base.VANISHING_NORM).double().mean(0), (norms > base.EXPLODING_NORM).double().mean(0)
            )
        return result


def stacked_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each host's part of each tensor: float64 `[tensors, N]` from leaves `[N, ...]`."""
    return torch.stack([g.detach().double().reshape(g.shape[0], -1).norm(dim=1) for g in grads])


def select(tree: Tree, rows: Tensor) -> dict[str, Any]:
    """The rows of every leaf."""
    return tree_map(lambda leaf: leaf[rows], tree)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
