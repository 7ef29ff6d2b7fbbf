"""One epoch of growing: act, train, validate with all coalitions, record, govern, tick (plan steps 6 and 8).

The outer loop is over batches and every device is issued its hosts' step for batch `t` before batch `t + 1`. Scalars
are read once per phase, after the last batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.config_fields import Family
from esper.data.batches import SharedBatchIterator, evaluation_batches
from esper.data.family import class_names
from esper.data.splits import Split, Splits
from esper.growth import optim
from esper.growth.executors.base import Executor
from esper.growth.governor import Expectation, expect, govern, take_snapshot
from esper.growth.plan import Plan, make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.keys import Purpose
from esper.seeds import bank
from esper.seeds.gates import in_stage
from esper.seeds.lifecycle import apply_action, record_epoch, tick
from esper.seeds.nursery import Nursery
from esper.seeds.stages import BLENDED
from esper.values import assembled, changed, finite_rows, joined, upload


@dataclass(frozen=True)
class Shard:
    """One device's share of a run: `size` hosts from host `first` on, their executor and their copy of the data, and
    where their next seeds are drawn ahead, if they are."""

    device: torch.device
    first: int
    size: int
    executor: Executor
    splits: Splits
    calibration: Tensor | None
    nursery: Nursery | None = None

    @property
    def hosts(self) -> slice:
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True)
class EpochSettings:
    """How an epoch runs. `evaluation_batch` samples are scored at a time, all coalitions of a host at once; `family`
    says in what the hosts differ."""

    batch_size: int
    evaluation_batch: int = 512
    augment: bool = False
    dtype: torch.dtype = torch.float32
    family: Family | None = None


def reset(
    spec: GrowthSpec, shards: Sequence[Shard], settings: EpochSettings, keys: Tensor, host_lr: Tensor, seed_lr: Tensor
) -> tuple[list[TensorDict], TensorDict]:
    """Fresh hosts for `keys` `[N]` and the metrics of one validation pass; nothing is trained."""
    growth = [
        fresh_growth(spec, keys[s.hosts], host_lr[s.hosts], seed_lr[s.hosts], settings.dtype, s.device) for s in shards
    ]
    return begin(spec, shards, settings, growth)


def begin(
    spec: GrowthSpec, shards: Sequence[Shard], settings: EpochSettings, growth: Sequence[TensorDict]
) -> tuple[list[TensorDict], TensorDict]:
    """Hosts that have not trained yet, with their first snapshot, and the metrics of one validation pass."""
    plans = [make_plan(g["slots"], spec) for g in growth]
    scores = evaluate(shards, growth, plans, settings, "validation")
    metrics = _metrics(scores)
    metrics["train_loss"] = metrics["val_loss"].clone()
    metrics["train_accuracy"] = torch.zeros_like(metrics["val_accuracy"])
    first = [
        take_snapshot(g, spec.bank, metrics[s.hosts], torch.ones(s.size, dtype=torch.bool))
        for s, g in zip(shards, growth, strict=True)
    ]
    return first, metrics


def idle() -> None:
    """What is done meanwhile if there is nothing to do."""


def run_epoch(
    spec: GrowthSpec,
    shards: Sequence[Shard],
    settings: EpochSettings,
    growth: Sequence[TensorDict],
    actions: Tensor,
    accuracy: Tensor,
    epoch: int,
    meanwhile: Callable[[], None] = idle,
) -> tuple[list[TensorDict], TensorDict]:
    """One environment step of all hosts. After the last epoch nothing moves on by itself: the networks that were
    measured are the ones that are left behind.

    Args:
        growth: one growth state per shard.
        actions: int64 `[N, 4]`; the slot is an index of `spec.slots` or -1.
        accuracy: `[N]` validation accuracy before the step, percentage points.
        epoch: epochs already trained in this episode.
        meanwhile: called once, when the devices have all their work and before anything of theirs is waited for.

    Returns:
        The new growth states and a TensorDict `[N]` on the CPU with `key` (of the hosts), `before`, `lived` and
        `after` (slot records before the step, after training and validation, after governor and tick), `outcome` (of
        the action, with `auto_culled` `[N, S]`), `metrics` (`train_loss`, `val_loss`, `train_accuracy`,
        `val_accuracy`, `coalitions` `[N, 2**S]`; percentage points), `panic` (bool), `governor` (the rest of `govern`'s
        report) and `restarted` (bool, the step before was a panic). The metrics of a host that panicked are those it
        was taken back to; what its governor saw is in the report.
    """
    before = [g["slots"] for g in growth]
    restarted = [g["governor", "restored_epoch"] >= 0 for g in growth]
    acted, outcomes = [], []
    for shard, g in zip(shards, growth, strict=True):
        state, outcome = act(spec, g, actions[shard.hosts], accuracy[shard.hosts], shard.nursery)
        acted.append(state)
        outcomes.append(outcome)
    plans = [make_plan(g["slots"], spec) for g in acted]
    trained, measured = train(spec, shards, settings, acted, plans, epoch)
    finite = [finite_parts(spec, g) for g in trained]
    measurements = TensorDict()
    gradients: list[TensorDict] = []
    expected: list[Expectation] = []

    def while_scoring() -> None:
        nonlocal measurements, gradients, expected
        meanwhile()
        for shard, g in zip(shards, trained, strict=True):
            if shard.nursery is not None:
                shard.nursery.draw(g["seeds"], g["slots"], g["key"])
        # Training is over long before scoring is, and reading what it measured takes a while.
        measurements = measured()
        gradients = [
            _gradients(spec.parameters_of(g["key"]), g["slots"], own)
            for own, g in zip(_shared_out(measurements, shards), trained, strict=True)
        ]
        expected = [expect(g["governor"], spec.governor) for g in trained]

    scores = evaluate(shards, trained, plans, settings, "validation", while_scoring)
    learned = {
        "train_loss": measurements["loss"].float(),
        "train_accuracy": 100.0 * measurements["correct"] / measurements["seen"].clamp(min=1),
    }
    metrics = changed(_metrics(scores), **learned)

    done, results, standing = [], [], []
    of_shards = _shared_out(scores, shards), _shared_out(metrics, shards)
    per_shard = zip(shards, trained, outcomes, finite, gradients, expected, *of_shards, strict=True)
    for shard, g, outcome, sound, gradient, expectation, scored, own_metrics in per_shard:
        sound_host, sound_seeds = sound.cpu().tensor_split([1], dim=1)
        contribution, error = contributions(in_stage(g["slots"], BLENDED), scored)
        lived = record_epoch(g["slots"], own_metrics["val_accuracy"], contribution, error, gradient, sound_seeds)
        g = changed(g, slots=lived, epoch=g["epoch"] + 1)
        g, stands, report = govern(g, spec.bank, own_metrics, spec.governor, sound_host.squeeze(1), expectation)
        after = g["slots"]
        auto_culled = torch.zeros_like(after["healthy"])
        if epoch + 1 < spec.rules.max_epochs:
            after, auto_culled = tick(after, spec.rules)
        removed = bank.uproot(g["seeds"], spec.bank, auto_culled)
        done.append(changed(g, slots=after, seeds=removed))
        standing.append(stands)
        parts = {
            "key": g["key"],
            "lived": lived,
            "after": after,
            "outcome": changed(outcome, auto_culled=auto_culled),
            "panic": report["panic"],
            "governor": assembled({name: value for name, value in report.items() if name != "panic"}, [shard.size]),
        }
        results.append(assembled(parts, [shard.size]))
    also = {"before": joined(before), "metrics": joined(standing), "restarted": torch.cat(restarted)}
    return done, changed(joined(results), **also)


def act(
    spec: GrowthSpec, growth: TensorDict, action: Tensor, accuracy: Tensor, nursery: Nursery | None = None
) -> tuple[TensorDict, TensorDict]:
    """Carry out the controller's actions on one shard: records, then the bank. Moments of survivors keep their bits."""
    prices = spec.seed_parameters_of(growth["key"])
    records, outcome = apply_action(growth["slots"], action, spec.rules, prices, accuracy)
    seeds = bank.uproot(growth["seeds"], spec.bank, outcome["culled"])
    planted = outcome["germinated"], records, growth["key"]
    seeds = bank.plant(seeds, spec.bank, *planted) if nursery is None else nursery.plant(seeds, *planted)
    return changed(growth, slots=records, seeds=seeds), outcome


@torch.enable_grad()
def train(
    spec: GrowthSpec,
    shards: Sequence[Shard],
    settings: EpochSettings,
    growth: Sequence[TensorDict],
    plans: Sequence[Plan],
    epoch: int,
) -> tuple[list[TensorDict], Callable[[], TensorDict]]:
    """Train every host for an epoch; returns the new states and what says the measurements `[N]`, on the CPU.

    Gradients are switched on here because collectors step environments with gradients off.
    """
    keys = [upload(g["key"], s.device) for s, g in zip(shards, growth, strict=True)]
    batches = SharedBatchIterator(
        [s.splits for s in shards],
        keys,
        settings.batch_size,
        epoch,
        augment=settings.augment,
        dtype=settings.dtype,
        family=settings.family,
    )
    carries = [s.executor.begin(g, plan) for s, g, plan in zip(shards, growth, plans, strict=True)]
    rates = [(g["rates", "host"], g["rates", "seed"]) for g in growth]
    steps = len(batches)
    dropout = [_dropout_keys(key, epoch, steps) for key in keys]
    for t, batch in enumerate(batches):
        share = optim.schedule(spec.lr_schedule, epoch * steps + t, spec.rules.max_epochs * steps)
        for i, (shard, (x, y)) in enumerate(zip(shards, batch, strict=True)):
            host_lr, seed_lr = rates[i][0] * share, rates[i][1] * share
            carries[i] = shard.executor.train_step(carries[i], x, y, host_lr, seed_lr, dropout[i][t], t == steps - 1)
    finished = [s.executor.finish(c, g) for s, c, g in zip(shards, carries, growth, strict=True)]
    parts = list(zip(shards, carries, strict=True))
    return finished, lambda: joined([s.executor.measured(c) for s, c in parts])


def evaluate(
    shards: Sequence[Shard],
    growth: Sequence[TensorDict],
    plans: Sequence[Plan],
    settings: EpochSettings,
    part: str,
    meanwhile: Callable[[], None] = idle,
) -> TensorDict:
    """Score every coalition of every host on one split; `empty_scores` `[N]` on the CPU. `meanwhile` is called before
    the devices are waited for."""
    pairs, family = list(zip(shards, growth, strict=True)), settings.family
    carries = [
        s.executor.begin_evaluation(g, plan, s.calibration) for s, g, plan in zip(shards, growth, plans, strict=True)
    ]
    size, dtype = settings.evaluation_batch, settings.dtype
    names = [None if family is None else class_names(family, s.splits.train, g["key"].to(s.device)) for s, g in pairs]
    streams = [evaluation_batches(s.splits, _part(s.splits, part), size, dtype) for s in shards]
    for batch in zip(*streams, strict=True):
        for i, (shard, (x, y)) in enumerate(zip(shards, batch, strict=True)):
            own = names[i]
            targets = y.expand(shard.size, *y.shape) if own is None else own[:, y]
            carries[i] = shard.executor.evaluate_step(carries[i], x, targets)
    meanwhile()
    return joined([s.executor.finish_evaluation(c) for s, c in zip(shards, carries, strict=True)])


def contributions(live: Tensor, scores: TensorDict) -> tuple[Tensor, Tensor]:
    """What each slot in `live` bool `[N, S]` adds: accuracy of all live slots minus accuracy without it, `[N, S]`
    percentage points, and its paired standard error over samples. Slots that are not live are nan."""
    correct, seen = scores["correct"].double(), scores["seen"].double()[:, None]
    n_slots = live.shape[1]
    # A coalition with slots that are not live counts as the one without them, so the last one is everybody.
    without = correct.index_select(1, _without_one(n_slots))
    gain = (correct[:, -1:] - without) / seen
    variance = (scores["differ"].double() / seen - gain**2).clamp(min=0.0)
    value, error = 100.0 * gain, 100.0 * (variance / seen).sqrt()
    return value.masked_fill(~live, torch.nan).float(), error.masked_fill(~live, torch.nan).float()


def _shared_out(value: TensorDict, shards: Sequence[Shard]) -> list[TensorDict]:
    """The rows of every shard's hosts: what `joined` puts together."""
    return [value] if len(shards) == 1 else [value[shard.hosts] for shard in shards]


@cache
def _without_one(n_slots: int) -> Tensor:
    """The coalitions that lack one slot, by slot."""
    return (2**n_slots - 1) - (1 << torch.arange(n_slots))


def finite_parts(spec: GrowthSpec, growth: TensorDict) -> Tensor:
    """Whether all numbers of a host (parameters, statistics, moments) and all parameters of the seed in each of its
    slots are finite, bool `[N, 1 + S]` on the host's device; True for empty slots."""
    # In one piece, because every launch costs as much as all the numbers. What is not planted is zero.
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in growth["host"].values(include_nested=True, leaves_only=True)]
    seeds = growth["seeds", "params"]
    return finite_rows([torch.cat(leaves, dim=1), *(seeds[:, spec.bank.columns(slot)] for slot in spec.slots)])


_NEGLIGIBLE = 1e-8


def _gradients(host_parameters: Tensor, records: TensorDict, measured: TensorDict) -> TensorDict:
    """Norm, parameter-normalised seed/host ratio and health of the last batch's gradients, `[N, S]`, of hosts with so
    many parameters `[N]`."""
    seed, host = measured["seed_norm"], measured["host_norm"][:, None]
    size = records["parameters"].double()
    ratio = (seed / size.sqrt()) / (host / host_parameters[:, None].double().sqrt() + _NEGLIGIBLE)
    ratio = torch.where((seed < _NEGLIGIBLE) | (host < _NEGLIGIBLE) | (size == 0), torch.zeros_like(ratio), ratio)
    return TensorDict(
        {"norm": seed.float(), "ratio": ratio.float(), "health": measured["seed_health"].float()},
        batch_size=records.batch_size,
    )


def _metrics(scores: TensorDict) -> TensorDict:
    seen = scores["seen"].double()
    accuracies = (100.0 * scores["correct"] / seen[:, None]).float()
    entries = {"val_loss": (scores["loss"] / seen).float(), "val_accuracy": accuracies[:, -1], "coalitions": accuracies}
    return assembled(entries, scores.batch_size)


def _part(splits: Splits, part: str) -> Split:
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}[part]


def _dropout_keys(keys: Tensor, epoch: int, steps: int) -> Tensor:
    """Keys `[steps, N]` of an epoch's steps."""
    return k.fold(k.fold(keys, Purpose.DROPOUT, epoch), torch.arange(steps, device=keys.device)[:, None])
