"""The coalition tree of a stack of hosts: every coalition of live slots scored in one forward pass.

A row of the tree is one (host, prefix of a coalition). The tree starts with one row per host and branches at each live
slot; rows share everything up to the slot where they part. Leaving a seed out is a bypass, as if it was never planted.
Like training, the pass depends on the room it has and not on the plan: which row is whose is data.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from esper.growth.executors import base
from esper.growth.executors.grafting import branch, select_rows
from esper.growth.executors.packing import Layout, layout, pack
from esper.growth.executors.seating import (
    Capacity,
    Seating,
    Table,
    demand,
    enlarged,
    fill,
    fits,
    seat_plan,
)
from esper.growth.executors.seeds import addresses, fetch, grow, numbered, seat_columns, select, strength
from esper.growth.forward import correct, mean_loss
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tree
from esper.hosts import ops
from esper.hosts.base import Tree
from esper.values import download, upload


@dataclass(frozen=True)
class Room:
    """What a scoring program has room for: `seeds` by slot and blueprint, and the `branches` of the tree likewise
    (every prefix that a seed joins is one)."""

    seeds: Capacity
    branches: Capacity

    def holds(self, wanted: Room) -> bool:
        """Whether there is room for `wanted`."""
        return fits(wanted.seeds, self.seeds) and fits(wanted.branches, self.branches)


@dataclass(frozen=True)
class Branching:
    """One slot of the tree, on the device, all int64. For every branch `[D]`: the row it leaves (`source`), whether
    there is one (`active`), the seat of its seed and the host it belongs to (`owner`). For every row after the slot
    `[A]`: the row before it that it continues (`origin`), the branch whose seed is blended in (-1 for none), its host
    (`hosts`), and whether there is one (`used`)."""

    capacity: tuple[int, ...]
    source: Tensor
    active: Tensor
    seat: Tensor
    owner: Tensor
    origin: Tensor
    branch: Tensor
    hosts: Tensor
    used: Tensor


@dataclass(frozen=True)
class Coalitions:
    """The tree of a plan: its `data` for the device and, on the CPU, the row at the end of every (host, coalition),
    `[N, 2**S]`. Seeds that are not live count as left out."""

    room: Room
    data: Tensor
    leaf: Tensor

    def slots(self, data: Tensor) -> tuple[list[Branching], Tensor, Tensor]:
        """The slots as views of `data`; the row at the end with all live slots of each host `[N]`; those with one slot
        less `[N, S]`."""
        n, n_slots = self.leaf.shape[0], len(self.room.branches)
        found, first, rows = [], 0, n
        for capacity in self.room.branches:
            rows += sum(capacity)
            sizes = [sum(capacity)] * 4 + [rows] * 4
            found.append(Branching(capacity, *data[first : first + sum(sizes)].split(sizes)))
            first += sum(sizes)
        everyone, without = data[first:].split([n, n * n_slots])
        return found, everyone, without.view(n, n_slots)


@dataclass
class Scoring:
    """A stack of hosts being scored: the tree, what runs in it, and the counts so far.

    `params` and `statistics` `[N, ...]` are the growth state's. `seeds` `[T]` are those on all seats, packed as
    `layout` says; `rows` and `columns` `[T]` tell the seat and the column of the bank that each number belongs to.
    `levels` has what each part of the tree runs with: `params` and `statistics` of its rows, and the `seeds` of the
    branches at its end.
    """

    tree: Coalitions
    data: Tensor
    seating: Seating
    seats: Tensor
    params: Tree
    statistics: Tree
    layout: Layout
    rows: Tensor
    columns: Tensor
    seeds: Tensor
    alpha: Tensor
    correct: Tensor
    differ: Tensor
    loss: Tensor
    levels: list[Tree] = field(default_factory=list)
    seen: int = 0


def room_for(spec: GrowthSpec, live: Table) -> Room:
    """The room that scoring a plan of live seeds needs."""
    kinds = len(spec.blueprints)
    branches = demand([live.blueprint[hosts, j] for j, (hosts, _) in enumerate(_rows(live)[:-1])], kinds)
    return Room(demand(list(live.blueprint.T), kinds), branches)


def enlarged_room(wanted: Room, held: Room | None, n_hosts: int | None) -> Room:
    """Room for `wanted` and no less than `held`, with some to spare if the number of hosts, its limit, is given."""
    places = range(len(wanted.seeds))
    most, branching = (None, None) if n_hosts is None else ([n_hosts for _ in places], [n_hosts << j for j in places])
    seeds = enlarged(wanted.seeds, None if held is None else held.seeds, most)
    branches = enlarged(wanted.branches, None if held is None else held.branches, branching)
    # A branch needs a seed to run.
    seeds = tuple(
        tuple(max(a, min(1, b)) for a, b in zip(row, other, strict=True))
        for row, other in zip(seeds, branches, strict=True)
    )
    return Room(seeds, branches)


def lay_out(table: Table, seat: Tensor, room: Room, device: torch.device) -> Coalitions:
    """The tree of a plan of live seeds, who sit on `seat` `[N, S]`; new rows are appended at each slot."""
    n, n_slots = table.blueprint.shape
    rows, length = _rows(table), n
    data: list[Tensor] = []
    for j, capacity in enumerate(room.branches):
        length += sum(capacity)
        hosts, _ = rows[j]
        groups = _groups(table, hosts, j, len(capacity))
        leaving = torch.cat(groups)
        source, active = fill(groups, capacity)
        seats, _ = fill([seat[hosts[g], j] for g in groups], capacity)
        owner, _ = fill([hosts[g] for g in groups], capacity)
        old = torch.arange(hosts.shape[0])
        origin, used = fill([torch.cat([old, leaving])], [length])
        joins = torch.full((length,), -1)
        joins[hosts.shape[0] : hosts.shape[0] + leaving.shape[0]] = active.nonzero().squeeze(1)
        after, _ = fill([rows[j + 1][0]], [length])
        data += [source, active, seats, owner, origin, joins, after, used]
    live = (table.live.long() << torch.arange(n_slots)).sum(1)
    hosts, members = rows[-1]
    leaf = torch.zeros(n, 2**n_slots, dtype=torch.int64)
    leaf[hosts, members] = torch.arange(hosts.shape[0])
    leaf = leaf.gather(1, torch.arange(2**n_slots) & live[:, None])
    everyone = leaf[:, -1]
    without = leaf[:, (2**n_slots - 1) - (1 << torch.arange(n_slots))]
    return Coalitions(room, upload(torch.cat([*data, everyone, without.flatten()]), device), leaf)


def _rows(live: Table) -> list[tuple[Tensor, Tensor]]:
    """Host and coalition of every row before each slot, and at the end."""
    n, n_slots = live.blueprint.shape
    hosts, members = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    found = [(hosts, members)]
    for j in range(n_slots):
        kinds = int(live.blueprint[:, j].max()) + 1
        leaving = torch.cat([torch.zeros(0, dtype=torch.int64), *_groups(live, hosts, j, kinds)])
        hosts = torch.cat([hosts, hosts[leaving]])
        members = torch.cat([members, members[leaving] | 1 << j])
        found.append((hosts, members))
    return found


def _groups(live: Table, hosts: Tensor, slot: int, kinds: int) -> list[Tensor]:
    """The rows that branch at a slot, by blueprint."""
    kind = live.blueprint[hosts, slot]
    return [(kind == b).nonzero().squeeze(1) for b in range(kinds)]


def start(
    spec: GrowthSpec, growth: TensorDict, table: Table, room: Room, device: torch.device, alike: Scoring | None = None
) -> Scoring:
    """Nothing scored yet; `table` is a plan of live seeds. `alike` was started with as much room."""
    seating = seat_plan(table, room.seeds, device)
    tree = lay_out(table, seating.seat, room, device)
    n, n_slots = table.blueprint.shape
    if alike is None:
        seeds = seat_columns(spec, room.seeds, device)
        held = layout(numbered(spec, seeds, room.seeds, 0), seeds)
        rows = held.rows(device)
        columns = pack(seeds) if seeds else rows
    else:
        held, rows, columns = alike.layout, alike.rows, alike.columns
    address = addresses(seating.hosts(seating.data), rows, columns, spec.bank.width)
    return Scoring(
        tree=tree,
        data=tree.data,
        seating=seating,
        seats=seating.data,
        params=as_tree(growth["host", "params"]),
        statistics=as_tree(growth["host", "statistics"]),
        layout=held,
        rows=rows,
        columns=columns,
        seeds=fetch(growth["seeds", "params"], address),
        alpha=upload(growth["slots", "alpha"], device),
        correct=torch.zeros(n + sum(map(sum, room.branches)), dtype=torch.int64, device=device),
        differ=torch.zeros(n, n_slots, dtype=torch.int64, device=device),
        loss=torch.zeros(n, dtype=torch.float64, device=device),
    )


def levels(spec: GrowthSpec, scoring: Scoring) -> list[Tree]:
    """Parameters and running statistics of the rows of every level, and the seeds of its branches."""
    branchings, _, _ = scoring.tree.slots(scoring.data)
    params, statistics = scoring.params, scoring.statistics
    whole = scoring.layout.open(scoring.seeds)
    found: list[Tree] = []
    for slot, b, rooms in zip(spec.slots, branchings, scoring.tree.room.seeds, strict=True):
        seeds: dict[str, Any] = {}
        if slot in whole and b.source.shape[0]:
            body, first = {}, 0
            for name, room, seat in zip(spec.blueprints, rooms, b.seat.split(b.capacity), strict=True):
                if seat.shape[0]:
                    # Branches that are not there name seat 0, which another blueprint may own.
                    body[name] = select(whole[slot]["body"][name], (seat - first).clamp(min=0))
                first += room
            seeds = {"gate": select(whole[slot]["gate"], b.seat), "body": body}
        found.append({"params": params, "statistics": statistics, "seeds": seeds})
        params, statistics = select(scoring.params, b.hosts), select(scoring.statistics, b.hosts)
    return [*found, {"params": params, "statistics": statistics, "seeds": {}}]


def calibrated(spec: GrowthSpec, scoring: Scoring, x: Tensor) -> list[Tree]:
    """`levels` with the statistics of every row estimated on one batch `x` `[B, ...]`."""
    _, statistics = _run(spec, scoring, x, recalibrate=True)
    return [{**level, "statistics": s} for level, s in zip(scoring.levels, statistics, strict=True)]


def score(spec: GrowthSpec, scoring: Scoring, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one batch adds to `correct` (by row at the end), `differ` `[N, S]` and `loss` `[N]`; `y` `[N, B, ...]`."""
    branchings, everyone, without = scoring.tree.slots(scoring.data)
    logits, _ = _run(spec, scoring, x, recalibrate=False)
    right = correct(logits, y[branchings[-1].hosts]).flatten(1)
    differ = (right[everyone][:, None] != right[without]).sum(2)
    losses = vmap(mean_loss)(logits[everyone], y)
    return right.sum(1), differ, losses.double() * y[0].numel()


def tally(spec: GrowthSpec, scoring: Scoring) -> TensorDict:
    """The scores of `empty_scores`, on the CPU."""
    scores = base.empty_scores(scoring.loss.shape[0], len(spec.slots))
    right, differ, loss = download([scoring.correct, scoring.differ, scoring.loss])()
    scores["correct"][:], scores["differ"][:], scores["loss"][:] = right[scoring.tree.leaf], differ, loss
    scores["seen"][:] = scoring.seen
    return scores


def _run(spec: GrowthSpec, scoring: Scoring, x: Tensor, *, recalibrate: bool) -> tuple[Tensor, list[Tree]]:
    """Logits `[rows, B, ...]` at the end and the statistics of every level; with `recalibrate` those of `x`."""
    host = spec.host
    branchings, _, _ = scoring.tree.slots(scoring.data)
    seats = scoring.seating.slots(scoring.seats)
    momentum = 1.0 if recalibrate else None
    statistics: list[Tree] = []

    def blocks(level: int, h: Tensor, begin: int, stop: int) -> Tensor:
        def run(p: Tree, s: Tree, features: Tensor) -> tuple[Tensor, Tree]:
            return host.run_blocks(p, s, features, begin, stop, momentum=momentum)

        with ops.active(branchings[level - 1].used) if level else nullcontext():
            h, after = vmap(run)(scoring.levels[level]["params"], scoring.levels[level]["statistics"], h)
        statistics.append(after)
        return h

    h = vmap(lambda p: host.embed(p, x))(scoring.levels[0]["params"])
    done = 0
    for j, place in enumerate(spec.sites):
        h = blocks(j, h, done, place.boundary)
        done = place.boundary
        b, seeds = branchings[j], scoring.levels[j]["seeds"]
        if seeds:
            features = select_rows(h, b.source, b.active)
            grown = grow(spec, seeds, b.capacity, b.active, features)
            alpha = strength(seeds, scoring.alpha[b.owner, j], seats[j].gated[b.seat], features)
            h = branch(h, grown, alpha, b.origin, b.branch, b.used)
    h = blocks(len(spec.sites), h, done, host.depth)
    return vmap(host.head)(scoring.levels[-1]["params"], h), statistics
