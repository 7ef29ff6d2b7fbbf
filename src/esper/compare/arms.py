"""The arms of a comparison, each judged on the same fresh hosts.

What an arm has to choose it chooses on the tuning hosts by the mean objective; the evaluation hosts are played once a
row, and the test split is read once a row, after that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from esper.build import build_controller
from esper.checkpoint.store import find
from esper.compare.bench import Bench
from esper.compare.config import (
    OBSERVATION,
    Arm,
    Heuristic,
    Never,
    Ppo,
    RandomLegal,
    Schedule,
    StaticEqual,
    StaticFinal,
    points_of,
    ppo_training,
)
from esper.compare.play import costs_of
from esper.compare.widen import widened
from esper.config import TrainingConfig, read_json
from esper.control.policy import RecurrentPolicy
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import never_grow, patient_schedule, patient_schedules, random_legal
from esper.control.transfer import Transferred
from esper.environment.env import GrowthEnv, episode_keys
from esper.errors import InputError
from esper.events import EventLog, load
from esper.growth.flops import FLOPS, TRAINING, Ledger
from esper.learn.responses import Learned
from esper.run import train
from esper.seeds.slots import empty_records
from esper.tasks import get_task


class Quiet:
    """A progress that shows nothing."""

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
        """Nothing."""

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
        """Nothing."""


@dataclass
class Spent:
    """What the hosts of a training have cost, written down after every step, so that a training that is taken up again
    knows. `before` are the FLOPs of earlier processes, `step` the steps that were made."""

    file: Path
    ledger: Ledger
    before: int = 0
    step: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all hosts up to now."""
        return self.before + int(self.ledger.total.sum())

    def add(self, result: TensorDict) -> None:
        """Take in one step of all hosts."""
        self.ledger.add(result)
        self.step += 1
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": self.step, "flops": self.total}) + "\n")

    def go_on(self, step: int) -> None:
        """Begin with what was written down, the latest time, after so many steps. Raises InputError if nothing was."""
        known = {line["step"]: line["flops"] for line in load(self.file)} if self.file.exists() else {}
        if step and step not in known:
            raise InputError([f'resume: "{self.file}": does not say what the hosts had cost after step {step}'])
        self.step, self.before = step, known.get(step, 0)


def run_arms(bench: Bench) -> Iterator[Arm]:
    """Run every arm of the bench's configuration, in order; yields each when its rows are there. Raises InputError
    where a given run does not fit."""
    for arm in bench.config.arms:
        name = arm.rows[0]
        match arm:
            case Never():
                _never(bench, arm, name)
            case RandomLegal():
                bench.evaluate(name, ScriptedPolicy(random_legal()))
            case Heuristic():
                bench.evaluate(name, build_controller(bench.config.shared.replace(controller="heuristic"), bench.judge))
            case Schedule():
                _schedule(bench, arm, name)
            case Ppo():
                _ppo(bench, arm)
            case StaticFinal():
                _static_final(bench, arm, name)
            case StaticEqual():
                _static_equal(bench, arm, name)
        yield arm


def _never(bench: Bench, arm: Never, name: str) -> None:
    search, scores = 0, dict[float, float]()
    for rates in bench.portions(arm.host_lrs):
        trial = bench.tune(never_grow(), len(rates), tuple(rates))
        scores |= dict(zip(rates, trial.objectives, strict=True))
        search += trial.flops
    for rate, score in scores.items():
        bench.say(f"{name}: host_lr {rate:g}: {score:.2f} on tuning seeds")
    if scores:
        bench.host_lr = max(scores, key=lambda rate: scores[rate])
    chosen = {"host_lr": bench.host_lr, "tried": scores} if scores else {}
    bench.evaluate(name, ScriptedPolicy(never_grow()), chosen=chosen, search=search)


def _schedule(bench: Bench, arm: Schedule, name: str) -> None:
    spec, search = bench.judge.spec, 0
    tried: list[dict[str, Any]] = []
    points = points_of(arm, bench.config.shared)
    for portion in bench.portions(points):
        trial = bench.tune(patient_schedules(portion, spec.blueprints, spec.rules.max_epochs), len(portion))
        search += trial.flops
        for point, score in zip(portion, trial.objectives, strict=True):
            tried.append({"steps": [step.model_dump(exclude_none=True) for step in point], "objective": score})
        bench.say(f"{name}: {len(tried)} of {len(points)} points tried")
    best = max(range(len(tried)), key=lambda i: tried[i]["objective"])
    policy = ScriptedPolicy(patient_schedule(points[best], spec.blueprints, spec.rules.max_epochs))
    bench.evaluate(name, policy, chosen={**tried[best], "tried": tried}, search=search)


def _ppo(bench: Bench, arm: Ppo) -> None:
    shared, search, learning = bench.config.shared, None, None
    if arm.run is None:
        teacher = None if arm.imitates is None else bench.rows[arm.imitates]
        training = ppo_training(arm, shared, [] if teacher is None else teacher.chosen["steps"])
        if bench.host_lr is not None:
            training = training.replace(host_lr=bench.host_lr)
        run_dir, search = bench.out / (arm.name or arm.kind), _trained(bench, arm, training)
        if teacher is not None:
            # Whom it imitates had to be found first.
            search += teacher.search or 0
    else:
        run_dir = Path(arm.run)
        training = _given(run_dir, shared)
    env = bench.judge
    seen = {name: getattr(training, name) for name in OBSERVATION}
    if any(getattr(shared, name) != value for name, value in seen.items()):
        env = bench.env(bench.config.seeds, **seen)
    policy, step = _learned(run_dir, training, env)
    if search is not None:
        learning = learning_flops(policy, training, env.spec.rules.max_epochs)
    names = _blueprints(training)
    chosen = {"run": str(run_dir), "checkpoint": step, "task": training.task, "blueprints": list(names)}
    judged: Learned = policy
    if names != env.spec.blueprints:
        try:
            judged = Transferred(policy, names, env.spec.blueprints)
        except ValueError as error:
            raise InputError([f'run: "{run_dir}": {error}']) from error
    for name, greedy in zip(arm.rows, (True, False), strict=True):
        bench.evaluate(name, judged, env, greedy=greedy, chosen=chosen, search=search, learning=learning)


def _trained(bench: Bench, arm: Ppo, training: TrainingConfig) -> int:
    """Train a controller, or go on with its training; returns the FLOPs of all hosts and twins."""
    run_dir = bench.out / (arm.name or arm.kind)
    costs, empty = costs_of(bench.judge), empty_records(training.n_envs, len(bench.judge.spec.slots))
    ledger = Ledger(costs, training.n_envs)
    spent, resume = Spent(run_dir / "flops.jsonl", ledger), None
    if bench.resume and run_dir.exists():
        resume, (manifest, _) = run_dir, find(run_dir, run_dir)
        spent.go_on(manifest.step)
    with EventLog(run_dir, training.to_dict(), training.telemetry_level) as events:
        fields = training.to_train_kwargs()
        train(run_dir=run_dir, events=events, progress=Quiet(), resume=resume, watch=spent.add, **fields)
    total, alone = spent.total, Ledger(costs, training.n_envs)
    for episode in range(training.rollouts):
        keys = episode_keys(training.seed, episode, training.n_envs)
        alone.reset(empty, keys)
        if training.reward_baseline == "twin":
            for _ in range(bench.judge.spec.rules.max_epochs):
                alone.add(TensorDict({"lived": empty, "key": keys}))
    return total + int(alone.total.sum())


def _learned(run_dir: Path, training: TrainingConfig, env: GrowthEnv) -> tuple[RecurrentPolicy, int]:
    """The controller of a run's last checkpoint, and its step. Raises InputError if its weights do not fit."""
    policy = build_controller(training, env)
    assert isinstance(policy, RecurrentPolicy), "only a learner is trained"
    _, snapshot = find(run_dir, run_dir)
    try:
        policy.load_state_dict(dict(snapshot.parts["learner"]["weights"].items()))
    except RuntimeError as error:
        raise InputError([f'run: "{run_dir}": its controller does not fit: {str(error).splitlines()[-1]}']) from error
    return policy, snapshot.step


def _blueprints(training: TrainingConfig) -> tuple[str, ...]:
    return training.blueprints or get_task(training.task).blueprints


def learning_flops(policy: RecurrentPolicy, training: TrainingConfig, max_epochs: int) -> int:
    """FLOPs of a controller's own passes over a whole training, at most (an early KL stop saves some): each step is
    decided once, valued once for what follows and looked at once for diagnostics, and learned from in every update."""
    macs = sum(p.numel() for p in policy.parameters() if p.dim() == 2)
    steps = training.rollouts * training.n_envs * max_epochs
    return FLOPS * macs * steps * (3 + TRAINING * training.ppo_updates_per_batch)


def _given(run_dir: Path, shared: TrainingConfig) -> TrainingConfig:
    """The configuration of a finished run whose controller can be judged here without having seen the hosts' data."""
    trained = TrainingConfig.from_dict(read_json(run_dir / "config.json"))
    problems = []
    if get_task(trained.task).load is get_task(shared.task).load and trained.seed != shared.seed:
        problems.append(
            f'run: "{run_dir}": was trained on the same data with seed {trained.seed}, the comparison has '
            f"{shared.seed}; they must be equal, or it has seen what it is judged on"
        )
    if trained.controller != "ppo":
        problems.append(f'run: "{run_dir}": has controller {trained.controller!r}; must be ppo')
    if problems:
        raise InputError(problems)
    return trained.replace(device=shared.device)


def _static_final(bench: Bench, arm: StaticFinal, name: str) -> None:
    """Fossils train from the first epoch, even in a comparison that freezes them once they are grown."""
    env = bench.env(bench.config.seeds, freeze_fossils=False)
    grown = bench.rows[arm.of].records
    bench.evaluate(name, ScriptedPolicy(never_grow()), env, grown=grown, chosen={"of": arm.of})


def _static_equal(bench: Bench, arm: StaticEqual, name: str) -> None:
    wanted = float(bench.rows[arm.of].parameters.double().mean())
    task = get_task(bench.config.shared.task)
    host, width = widened(bench.judge.spec.host, wanted)
    wide = replace(task, host=lambda: host)
    env = bench.env(bench.config.seeds, task=wide)
    chosen = {"of": arm.of, "width": width, "wanted_parameters": wanted}
    bench.evaluate(name, ScriptedPolicy(never_grow()), env, chosen=chosen)
