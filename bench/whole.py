"""Whole runs, measured: training, coalitions, lifecycle, controller, learner, events and checkpoints together.

A run is an ordinary one, `esper.run.train` with the PPO controller, but held in a steady state: its hosts begin with
blended seeds in half of their slots, and the masks allow only the op that keeps them there. Every host has two seeds
and one seed in turn, for `SWAP` epochs each and not all at once, so every epoch has other plans; kinds come in turn.
Where to plant or cull, and how to blend, is left to the policy, which learns as ever. What it takes to hold a run there
is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tensordict import TensorDict

from esper import engine
from esper.config import TrainingConfig
from esper.control.recorded import RecordedPolicy
from esper.data.batches import SharedBatchIterator
from esper.environment.env import GrowthEnv
from esper.events import EventLog
from esper.growth import step
from esper.growth.state import fresh_growth
from esper.learn.learner import Learner
from esper.run import train
from esper.seeds.actions import Op
from esper.seeds.gates import in_stage
from esper.seeds.stages import BLENDED, OCCUPIED
from grown import filled

SWAP = 6
MEASURED, AT_MOST = 2, 8
"""Rollouts measured, and those after which a run ends although it still records programs."""

PARTS = (
    (step, "train", "training"),
    (step, "finite_parts", "finite"),
    (step, "evaluate", "scoring"),
    (RecordedPolicy, "forward", "controller"),
    (Learner, "learn", "update"),
    (GrowthEnv, "settle", "events"),
)


class Done(Exception):
    """Enough was measured."""


class Clock:
    """Progress and observer of a run: when epochs and rollouts ended, what they were spent on, how full slots were.

    Ends the run after `MEASURED` rollouts without a recording. `data` is seconds an epoch, of the batches alone;
    `within` are the seconds that parts have spent inside each part that is going on.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.rollouts: list[float] = []
        self.recorded: list[int] = []
        self.spent: dict[str, list[tuple[float, float]]] = {part: [] for _, _, part in PARTS}
        self.within: list[float] = []
        self.uncounted = 0.0
        self.filled: list[float] = []
        self.live: list[float] = []
        self.accuracy: list[float] = []
        self.executors: set[Any] = set()
        self.data = 0.0

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            self.within.append(0.0)
            result = call(*args, **kwargs)
            seconds = self.now() - start
            # What happened in an epoch is told while the next is scored; it counts as events alone.
            self.spent[part].append((start, seconds - self.within.pop()))
            if self.within:
                self.within[-1] += seconds
            if part == "training" and len(self.spent[part]) == 2:
                self.executors, self.data = {shard.executor for shard in args[1]}, data_seconds(*args)
            return result

        return run

    def now(self) -> float:
        """Seconds, without those that do not count."""
        return time.perf_counter() - self.uncounted

    def aside(self, call: Callable[..., Any], devices: Sequence[torch.device]) -> Callable[..., Any]:
        """The same, with its time not counted, but that of what the devices had still to do."""

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            for device in devices:
                wait(device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.uncounted += time.perf_counter() - start
            return result

        return run

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
        self.accuracy.append(statistics.mean(accuracies))

    def stepped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def run(*args: Any) -> Any:
            result = step(*args)
            self.epochs.append(self.now())
            return result

        return run

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
        self.rollouts.append(self.now())
        self.recorded.append(sum(getattr(executor, "recorded", 0) for executor in self.executors))
        if len(self.recorded) > MEASURED and self.recorded[-1] == self.recorded[-1 - MEASURED]:
            raise Done

    def watch(self, result: TensorDict) -> None:
        self.filled.append(float(in_stage(result["lived"], OCCUPIED).double().mean()))
        self.live.append(float(in_stage(result["lived"], BLENDED).double().mean()))


def data_seconds(spec: Any, shards: Any, settings: Any, growth: Any, plans: Any, epoch: int) -> float:
    """Seconds that the batches of an epoch of training take alone, the median of five."""
    keys = [g["key"].to(s.device) for s, g in zip(shards, growth, strict=True)]
    seconds = []
    for _ in range(5):
        for shard in shards:
            wait(shard.device)
        start = time.perf_counter()
        for batch in SharedBatchIterator(
            [s.splits for s in shards], keys, settings.batch_size, epoch, dtype=settings.dtype
        ):
            del batch
        for shard in shards:
            wait(shard.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hold(env: GrowthEnv, state: TensorDict, observed: TensorDict) -> TensorDict:
    """What an environment observes, with masks that keep half of its slots filled."""
    records = env.records()
    host = torch.arange(len(records))
    turn = (int(state["epoch"]) + host // 2 % SWAP) // SWAP
    missing = 2 - (host + turn) % 2 - in_stage(records, OCCUPIED).sum(1)
    op = torch.where(missing > 0, Op.GERMINATE, torch.where(missing < 0, Op.CULL, Op.WAIT))
    allowed = observed["mask_op"].cpu() & F.one_hot(op, len(Op)).bool()
    allowed[:, Op.WAIT] |= ~allowed.any(1)
    mask = observed["mask_blueprint"]
    kind = (host + records["planted"].sum(1)) % len(env.spec.blueprints)
    observed["mask_op"] = allowed.to(mask.device)
    observed["mask_blueprint"] = F.one_hot(kind, mask.shape[1]).bool().to(mask.device)
    return observed


def measure(row: dict[str, Any], task: str, n: int, amp: str, devices: list[str], epochs: int, told: bool) -> None:
    """Fill `row` with what one run of `n` hosts and `epochs` epochs an episode shows; with `told` the events of its
    steps are written, as in any run."""
    config = TrainingConfig(
        task=task,
        slots=["early", "mid", "late"],
        n_envs=n,
        n_episodes=n * AT_MOST,
        max_epochs=epochs,
        devices=devices,
        device=devices[0],
        amp=amp,
        gates="permissive",
    )
    clock, stop, load = Clock(), threading.Event(), []
    cuda = devices[0].startswith("cuda")

    def sample() -> None:
        while not stop.wait(0.05):
            load.append((clock.now(), statistics.mean(torch.cuda.utilization(d) for d in devices)))

    used = [torch.device(name) for name in devices]
    fill, masked, observing = clock.aside(filled, used), clock.aside(hold, used), GrowthEnv._observe

    def start(spec: Any, *args: Any) -> TensorDict:
        return fill(spec, fresh_growth(spec, *args), "half")

    def observe(env: GrowthEnv, state: TensorDict, *happened: Any) -> TensorDict:
        return masked(env, state, observing(env, state, *happened))

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for owner, name, part in PARTS:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(step, "fresh_growth", start))
        stack.enter_context(patch.object(GrowthEnv, "_observe", observe))
        stack.enter_context(patch.object(GrowthEnv, "advance", clock.stepped(GrowthEnv.advance)))
        if not told:
            stack.enter_context(patch.object(engine, "record_step", lambda *step: None))
        stack.callback(stop.set)
        if cuda:
            threading.Thread(target=sample, daemon=True).start()
        events = stack.enter_context(EventLog(folder / "run", config.to_dict(), config.telemetry_level))
        with suppress(Done):
            train(run_dir=folder / "run", events=events, progress=clock, watch=clock.watch, **config.to_train_kwargs())
    began, ended = clock.rollouts[-1 - MEASURED], clock.rollouts[-1]
    wall, count = ended - began, MEASURED * epochs
    # The first epoch of a rollout includes the making of fresh hosts and what was learned from the rollout before.
    within = [b - a for i, (a, b) in enumerate(zip(clock.epochs, clock.epochs[1:], strict=False), 1) if i % epochs]
    within = sorted(within[-MEASURED * (epochs - 1) :])
    spent = {part: sum(seconds for at, seconds in spans if began <= at < ended) for part, spans in clock.spent.items()}
    spent["data"] = clock.data * count
    # All three are issued while training still runs, so they cannot be told apart from outside.
    spent["training and scoring"] = sum(spent.pop(part) for part in ("training", "finite", "scoring")) - spent["data"]
    share = {part: seconds / wall for part, seconds in spent.items()}
    share["lifecycle and rest"] = 1.0 - sum(share.values())
    row |= {
        "epoch_ms": 1e3 * statistics.median(within),
        "p95_over_p50": within[int(0.95 * (len(within) - 1))] / statistics.median(within),
        "env_epochs_per_second": n * count / wall,
        "share": share,
        "filled": statistics.mean(clock.filled[-count:]),
        "live": statistics.mean(clock.live[-count:]),
        "rollouts": len(clock.rollouts),
        "recorded": clock.recorded[-1],
        "recorded_after_warm_up": clock.recorded[-1] - clock.recorded[-1 - MEASURED],
        "accuracy": clock.accuracy[-1],
    }
    if cuda:
        row["busy_percent"] = statistics.mean(percent for at, percent in load if began <= at < ended)
