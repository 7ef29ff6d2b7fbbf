"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float,
    lmbda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets `[N, T]` (Schulman et al. 2016, equation 16), every row on its own.

    `reward`, `value` = V(s_t) and `next_value` = V(s_{t+1}) are `[N, T]`; `s_{t+1}` is what followed the action, seen
    with the recurrent state that the step left behind, also where a reset came next. `terminated` and `done` are bool
    `[N, T]`, done = terminated or truncated, at any t. With the one-step error

        delta_t = r_t + gamma V(s_{t+1}) [not terminated_t] - V(s_t)

    the estimator sum_k (gamma lambda)^k delta_{t+k}, cut at the end of a segment, obeys

        A_t = delta_t + gamma lambda [not done_t] A_{t+1},    A_T = 0.

    So a terminal step has no future, and a truncated one (or the last of the row) has the future that V(s_{t+1})
    promises. The value target is A_t + V(s_t). Raises ValueError if the shapes differ.
    """
    shapes = {tuple(x.shape) for x in (reward, value, next_value, terminated, done)}
    if len(shapes) != 1 or reward.ndim != 2:
        raise ValueError(f"gae needs five tensors of one shape [N, T], got {sorted(shapes)}")
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    decay = gamma * lmbda * (~done).to(reward.dtype)
    advantage = torch.zeros_like(reward[:, 0])
    backwards = []
    for delta_t, decay_t in zip(reversed(delta.unbind(1)), reversed(decay.unbind(1)), strict=True):
        advantage = delta_t + decay_t * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    return advantages, advantages + value


def standardize(advantage: Tensor) -> Tensor:
    """Advantages of any shape with mean 0 and sample standard deviation 1, pooled; one alone is returned as it is."""
    if advantage.numel() < 2:
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
