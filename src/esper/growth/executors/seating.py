"""Who sits where: the plan of an epoch as data, so that one program serves every plan.

Each slot has seats, so many for each blueprint. Whatever differs between seeds of one blueprint (the host they belong
to, how they take part, whether a gate scales them, whether they still learn) is a number at their seat. A program
depends on the number of seats alone; a free seat computes nothing that anyone reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.growth.plan import Mode, Plan
from esper.growth.spec import GrowthSpec
from esper.values import upload

BYPASS, STRAIGHT, BLEND, SHADOW = range(4)
_CODES = {Mode.STRAIGHT_THROUGH: STRAIGHT, Mode.BLEND: BLEND, Mode.SHADOW: SHADOW}

Capacity = tuple[tuple[int, ...], ...]
"""Seats by slot and blueprint."""


@dataclass(frozen=True)
class Table:
    """A plan as tensors `[N, S]` on the CPU; `blueprint` is -1 and `mode` BYPASS where there is no seed."""

    blueprint: Tensor
    mode: Tensor
    gated: Tensor
    frozen: Tensor

    @property
    def live(self) -> Tensor:
        """Seeds that take part in the forward value, bool `[N, S]`."""
        return self.mode == BLEND

    def only_live(self) -> Table:
        """The plan without all other seeds: what there is to score."""
        off = ~self.live
        blueprint, mode = self.blueprint.masked_fill(off, -1), self.mode.masked_fill(off, BYPASS)
        return Table(blueprint, mode, self.gated, self.frozen)

    @property
    def uses_gate(self) -> Tensor:
        """Seeds whose gate takes part, bool `[N, S]`."""
        return self.gated & (self.mode != STRAIGHT)


def as_table(plan: Plan, spec: GrowthSpec) -> Table:
    """The plan as tensors."""
    number = {name: i for i, name in enumerate(spec.blueprints)}
    cells = [
        (-1, BYPASS, False, False) if e is None else (number[e.blueprint], _CODES[e.mode], e.gated, e.frozen)
        for row in plan
        for e in row
    ]
    values = torch.tensor(cells, dtype=torch.int64).view(len(plan), len(spec.slots), 4)
    return Table(values[..., 0], values[..., 1], values[..., 2].bool(), values[..., 3].bool())


def demand(chosen: Sequence[Tensor], kinds: int) -> Capacity:
    """Seats that the seeds of each slot need; `chosen[j]` lists the blueprints of the slot's seeds, -1 for none."""
    return tuple(tuple(torch.bincount(column[column >= 0], minlength=kinds).tolist()) for column in chosen)


def enlarged(wanted: Capacity, held: Capacity | None, limits: Sequence[int] | None) -> Capacity:
    """Capacity for `wanted` and no less than `held`; just that without `limits`.

    With them there is some to spare. What one blueprint needs in a slot another may need tomorrow, so every one of a
    slot gets at least half as much as the largest; all in steps of powers of two with half as much again, so that a run
    soon stops needing more. `limits[j]` bounds each entry of slot `j`.
    """

    def roomy(need: int, limit: int) -> int:
        return max(need, min(limit, 1 << (3 * need // 2 - 1).bit_length())) if need else 0

    held = held or tuple(tuple(0 for _ in row) for row in wanted)
    if fits(wanted, held):
        return held
    if limits is None:
        return tuple(tuple(map(max, row, old)) for row, old in zip(wanted, held, strict=True))
    return tuple(
        tuple(
            max(roomy(need, limit), have, -(-roomy(max(row), limit) // 2)) for need, have in zip(row, old, strict=True)
        )
        for row, old, limit in zip(wanted, held, limits, strict=True)
    )


def fits(wanted: Capacity, held: Capacity) -> bool:
    """Whether `held` has every seat that is wanted."""
    return all(a <= b for row, old in zip(wanted, held, strict=True) for a, b in zip(row, old, strict=True))


def fill(members: Sequence[Tensor], capacity: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Numbers by group put on seats: int64 `[R]` with 0 on free seats, and 1 where a seat is taken."""
    seats, taken = torch.zeros(sum(capacity), dtype=torch.int64), torch.zeros(sum(capacity), dtype=torch.int64)
    first = 0
    for group, room in zip(members, capacity, strict=True):
        seats[first : first + group.numel()] = group
        taken[first : first + group.numel()] = 1
        first += room
    return seats, taken


@dataclass(frozen=True)
class Seats:
    """One slot, on the device; all int64. For every seat `[R]`: `source`, the row of features it takes (0 when free),
    `active`, `gated`, `learning`. For every host `[N]`: its `seat`, -1 for none, and its `mode`."""

    capacity: tuple[int, ...]
    source: Tensor
    active: Tensor
    gated: Tensor
    learning: Tensor
    seat: Tensor
    mode: Tensor


@dataclass(frozen=True)
class Seating:
    """The seats of a plan. All of it lies in one tensor, `data`, which another plan of the same capacity can replace.
    `seat` `[N, S]` on the CPU is the seat of each host's seed, -1 for none.

    `data` has what `Seats` says: each of the four entries of seats for the seats of all slots, then each of the two of
    hosts for all slots.
    """

    capacity: Capacity
    seat: Tensor
    data: Tensor

    def slots(self, data: Tensor) -> list[Seats]:
        """The seats by slot, as views of `data`."""
        n, n_slots = self.seat.shape
        rooms = [sum(room) for room in self.capacity]
        by_seat, by_host = data.split([4 * sum(rooms), 2 * n * n_slots])
        columns = by_seat.view(4, sum(rooms)).split(rooms, dim=1)
        seat, mode = by_host.view(2, n_slots, n)
        return [Seats(room, *part, *own) for room, part, *own in zip(self.capacity, columns, seat, mode, strict=True)]

    def hosts(self, data: Tensor) -> Tensor:
        """The host on every seat of all slots, one slot after the other; 0 on free seats. A view of `data`."""
        return data[: sum(map(sum, self.capacity))]

    def members(self, slot: int) -> list[Tensor]:
        """The hosts on a slot's seats by blueprint, in the order of seats."""
        hosts = (self.seat[:, slot] >= 0).nonzero().squeeze(1)
        seats = self.seat[hosts, slot]
        ends = torch.tensor(self.capacity[slot]).cumsum(0)
        kind = torch.bucketize(seats, ends, right=True)
        return [hosts[kind == b] for b in range(len(ends))]


def seat_plan(table: Table, capacity: Capacity, device: torch.device) -> Seating:
    """Give every seed of the plan a seat; those of one blueprint sit in the order of their hosts."""
    rooms = torch.tensor(capacity)
    first = rooms.cumsum(1) - rooms
    of_kind = table.blueprint[..., None] == torch.arange(rooms.shape[1])
    seat = (of_kind * (first + of_kind.cumsum(0))).sum(2) - 1

    hosts, slots = (seat >= 0).nonzero(as_tuple=True)
    before = rooms.sum(1).cumsum(0) - rooms.sum(1)
    taken = torch.ones_like(hosts)
    values = torch.stack([hosts, taken, taken * table.gated[hosts, slots], taken * ~table.frozen[hosts, slots]])
    by_seat = torch.zeros(4, int(rooms.sum()), dtype=torch.int64)
    by_seat[:, before[slots] + seat[hosts, slots]] = values
    data = torch.cat([by_seat.flatten(), seat.T.flatten(), table.mode.T.flatten()])
    return Seating(capacity, seat, upload(data, device))
