"""The coalition tree of a stack of hosts: every coalition of live slots scored in one forward pass.

A row of the tree is one (host, prefix of a coalition). The tree starts with one row per host and branches at each live
slot; rows share everything up to the slot where they part. Leaving a seed out is a bypass, as if it was never planted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from esper.growth.executors import base
from esper.growth.executors.groups import Address, Seeds, index, select, split_slot
from esper.growth.forward import correct, graft, mean_loss
from esper.growth.plan import Mode, Plan, SlotPlan, live_slots
from esper.growth.spec import GrowthSpec
from esper.hosts.base import Tree


@dataclass(frozen=True)
class Level:
    """One slot of the tree, by group: the rows that branch, where their seeds lie in the group's stack, and the hosts
    they belong to."""

    entries: tuple[SlotPlan, ...]
    rows: tuple[Tensor, ...]
    seats: tuple[Tensor, ...]
    owners: tuple[Tensor, ...]


@dataclass(frozen=True)
class Coalitions:
    """The tree of a plan: its levels, the host of every row before each slot (and at the end), the (host, coalition) of
    every leaf, and which leaves are compared."""

    levels: tuple[Level, ...]
    hosts: tuple[Tensor, ...]
    leaves: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    """(host, live slot), in the order of `with_slot`, `without_slot`."""
    with_slot: Tensor
    without_slot: Tensor
    everyone: Tensor
    """The leaf of each host in which all its live slots take part, `[N]`."""


def live_plan(plan: Plan) -> Plan:
    """The plan with only the seeds that take part in the forward value."""
    return tuple(tuple(e if e is not None and e.mode is Mode.BLEND else None for e in row) for row in plan)


def lay_out(spec: GrowthSpec, plan: Plan, device: torch.device) -> Coalitions:
    """Build the tree of a plan; new rows are appended at each slot."""
    live = live_plan(plan)
    rows = [(i, 0) for i in range(len(plan))]
    levels, hosts = [], [index([i for i, _ in rows], device)]
    for j in range(len(spec.slots)):
        seat: dict[int, int] = {}
        taken: dict[SlotPlan, int] = {}
        for i, entry in enumerate(row[j] for row in live):
            if entry is not None:
                seat[i] = taken.get(entry, 0)
                taken[entry] = seat[i] + 1
        branching = split_slot([live[i][j] for i, _ in rows], device)
        seats, owners, grown = [], [], list(rows)
        for members in branching.members:
            parents = [rows[r] for r in members]
            owners.append(index([i for i, _ in parents], device))
            seats.append(index([seat[i] for i, _ in parents], device))
            grown += [(i, m | 1 << j) for i, m in parents]
        rows = grown
        levels.append(Level(branching.entries, branching.rows, tuple(seats), tuple(owners)))
        hosts.append(index([i for i, _ in rows], device))
    at = {row: r for r, row in enumerate(rows)}
    full = [sum(1 << j for j in live_slots(row)) for row in plan]
    pairs = tuple((i, j) for i, row in enumerate(plan) for j in live_slots(row))
    return Coalitions(
        levels=tuple(levels),
        hosts=tuple(hosts),
        leaves=tuple(rows),
        pairs=pairs,
        with_slot=index([at[i, full[i]] for i, _ in pairs], device),
        without_slot=index([at[i, full[i] & ~(1 << j)] for i, j in pairs], device),
        everyone=index([at[i, members] for i, members in enumerate(full)], device),
    )


@dataclass
class Scoring:
    """A stack of hosts being scored: the tree, what runs in it, and the counts so far.

    `params` and `statistics` have one stack per level of the tree, a row per row of the tree.
    """

    tree: Coalitions
    params: list[Tree]
    statistics: list[Tree]
    seeds: Seeds
    alpha: Tensor
    correct: Tensor
    differ: Tensor
    loss: Tensor
    seen: int = 0


def start(tree: Coalitions, params: Tree, statistics: Tree, seeds: Seeds, alpha: Tensor) -> Scoring:
    """Nothing scored yet; `params` and `statistics` are `[N, ...]`, scored with the running statistics."""
    device = alpha.device
    return Scoring(
        tree=tree,
        params=[select(params, h) for h in tree.hosts],
        statistics=[select(statistics, h) for h in tree.hosts],
        seeds=seeds,
        alpha=alpha,
        correct=torch.zeros(len(tree.leaves), dtype=torch.int64, device=device),
        differ=torch.zeros(len(tree.pairs), dtype=torch.int64, device=device),
        loss=torch.zeros(tree.everyone.shape[0], dtype=torch.float64, device=device),
    )


def calibrated(spec: GrowthSpec, scoring: Scoring, x: Tensor) -> list[Tree]:
    """Statistics of every row, estimated on one batch `x` `[B, ...]`."""
    return _run(spec, scoring, x, recalibrate=True)[1]


def score(spec: GrowthSpec, scoring: Scoring, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one batch adds to `correct` (by leaf), `differ` (by pair) and `loss` (by host)."""
    tree = scoring.tree
    logits, _ = _run(spec, scoring, x, recalibrate=False)
    right = correct(logits, y.expand(logits.shape[0], *y.shape)).flatten(1)
    differ = (right[tree.with_slot] != right[tree.without_slot]).sum(1)
    losses = vmap(mean_loss, in_dims=(0, None))(logits[tree.everyone], y)
    return right.sum(1), differ, losses.double() * y.numel()


def tally(spec: GrowthSpec, scoring: Scoring) -> TensorDict:
    """The scores of `empty_scores`, on the CPU."""
    tree, n_slots = scoring.tree, len(spec.slots)
    n = tree.everyone.shape[0]
    scores = base.empty_scores(n, n_slots)
    by_leaf = dict(zip(tree.leaves, scoring.correct.tolist(), strict=True))
    live = [0] * n
    for (i, j), count in zip(tree.pairs, scoring.differ.tolist(), strict=True):
        live[i] |= 1 << j
        scores["differ"][i, j] = count
    scores["loss"][:] = scoring.loss.cpu()
    scores["seen"][:] = scoring.seen
    scores["correct"][:] = torch.tensor([[by_leaf[i, m & live[i]] for m in range(2**n_slots)] for i in range(n)])
    return scores


def _run(spec: GrowthSpec, scoring: Scoring, x: Tensor, *, recalibrate: bool) -> tuple[Tensor, list[Tree]]:
    """Logits `[R, B, ...]` of all rows and their statistics, which with `recalibrate` are those of `x`."""
    host, tree = spec.host, scoring.tree
    momentum = 1.0 if recalibrate else None
    statistics: list[Tree] = []

    def blocks(level: int, h: Tensor, begin: int, stop: int) -> Tensor:
        def run(p: Tree, s: Tree, features: Tensor) -> tuple[Tensor, Tree]:
            return host.run_blocks(p, s, features, begin, stop, momentum=momentum)

        h, after = vmap(run)(scoring.params[level], scoring.statistics[level], h)
        statistics.append(after)
        return h

    h = vmap(lambda p: host.embed(p, x))(scoring.params[0])
    done = 0
    for j, place in enumerate(spec.sites):
        h = blocks(j, h, done, place.boundary)
        done = place.boundary
        level = tree.levels[j]
        branches = [h]
        for entry, rows, seats, owners in zip(level.entries, level.rows, level.seats, level.owners, strict=True):
            address: Address = (j, entry)
            seed = select(scoring.seeds[address], seats)
            branches.append(graft_stack(spec, entry, seed, scoring.alpha[owners, j], h.index_select(0, rows)))
        h = torch.cat(branches)
    h = blocks(len(spec.sites), h, done, host.depth)
    return vmap(host.head)(scoring.params[-1], h), statistics


def graft_stack(spec: GrowthSpec, entry: SlotPlan, seed: Tree, alpha: Tensor, h: Tensor) -> Tensor:
    """`graft` over a group: seeds, `alpha` `[members]` and features `[members, B, ...]`."""

    def one(params: Tree, a: Tensor, features: Tensor) -> Tensor:
        return graft(spec.host.topology, entry, params, a, features)

    return vmap(one)(seed, alpha, h)
