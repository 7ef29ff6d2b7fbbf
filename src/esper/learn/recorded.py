"""The losses of an update and their gradients as one launch on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import functional_call

from esper.control.policy import RecurrentPolicy
from esper.learn.losses import LOSSES, FactoredPPOLoss
from esper.learn.update import Checks, Evaluation, PPOSettings, checks, eager_gradients, gradients_of, ppo_loss
from esper.recording import recorded

MAX_PROGRAMS = 4
"""Recordings that are kept. A run has rows of one size, or of two where minibatches differ by a host; those of
imitation are others."""


class Differentiated(NamedTuple):
    """Detached outputs of the loss, the gradients by parameter, and what there is to know of them."""

    outputs: TensorDictBase
    gradients: dict[str, Tensor]
    checks: Checks


class _Program(NamedTuple):
    """A recording, what it reads (`loss` keeps the constants alive), and where its results lie."""

    graph: torch.cuda.CUDAGraph
    loss: FactoredPPOLoss
    rows: TensorDict
    entropy_coef: Tensor
    results: Differentiated


class RecordedGradients:
    """`eager_gradients`, but on a CUDA device losses, gradients and their checks are recorded as a CUDA graph and
    replayed: an update of a small network is six hundred launches, and takes the time of launching them.

    Rows of other sizes, other settings and other policies are recorded apart, each when it first occurs. What an
    evaluation returns lies in the recording and is written over by the next. Weights and statistics are those of the
    policy, which must be written in place, as optimizers do. Rows that restart on the way, as few do, are not recorded.
    A mask that allows nothing is a device assertion.
    """

    def __init__(self) -> None:
        self._programs: dict[tuple[RecurrentPolicy, PPOSettings, torch.Size], _Program] = {}

    def __call__(
        self,
        policy: RecurrentPolicy,
        rows: TensorDictBase,
        starts: Sequence[int],
        settings: PPOSettings,
        entropy_coef: float,
    ) -> Evaluation:
        """See `Gradients`."""
        if starts or not rows["observation"].is_cuda:
            return eager_gradients(policy, rows, starts, settings, entropy_coef)
        wanted = policy, settings, rows.batch_size
        if wanted not in self._programs:
            if len(self._programs) == MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[wanted] = _record(policy, rows, settings)
        program = self._programs[wanted]
        program.rows.update_(rows.select(*program.rows.keys()))
        program.entropy_coef.fill_(entropy_coef)
        program.graph.replay()
        return Evaluation(program.results.outputs, partial(_hand_over, policy, program.results))


def differentiated(loss: FactoredPPOLoss, rows: TensorDictBase) -> Differentiated:
    """For rows `[n, T]` without restarts, leaving the `.grad` of the weights alone.

    Differentiates by leaves of its own, which share the memory of the weights: autograd hands a gradient over on the
    stream where its leaf was first used, and that must be the one which is recorded.
    """
    weights = {name: p.detach().requires_grad_() for name, p in loss.actor_network.named_parameters()}
    substituted = {f"actor_network.{name}": weight for name, weight in weights.items()}
    # Looking for tied weights, of which there are none, takes more than a LossModule offers.
    outputs = functional_call(loss, substituted, (rows, ()), tie_weights=False)
    # Not autograd.grad: it may give two weights the same tensor (both biases of an LSTM), which clipping scales twice.
    sum(outputs[name] for name in LOSSES).backward()
    gradients = gradients_of(weights.items())
    return Differentiated(outputs.detach(), gradients, checks(gradients))


def _hand_over(policy: RecurrentPolicy, results: Differentiated) -> Checks:
    for name, parameter in policy.named_parameters():
        parameter.grad = results.gradients[name]
    return results.checks


def _record(policy: RecurrentPolicy, rows: TensorDictBase, settings: PPOSettings) -> _Program:
    device = rows["observation"].device
    entropy_coef = torch.zeros((), device=device)
    loss = ppo_loss(policy, settings, entropy_coef)
    inputs: TensorDict = rows.select(*loss.in_keys).clone()
    graph, results = recorded(partial(differentiated, loss, inputs), device)
    return _Program(graph, loss, inputs, entropy_coef, results)
