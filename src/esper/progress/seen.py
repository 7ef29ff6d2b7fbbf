"""What the live view knows of a run: events and timings as they come, reduced to what it draws."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from esper.events import Event
from esper.progress.lines import health

MOST_HOSTS = 32
"""Hosts whose course is kept: more than a terminal can show would cost time for nothing."""
_HISTORY = 40
_STAGE_AFTER = {"germinated": "GERMINATED", "fossilized": "FOSSILIZED", "culled": "DORMANT"}


class Seen:
    """The present episode of a run of `rollouts` x `max_epochs` epochs of `n_envs` hosts, and what led there.

    `accuracy[host]` are validation accuracies, percentage points, one per epoch; `strips[host, slot]` names of stages
    after each epoch, CULLED where a seed was removed; "" stands for epochs before this process took the run up. `ops`
    counts the episode's ops, `learner` holds the last updates' health, `phases` seconds by phase, `alarms` rollbacks
    and anomalies.
    """

    def __init__(self, rollouts: int, max_epochs: int, n_envs: int, slots: Sequence[str]) -> None:
        self.rollouts, self.max_epochs, self.n_envs, self.slots = rollouts, max_epochs, n_envs, tuple(slots)
        self.episode = -1
        self.epoch = 0
        self.present: list[float] = []
        self.learner: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.alarms: Counter[str] = Counter()
        self._times: deque[float] = deque(maxlen=2 * max_epochs + 1)
        self._start(-1)

    def _start(self, episode: int) -> None:
        self.episode = episode
        self.ops: Counter[str] = Counter()
        self.accuracy: dict[int, list[float]] = defaultdict(list)
        self.strips: dict[tuple[int, str], list[str]] = defaultdict(list)
        self._stages: dict[tuple[int, str], str] = {}
        self._culled: set[tuple[int, str]] = set()
        self._unknown = "DORMANT"

    def event(self, event: Event) -> None:
        """Take in one event of the log."""
        kind, host, slot = event["type"], event["host"], event["slot"]
        if event["episode"] is not None and event["episode"] != self.episode:
            self._start(event["episode"])
        if kind == "reward":
            self.ops[event["data"]["op"]] += 1
        elif kind == "update":
            self.learner.append(health(event["data"]))
        elif kind in ("governor_rollback", "anomaly", "host_restarted"):
            self.alarms[kind] += 1
        elif host is None or host >= MOST_HOSTS:
            return
        elif kind == "epoch":
            self._epoch(host, event["epoch"], event["data"]["validation_accuracy"])
        elif kind == "stage_changed":
            self._stages[host, slot] = event["data"]["after"]
        elif kind in _STAGE_AFTER:
            self._stages[host, slot] = _STAGE_AFTER[kind]
            if kind == "culled":
                self._culled.add((host, slot))

    def _epoch(self, host: int, epoch: int, accuracy: float | str | None) -> None:
        course = self.accuracy[host]
        missed = epoch - 1 - len(course)
        if missed:
            self._unknown = ""
        course.extend([math.nan] * missed)
        course.append(math.nan if accuracy is None else float(accuracy))
        for slot in self.slots:
            place = (host, slot)
            strip = self.strips[place]
            strip.extend([""] * missed)
            strip.append("CULLED" if place in self._culled else self._stages.get(place, self._unknown))
            self._culled.discard(place)

    def epoch_over(self, episode: int, epoch: int, accuracies: Sequence[float], now: float) -> None:
        """All hosts have finished an epoch at `now`, seconds."""
        if episode != self.episode:
            self._start(episode)
        self.epoch, self.present = epoch, list(accuracies)
        self._times.append(now)

    def phase(self, name: str, seconds: float) -> None:
        """A phase took some seconds."""
        self.phases[name] += seconds

    @property
    def done(self) -> int:
        """Epochs of all hosts that are over."""
        return max(0, self.episode) * self.max_epochs + self.epoch

    def epochs_per_second(self) -> float | None:
        """Over the last two episodes; None before there are two epochs to measure between."""
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def seconds_left(self) -> float | None:
        """At the present rate; None before there is one."""
        rate = self.epochs_per_second()
        return None if rate is None else (self.rollouts * self.max_epochs - self.done) / rate
