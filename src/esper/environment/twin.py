"""The twin of a host: the same host with the same keys, in the same order of the same data, left alone.

What a twin does depends on nobody's actions, so it is a number to subtract that no controller can move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth.backend import Backend
from esper.seeds.actions import HEADS, Op


def twin_accuracies(backend: Backend, growth: Sequence[TensorDict], accuracy: Tensor, max_epochs: int) -> Tensor:
    """Validation accuracy `[N, T + 1]` before and after every epoch of an episode in which nothing is planted.

    `growth` and `accuracy` `[N]` are those of hosts that have not trained yet; neither is changed. A twin that breaks
    down is taken back to its last snapshot like any host, and goes on.
    """
    wait = torch.full((accuracy.shape[0], len(HEADS)), int(Op.WAIT))
    course = [accuracy]
    for epoch in range(max_epochs):
        growth, result = backend.run_epoch(growth, wait, course[-1], epoch)
        course.append(result["metrics", "val_accuracy"])
    return torch.stack(course, dim=1)
