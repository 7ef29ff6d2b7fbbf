"""A one-layer LSTM whose weights start from a generator of its own and whose state restarts inside a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def restarts(is_init: Tensor) -> list[int]:
    """The steps after the first at which some row of `is_init` bool `[N, T]` restarts, read on the host."""
    return (is_init[:, 1:].any(0).nonzero().flatten() + 1).tolist() if is_init.shape[1] > 1 else []


class Recurrence(nn.Module):
    """Maps `[N, T, I]` to `[N, T, H]`. Weights are orthogonal, biases zero but for the forget gate (1 in both)."""

    def __init__(self, input_dim: int, hidden_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_dim, input_dim))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_dim, hidden_dim))
        self.bias_ih = nn.Parameter(torch.zeros(4 * hidden_dim))
        self.bias_hh = nn.Parameter(torch.zeros(4 * hidden_dim))
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.orthogonal_(weight, generator=generator)
        with torch.no_grad():
            for bias in (self.bias_ih, self.bias_hh):
                bias[hidden_dim : 2 * hidden_dim] = 1.0

    def forward(
        self, x: Tensor, h: Tensor, c: Tensor, is_init: Tensor, starts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs `[N, T, H]` and the state after the last step.

        `x` is `[N, T, I]`, `h` and `c` `[N, H]` the state before the first step, and `is_init` bool `[N, T]` marks the
        steps that start from a zero state. Between restarts the fused kernel runs over whole segments, at 4 rows of 25
        in a third of the time of a loop over cells. Where the restarts are is `starts`, as `restarts` gives them, or
        read on the host here; a recording has to be told.
        """
        weights: list[Tensor] = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        outputs = []
        starts = restarts(is_init) if starts is None else starts
        for start, stop in pairwise([0, *starts, x.shape[1]]):
            fresh = is_init[:, start].unsqueeze(-1)
            state = tuple(torch.where(fresh, 0.0, part).unsqueeze(0) for part in (h, c))
            # cuDNN would round to TF32, and a step would no longer equal its place in a sequence.
            with torch.backends.cudnn.flags(enabled=False):
                y, h_n, c_n = torch.lstm(x[:, start:stop], state, weights, True, 1, 0.0, self.training, False, True)
            h, c = h_n[0], c_n[0]
            outputs.append(y)
        return torch.cat(outputs, 1), h, c
