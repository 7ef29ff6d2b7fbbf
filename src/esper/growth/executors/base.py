"""The interface of executors: how the pure per-host forward is run over the hosts of one device.

An epoch is a conversation: `begin` takes the growth state and the plan, `train_step` is called once per batch, `finish`
returns the new growth state and `measured`, any time before the next `begin`, what was measured. Evaluation has the
first three parts. From `begin` on the carry belongs to the executor, which may update it in place (a loop over tensors,
the static buffers of a captured graph); the growth state passed to `begin` is never touched. Every executor gives the
same numbers; tests compare them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.growth.plan import Plan

Carry = Any
"""What an executor keeps between the calls of one epoch."""


Rooms = dict[str, tuple[tuple[int, ...], ...]]
"""What an executor's programs have room for, by name: a number for each slot and blueprint. Sums are made in an order
that depends on it, so it is part of a run's state."""


class Executor(Protocol):
    """See the module docstring. `growth` is a TensorDict `[N]` as in `docs/design.md`, section 2."""

    def begin(self, growth: TensorDict, plan: Plan) -> Carry:
        """Start an epoch of training."""
        ...

    def train_step(
        self, carry: Carry, x: Tensor, y: Tensor, host_lr: Tensor, seed_lr: Tensor, keys: Tensor, measure: bool
    ) -> Carry:
        """One SGD step of every host on `x` `[N, B, ...]`, `y` `[N, B, ...]` with learning rates `[N]` (CPU float64).

        `keys` `[N]` draw dropout. `measure` asks for the gradient norms of this batch.
        """
        ...

    def finish(self, carry: Carry, growth: TensorDict) -> TensorDict:
        """The new growth state: the one passed to `begin`, trained."""
        ...

    def measured(self, carry: Carry) -> TensorDict:
        """The measurements of `empty_measurements` on the CPU, after `finish`. Waits until the device has trained, not
        for what it was given to do since."""
        ...

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> Carry:
        """Start scoring every coalition of each host's live slots.

        `calibration` `[B, ...]` is the batch on which each coalition's BatchNorm statistics are estimated anew; None
        scores with the running ones. The growth state's own statistics never change.
        """
        ...

    def evaluate_step(self, carry: Carry, x: Tensor, y: Tensor) -> Carry:
        """Score one batch `x` `[B, ...]`, the same for every host, by each host's targets `y` `[N, B, ...]`."""
        ...

    def finish_evaluation(self, carry: Carry) -> TensorDict:
        """The scores of `empty_scores`, on the CPU."""
        ...

    @property
    def rooms(self) -> Rooms:
        """What the programs have room for by now; empty for an executor that keeps none from epoch to epoch."""
        ...

    def reserve(self, rooms: Rooms) -> None:
        """Have room for as much as `rooms`, which `rooms` of such an executor said. Raises ValueError if it does not
        fit."""
        ...


class Roomless:
    """An executor that keeps no program from one epoch to the next."""

    @property
    def rooms(self) -> Rooms:
        return {}

    def reserve(self, rooms: Rooms) -> None:
        if rooms:
            raise ValueError(f"rooms: {', '.join(rooms)}; {type(self).__name__} has none")


def empty_measurements(n_hosts: int, n_slots: int, device: torch.device | None = None) -> TensorDict:
    """What training measures, `[N]`: `loss` (mean over batches), `correct` and `seen` counts, `host_norm` and, per slot
    `[N, S]`, `seed_norm`, `seed_health`: L2 norms of the last batch's gradients and the share of healthy tensors."""
    return TensorDict(
        {
            "loss": torch.zeros(n_hosts, dtype=torch.float64, device=device),
            "correct": torch.zeros(n_hosts, dtype=torch.int64, device=device),
            "seen": torch.zeros(n_hosts, dtype=torch.int64, device=device),
            "host_norm": torch.full((n_hosts,), float("nan"), dtype=torch.float64, device=device),
            "seed_norm": torch.full((n_hosts, n_slots), float("nan"), dtype=torch.float64, device=device),
            "seed_health": torch.full((n_hosts, n_slots), float("nan"), dtype=torch.float64, device=device),
        },
        batch_size=[n_hosts],
    )


def empty_scores(n_hosts: int, n_slots: int, device: torch.device | None = None) -> TensorDict:
    """What evaluation counts, `[N]`: `loss` (sum over samples, all live slots on), `correct` `[N, 2**S]` by coalition
    (bit `j` = slot `j`), `differ` `[N, S]` (samples on which leaving the slot out changes right to wrong or back),
    `seen`. A coalition with slots that are not live counts as the one without them."""
    return TensorDict(
        {
            "loss": torch.zeros(n_hosts, dtype=torch.float64, device=device),
            "correct": torch.zeros(n_hosts, 2**n_slots, dtype=torch.int64, device=device),
            "differ": torch.zeros(n_hosts, n_slots, dtype=torch.int64, device=device),
            "seen": torch.zeros(n_hosts, dtype=torch.int64, device=device),
        },
        batch_size=[n_hosts],
    )


def gradient_health(norms: Tensor) -> Tensor:
    """1 - 0.5 (share of vanishing tensors) - 0.8 (share of exploding tensors), clipped to 0..1, from the norms
    `[tensors, ...]` of all tensors that take part."""
    vanishing, exploding = (test.double().mean(0) for test in (norms < VANISHING_NORM, norms > EXPLODING_NORM))
    return (1.0 - 0.5 * vanishing - 0.8 * exploding).clamp(0.0, 1.0)


VANISHING_NORM = 1e-7
EXPLODING_NORM = 100.0
