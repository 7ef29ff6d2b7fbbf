"""A run while it goes on, and how it becomes a value and is taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tensordict import TensorDict

from esper.checkpoint.compatible import differences, regrouped
from esper.checkpoint.snapshot import Group, Manifest, Snapshot
from esper.checkpoint.tensors import like
from esper.config import TrainingConfig
from esper.config_fields import AsTuple
from esper.environment.env import GrowthEnv
from esper.errors import CheckpointError
from esper.events import EventLog
from esper.learn.collector import BatchFirstCollector
from esper.learn.diagnostics import UpdateWatch
from esper.learn.escalation import AccuracyTrend, TelemetryLevel
from esper.learn.learner import Learner
from esper.oversight import Oversight, oversee, oversight_settings
from esper.telemetry import RolloutBook, record_step

Count = Annotated[int, Field(ge=0)]
Room = Annotated[tuple[Annotated[tuple[Count, ...], AsTuple], ...], AsTuple]


class Progress(Protocol):
    """What shows a run while it runs."""

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None: ...

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None: ...


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Book(_Strict):
    ops: dict[str, Count]
    returns: list[float]
    planted: Count
    culled: Count


class Counters(_Strict):
    """Everything of a run that is not a tensor. `rollouts` are whole ones, `events` the events written, `outcome` the
    last rollout's, `rooms` what the executor of each group has room for, `escalated` the rollouts for which the level
    is still debug, `accuracies` those the trend is about, `seconds` the time spent."""

    rollouts: Count
    updates: Count
    refused: Count
    events: Count
    planted: Count
    culled: Count
    outcome: dict[str, Any]
    book: _Book
    rooms: list[dict[str, Room]]
    escalated: Count
    accuracies: list[float]
    seconds: Annotated[float, Field(ge=0)]


@dataclass
class Engine:
    """The running parts and the counters of a run. `learner` is None for controllers that do not learn."""

    config: TrainingConfig
    env: GrowthEnv
    collector: BatchFirstCollector
    learner: Learner | None
    book: RolloutBook
    events: EventLog
    rollouts: int = 0
    planted: int = 0
    culled: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._oversight_settings = oversight_settings(self.config)
        self.oversight = Oversight(TelemetryLevel(self.config.telemetry_level), AccuracyTrend())
        self._learned = self._learner_state()
        self.moment: Callable[[], Snapshot] = self.capture(self.collector.position())
        self.collector.between = self.mark_later

    @property
    def seconds(self) -> float:
        """Time spent on the run, by earlier processes too."""
        return time.perf_counter() - self.began

    @property
    def groups(self) -> list[Group]:
        """How hosts are shared out."""
        return [
            Group(first=place.first, size=place.size, device=place.device, executor=place.executor)
            for place in self.env.backend.places
        ]

    @property
    def refused(self) -> int:
        """Updates refused in a row, up to now."""
        return 0 if self.learner is None else self.learner.refused

    def close_rollout(self) -> dict[str, Any]:
        """Count the rollout that has just been collected; returns its outcome."""
        self.outcome = self.book.close()
        self.rollouts += 1
        self.planted += self.outcome["planted"]
        self.culled += self.outcome["culled"]
        return self.outcome

    def watch(self) -> UpdateWatch:
        """What looks at the next update."""
        return self.oversight.watch(self._oversight_settings)

    def oversee(self, episode: int, metrics: dict[str, float] | None, watch: UpdateWatch) -> None:
        """Report on the rollout just learned from, and decide how closely to look at the next."""
        self.oversight = oversee(
            self.events,
            self.oversight,
            self._oversight_settings,
            episode=episode,
            outcome=self.outcome,
            metrics=metrics,
            watch=watch,
        )

    def learn(self, rollout: TensorDict, watch: UpdateWatch) -> dict[str, Any]:
        """Let the learner learn, and note what it has become."""
        assert self.learner is not None, "only a learner learns"
        metrics = self.learner.learn(rollout, watch)
        self._learned = self._learner_state()
        return metrics

    def mark(self, position: Callable[[], TensorDict] | None = None) -> None:
        """Make `moment` the present one, with collecting at `position`, by default where it stands now. Takes
        references only: what they refer to is never changed."""
        self.moment = self.capture(position or self.collector.position())

    def mark_later(self) -> None:
        """The same for the moment of this call, once its events are written; until then `moment` is the one before."""
        self.env.later(partial(self.mark, self.collector.position()))

    def capture(self, position: Callable[[], TensorDict]) -> Callable[[], Snapshot]:
        """The run between two steps, where collecting stands at `position`; call the result, at any time, for its
        snapshot."""
        learned, counters = self._learned, self._counters()
        state, finished = self.env.state, self.env.finished
        assert state is not None, "collectors reset the environment first"
        whole = self.env.epoch == 0
        step = self.rollouts * self.env.spec.rules.max_epochs + self.env.epoch
        objective = self.outcome.get("objective")
        taught = self.learner is not None and self.learner.imitated
        # Best is the policy that did best, not the one whose teacher did.
        score = sum(objective) / len(objective) if whole and objective and not taught else None

        def snapshot() -> Snapshot:
            parts = {"environment": state, "collector": position()}
            if learned is not None:
                parts["learner"] = learned
            if whole and finished is not None:
                parts["finished"] = finished
            return Snapshot(step, parts, counters.model_dump(), score)

        return snapshot

    def restore(self, manifest: Manifest, snapshot: Snapshot) -> None:
        """Go on from `snapshot`. Raises CheckpointError, before anything changes on the disk, if it does not fit."""
        done = self._fitting_counters(manifest)
        try:
            self._restore_tensors(snapshot, done)
        except (KeyError, ValueError, RuntimeError) as error:
            problem = f"checkpoint: step {snapshot.step}: does not fit this run: {str(error).splitlines()[0]}"
            raise CheckpointError([problem]) from error
        self.rollouts, self.planted, self.culled, self.outcome = done.rollouts, done.planted, done.culled, done.outcome
        self.book.load_state(**done.book.model_dump())
        level = TelemetryLevel(self.config.telemetry_level, done.escalated)
        self.oversight = Oversight(level, AccuracyTrend(tuple(done.accuracies)))
        self.events.level = level.effective
        self.began = time.perf_counter() - done.seconds
        self.events.step = done.events
        self._learned = self._learner_state()
        self.mark()

    def _fitting_counters(self, manifest: Manifest) -> Counters:
        try:
            done = Counters.model_validate(manifest.counters)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError([f"checkpoint: counters.{place}: {first['input']!r}: {first['msg']}"]) from None
        problems = differences(manifest.config, self.config.to_dict(), done.rollouts * self.config.n_envs)
        problems = problems or regrouped(manifest.groups, self.groups)
        if not problems and manifest.step // self.env.spec.rules.max_epochs != done.rollouts:
            problems = [f"checkpoint: step {manifest.step}: is not in rollout {done.rollouts}, as its counters say"]
        if problems:
            raise CheckpointError(problems)
        return done

    def _restore_tensors(self, snapshot: Snapshot, done: Counters) -> None:
        parts, template = dict(snapshot.parts), self.env.state
        assert template is not None, "collectors reset the environment first"
        state, finished = like(parts.pop("environment"), template), parts.pop("finished", None)
        place = (int(state["episode"]), int(state["epoch"]))
        if place != divmod(snapshot.step, self.env.spec.rules.max_epochs):
            raise ValueError(f"environment: episode {place[0]}, epoch {place[1]} is not step {snapshot.step}")
        self.env.backend.reserve(done.rooms)
        self.env.finished = None if finished is None else like(finished, template)
        self.env.state = state
        self.collector.go_on(parts.pop("collector"), done.rollouts)
        if self.learner is not None:
            self.learner.load_state(parts.pop("learner"))
            self.learner.rollouts, self.learner.refused = done.updates, done.refused
        if parts:
            raise ValueError(f"{', '.join(parts)}: this run has no such part")

    def _learner_state(self) -> TensorDict | None:
        return None if self.learner is None else self.learner.state()

    def _counters(self) -> Counters:
        return Counters(
            rollouts=self.rollouts,
            updates=0 if self.learner is None else self.learner.rollouts,
            refused=self.refused,
            events=self.events.step,
            planted=self.planted,
            culled=self.culled,
            outcome=self.outcome,
            book=_Book(**self.book.state()),
            rooms=self.env.backend.rooms(),
            escalated=self.oversight.level.remaining,
            accuracies=list(self.oversight.trend.accuracies),
            seconds=self.seconds,
        )


def observer(env: GrowthEnv, events: EventLog, progress: Progress, book: RolloutBook) -> Callable[[TensorDict], None]:
    """What a run does with every step: events, the rollout's book, the display."""

    def observe(result: TensorDict) -> None:
        drawn = env.drawn() if env.epoch == 1 else None
        if drawn is not None:
            events.write("hosts", episode=env.episode, epoch=0, **drawn)
        record_step(events, result, env.spec, env.episode, env.epoch - 1)
        book.add(result)
        progress.epoch(env.episode, env.epoch, result["metrics", "val_accuracy"].tolist())

    return observe
