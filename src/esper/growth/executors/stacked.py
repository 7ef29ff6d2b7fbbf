"""The stacked executor: all hosts of a device advance as one program, by vmap over the pure per-host functions.

Host blocks are the same for every host, so they run stacked over all `N`. Seeds take seats, so many for each slot and
blueprint, and every blueprint runs stacked over its seats; what differs between its seeds is data at the seat
(`seating`). Nothing inside a step waits for the device, and no step changes a tensor: it binds new ones to the carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from esper.growth import precision
from esper.growth.executors import base, coalitions
from esper.growth.executors.coalitions import Room, Scoring
from esper.growth.executors.grafting import combine, take
from esper.growth.executors.packing import Layout, layout, pack
from esper.growth.executors.seating import (
    BLEND,
    SHADOW,
    Capacity,
    Seating,
    Seats,
    Table,
    as_table,
    demand,
    seat_plan,
)
from esper.growth.executors.seeds import (
    SlotSeeds,
    addresses,
    fetch,
    grow,
    numbered,
    put_back,
    seat_columns,
    strength,
)
from esper.growth.forward import BATCHNORM_MOMENTUM, correct, mean_loss
from esper.growth.plan import Plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts.base import Tree
from esper.hosts.ops import fused
from esper.values import changed, download, upload


@dataclass
class Training:
    """A stack of hosts being trained.

    `params` and `moments` `[T]` hold hosts and seeds, packed as `layout` says; `rows` `[T]` tells the row each number
    belongs to, `decay` `[T]` its weight decay, and `columns` the column of the bank of each number of the seeds, which
    are the last of them. `seats` is the data of the seating on the device.
    """

    table: Table
    seating: Seating
    layout: Layout
    rows: Tensor
    columns: Tensor
    decay: Tensor
    seats: Tensor
    params: Tensor
    moments: Tensor
    statistics: Tree
    alpha: Tensor
    loss: Tensor
    correct: Tensor
    scale: dict[str, Tensor]
    norms: Tree = field(default_factory=dict)
    steps: int = 0
    seen: int = 0
    told: Callable[[], list[Tensor]] = list


@dataclass(frozen=True)
class StackedExecutor(base.Roomless):
    """Runs all hosts as one stack on `device`; see `Executor` for the contract. `kernels` allows the fused ones."""

    spec: GrowthSpec
    device: torch.device
    kernels: bool = False

    @contextmanager
    def operators(self) -> Iterator[None]:
        """The context in which hosts and seeds run: which operators, at which precision."""
        with precision.autocast(self.spec.amp, self.device), fused(self.kernels, tf32=self.spec.amp == "tf32"):
            yield

    def begin(self, growth: TensorDict, plan: Plan) -> Training:
        table = as_table(plan, self.spec)
        return self.start(growth, table, self.seats_for(table))

    def seats_for(self, table: Table) -> Capacity:
        """The seats that training a plan needs."""
        return demand(list(table.blueprint.T), len(self.spec.blueprints))

    def start(self, growth: TensorDict, table: Table, capacity: Capacity, alike: Training | None = None) -> Training:
        """`begin` with that many seats; `alike` is a carry with as many, whose layout need not be made again."""
        n, bank = growth.batch_size[0], growth["seeds"]
        seating = seat_plan(table, capacity, self.device)
        host = {name: as_tree(growth["host", name]) for name in ("params", "statistics", "moments")}
        if alike is None:
            seeds = seat_columns(self.spec, capacity, self.device)
            tree = {"host": host["params"], "slots": seeds}
            held = layout([(host["params"], 0), *numbered(self.spec, seeds, capacity, n)], tree)
            rows = held.rows(self.device)
            columns = pack(seeds) if seeds else rows[:0]
            decay = torch.full(rows.shape, self.spec.seed_weight_decay, dtype=bank["params"].dtype, device=self.device)
            decay = decay.masked_fill(rows < n, self.spec.host_weight_decay)
        else:
            held, rows, columns, decay = alike.layout, alike.rows, alike.columns, alike.decay
        owner = _by_row(torch.arange(n, device=self.device), [seating.hosts(seating.data)])
        address = addresses(owner, rows, columns, self.spec.bank.width)
        return Training(
            table=table,
            seating=seating,
            layout=held,
            rows=rows,
            columns=columns,
            decay=decay,
            seats=seating.data,
            params=pack({"host": host["params"], "seeds": fetch(bank["params"], address)}).requires_grad_(),
            moments=pack({"host": host["moments"], "seeds": fetch(bank["moments"], address)}),
            statistics=tree_map(torch.Tensor.clone, host["statistics"]),
            alpha=upload(growth["slots", "alpha"], self.device).clone(),
            loss=torch.zeros(n, dtype=torch.float64, device=self.device),
            correct=torch.zeros(n, dtype=torch.int64, device=self.device),
            scale={name: growth[name].clone() for name in precision.fresh_scale(self.spec.amp, 1)},
        )

    def train_step(
        self, carry: Training, x: Tensor, y: Tensor, host_lr: Tensor, seed_lr: Tensor, keys: Tensor, measure: bool
    ) -> Training:
        spec, seats = self.spec, carry.seating.slots(carry.seats)
        with self.operators():
            tree = carry.layout.open(carry.params)
            logits, statistics = self._forward(tree, carry.statistics, seats, carry.alpha, x, keys)
            losses = vmap(mean_loss)(logits, y)
            total = losses
            if spec.rules.incubation == "shadow":
                total = losses + self._shadow_losses(carry, seats, x, y, keys)
        if carry.scale:
            total = total * carry.scale["loss_scale"]
        (grad,) = torch.autograd.grad(total.sum(), [carry.params])
        with torch.no_grad():
            statistics = tree_map(torch.Tensor.detach, statistics)
            moving = None
            if spec.freeze_fossils:
                moving = _by_row(torch.ones_like(losses, dtype=torch.bool), [s.learning > 0 for s in seats])
            if carry.scale:
                grad, stepping, ok = _checked(carry, seats, grad)
                moving = stepping if moving is None else moving & stepping
                kept = precision.keep(ok, leaves(statistics), leaves(carry.statistics))
                statistics = like(statistics, iter(kept))
                adapted = precision.adapt(carry.scale["loss_scale"], carry.scale["scale_age"], ok)
                carry.scale = dict(zip(("loss_scale", "scale_age"), adapted, strict=True))
            if measure:
                carry.norms = tree_map(row_norms, carry.layout.open(grad))
            slow, fast = upload(host_lr, self.device), upload(seed_lr, self.device)
            rate = _by_row(slow, [fast[s.source] for s in seats]).to(grad.dtype).index_select(0, carry.rows)
            moments = spec.momentum * carry.moments + (grad + carry.decay * carry.params)
            params = carry.params - rate * moments
            if moving is not None:
                moves = moving.index_select(0, carry.rows)
                params, moments = torch.where(moves, params, carry.params), torch.where(moves, moments, carry.moments)
            carry.params, carry.moments = params.detach().requires_grad_(), moments
            carry.statistics = statistics
            carry.loss = carry.loss + losses.detach().double()
            carry.correct = carry.correct + correct(logits, y).flatten(1).sum(1)
        carry.steps += 1
        carry.seen += y[0].numel()
        return carry

    def finish(self, carry: Training, growth: TensorDict) -> TensorDict:
        n, norms = list(growth.batch_size), leaves(carry.norms)
        carry.told = download([carry.loss, carry.correct, *([torch.cat(norms)] if norms else [])])
        params, moments = (carry.layout.open(packed.detach()) for packed in (carry.params, carry.moments))
        # Copies, because a view would keep the whole vector with all its seats.
        host = TensorDict(
            {
                "params": as_tensordict(tree_map(torch.Tensor.clone, params["host"]), n),
                "statistics": as_tensordict(carry.statistics, n),
                "moments": as_tensordict(tree_map(torch.Tensor.clone, moments["host"]), n),
            },
            batch_size=n,
        )
        return changed(growth, host=host, seeds=self._banked(carry, growth["seeds"]), **carry.scale)

    def _banked(self, carry: Training, bank: TensorDict) -> TensorDict:
        """`bank` with the seeds on all taken seats put back."""
        count, n = carry.columns.shape[0], carry.loss.shape[0]
        if count == 0:
            return bank
        # A free seat belongs to nobody: to a host behind the last.
        owners = [torch.where(s.active > 0, s.source, n) for s in carry.seating.slots(carry.seats)]
        owner = _by_row(torch.arange(n, device=self.device), owners)
        address = addresses(owner, carry.rows, carry.columns, self.spec.bank.width)
        params, moments = (packed.detach()[-count:] for packed in (carry.params, carry.moments))
        return changed(
            bank,
            params=put_back(bank["params"], address, params),
            moments=put_back(bank["moments"], address, moments),
        )

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> Scoring:
        table = as_table(plan, self.spec).only_live()
        return self.prepare(self.start_evaluation(growth, table, coalitions.room_for(self.spec, table)), calibration)

    def start_evaluation(self, growth: TensorDict, table: Table, room: Room, alike: Scoring | None = None) -> Scoring:
        """`begin_evaluation` of a plan of live seeds, with that much room and nothing prepared; `alike` is a carry with
        as much, whose layout need not be made again."""
        return coalitions.start(self.spec, growth, table, room, self.device, alike)

    def prepare(self, carry: Scoring, calibration: Tensor | None) -> Scoring:
        """Bring parameters to the rows that need them and estimate every coalition's statistics."""
        with torch.no_grad(), self.operators():
            carry.levels = coalitions.levels(self.spec, carry)
            if calibration is not None:
                carry.levels = coalitions.calibrated(self.spec, carry, calibration)
        return carry

    def evaluate_step(self, carry: Scoring, x: Tensor, y: Tensor) -> Scoring:
        with torch.no_grad(), self.operators():
            right, differ, loss = coalitions.score(self.spec, carry, x, y)
        carry.correct, carry.differ, carry.loss = carry.correct + right, carry.differ + differ, carry.loss + loss
        carry.seen += y[0].numel()
        return carry

    def finish_evaluation(self, carry: Scoring) -> TensorDict:
        return coalitions.tally(self.spec, carry)

    def _forward(
        self, tree: Tree, statistics: Tree, seats: Sequence[Seats], alpha: Tensor, x: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tree]:
        """Training logits `[N, B, ...]` of all hosts and their statistics."""
        host, params = self.spec.host, tree["host"]
        h = vmap(host.embed)(params, x, keys)
        done = 0
        for j, place in enumerate(self.spec.sites):
            h, statistics = self._blocks(params, statistics, h, keys, done, place.boundary)
            done = place.boundary
            if self.spec.slots[j] in tree["slots"]:
                h = self._graft(tree["slots"][self.spec.slots[j]], seats[j], alpha[:, j], h)
        h, statistics = self._blocks(params, statistics, h, keys, done, host.depth)
        return vmap(host.head)(params, h), statistics

    def _graft(self, seeds: SlotSeeds, seats: Seats, alpha: Tensor, h: Tensor) -> Tensor:
        features = take(h, seats)
        grown = grow(self.spec, seeds, seats.capacity, seats.active, features)
        return combine(h, grown, strength(seeds, alpha[seats.source], seats.gated, features), seats)

    def _blocks(
        self, params: Tree, statistics: Tree, h: Tensor, keys: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tree]:
        def run(p: Tree, s: Tree, features: Tensor, key: Tensor) -> tuple[Tensor, Tree]:
            return self.spec.host.run_blocks(p, s, features, start, stop, momentum=BATCHNORM_MOMENTUM, key=key)

        return vmap(run, randomness="error")(params, statistics, h, keys)

    def _shadow_losses(self, carry: Training, seats: Sequence[Seats], x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Losses `[N]` of the pass in which shadowed seeds learn, fully inserted into hosts held fixed."""
        shadowed = torch.stack([s.mode == SHADOW for s in seats], dim=1)
        learns = _by_row(
            torch.zeros_like(shadowed[:, 0]), [shadowed[s.source, j] & (s.active > 0) for j, s in enumerate(seats)]
        )
        tree = carry.layout.open(torch.where(learns.index_select(0, carry.rows), carry.params, carry.params.detach()))
        whole = torch.where(shadowed, torch.ones_like(carry.alpha), carry.alpha)
        inserted = [replace(s, mode=torch.where(shadowed[:, j], BLEND, s.mode)) for j, s in enumerate(seats)]
        logits, _ = self._forward(tree, carry.statistics, inserted, whole, x, keys)
        return vmap(mean_loss)(logits, y)

    def measured(self, carry: Training) -> TensorDict:
        n, table = carry.loss.shape[0], carry.table
        result = base.empty_measurements(n, len(self.spec.slots))
        loss, correct, *joined = carry.told()
        result["loss"][:] = loss / max(1, carry.steps)
        result["correct"][:] = correct
        result["seen"][:] = carry.seen
        if not joined:
            return result
        norms = like(carry.norms, iter(joined[0].split([leaf.shape[0] for leaf in leaves(carry.norms)])))
        result["host_norm"][:] = torch.stack(leaves(norms["host"])).norm(dim=0)
        for j, slot in enumerate(self.spec.slots):
            first = 0
            members = carry.seating.members(j)
            for b, (rows, room) in enumerate(zip(members, carry.seating.capacity[j], strict=True)):
                if rows.numel():
                    seeds, count = norms["slots"][slot], rows.numel()
                    body = torch.stack([v[:count] for v in leaves(seeds["body"][self.spec.blueprints[b]])])
                    gate = torch.stack([v[first : first + count] for v in leaves(seeds["gate"])])
                    whole = torch.cat([body, gate])
                    health = torch.where(
                        table.uses_gate[rows, j], base.gradient_health(whole), base.gradient_health(body)
                    )
                    learns = ~table.frozen[rows, j]
                    result["seed_norm"][rows[learns], j] = whole.norm(dim=0)[learns]
                    result["seed_health"][rows[learns], j] = health[learns]
                first += room
        return result


def row_norms(grad: Tensor) -> Tensor:
    """L2 norm of each row's part of a leaf `[rows, ...]`: float64 `[rows]`."""
    return grad.double().reshape(grad.shape[0], -1).norm(dim=1)


def _by_row(hosts: Tensor, seats: Sequence[Tensor]) -> Tensor:
    """Values of all rows: of the hosts `[N]`, then of the seats `[R]` of every slot."""
    return torch.cat([hosts, *seats])


def _checked(carry: Training, seats: Sequence[Seats], grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unscaled gradients, zero where a step is skipped; which rows step; which hosts do `[N]`.

    An incubating seed reaches nobody, so its overflow is its own; host and blended seeds share theirs and the scale.
    """
    scale = carry.scale["loss_scale"]
    inverse = 1.0 / _by_row(scale, [scale[s.source] for s in seats])
    grad = grad * inverse.index_select(0, carry.rows).to(grad.dtype)
    broken = torch.zeros_like(inverse).index_add(0, carry.rows, (~grad.isfinite()).to(inverse.dtype))
    ok, *fine = (broken == 0).split([scale.shape[0], *(s.source.shape[0] for s in seats)])
    for s, good in zip(seats, fine, strict=True):
        # Seat -1 of hosts without a seed is the last entry, which is always good.
        shared = torch.cat([good | (s.learning == 0), torch.ones_like(ok[:1])])[s.seat]
        ok = ok & (shared | (s.mode != BLEND))
    steps = _by_row(ok, [ok[s.source] & good for s, good in zip(seats, fine, strict=True)])
    return torch.where(steps.index_select(0, carry.rows), grad, torch.zeros_like(grad)), steps, ok
