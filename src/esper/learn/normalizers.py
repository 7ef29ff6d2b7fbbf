"""Running statistics as values: `new_state = update(state, x)`; nothing changes unless its caller rebinds it.

Both normalisers are frozen while a rollout is collected and learn from it exactly once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.control.normalization import CLIP, RunningMeanStd, normalize, running_mean_std

__all__ = [
    "RunningMeanStd",
    "discounted_returns",
    "normalize",
    "reward_scale",
    "running_mean_std",
    "scale_reward",
    "update",
    "update_reward_scale",
]

RETURN_FLOOR = 0.1
"""Least standard deviation of returns relative to their mean, so that (nearly) constant rewards are not blown up."""


def update(state: RunningMeanStd, x: Tensor, mask: Tensor | None = None) -> RunningMeanStd:
    """Merge the samples `x` `[..., *features]` into `state`, exactly, in whatever portions they arrive.

    `mask` (bool, broadcastable to `x`) says which entries are measurements; the others, such as the structural zeros of
    an empty slot, leave mean, variance and count of their feature alone. With n_b samples of mean m_b and population
    variance v_b, and d = m_b - m (Chan, Golub & LeVeque 1983):

        n' = n + n_b;  m' = m + d n_b / n';  v' = v n / n' + v_b n_b / n' + d^2 n n_b / n'^2
    """
    mean, var, count = state["mean"], state["var"], state["count"]
    rows = x.to(torch.float64).reshape(-1, *mean.shape)
    known = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.expand(x.shape).reshape(rows.shape)
    n_b = known.sum(0).to(torch.float64)
    m_b = torch.where(known, rows, 0.0).sum(0) / n_b.clamp(min=1)
    v_b = torch.where(known, rows - m_b, 0.0).square().sum(0) / n_b.clamp(min=1)
    share = n_b / (count + n_b).clamp(min=1)
    delta = m_b - mean
    merged = state.clone()
    merged["mean"] = mean + delta * share
    merged["var"] = var + (v_b - var) * share + delta.square() * share * (1 - share)
    merged["count"] = count + n_b
    return merged


def reward_scale() -> RunningMeanStd:
    """Statistics of discounted returns before the first rollout: rewards pass unscaled."""
    return running_mean_std()


def discounted_returns(reward: Tensor, done: Tensor, gamma: float) -> Tensor:
    """Rewards so far, discounted: R_t = r_t + gamma R_{t-1} within a segment, `[N, T]` from `[N, T]`.

    The running sum looks back rather than forward, so it is known at t; its spread measures the scale of returns
    (Engstrom et al. 2020, "Implementation matters in deep policy gradients").
    """
    running = torch.zeros_like(reward[:, 0])
    sums = []
    for r_t, done_t in zip(reward.unbind(1), done.unbind(1), strict=True):
        running = r_t + gamma * running
        sums.append(running)
        running = torch.where(done_t, 0.0, running)
    return torch.stack(sums, 1)


def update_reward_scale(state: RunningMeanStd, reward: Tensor, done: Tensor, gamma: float) -> RunningMeanStd:
    """Merge one rollout's raw rewards `[N, T]` into the statistics; rows are independent and start afresh."""
    return update(state, discounted_returns(reward.to(torch.float64), done, gamma))


def scale_reward(state: RunningMeanStd, reward: Tensor, clip: float = CLIP) -> Tensor:
    """Rewards divided by the standard deviation of discounted returns, within +-`clip`; the mean is not subtracted.

    The deviation counts as at least a tenth of the mean's size, and as 1 while both are zero.
    """
    deviation = torch.maximum(state["var"].sqrt(), RETURN_FLOOR * state["mean"].abs())
    scale = torch.where(deviation > 0, deviation, 1.0)
    return (reward / scale).clamp(-clip, clip).to(reward.dtype)
