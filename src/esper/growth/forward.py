"""The specification: one host's forward pass as a pure function. Executors only transform it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.growth.plan import HostPlan, Mode, SlotPlan, shadow_plan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import tree_map
from esper.hosts.base import Tree
from esper.seeds import blending
from esper.seeds.blueprints import registry

Seeds = Sequence[Tree | None]
"""One host's seed parameters `{body, gate}` per slot; None where the plan has none."""

BATCHNORM_MOMENTUM = 0.1


def graft(topology: str, entry: SlotPlan, seed: Tree, alpha: Tensor, h: Tensor) -> Tensor:
    """Features `h` `[B, ...]` with a seed grafted on; `alpha` is a scalar.

    A straight-through seed sees detached features, so the host's gradients are those of a host without it.
    """
    apply = registry.get(topology, entry.blueprint).apply
    if entry.mode is Mode.STRAIGHT_THROUGH:
        return blending.straight_through(h, apply(seed["body"], h.detach()))
    if entry.mode is Mode.SHADOW:
        return h
    weight = alpha * blending.gate(seed["gate"], h) if entry.gated else alpha
    return blending.blend(h, apply(seed["body"], h), weight)


def forward(
    spec: GrowthSpec,
    plan: HostPlan,
    params: Tree,
    statistics: Tree,
    seeds: Seeds,
    alpha: Sequence[Tensor] | Tensor,
    x: Tensor,
    *,
    momentum: float | None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tree]:
    """Logits of one host and its statistics afterwards.

    Args:
        plan: what runs in each slot; None is a bypass, so a seed that contributes nothing cannot be felt.
        alpha: `[S]`, the records' alpha.
        x: `[B, ...]` inputs.
        momentum: None evaluates; a number trains and moves the BatchNorm statistics by that share.
        key: scalar int64 that draws dropout; None for none.
    """
    h = spec.host.embed(params, x, key)
    done = 0
    for j, place in enumerate(spec.sites):
        h, statistics = spec.host.run_blocks(params, statistics, h, done, place.boundary, momentum=momentum, key=key)
        done = place.boundary
        entry, seed = plan[j], seeds[j]
        if entry is not None and seed is not None:
            h = graft(spec.host.topology, entry, seed, alpha[j], h)
    h, statistics = spec.host.run_blocks(params, statistics, h, done, spec.host.depth, momentum=momentum, key=key)
    return spec.host.head(params, h), statistics


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in float32 or better, averaged over samples (and positions): logits `[..., classes]`, y `[...]`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), y.flatten())


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each prediction is right, bool, the shape of `y`."""
    return logits.argmax(dim=-1) == y


Segment = Callable[[int, int, Tensor, int, int], Tensor]
"""`segment(level, members, h, start, stop)`: run blocks for the coalition prefix `members` ."""


def coalition_logits(
    spec: GrowthSpec, plan: HostPlan, params: Tree, seeds: Seeds, alpha: Sequence[Tensor], x: Tensor, segment: Segment
) -> dict[int, Tensor]:
    """Logits of every coalition of one host's live slots, by bit set (bit `j` = slot `j`).

    A tree that branches at each live slot: coalitions share everything up to the slot where they part. Leaving a seed
    out is a bypass, exactly as if it had never been planted.
    """
    branches = {0: spec.host.embed(params, x)}
    done = 0
    for j, place in enumerate(spec.sites):
        branches = {m: segment(j, m, h, done, place.boundary) for m, h in branches.items()}
        done = place.boundary
        entry, seed = plan[j], seeds[j]
        if entry is not None and seed is not None and entry.mode is Mode.BLEND:
            grafted = {m | 1 << j: graft(spec.host.topology, entry, seed, alpha[j], h) for m, h in branches.items()}
            branches = branches | grafted
    last = len(spec.sites)
    branches = {m: segment(last, m, h, done, spec.host.depth) for m, h in branches.items()}
    return {m: spec.host.head(params, h) for m, h in branches.items()}


def shadow_loss(
    spec: GrowthSpec,
    plan: HostPlan,
    params: Tree,
    statistics: Tree,
    seeds: Seeds,
    alpha: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    key: Tensor | None,
) -> Tensor:
    """The loss from which shadowed seeds learn: fully inserted into a network held fixed. Zero without such seeds."""
    second = shadow_plan(plan)
    if second is None:
        return torch.zeros((), device=x.device)
    shadowed = [entry is not None and entry.mode is Mode.SHADOW for entry in plan]
    fixed = tree_map(torch.Tensor.detach, params)
    held = [
        seed if seed is None or mine else tree_map(torch.Tensor.detach, seed)
        for seed, mine in zip(seeds, shadowed, strict=True)
    ]
    full = [torch.ones_like(a) if mine else a for a, mine in zip(alpha, shadowed, strict=True)]
    logits, _ = forward(spec, second, fixed, statistics, held, full, x, momentum=BATCHNORM_MOMENTUM, key=key)
    return mean_loss(logits, y)


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, float64 `[len(tensors)]`."""
    return torch.stack([tensor.detach().double().norm() for tensor in tensors])
