"""Who deserves which part of a coalition's accuracy, from the accuracies of all coalitions.

`accuracies` is `[..., 2**S]`; bit `j` of the last index says whether slot `j` is on. A coalition that was not
measured (nan) makes every number that needs it nan; nothing is imputed.
"""

from __future__ import annotations

from math import factorial

import torch
from torch import Tensor


def _slots(accuracies: Tensor) -> int:
    count = accuracies.shape[-1]
    n_slots = count.bit_length() - 1
    if count < 2 or 1 << n_slots != count:
        raise ValueError(f"accuracies must have 2**S coalitions in the last dimension, got {count}")
    return n_slots


def shapley(accuracies: Tensor) -> Tensor:
    """Exact Shapley values `[..., S]` in the unit of `accuracies` (Shapley 1953).

    The value of a slot is its marginal gain averaged over all orders of arrival; the values sum to the accuracy of
    all slots minus that of none. Raises ValueError if the last dimension is not a power of two of at least 2.
    """
    n = _slots(accuracies)
    values = []
    for j in range(n):
        value = torch.zeros_like(accuracies[..., 0])
        for rest in range(1 << n):
            if not rest >> j & 1:
                size = rest.bit_count()
                weight = factorial(size) * factorial(n - size - 1) / factorial(n)
                value = value + weight * (accuracies[..., rest | 1 << j] - accuracies[..., rest])
        values.append(value)
    return torch.stack(values, dim=-1)


def interactions(accuracies: Tensor) -> Tensor:
    """Pairwise interactions `[..., S, S]`: f(ij) - f(i) - f(j) + f(none), zero on the diagonal.

    Positive means two seeds do more together than apart. Raises ValueError as `shapley` does.
    """
    n = _slots(accuracies)
    result = accuracies.new_zeros((*accuracies.shape[:-1], n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                both = accuracies[..., 1 << i | 1 << j] + accuracies[..., 0]
                result[..., i, j] = both - accuracies[..., 1 << i] - accuracies[..., 1 << j]
    return result
