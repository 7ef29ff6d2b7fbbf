"""What the training of each host looks like from outside, as values (plan step 7).

A tracker is a TensorDict `[N]`; `SignalTracker` holds the settings and the two functions that make and advance one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds import gates
from esper.seeds.stages import OCCUPIED
from esper.values import changed

HISTORY = 5
_EXPLODED = 1.5  # an epoch whose loss grew by half is not stable


@dataclass(frozen=True)
class SignalTracker:
    """Settings of the signals. Accuracies are percentage points.

    Attributes:
        plateau_threshold: an epoch that gains less than this many points counts as a plateau epoch.
        stabilization_threshold: relative loss improvement below which an epoch counts as stable.
        stabilization_epochs: consecutive stable epochs after which the host is stabilized for the rest of the episode;
            0 means it is from the start.
    """

    plateau_threshold: float = 0.5
    stabilization_threshold: float = 0.03
    stabilization_epochs: int = 3

    def init(self, n_hosts: int, device: torch.device | None = None) -> TensorDict:
        """The tracker `[N]` of hosts of which nothing has been measured (losses nan)."""
        zero = torch.zeros(n_hosts, device=device)
        count = torch.zeros(n_hosts, dtype=torch.int64, device=device)
        unknown = torch.full_like(zero, float("nan"))
        history = torch.zeros(n_hosts, HISTORY, device=device)
        return TensorDict(
            {
                "epoch": count,
                "train_loss": unknown,
                "val_loss": unknown,
                "train_accuracy": zero,
                "val_accuracy": zero,
                "previous_val_accuracy": zero,
                "loss_delta": zero,
                "accuracy_delta": zero,
                "plateau_epochs": count,
                "best_val_accuracy": zero,
                "best_val_loss": torch.full_like(zero, float("inf")),
                "loss_history": history,
                "accuracy_history": history,
                "stable_count": count,
                "stabilized": torch.full_like(count, self.stabilization_epochs == 0, dtype=torch.bool),
            },
            batch_size=[n_hosts],
            device=device,
        ).clone()

    def start(self, metrics: TensorDict) -> TensorDict:
        """The tracker at epoch 0, after the validation pass of a reset (`metrics` `[N]` as in `update`)."""
        state = self.init(metrics.batch_size[0], metrics["val_loss"].device)
        return state.update(
            {
                **{name: metrics[name] for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy")},
                "previous_val_accuracy": metrics["val_accuracy"],
                "best_val_accuracy": metrics["val_accuracy"],
                "best_val_loss": metrics["val_loss"],
                "loss_history": _push(state["loss_history"], metrics["val_loss"]),
                "accuracy_history": _push(state["accuracy_history"], metrics["val_accuracy"]),
            }
        )

    def update(self, state: TensorDict, metrics: TensorDict) -> TensorDict:
        """The tracker after one more epoch.

        Args:
            state: the tracker `[N]`; it is not changed.
            metrics: `[N]` with `train_loss`, `val_loss`, `train_accuracy`, `val_accuracy`.

        Deltas are positive for improvement and 0 in the first epoch and wherever either side is not finite; an epoch
        without a delta is neither a plateau epoch nor a stable one.
        """
        before = dict(state.items())
        loss, accuracy = metrics["val_loss"], metrics["val_accuracy"]
        previous_loss = before["val_loss"]
        later = before["epoch"] > 0
        loss_delta = _delta(previous_loss - loss, later)
        accuracy_delta = _delta(accuracy - before["val_accuracy"], later)

        plateau = before["plateau_epochs"]
        flat = accuracy_delta < self.plateau_threshold
        stable = (
            later
            & previous_loss.isfinite()
            & (previous_loss > 1e-8)
            & (loss_delta < self.stabilization_threshold * previous_loss)
            & (loss < _EXPLODED * previous_loss)
        )
        stable_count = torch.where(stable, before["stable_count"] + 1, 0)
        return changed(
            state,
            epoch=before["epoch"] + 1,
            train_loss=metrics["train_loss"],
            val_loss=loss,
            train_accuracy=metrics["train_accuracy"],
            val_accuracy=accuracy,
            previous_val_accuracy=before["val_accuracy"],
            loss_delta=loss_delta,
            accuracy_delta=accuracy_delta,
            plateau_epochs=torch.where(later & flat, plateau + 1, 0),
            best_val_accuracy=torch.fmax(before["best_val_accuracy"], accuracy),
            best_val_loss=torch.fmin(before["best_val_loss"], loss),
            loss_history=_push(before["loss_history"], loss),
            accuracy_history=_push(before["accuracy_history"], accuracy),
            stable_count=stable_count,
            stabilized=before["stabilized"] | (stable_count >= self.stabilization_epochs),
        )


def _push(history: Tensor, value: Tensor) -> Tensor:
    return torch.cat([history[:, 1:], value[:, None].to(history.dtype)], dim=1)


def _delta(change: Tensor, known: Tensor) -> Tensor:
    return torch.where(known & change.isfinite(), change, torch.zeros_like(change))


def summary_seed(records: TensorDict, slots: tuple[str, ...]) -> TensorDict:
    """One seed that stands for its host, a TensorDict `[N]`; no seed gives slot -1 and zeros.

    It is the maximum by stage, then alpha, then the *lowest* contribution (never measured ranks last), then the slot's
    place in `slots`, so the choice never depends on the order of a dict.

    Args:
        records: `[N, S]`.
        slots: names of the S slots. Raises ValueError if one occurs twice or the number does not fit.
    """
    if len(set(slots)) != len(slots) or len(slots) != records.batch_size[1]:
        raise ValueError(f"slots must name the {records.batch_size[1]} records once each, got {slots}")
    candidate = gates.in_stage(records, OCCUPIED)
    lowest = torch.full_like(records["alpha"], -torch.inf)
    order = torch.arange(len(slots), device=lowest.device).expand_as(candidate)
    need = -records["contribution"].nan_to_num(nan=torch.finfo(torch.float32).max)
    for rank in (records["stage"], records["alpha"], need, order):
        value = torch.where(candidate, rank.to(torch.float32), lowest)
        candidate = candidate & (value == value.amax(dim=1, keepdim=True))
    found = candidate.any(dim=1)
    chosen = candidate.to(torch.int64).argmax(dim=1, keepdim=True)
    improvement = records["accuracy_current"] - records["accuracy_at_stage_start"]
    fields = {
        "stage": records["stage"],
        "epochs_in_stage": records["epochs_in_stage"],
        "alpha": records["alpha"],
        "improvement": improvement,
        "contribution": records["contribution"],
    }
    picked = {name: value.gather(1, chosen).squeeze(1) for name, value in fields.items()}
    result = {name: torch.where(found, value, torch.zeros_like(value)) for name, value in picked.items()}
    slot = torch.where(found, chosen.squeeze(1), -1)
    return TensorDict({"slot": slot, **result}, batch_size=records.batch_size[:1])
