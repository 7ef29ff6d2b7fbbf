"""Hosts that differ: what each one draws for an episode, and the training samples that follow from it.

Draws are pure functions of a host's key, so they need no place in the state, and host `i` of an episode has the same
draws whatever runs beside it. Validation, test and calibration samples are the same for every host.

Letters: `N` hosts of a run, `n` hosts of one device group, `M` training samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.config_fields import Family
from esper.data.splits import Split
from esper.keys import Purpose

_FRACTION, _NOISE, _RATE, _MEMBERS, _WRONG, _LABELS, _CLASSES, _KEPT = range(8)


def draws(family: Family, keys: Tensor) -> TensorDict:
    """What hosts with `keys` `[N]` draw, float64 `[N]` on the CPU: `train_fraction`, `label_noise`, `host_lr_factor`,
    `classes`.

    What the family does not draw is what a host without family has: 1, 0 and 1; and nan for all classes.
    """
    keys = keys.cpu()
    least, greatest = family.classes or (math.nan, math.nan)
    factor = _drawn(tuple(map(math.log, family.host_lr_factor or (1.0, 1.0))), keys, _RATE).exp()
    return TensorDict(
        {
            "train_fraction": _drawn(family.train_fraction or (1.0, 1.0), keys, _FRACTION),
            "label_noise": _drawn(family.label_noise or (0.0, 0.0), keys, _NOISE),
            "host_lr_factor": factor,
            "classes": _drawn((least, greatest + 1), keys, _CLASSES).floor(),
        },
        batch_size=keys.shape,
    )


def _drawn(ends: tuple[float, ...], keys: Tensor, what: int) -> Tensor:
    least, greatest = ends
    return least + (greatest - least) * k.uniform(k.fold(keys, Purpose.FAMILY, what), dtype=torch.float64)


def class_names(family: Family, train: Split, keys: Tensor) -> Tensor | None:
    """What hosts with `keys` `[n]` call each class, int64 `[n, classes]`; None where all call them by their own name.

    A host that draws `c` classes keeps the names of `c - 1`, drawn evenly, and calls all others by the name of one.
    """
    if family.classes is None:
        return None
    kept, seat = _class_seats(family, train, keys)
    return kept.gather(1, seat)


def _class_seats(family: Family, train: Split, keys: Tensor) -> tuple[Tensor, Tensor]:
    """All classes in the order in which each host keeps them, and the seat in that order of the name that it has for
    each class; both int64 `[n, classes]`."""
    kept = k.permutation(k.fold(keys, Purpose.FAMILY, _KEPT), train.classes)
    last = draws(family, keys)["classes"].nan_to_num(train.classes).to(torch.int64).to(keys.device) - 1
    return kept, kept.argsort(dim=1).minimum(last[:, None])


@dataclass(frozen=True)
class Lessons:
    """What the hosts of one device group train on for an episode.

    `members` int64 `[n, M]` lists the samples with each host's own first, in order of their index; `counts` int64 `[n]`
    says how many are its own. `labels` `[n, M]` are the targets of all samples as the host is taught them; None where
    everybody is taught the truth.
    """

    members: Tensor
    counts: Tensor
    labels: Tensor | None

    def order(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """An epoch of `M` samples for `keys` `[n]`: which samples, int64 `[n, M]`, and in which pass each is met.

        A host goes through its own samples again and again, each time in a new order. One that owns all of them meets
        them in the order of a host without family.
        """
        seats, passes = _rounds(keys, self.counts, self.members.shape[1])
        return self.members.gather(1, seats), passes


def lessons(family: Family, train: Split, keys: Tensor) -> Lessons:
    """The lessons of hosts with `keys` `[n]` on the training split. Raises ValueError for noise on tokens."""
    drawn, total = draws(family, keys).to(keys.device), len(train)
    counts = (drawn["train_fraction"] * total).round().clamp(min=1).to(torch.int64)
    member = _first(k.bits(k.fold(keys, Purpose.FAMILY, _MEMBERS), total), counts)
    labels = None
    if family.label_noise is not None or family.classes is not None:
        wrong = (drawn["label_noise"] * counts).round().to(torch.int64)
        labels = _labels(family, train, member, wrong, keys)
    return Lessons(k.row_order((~member).to(torch.int8)), counts, labels)


def _first(draw: Tensor, counts: Tensor) -> Tensor:
    """Which entries of each row of `draw` `[n, M]` are among the `counts` `[n]` least, bool `[n, M]`."""
    rank = k.row_order(k.row_order(draw))
    return rank < counts[:, None]


def _labels(family: Family, train: Split, member: Tensor, wrong: Tensor, keys: Tensor) -> Tensor:
    """Targets `[n, M]` by each host's names, of which exactly `wrong` `[n]` of its own samples have another of its
    names, drawn evenly."""
    total = len(train)
    kept, seats = _class_seats(family, train, keys)
    seat, names = seats[:, train.targets], seats.amax(dim=1, keepdim=True) + 1
    key = k.fold(keys, Purpose.FAMILY, _WRONG)
    # Half the range for samples of one's own, the other half for the rest, which therefore come last.
    draw = (k.bits(key, total) >> 1) + torch.where(member, -(1 << 62), 1 << 62)
    off = 1 + (k.bits(k.fold(keys, Purpose.FAMILY, _LABELS), total) >> 1) % (names - 1)
    return kept.gather(1, torch.where(_first(draw, wrong), (seat + off) % names, seat))


def _rounds(keys: Tensor, counts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each host a sequence of permutations of `0 ... counts - 1`, cut after `length`; and the number of the
    permutation at each place. Both int64 `[n, length]`."""
    # Twice the length holds the last permutation whole, so that its cut-off part is as random as the rest.
    place = torch.arange(2 * length, device=keys.device)
    passes = place // counts[:, None]
    shuffled = k.permutation(keys, 2 * length)
    sorted_passes = k.row_order(passes.gather(1, shuffled))
    order = shuffled.gather(1, sorted_passes)
    return (order % counts[:, None])[:, :length], passes[:, :length]
