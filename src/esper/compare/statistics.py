"""What can be said about paired seeds: means, intervals, differences. Every draw is keyed, so a table is reproducible.

Letters: `n` seeds, `R` resamples. Values are in whatever unit they come in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper import keys as k

RESAMPLES = 10_000
LEVEL = 0.95
_EXACT = 14
"""Up to so many seeds every assignment of signs is tried."""


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """The mean of paired differences, its bootstrap interval, and how likely one as large is if signs are chance."""

    mean: float
    low: float
    high: float
    p: float


def interval(values: Tensor, key: Tensor) -> Interval:
    """Mean of `values` `[n]` and its 95 % percentile bootstrap interval over seeds (Efron 1979).

    Values drawn with the same key are resampled alike, so intervals of paired arms belong together. Raises ValueError
    for fewer than two values or values that are not finite.
    """
    values = _checked(values)
    n = values.shape[0]
    means = values[k.integers(key, n, RESAMPLES, n)].mean(dim=1)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return Interval(float(values.mean()), low, high)


def difference(ours: Tensor, theirs: Tensor, key: Tensor) -> Difference:
    """`ours - theirs`, both `[n]` and paired by seed: interval as above, and the two-sided p of the sign-flip test.

    The test asks how often the mean is at least as large in size when each difference keeps or changes its sign by
    chance. Up to 14 seeds that is exact; beyond, the observed signs count as one of R + 1 draws, so p is never 0.
    Raises ValueError for numbers of values that differ, and as `interval`.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"ours, theirs: {ours.shape[0]} and {theirs.shape[0]} values; pairs are needed")
    gaps = _checked(ours) - _checked(theirs)
    return Difference(*interval(gaps, k.fold(key, 0)), _sign_flip(gaps, k.fold(key, 1)))


def _sign_flip(gaps: Tensor, key: Tensor) -> float:
    n = gaps.shape[0]
    exact = n <= _EXACT
    if exact:
        codes = torch.arange(2**n)
        flips = (codes[:, None] >> torch.arange(n)) & 1
    else:
        flips = k.integers(key, 2, RESAMPLES, n)
    means = ((1 - 2 * flips).double() * gaps).mean(dim=1).abs()
    observed = gaps.mean().abs()
    # Sums in another order differ by rounding; a tie counts as at least as large.
    reached = int((means >= observed - 1e-12 * gaps.abs().sum()).sum())
    return reached / 2**n if exact else (reached + 1) / (RESAMPLES + 1)


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's rank correlation of `x` and `y` `[n]`, ties at their mean rank; None if either is the same throughout
    or there are fewer than two."""
    if x.unique().numel() < 2 or y.unique().numel() < 2:
        return None
    return float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()


def _checked(values: Tensor) -> Tensor:
    if values.dim() != 1 or values.shape[0] < 2:
        raise ValueError(f"values: shape {list(values.shape)}; at least two, one per seed, are needed")
    if not bool(values.isfinite().all()):
        raise ValueError(f"values: {values.tolist()}; all must be finite")
    return values.double()
