"""The governor: notices that a host's training broke down, and takes that one host back (plan step 8).

Per host it watches the validation loss. A loss that is not finite, a trained host that suddenly guesses, or several
absurd losses in a row are a panic: the host and its fossils return to their last snapshot, bit by bit and with their
moments. Nothing here looks across hosts, so every other host is what it would have been without the fault.

A snapshot holds what would survive a rollback and nothing else: the host, and the seeds that were fossils when it was
taken. Live seeds are not in it, and a seed fossilised later has adapted to a host that is no more, so both are dropped.
Taking a host back is therefore nothing but choosing the snapshot's rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds import bank, stages
from esper.seeds.gates import in_stage
from esper.seeds.lifecycle import clear, put
from esper.seeds.stages import Stage
from esper.values import changed, upload

_GUESS_TOLERANCE = 0.065  # a loss this close to that of a uniform guess, as a share of it, is guessing
_TRAINED = 0.6  # a mean loss below this share of a uniform guess's belongs to a host that had learned
_SHORTEST, _LONGEST = 3, 10


class Reason(IntEnum):
    """What the last check found."""

    NORMAL = 0
    NOT_FINITE = 1
    GUESSING = 2
    ABSURD_LOSS = 3


@dataclass(frozen=True)
class GovernorSettings:
    """When a loss is a panic. Losses are nats; `absolute` and `random_guess_loss` come from the task.

    A loss is absurd when it is above `absolute`, above the mean of the window by `sensitivity` standard deviations and
    above `multiplier` times that mean; `min_panics` of them in a row are a panic. Defaults are those of a task with
    ten classes and ten epochs of history.
    """

    absolute: float = 12.0
    random_guess_loss: float = math.log(10.0)
    sensitivity: float = 6.0
    multiplier: float = 3.0
    window: int = 20
    min_history: int = _LONGEST
    min_panics: int = 3
    snapshot_every: int = 5


def history_epochs(max_epochs: int) -> int:
    """Losses needed before their mean and spread are trusted: a fifth of the episode, three to ten epochs."""
    return min(_LONGEST, max(_SHORTEST, max_epochs // 5))


def fresh_governor(n_hosts: int, settings: GovernorSettings) -> TensorDict:
    """The governor of `n_hosts` fresh hosts, `[N]`: `losses` `[N, window]` (newest last), `seen` (how many entered the
    window), `consecutive` absurd losses, `panics` of the episode, and `reason`, `loss`, `threshold` of the last check,
    with `restored_epoch` (-1 unless that check led to a rollback)."""
    count = torch.zeros(n_hosts, dtype=torch.int64)
    number = torch.full((n_hosts,), math.nan, dtype=torch.float64)
    return TensorDict(
        {
            "losses": torch.zeros(n_hosts, settings.window, dtype=torch.float64),
            "seen": count,
            "consecutive": count.clone(),
            "panics": count.clone(),
            "reason": count.clone(),
            "loss": number,
            "threshold": number.clone(),
            "restored_epoch": count - 1,
        },
        batch_size=[n_hosts],
    )


class Expectation(NamedTuple):
    """What a governor expects of the next loss, `[N]`: the mean of its window, the loss above which one is absurd, and
    whether there are enough losses to tell that a host guesses."""

    mean: Tensor
    threshold: Tensor
    enough: Tensor


def expect(governor: TensorDict, settings: GovernorSettings) -> Expectation:
    """What to expect, before the epoch's loss is known. Until the window holds `min_history` losses, that of a uniform
    guess stands in for their mean, so that a run is never unguarded; that a host guesses can only be told afterwards.
    """
    losses = governor["losses"]
    width, guess = losses.shape[1], settings.random_guess_loss
    count = governor["seen"].clamp(max=width)
    known = torch.arange(width, device=losses.device) >= width - count[:, None]
    n = count.clamp(min=1)
    mean = torch.where(known, losses, 0.0).sum(1) / n
    spread = (torch.where(known, losses - mean[:, None], 0.0).square().sum(1) / n).sqrt()
    enough = count >= settings.min_history
    mean, spread = mean.masked_fill(~enough, guess), spread.masked_fill(~enough, 0.0)
    threshold = torch.maximum(mean + settings.sensitivity * spread, settings.multiplier * mean)
    return Expectation(mean, threshold.clamp(min=settings.absolute), enough)


def check(
    governor: TensorDict, loss: Tensor, settings: GovernorSettings, expected: Expectation
) -> tuple[TensorDict, Tensor]:
    """Judge one epoch's loss `[N]` of every host by what was expected; returns the governor and the panics, bool `[N]`.
    Only normal losses enter the window."""
    loss, losses, guess = loss.double(), governor["losses"], settings.random_guess_loss
    mean, threshold, enough = expected
    finite = loss.isfinite()
    guessing = enough & (mean < _TRAINED * guess) & ((loss - guess).abs() < _GUESS_TOLERANCE * guess)
    absurd = finite & (loss > threshold)
    normal = finite & ~guessing & ~absurd
    consecutive = (governor["consecutive"] + 1).masked_fill(~absurd, settings.min_panics).masked_fill(normal, 0)
    reason = torch.full_like(consecutive, Reason.NOT_FINITE)
    for found, code in ((absurd, Reason.ABSURD_LOSS), (guessing, Reason.GUESSING), (normal, Reason.NORMAL)):
        reason = reason.masked_fill(found, code)
    longer = torch.cat([losses[:, 1:], loss[:, None]], dim=1)
    judged = changed(
        governor,
        losses=torch.where(normal[:, None], longer, losses),
        seen=governor["seen"] + normal,
        consecutive=consecutive,
        reason=reason,
        loss=loss,
        threshold=threshold,
        restored_epoch=torch.full_like(consecutive, -1),
    )
    return judged, consecutive >= settings.min_panics


def choose(mask: Tensor, new: TensorDict, old: TensorDict) -> TensorDict:
    """`new` in the rows where `mask` `[N]` is True, `old` elsewhere; every leaf keeps its bits."""

    at = {device: upload(mask, device) for device in {leaf.device for leaf in new.values(True, True)}}

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(at[a.device].reshape(-1, *[1] * (a.dim() - 1)), a, b)

    chosen: TensorDict = new.apply(pick, old, filter_empty=False)
    return chosen


def take_snapshot(growth: TensorDict, layout: bank.BankLayout, metrics: TensorDict, due: Tensor) -> TensorDict:
    """Growth whose snapshot is the present state where `due` bool `[N]`.

    `layout` is the bank's; `metrics` `[N]` are the epoch's, of which the snapshot keeps those of host and fossils alone
    (the losses are the whole network's). Raises ValueError if a host would be left without any snapshot.
    """
    old = growth.get("snapshot", None)
    if old is None and not due.all():
        raise ValueError(f"due: {due.tolist()}; the first snapshot is of every host")
    if old is not None and not due.any():
        return growth
    fossils = growth["slots", "stage"] == Stage.FOSSILIZED
    live = ~fossils & (growth["slots", "blueprint"] >= 0)
    now = TensorDict(
        {
            "host": growth["host"],
            "seeds": bank.uproot(growth["seeds"], layout, live),
            "slots": clear(growth["slots"], ~fossils),
            "losses": growth["governor", "losses"],
            "seen": growth["governor", "seen"],
            "metrics": _of_fossils(metrics, fossils),
            "epoch": growth["epoch"],
        },
        batch_size=growth.batch_size,
    )
    return changed(growth, snapshot=now if due.all() else choose(due, now, old))


def _of_fossils(metrics: TensorDict, fossils: Tensor) -> TensorDict:
    """The metrics that remain when all slots but the `fossils` `[N, S]` are emptied."""
    kept = (fossils.long() << torch.arange(fossils.shape[1])).sum(1)
    coalitions = metrics["coalitions"]
    members = torch.arange(coalitions.shape[1]) & kept[:, None]
    return changed(
        metrics, coalitions=coalitions.gather(1, members), val_accuracy=coalitions.gather(1, kept[:, None]).squeeze(1)
    )


def rollback(growth: TensorDict, panic: Tensor) -> TensorDict:
    """Take the hosts where `panic` bool `[N]` back to their snapshots; all others keep their bits.

    Host and fossils return with their moments, all other seeds are gone with theirs, and the loss window is the one of
    then. What goes on counting: `epoch`, the number of seeds `planted` (so that no seed is drawn twice), the embargo of
    a slot that waits for its end.
    """
    if not panic.any():
        return growth
    good, records, governor = growth["snapshot"], growth["slots"], growth["governor"]
    back = panic[:, None] & ~in_stage(records, stages.FAILED)
    judged = changed(
        governor,
        losses=good["losses"],
        seen=good["seen"],
        consecutive=torch.zeros_like(governor["consecutive"]),
        panics=governor["panics"] + 1,
        restored_epoch=good["epoch"],
    )
    return changed(
        growth,
        host=choose(panic, good["host"], growth["host"]),
        seeds=choose(panic, good["seeds"], growth["seeds"]),
        slots=torch.where(back, put(good["slots"], back, planted=records["planted"]), records),
        governor=choose(panic, judged, governor),
    )


def govern(
    growth: TensorDict,
    layout: bank.BankLayout,
    metrics: TensorDict,
    settings: GovernorSettings,
    finite: Tensor,
    expected: Expectation,
) -> tuple[TensorDict, TensorDict, TensorDict]:
    """One epoch's check of all hosts of a shard, after their records are written: roll back or take snapshots. `finite`
    bool `[N]` says whether all that a host consists of is.

    Returns the growth, the metrics `[N]` of the hosts as they stand now (finite whatever happened), and the report
    `[N]` on the CPU: `panic`, `reason`, `loss`, `threshold`, `consecutive` as they were judged, `restored_epoch`, and
    `dropped` `[N, S]`, the seeds a rollback removed. A host is judged by its validation loss, or as not finite when its
    training loss or anything it consists of is not.
    """
    sound = finite & metrics["train_loss"].isfinite()
    loss = torch.where(sound, metrics["val_loss"].double(), math.nan)
    governor, panic = check(growth["governor"], loss, settings, expected)
    judged = changed(growth, governor=governor)
    restored = rollback(judged, panic)
    age = restored["epoch"] - restored["snapshot", "epoch"]
    due = (governor["reason"] == Reason.NORMAL) & (age >= settings.snapshot_every)
    if panic.any():
        metrics = choose(panic, restored["snapshot", "metrics"], metrics)
    restored = take_snapshot(restored, layout, metrics, due)
    occupied = in_stage(growth["slots"], stages.OCCUPIED)
    report = changed(
        governor.select("reason", "loss", "threshold", "consecutive"),
        panic=panic,
        restored_epoch=restored["governor", "restored_epoch"],
        dropped=occupied & ~in_stage(restored["slots"], stages.OCCUPIED),
    )
    return restored, metrics, report
