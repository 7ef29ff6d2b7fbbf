"""The stacked executor: all hosts of a device advance as one program, by vmap over the pure per-host functions.

Host blocks are the same for every host, so they run stacked over all `N`. Seeds differ, so each slot is split into
groups of the same (blueprint, mode, gate) and every group runs stacked over its members. Nothing inside a step waits
for the device, and no step changes a tensor: it binds new ones to the carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from esper.growth import optim, precision
from esper.growth.executors import base, coalitions
from esper.growth.executors.coalitions import Scoring, graft_stack, lay_out, live_plan
from esper.growth.executors.groups import (
    Address,
    Seeds,
    Split,
    apply_groups,
    gather,
    scatter,
    split_plan,
    upload,
)
from esper.growth.executors.packing import Layout, layout, pack
from esper.growth.forward import BATCHNORM_MOMENTUM, correct, mean_loss
from esper.growth.plan import Mode, Plan, SlotPlan, inserted, shadow_plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts.base import Tree
from esper.hosts.ops import fused
from esper.values import changed


@dataclass
class Training:
    """A stack of hosts being trained; every tensor has the leading `N` or is a group's.

    `params`, `moments` and those of each group are packed, `[N, P]`; `layout` and `layouts` say how.
    """

    plan: Plan
    splits: list[Split]
    shadowed: bool
    layout: Layout
    params: Tensor
    moments: Tensor
    statistics: Tree
    layouts: dict[Address, Layout]
    members: dict[Address, Tensor]
    seeds: dict[Address, Tensor]
    seed_moments: dict[Address, Tensor]
    alpha: Tensor
    loss: Tensor
    correct: Tensor
    scale: dict[str, Tensor]
    norms: dict[Any, Tensor]
    steps: int = 0
    seen: int = 0


@dataclass(frozen=True)
class StackedExecutor:
    """Runs all hosts as one stack on `device`; see `Executor` for the contract. `kernels` allows the fused ones."""

    spec: GrowthSpec
    device: torch.device
    kernels: bool = False

    def begin(self, growth: TensorDict, plan: Plan) -> Training:
        return self.start(growth, plan, split_plan(plan, self.device))

    def start(self, growth: TensorDict, plan: Plan, splits: list[Split]) -> Training:
        """`begin` with the splits of the plan already made."""
        host, n = growth["host"], len(plan)
        params, statistics, moments = (as_tree(host[name]) for name in ("params", "statistics", "moments"))
        seeds, seed_moments = gather(self.spec, growth["seeds"], splits, moments=True)
        groups = [
            ((j, entry), rows) for j, s in enumerate(splits) for entry, rows in zip(s.entries, s.rows, strict=True)
        ]
        return Training(
            plan=plan,
            splits=splits,
            shadowed=any(shadow_plan(row) is not None for row in plan),
            layout=layout(params),
            params=pack(leaves(params)).requires_grad_(),
            moments=pack(leaves(moments)),
            statistics=tree_map(torch.Tensor.clone, statistics),
            layouts={address: layout(tree) for address, tree in seeds.items()},
            members=dict(groups),
            seeds={address: pack(leaves(tree)).requires_grad_() for address, tree in seeds.items()},
            seed_moments={address: pack(leaves(tree)) for address, tree in seed_moments.items()},
            alpha=growth["slots", "alpha"].clone(),
            loss=torch.zeros(n, dtype=torch.float64, device=self.device),
            correct=torch.zeros(n, dtype=torch.int64, device=self.device),
            scale={name: growth[name].clone() for name in precision.fresh_scale(self.spec.amp, 1)},
            norms={},
        )

    def train_step(
        self, carry: Training, x: Tensor, y: Tensor, host_lr: Tensor, seed_lr: Tensor, keys: Tensor, measure: bool
    ) -> Training:
        spec = self.spec
        params = carry.layout.open(carry.params)
        seeds = {address: carry.layouts[address].open(packed) for address, packed in carry.seeds.items()}
        with precision.autocast(spec.amp, self.device), fused(self.kernels):
            logits, statistics = self._forward(carry.splits, params, carry.statistics, seeds, carry.alpha, x, keys)
            losses = vmap(mean_loss)(logits, y)
            total = losses + self._shadow_losses(carry, params, seeds, x, y, keys)
        if carry.scale:
            total = total * carry.scale["loss_scale"]
        learning = [address for address in carry.seeds if not address[1].frozen]
        wanted = [carry.params, *(carry.seeds[address] for address in learning)]
        rows = [carry.members[address] for address in learning]
        grads = list(torch.autograd.grad(total.sum(), wanted, materialize_grads=True))
        with torch.no_grad():
            statistics = tree_map(torch.Tensor.detach, statistics)
            if carry.scale:
                scale = carry.scale["loss_scale"]
                grads = [precision.unscale([g], s)[0] for g, s in zip(grads, _each(scale, rows), strict=True)]
                ok = precision.all_finite(grads[:1], 1)
                own = [precision.all_finite([g], 1) for g in grads[1:]]
                # An incubating seed reaches nobody, so its overflow is its own; everybody shares the host's.
                for (_, entry), r, fine in zip(learning, rows, own, strict=True):
                    if entry.mode is Mode.BLEND:
                        ok = ok.index_copy(0, r, ok[r] & fine)
                good = [ok, *(ok[r] & fine for r, fine in zip(rows, own, strict=True))]
                grads = [precision.keep(o, [g], [torch.zeros_like(g)])[0] for o, g in zip(good, grads, strict=True)]
            if measure:
                norms = [stacked_norms(carry.layout.pieces(grads[0]))]
                norms += [stacked_norms(carry.layouts[a].pieces(g)) for a, g in zip(learning, grads[1:], strict=True)]
                carry.norms = dict(zip(("host", *learning), norms, strict=True))
            held = [carry.moments, *(carry.seed_moments[address] for address in learning)]
            seed_rates = upload(seed_lr, self.device)
            rates = [upload(host_lr, self.device), *(seed_rates[r] for r in rows)]
            decays = [spec.host_weight_decay, *[spec.seed_weight_decay] * len(rows)]
            stepped = [
                optim.sgd([p], [g], [m], lr, momentum=spec.momentum, weight_decay=decay)
                for p, g, m, lr, decay in zip(wanted, grads, held, rates, decays, strict=True)
            ]
            updated, moments = [p for (p,), _ in stepped], [m for _, (m,) in stepped]
            if carry.scale:
                updated = [precision.keep(o, [a], [b])[0] for o, a, b in zip(good, updated, wanted, strict=True)]
                moments = [precision.keep(o, [a], [b])[0] for o, a, b in zip(good, moments, held, strict=True)]
                kept = precision.keep(ok, leaves(statistics), leaves(carry.statistics))
                statistics = like(statistics, iter(kept))
                adapted = precision.adapt(carry.scale["loss_scale"], carry.scale["scale_age"], ok)
                carry.scale = dict(zip(("loss_scale", "scale_age"), adapted, strict=True))
            carry.params, *group_params = (p.detach().requires_grad_() for p in updated)
            carry.moments, *group_moments = moments
            carry.seeds = carry.seeds | dict(zip(learning, group_params, strict=True))
            carry.seed_moments = carry.seed_moments | dict(zip(learning, group_moments, strict=True))
            carry.statistics = statistics
            carry.loss = carry.loss + losses.detach().double()
            carry.correct = carry.correct + correct(logits, y).flatten(1).sum(1)
        carry.steps += 1
        carry.seen += y[0].numel()
        return carry

    def finish(self, carry: Training, growth: TensorDict) -> tuple[TensorDict, TensorDict]:
        n = [len(carry.plan)]
        host = TensorDict(
            {
                "params": as_tensordict(carry.layout.contiguous(carry.params), n),
                "statistics": as_tensordict(carry.statistics, n),
                "moments": as_tensordict(carry.layout.contiguous(carry.moments), n),
            },
            batch_size=n,
        )
        params = {a: layout.open(carry.seeds[a]) for a, layout in carry.layouts.items()}
        moments = {a: layout.open(carry.seed_moments[a]) for a, layout in carry.layouts.items()}
        bank = scatter(self.spec, growth["seeds"], params, moments, carry.members)
        trained = changed(growth, host=host, seeds=bank, **carry.scale)
        return trained, self._measurements(carry)

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> Scoring:
        carry = self.start_evaluation(growth, plan, lay_out(self.spec, plan, self.device))
        return carry if calibration is None else self.calibrate(carry, calibration)

    def start_evaluation(self, growth: TensorDict, plan: Plan, tree: coalitions.Coalitions) -> Scoring:
        """`begin_evaluation` with the tree already laid out and nothing calibrated."""
        live = split_plan(live_plan(plan), self.device)
        seeds, _ = gather(self.spec, growth["seeds"], live, moments=False)
        params, statistics = as_tree(growth["host", "params"]), as_tree(growth["host", "statistics"])
        return coalitions.start(tree, params, statistics, seeds, growth["slots", "alpha"])

    def calibrate(self, carry: Scoring, x: Tensor) -> Scoring:
        """Estimate every coalition's statistics on one batch."""
        with torch.no_grad(), precision.autocast(self.spec.amp, self.device), fused(self.kernels):
            carry.statistics = coalitions.calibrated(self.spec, carry, x)
        return carry

    def evaluate_step(self, carry: Scoring, x: Tensor, y: Tensor) -> Scoring:
        with torch.no_grad(), precision.autocast(self.spec.amp, self.device), fused(self.kernels):
            right, differ, loss = coalitions.score(self.spec, carry, x, y)
        carry.correct, carry.differ, carry.loss = carry.correct + right, carry.differ + differ, carry.loss + loss
        carry.seen += y.numel()
        return carry

    def finish_evaluation(self, carry: Scoring) -> TensorDict:
        return coalitions.tally(self.spec, carry)

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

            def grown(entry: SlotPlan, rows: Tensor, features: Tensor, slot: int = j) -> Tensor:
                runs = inserted(entry) if insert_shadows else entry
                return graft_stack(self.spec, runs, seeds[slot, entry], alpha[rows, slot], features)

            h = apply_groups(splits[j], h, grown)
        h, statistics = self._blocks(params, statistics, h, keys, done, host.depth)
        return vmap(host.head)(params, h), statistics

    def _blocks(
        self, params: Tree, statistics: Tree, h: Tensor, keys: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tree]:
        def run(p: Tree, s: Tree, features: Tensor, key: Tensor) -> tuple[Tensor, Tree]:
            return self.spec.host.run_blocks(p, s, features, start, stop, momentum=BATCHNORM_MOMENTUM, key=key)

        return vmap(run, randomness="error")(params, statistics, h, keys)

    def _shadow_losses(self, carry: Training, params: Tree, seeds: Seeds, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Losses `[N]` of the pass in which shadowed seeds learn, fully inserted into hosts held fixed."""
        if not carry.shadowed:
            return torch.zeros(len(carry.plan), device=self.device)
        fixed = tree_map(torch.Tensor.detach, params)
        alpha = carry.alpha.clone()
        held: Seeds = {}
        for (j, entry), seed in seeds.items():
            if entry.mode is Mode.SHADOW:
                alpha[:, j] = alpha[:, j].index_fill(0, carry.members[j, entry], 1.0)
                held[j, entry] = seed
            else:
                held[j, entry] = tree_map(torch.Tensor.detach, seed)
        logits, _ = self._forward(carry.splits, fixed, carry.statistics, held, alpha, x, keys, insert_shadows=True)
        return vmap(mean_loss)(logits, y)

    def _measurements(self, carry: Training) -> TensorDict:
        result = base.empty_measurements(len(carry.plan), len(self.spec.slots))
        result["loss"][:] = (carry.loss / max(1, carry.steps)).cpu()
        result["correct"][:] = carry.correct.cpu()
        result["seen"][:] = carry.seen
        for address, norms in carry.norms.items():
            norms = norms.cpu()
            if address == "host":
                result["host_norm"][:] = norms.norm(dim=0)
                continue
            rows, j = carry.members[address].cpu(), address[0]
            result["seed_norm"][rows, j] = norms.norm(dim=0)
            seed = carry.layouts[address].tree
            result["seed_health"][rows, j] = base.gradient_health(norms, seed, address[1])
        return result


def stacked_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each host's part of each tensor: float64 `[tensors, N]` from leaves `[N, ...]`."""
    return torch.stack([g.detach().double().reshape(g.shape[0], -1).norm(dim=1) for g in grads])


def _each(values: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Values `[N]` of all hosts, then of the members of each group."""
    return [values, *(values[r] for r in rows)]
