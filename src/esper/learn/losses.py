"""The PPO objective of a factored action, and that of imitation: pure functions, and TorchRL loss modules around
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from esper.control.distributions import HeadTerms
from esper.control.policy import HIDDEN_KEYS, MASK_KEYS, RecurrentPolicy
from esper.seeds.actions import OP, Op

LOSSES = ("loss_objective", "loss_critic", "loss_entropy")


def factored_clip_objective(
    log_prob: Tensor,
    log_prob_old: Tensor,
    entropy: Tensor,
    relevant: Tensor,
    advantage: Tensor,
    value: Tensor,
    value_old: Tensor,
    value_target: Tensor,
    *,
    clip_ratio: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float | Tensor,
    entropy_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The three losses and what to know about them; minimise the sum of the losses.

    Per-head inputs `log_prob`, `log_prob_old`, `entropy`, `relevant` are `[..., 4]`, the others `[...]`. With the ratio
    r_h = exp(log_prob_h - log_prob_old_h) of head h and means taken over the steps where h is relevant,

        loss_objective = - sum_h mean_h min(r_h A, clip(r_h, 1 - eps, 1 + eps) A)       (Schulman et al. 2017, eq. 7)
        loss_critic    = value_coef / 2 mean max((V - R)^2, (V_old + clip(V - V_old, -v, v) - R)^2)
        loss_entropy   = - entropy_coef sum_h w_h mean_h H_h

    where `value_clip` None leaves only (V - R)^2, `entropy_coef` is a number or a tensor `[]`, and `entropy_weights`
    `[4]` default to one. A head relevant nowhere contributes 0. Detached diagnostics: `kl`, `clip_fraction`,
    `ratio_max`, `ratio_min`, `entropy` `[4]` over relevant steps, `relevant` `[4]` the share of such steps, and
    `kl_joint`, the estimate mean sum_h (r_h - 1 - ln r_h) of the divergence of the joint policy (a rare head counts by
    its frequency).
    """
    log_ratio = torch.where(relevant, log_prob - log_prob_old, 0.0)
    ratio = log_ratio.exp()
    gain = advantage.unsqueeze(-1)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * gain)
    drift = (ratio - 1 - log_ratio).detach()
    flat = _steps(ratio.detach())
    return {
        "loss_objective": -_mean_relevant(surrogate, relevant).sum(),
        "loss_critic": _critic(value, value_old, value_target, value_clip, value_coef),
        **_exploration(entropy, relevant, entropy_coef, entropy_weights),
        "kl": _mean_relevant(drift, relevant),
        "kl_joint": _steps(drift).sum(-1).mean(),
        "clip_fraction": _mean_relevant(((ratio.detach() - 1).abs() > clip_ratio).to(ratio.dtype), relevant),
        "ratio_max": flat.amax(0),
        "ratio_min": flat.amin(0),
    }


def imitation_objective(
    log_prob: Tensor,
    entropy: Tensor,
    relevant: Tensor,
    op: Tensor,
    value: Tensor,
    value_old: Tensor,
    value_target: Tensor,
    *,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float | Tensor,
    entropy_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of learning to act as was acted (behaviour cloning), whatever came of it; inputs as above, with the
    ops `op` `[...]` that were taken.

    Critic and entropy are those above, `loss_objective` is minus the sum of `log_prob` `[4]`: the log-probability of
    each head's choice, mean over the steps of an op, then over the ops that use the head. Every op counts alike,
    because a teacher that mostly waits would at first be imitated by doing nothing else.
    """
    members = (op.reshape(-1, 1) == torch.arange(len(Op), device=op.device)).to(log_prob.dtype)
    by_op = members.T @ _steps(torch.where(relevant, log_prob, 0.0)) / members.sum(0).clamp(min=1)[:, None]
    used = members.T @ _steps(relevant).to(log_prob.dtype) > 0
    likelihood = by_op.sum(0) / used.sum(0).clamp(min=1)
    return {
        "loss_objective": -likelihood.sum(),
        "loss_critic": _critic(value, value_old, value_target, value_clip, value_coef),
        **_exploration(entropy, relevant, entropy_coef, entropy_weights),
        "log_prob": likelihood.detach(),
    }


def _critic(value: Tensor, old: Tensor, target: Tensor, clip: float | None, coef: float) -> Tensor:
    error = (value - target).square()
    if clip is not None:
        error = torch.maximum(error, (old + (value - old).clamp(-clip, clip) - target).square())
    return 0.5 * coef * error.mean()


def _exploration(entropy: Tensor, relevant: Tensor, coef: float | Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """The entropy bonus, the entropy by head, and how often each head matters."""
    by_head = _mean_relevant(entropy, relevant)
    weighted = by_head if weights is None else weights * by_head
    return {
        "loss_entropy": -coef * weighted.sum(),
        "entropy": by_head.detach(),
        "relevant": _steps(relevant).to(entropy.dtype).mean(0),
    }


def _mean_relevant(x: Tensor, relevant: Tensor) -> Tensor:
    """Means `[4]` over the steps where a head is relevant."""
    return _steps(torch.where(relevant, x, 0.0)).sum(0) / _steps(relevant).sum(0).clamp(min=1)


def _steps(x: Tensor) -> Tensor:
    """`[..., 4]` as `[steps, 4]`."""
    return x.reshape(-1, x.shape[-1])


class FactoredPPOLoss(LossModule):
    """`factored_clip_objective` over stored rows `[N, T]` of a rollout.

    Reads the in_keys; `advantage` and `value_target` `[N, T, 1]` come from `learn.advantages`, `action_log_prob` and
    `state_value` from the rollout. Writes the out_keys: losses to be summed and optimised, and detached diagnostics.
    """

    @dataclass
    class _AcceptedKeys:
        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    out_keys = [  # noqa: RUF012 - the attribute TorchRL looks up
        *LOSSES,
        *("entropy", "relevant", "kl", "kl_joint", "clip_fraction", "ratio_max", "ratio_min"),
    ]

    def __init__(
        self,
        policy: RecurrentPolicy,
        *,
        clip_ratio: float = 0.2,
        value_clip: float | None = 10.0,
        value_coef: float = 0.5,
        entropy_coef: float | Tensor = 0.05,
        entropy_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.actor_network = policy
        self.clip_ratio, self.value_clip, self.value_coef = clip_ratio, value_clip, value_coef
        self.entropy_coef, self.entropy_weights = entropy_coef, entropy_weights

    @property
    def in_keys(self) -> list[NestedKey]:
        """What a rollout must hold."""
        stored = ["observation", *MASK_KEYS, "is_init", *HIDDEN_KEYS, "action", "action_log_prob", "state_value"]
        return [*stored, self.tensor_keys.advantage, self.tensor_keys.value_target]

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Advantages are computed outside (`learn.advantages`), so there is no estimator to tell."""

    def forward(self, tensordict: TensorDictBase, starts: Sequence[int] | None = None) -> TensorDict:
        """Losses and diagnostics for rows `[N, T]`, a TensorDict without batch dimensions; `starts` as in the policy's
        `evaluate`."""
        actions, value = self.actor_network.evaluate(tensordict, starts)
        values = self._objective(
            tensordict,
            actions.head_terms(tensordict["action"]),
            value=value.squeeze(-1),
            value_old=tensordict["state_value"].squeeze(-1),
            value_target=tensordict[self.tensor_keys.value_target].squeeze(-1),
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            entropy_weights=self.entropy_weights,
        )
        return TensorDict(values, batch_size=[])

    def _objective(self, rows: TensorDictBase, terms: HeadTerms, **critic_and_entropy: Any) -> dict[str, Tensor]:
        return factored_clip_objective(
            terms.log_prob,
            rows["action_log_prob"],
            terms.entropy,
            terms.relevant,
            rows[self.tensor_keys.advantage].squeeze(-1),
            clip_ratio=self.clip_ratio,
            **critic_and_entropy,
        )


class ImitationLoss(FactoredPPOLoss):
    """`imitation_objective` over rows `[N, T]` of a rollout in which somebody else acted; everything else as above."""

    out_keys = [*LOSSES, "entropy", "relevant", "log_prob"]  # noqa: RUF012 - the attribute TorchRL looks up

    @property
    def in_keys(self) -> list[NestedKey]:
        """What a rollout must hold: no advantages, and not how likely the actions were."""
        unread = ("action_log_prob", self.tensor_keys.advantage)
        return [key for key in super().in_keys if key not in unread]

    def _objective(self, rows: TensorDictBase, terms: HeadTerms, **critic_and_entropy: Any) -> dict[str, Tensor]:
        op = rows["action"][..., OP]
        return imitation_objective(terms.log_prob, terms.entropy, terms.relevant, op, **critic_and_entropy)
