"""A run small enough for tests: a 500-parameter CNN on a handful of random 8x8 images, and comparisons to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict

from esper import keys as k
from esper.data.splits import Split, Splits, channel_moments
from esper.growth.executors.loop import LoopExecutor
from esper.growth.governor import GovernorSettings
from esper.growth.spec import GrowthSpec
from esper.growth.step import EpochSettings, Shard, reset, run_epoch
from esper.hosts.cnn import CNNHost
from esper.seeds import blueprints  # noqa: F401  (registers them)
from esper.seeds.actions import Op
from esper.seeds.lifecycle import LifecycleRules, put
from esper.seeds.stages import Stage
from esper.values import changed

CPU = torch.device("cpu")


def images(n_train: int = 32, n_validation: int = 40, n_test: int = 8) -> Splits:
    """Random images in ten classes; nothing to learn, everything to overfit."""
    key = k.root(3)
    parts = [
        Split(k.integers(k.fold(key, i), 256, size, 1, 8, 8).to(torch.uint8), k.integers(k.fold(key, i, 1), 10, size))
        for i, size in enumerate((n_train, n_validation, n_test))
    ]
    return Splits(*parts, *channel_moments(parts[0].inputs))


def tiny_spec(**changes: Any) -> GrowthSpec:
    """Three slots, three blueprints, permissive gates, 25 epochs."""
    rules = changes.pop("rules", LifecycleRules(max_epochs=25, strict_gates=False))
    spec = GrowthSpec(
        host=CNNHost(1, 10, 2, pool_layers=2),
        slots=("early", "mid", "late"),
        blueprints=("conv_light", "norm", "attention"),
        rules=rules,
        governor=GovernorSettings(12.0, math.log(10.0)),
    )
    return replace(spec, **changes)


@dataclass
class Run:
    """N hosts on one shard, stepped epoch by epoch."""

    spec: GrowthSpec = field(default_factory=tiny_spec)
    n: int = 3
    splits: Splits = field(default_factory=images)
    executor: Any = None
    device: torch.device = CPU
    seed: int = 0
    batch_size: int = 16
    lr: float = 0.1
    host_keys: torch.Tensor | None = None

    def __post_init__(self) -> None:
        calibration = self.splits.prepare(self.splits.train.inputs, torch.float32)
        if self.spec.coalition_statistics == "running":
            calibration = None
        executor = self.executor or LoopExecutor(self.spec)
        on_device = None if calibration is None else calibration.to(self.device)
        self.shards = [Shard(self.device, 0, self.n, executor, self.splits.to(self.device), on_device)]
        self.settings = EpochSettings(self.batch_size)
        keys = k.host_keys(k.root(self.seed), self.n) if self.host_keys is None else self.host_keys
        rate = torch.full((self.n,), self.lr, dtype=torch.float64)
        states, self.metrics = reset(self.spec, self.shards, self.settings, keys, rate, rate)
        self.growth: TensorDict = states[0]
        self.epoch = 0

    def step(self, actions: Mapping[int, tuple[int, ...]] | torch.Tensor | None = None) -> TensorDict:
        """One epoch; `actions` maps hosts to (op, slot, blueprint, blend), the rest wait."""
        if not isinstance(actions, torch.Tensor):
            actions = action(self.n, actions or {})
        states, result = run_epoch(
            self.spec, self.shards, self.settings, [self.growth], actions, self.metrics["val_accuracy"], self.epoch
        )
        self.growth, self.metrics, self.epoch = states[0], result["metrics"], self.epoch + 1
        return result

    def ripen(self, host: int, slot: int) -> None:
        """Make a seed ready to be fossilised."""
        mask = torch.zeros(self.n, len(self.spec.slots), dtype=torch.bool)
        mask[host, slot] = True
        ripe = put(self.growth["slots"], mask, stage=Stage.PROBATIONARY, alpha=1.0, contribution=5.0, epochs_in_stage=0)
        self.growth = self.growth.clone(recurse=False).update({"slots": ripe})


def action(n: int, chosen: Mapping[int, tuple[int, ...]]) -> torch.Tensor:
    """Actions `[N, 4]` from (op, slot, blueprint, blend) per host; hosts left out wait."""
    result = torch.zeros(n, 4, dtype=torch.int64)
    for host, (op, *rest) in chosen.items():
        result[host] = torch.tensor([*rest, *[0] * (3 - len(rest)), op])
    return result


def germinate(slot: int, blueprint: int = 0, blend: int = 0) -> tuple[int, ...]:
    return (Op.GERMINATE, slot, blueprint, blend)


def flat(state: TensorDict) -> dict[tuple[str, ...], torch.Tensor]:
    """Leaves by path."""
    items = state.items(include_nested=True, leaves_only=True)
    return {key if isinstance(key, tuple) else (key,): leaf for key, leaf in items}


def opened(spec: GrowthSpec, growth: TensorDict) -> TensorDict:
    """`growth` with every seed of the bank in its place: `seeds.<params or moments>.<slot>.<blueprint>`."""
    trees = {name: spec.bank.open(matrix) for name, matrix in growth["seeds"].items()}
    return changed(growth, seeds=TensorDict(trees, batch_size=growth.batch_size))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, nan to nan."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def differing(a: TensorDict, b: TensorDict) -> list[tuple[str, ...]]:
    """Paths of the leaves in which two states differ."""
    left, right = flat(a), flat(b)
    return sorted(left.keys() ^ right.keys()) + [
        path for path in left.keys() & right.keys() if not same(left[path], right[path])
    ]
