"""One rollout in, a better policy out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.control.policy import RecurrentPolicy
from esper.control.recurrence import restarts
from esper.keys import fold, permutation
from esper.learn.advantages import gae, standardize
from esper.learn.losses import LOSSES, FactoredPPOLoss, ImitationLoss
from esper.seeds.actions import HEADS

KL_MARGIN = 1.5
_PARTS = {
    **{head: f"heads.{head}." for head in HEADS},
    **{part: f"{part}." for part in ("features", "memory", "value")},
}
"""How the parameters of each part of a policy begin that has a norm of its own."""
_CHECKED: tuple[str | tuple[str, ...], ...] = (
    *("observation", "action_log_prob", "state_value"),
    *(("next", "observation"), ("next", "reward")),
)


class UpdateObserver(Protocol):
    """What looks at an update while it happens, for diagnostics; it must not change what it is shown."""

    def evaluated(
        self, policy: RecurrentPolicy, rows: TensorDictBase, hosts: Tensor, metrics: Mapping[str, float]
    ) -> None:
        """The losses of `rows` `[n, T]`, those of the hosts `hosts` `[n]`, are known."""

    def differentiated(self, policy: RecurrentPolicy) -> None:
        """The gradients of a step are known and not yet clipped."""


@dataclass(frozen=True)
class PPOSettings:
    """How a policy learns from a rollout: to act better, or with `imitate` to act like whoever acted in it. Units:
    rewards and values in units of the reward normaliser."""

    ppo_updates_per_batch: int = 4
    minibatches: int = 1
    gamma: float = 0.995
    gae_lambda: float = 0.97
    clip_ratio: float = 0.2
    value_clip: float | None = 10.0
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = 0.015
    entropy_coef: float = 0.05
    entropy_coef_start: float | None = None
    entropy_coef_end: float | None = None
    entropy_coef_min: float = 0.01
    entropy_anneal_steps: int = 0
    entropy_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # of the heads, in the order of HEADS
    imitate: bool = False


class Checks(NamedTuple):
    """What there is to know of gradients before they are used, scalars on their device: norms by `grad_norm` and
    `grad_norm/<part>`, and by parameter whether everything is finite."""

    norms: dict[str, Tensor]
    finite: dict[str, Tensor]


class Evaluation(NamedTuple):
    """The detached outputs of the loss for some rows, and what puts its gradients into `.grad`, whatever was there
    before; both are good until the next evaluation."""

    outputs: TensorDictBase
    differentiate: Callable[[], Checks]


class Gradients(Protocol):
    """How losses and gradients come about: `eager_gradients`, or a recording of the same."""

    def __call__(
        self,
        policy: RecurrentPolicy,
        rows: TensorDictBase,
        starts: Sequence[int],
        settings: PPOSettings,
        entropy_coef: float,
    ) -> Evaluation:
        """For rows `[n, T]`, which restart at the steps `starts` (`restarts` of their `is_init`)."""


def anneal_steps(episodes: int, n_hosts: int, updates_per_batch: int) -> int:
    """Update steps that `episodes` episodes bring: a rollout is one episode of each of `n_hosts` hosts.

    Raises ValueError if `n_hosts` is not positive.
    """
    if n_hosts < 1:
        raise ValueError(f"n_hosts is {n_hosts}; annealing needs at least 1 host")
    return math.ceil(max(0, episodes) / n_hosts) * max(1, updates_per_batch)


def entropy_coefficient(step: int, settings: PPOSettings) -> float:
    """Weight of the entropy bonus after `step` update steps: linear from start to end, never below the floor.

    `step` counts the steps that were due (rollouts times updates per rollout), so an early stop does not slow the
    annealing down. Without annealing the weight is `entropy_coef`.
    """
    if settings.entropy_anneal_steps == 0:
        return max(settings.entropy_coef_min, settings.entropy_coef)
    start = settings.entropy_coef if settings.entropy_coef_start is None else settings.entropy_coef_start
    end = settings.entropy_coef if settings.entropy_coef_end is None else settings.entropy_coef_end
    progress = min(1.0, step / settings.entropy_anneal_steps)
    return max(settings.entropy_coef_min, start + progress * (end - start))


def explained_variance(value: Tensor, target: Tensor) -> float:
    """Share of the variance of `target` that `value` explains; 0 where the target hardly varies."""
    variance = target.var(unbiased=False)
    return float(1 - (target - value).var(unbiased=False) / variance) if variance > 1e-8 else 0.0


def with_advantages(policy: RecurrentPolicy, rollout: TensorDictBase, settings: PPOSettings) -> TensorDictBase:
    """The rollout `[N, T]` with `advantage` (standardised over all steps) and `value_target`, both `[N, T, 1]`."""
    with torch.no_grad():
        following = policy.next_value(rollout).squeeze(-1)
    step = rollout["next"]
    advantage, target = gae(
        step["reward"].squeeze(-1),
        rollout["state_value"].squeeze(-1),
        following,
        step["terminated"].squeeze(-1),
        step["done"].squeeze(-1),
        gamma=settings.gamma,
        lmbda=settings.gae_lambda,
    )
    prepared = rollout.copy()
    prepared["advantage"] = standardize(advantage).unsqueeze(-1)
    prepared["value_target"] = target.unsqueeze(-1)
    return prepared


def ppo_loss(policy: RecurrentPolicy, settings: PPOSettings, entropy_coef: float | Tensor) -> FactoredPPOLoss:
    """The loss of `settings`, on the device of `policy`."""
    device = next(policy.parameters()).device
    kind = ImitationLoss if settings.imitate else FactoredPPOLoss
    return kind(
        policy,
        clip_ratio=settings.clip_ratio,
        value_clip=settings.value_clip,
        value_coef=settings.value_coef,
        entropy_coef=entropy_coef,
        entropy_weights=torch.tensor(settings.entropy_weights, device=device),
    )


def checks(gradients: Mapping[str, Tensor]) -> Checks:
    """Of the gradients of a policy by parameter, in the policy's order."""
    norms = {
        f"grad_norm/{part}": nn.utils.get_total_norm([g for name, g in gradients.items() if name.startswith(prefix)])
        for part, prefix in _PARTS.items()
    }
    norms["grad_norm"] = nn.utils.get_total_norm(gradients.values())
    return Checks(norms, {name: g.isfinite().all() for name, g in gradients.items()})


def gradients_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients that a backward pass left, by parameter."""
    return {name: p.grad for name, p in parameters if p.grad is not None}


def eager_gradients(
    policy: RecurrentPolicy, rows: TensorDictBase, starts: Sequence[int], settings: PPOSettings, entropy_coef: float
) -> Evaluation:
    """See `Gradients`. Those that are not asked for are not computed."""
    outputs = ppo_loss(policy, settings, entropy_coef)(rows, starts)

    def differentiate() -> Checks:
        policy.zero_grad()
        sum(outputs[name] for name in LOSSES).backward()
        return checks(gradients_of(policy.named_parameters()))

    return Evaluation(outputs.detach(), differentiate)


def ppo_update(
    policy: RecurrentPolicy,
    optimizer: Optimizer,
    rollout: TensorDictBase,
    settings: PPOSettings,
    *,
    entropy_coef: float,
    key: Tensor,
    observer: UpdateObserver | None = None,
    gradients: Gradients = eager_gradients,
) -> dict[str, float]:
    """Improve `policy` in place on one rollout `[N, T]`; returns metrics.

    The rollout holds the keys of `docs/design.md`, section 4, and `next.observation`, `next.hidden_h`, `next.hidden_c`;
    its rewards are already scaled. Each of `ppo_updates_per_batch` passes takes `minibatches` steps over disjoint
    groups of hosts, grouped by `key` (scalar int64). Ratios refer to the rollout's own log-probabilities throughout.

    A step is not taken, and none after it, if the joint policy has already drifted by more than 1.5 `target_kl`
    (`stopped_early` 1), or if something is not finite: then `non_finite/<source>` names the rollout entries, losses or
    gradients at fault, and weights and optimiser state stay as the last good step left them.

    Metrics: means over the losses evaluated, extremes for ratios, the last value for the divergences; `<name>/<head>`
    per head; `grad_norm` before clipping. `observer` looks on; `gradients` says how losses and gradients come about.
    Raises ValueError if there are more minibatches than hosts.
    """
    if settings.minibatches > rollout.shape[0]:
        raise ValueError(f"minibatches is {settings.minibatches}; a rollout of {rollout.shape[0]} hosts allows no more")
    sound = torch.stack([rollout[k].isfinite().all() for k in _CHECKED]).tolist()
    faults = [_name(k) for k, finite in zip(_CHECKED, sound, strict=True) if not finite]
    if faults:
        return {"updates": 0.0, **{f"non_finite/{name}": 1.0 for name in faults}}
    prepared = with_advantages(policy, rollout, settings)
    metrics = {"explained_variance": explained_variance(rollout["state_value"], prepared["value_target"])}
    is_init = rollout["is_init"].squeeze(-1).to(key.device)
    history: list[dict[str, float]] = []
    norms: list[dict[str, float]] = []
    stopped = False
    for hosts in _minibatches(rollout.shape[0], settings, key):
        rows = prepared if settings.minibatches == 1 else prepared[hosts]
        outputs, differentiate = gradients(policy, rows, restarts(is_init[hosts]), settings, entropy_coef)
        seen = _scalars(outputs)
        if observer is not None:
            observer.evaluated(policy, rows, hosts, seen)
        faults = [name for name in LOSSES if not math.isfinite(seen[name])]
        if faults:
            break
        history.append(seen)
        stopped = settings.target_kl is not None and seen["kl_joint"] > KL_MARGIN * settings.target_kl
        if stopped:
            break
        norm, finite = differentiate()
        if observer is not None:
            observer.differentiated(policy)
        numbers = _scalars({**norm, **finite})
        faults = [f"gradient/{name}" for name in finite if not numbers[name]]
        if faults:
            break
        norms.append({name: numbers[name] for name in norm})
        nn.utils.clip_grads_with_norm_(policy.parameters(), settings.max_grad_norm, norm["grad_norm"])
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics |= {"updates": float(len(norms)), "stopped_early": float(stopped), "entropy_coef": entropy_coef}
    return metrics | _summary(history) | _mean(norms) | {f"non_finite/{name}": 1.0 for name in faults}


def _minibatches(n_hosts: int, settings: PPOSettings, key: Tensor) -> Iterator[Tensor]:
    everyone = torch.arange(n_hosts, device=key.device)
    for index in range(settings.ppo_updates_per_batch):
        order = everyone if settings.minibatches == 1 else permutation(fold(key, index), n_hosts)
        yield from order.tensor_split(settings.minibatches)


def _name(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else ".".join(key)


def _scalars(outputs: TensorDictBase | Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars by name and per-head entries by `name/head`, read in one transfer."""
    names = [k if v.ndim == 0 else f"{k}/{h}" for k, v in outputs.items() for h in (HEADS if v.ndim else ("",))]
    numbers = torch.cat([v.detach().reshape(-1) for v in outputs.values()]).tolist()
    return dict(zip(names, numbers, strict=True))


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def _summary(history: list[dict[str, float]]) -> dict[str, float]:
    """One number per name: extremes stay extremes, divergences are the last ones measured, the rest are means."""
    summary = _mean(history)
    for name in summary:
        column = [row[name] for row in history]
        if name.startswith("ratio_max"):
            summary[name] = max(column)
        elif name.startswith("ratio_min"):
            summary[name] = min(column)
        elif name.startswith("kl"):
            summary[name] = column[-1]
    return summary
