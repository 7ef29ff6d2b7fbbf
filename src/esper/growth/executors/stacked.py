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
    by_group,
    gather,
    scatter,
    split_plan,
    upload,
)
from esper.growth.forward import BATCHNORM_MOMENTUM, correct, mean_loss
from esper.growth.plan import Mode, Plan, SlotPlan, inserted, shadow_plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tensordict, as_tree, leaves, like, tree_map
from esper.hosts.base import Tree
from esper.hosts.ops import fused
from esper.values import changed


@dataclass
class Training:
    """A stack of hosts being trained; every tensor has the leading `N` or is a group's."""

    plan: Plan
    splits: list[Split]
    shadowed: bool
    params: dict[str, Any]
    statistics: Tree
    moments: list[Tensor]
    seeds: Seeds
    seed_moments: dict[Address, list[Tensor]]
    members: dict[Address, Tensor]
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
        seeds, moments, members = gather(self.spec, growth["seeds"], splits, _leaf)
        return Training(
            plan=plan,
            splits=splits,
            shadowed=any(shadow_plan(row) is not None for row in plan),
            params=tree_map(_leaf, as_tree(host["params"])),
            statistics=tree_map(torch.Tensor.clone, as_tree(host["statistics"])),
            moments=[m.clone() for m in leaves(as_tree(host["moments"]))],
            seeds=seeds,
            seed_moments=moments,
            members=members,
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
        with precision.autocast(spec.amp, self.device), fused(self.kernels):
            logits, statistics = self._forward(
                carry.splits, carry.params, carry.statistics, carry.seeds, carry.alpha, x, keys
            )
            losses = vmap(mean_loss)(logits, y)
            total = losses + self._shadow_losses(carry, x, y, keys)
        if carry.scale:
            total = total * carry.scale["loss_scale"]
        learning = [address for address in carry.seeds if not address[1].frozen]
        host_leaves = leaves(carry.params)
        groups = [leaves(carry.seeds[address]) for address in learning]
        wanted = host_leaves + [leaf for group in groups for leaf in group]
        grads = list(torch.autograd.grad(total.sum(), wanted, materialize_grads=True))
        host_grads, *group_grads = by_group(grads, [len(host_leaves), *map(len, groups)])
        with torch.no_grad():
            members = [carry.members[address] for address in learning]
            if carry.scale:
                scale = carry.scale["loss_scale"]
                host_grads = precision.unscale(host_grads, scale)
                group_grads = [precision.unscale(g, scale[m]) for g, m in zip(group_grads, members, strict=True)]
            if measure:
                carry.norms = {"host": stacked_norms(host_grads)}
                carry.norms |= {a: stacked_norms(g) for a, g in zip(learning, group_grads, strict=True)}
            params, moments = optim.sgd(
                host_leaves,
                host_grads,
                carry.moments,
                upload(host_lr, self.device),
                momentum=spec.momentum,
                weight_decay=spec.host_weight_decay,
            )
            rates = upload(seed_lr, self.device)
            stepped = [
                optim.sgd(
                    group,
                    group_grad,
                    carry.seed_moments[address],
                    rates[rows],
                    momentum=spec.momentum,
                    weight_decay=spec.seed_weight_decay,
                )
                for address, group, group_grad, rows in zip(learning, groups, group_grads, members, strict=True)
            ]
            statistics = tree_map(torch.Tensor.detach, statistics)
            if carry.scale:
                ok = precision.all_finite(host_grads, 1)
                for rows, group_grad in zip(members, group_grads, strict=True):
                    ok = ok.index_copy(0, rows, ok[rows] & precision.all_finite(group_grad, 1))
                params = precision.keep(ok, params, host_leaves)
                moments = precision.keep(ok, moments, carry.moments)
                kept = precision.keep(ok, leaves(statistics), leaves(carry.statistics))
                statistics = like(statistics, iter(kept))
                stepped = [
                    (precision.keep(ok[m], p, old), precision.keep(ok[m], v, carry.seed_moments[a]))
                    for (p, v), old, m, a in zip(stepped, groups, members, learning, strict=True)
                ]
                carry.scale = dict(zip(carry.scale, precision.adapt(*carry.scale.values(), ok), strict=True))
            carry.params = like(carry.params, (p.detach().requires_grad_() for p in params))
            carry.moments = moments
            carry.seeds, carry.seed_moments = dict(carry.seeds), dict(carry.seed_moments)
            for address, (group, group_moments) in zip(learning, stepped, strict=True):
                carry.seeds[address] = like(carry.seeds[address], (p.detach().requires_grad_() for p in group))
                carry.seed_moments[address] = group_moments
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
                "params": as_tensordict(tree_map(torch.Tensor.detach, carry.params), n),
                "statistics": as_tensordict(carry.statistics, n),
                "moments": as_tensordict(like(carry.params, iter(carry.moments)), n),
            },
            batch_size=n,
        )
        bank = scatter(self.spec, growth["seeds"], carry.seeds, carry.seed_moments, carry.members)
        trained = changed(growth, host=host, seeds=bank, **carry.scale)
        return trained, self._measurements(carry)

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> Scoring:
        carry = self.start_evaluation(growth, plan, lay_out(self.spec, plan, self.device))
        return carry if calibration is None else self.calibrate(carry, calibration)

    def start_evaluation(self, growth: TensorDict, plan: Plan, tree: coalitions.Coalitions) -> Scoring:
        """`begin_evaluation` with the tree already laid out and nothing calibrated."""
        seeds, _, _ = gather(self.spec, growth["seeds"], split_plan(live_plan(plan), self.device), lambda leaf: leaf)
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

    def _shadow_losses(self, carry: Training, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Losses `[N]` of the pass in which shadowed seeds learn, fully inserted into hosts held fixed."""
        if not carry.shadowed:
            return torch.zeros(len(carry.plan), device=self.device)
        fixed = tree_map(torch.Tensor.detach, carry.params)
        alpha = carry.alpha.clone()
        seeds: Seeds = {}
        for (j, entry), seed in carry.seeds.items():
            if entry.mode is Mode.SHADOW:
                alpha[:, j] = alpha[:, j].index_fill(0, carry.members[j, entry], 1.0)
                seeds[j, entry] = seed
            else:
                seeds[j, entry] = tree_map(torch.Tensor.detach, seed)
        logits, _ = self._forward(carry.splits, fixed, carry.statistics, seeds, alpha, x, keys, insert_shadows=True)
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
            result["seed_health"][rows, j] = base.gradient_health(
                (norms < base.VANISHING_NORM).double().mean(0), (norms > base.EXPLODING_NORM).double().mean(0)
            )
        return result


def stacked_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each host's part of each tensor: float64 `[tensors, N]` from leaves `[N, ...]`."""
    return torch.stack([g.detach().double().reshape(g.shape[0], -1).norm(dim=1) for g in grads])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
