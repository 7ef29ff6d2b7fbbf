"""The engine: collect, learn, repeat (plan steps 8 to 10). One loop for every controller.

`train` is what the command line calls; its keyword arguments are the fields of `TrainingConfig`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torch.optim import Adam

from esper import keys as k
from esper.build import build_controller, build_env
from esper.checkpoint.lock import LOCK, run_lock
from esper.checkpoint.signals import leaving
from esper.checkpoint.store import CheckpointStore, find, forget_after
from esper.config import TrainingConfig
from esper.control.policy import RecurrentPolicy
from esper.control.recorded import RecordedPolicy
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import patient_schedule
from esper.control.taught import TaughtPolicy
from esper.engine import Engine, Progress, observer
from esper.environment.env import GrowthEnv, Observer
from esper.errors import InputError, RunStopped
from esper.events import EventLog, Summary
from esper.garbage import collected_meanwhile
from esper.learn.collector import BatchFirstCollector
from esper.learn.learner import Learner
from esper.learn.normalizers import reward_scale
from esper.learn.update import PPOSettings, anneal_steps
from esper.memory import memory_named
from esper.seeds.actions import HEADS
from esper.tasks import get_task
from esper.telemetry import RolloutBook, weights_digest

REFUSALS = 3
"""Updates in a row that may be refused before a run stops."""


def build_learner(config: TrainingConfig, policy: RecurrentPolicy) -> Learner:
    """The learner of a run."""
    settings = PPOSettings(
        ppo_updates_per_batch=config.ppo_updates_per_batch,
        minibatches=config.minibatches,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_ratio=config.clip_ratio,
        value_coef=config.value_coef,
        value_clip=config.value_clip,
        max_grad_norm=config.max_grad_norm,
        target_kl=config.target_kl,
        entropy_coef=config.entropy_coef,
        entropy_coef_start=config.entropy_coef_start,
        entropy_coef_end=config.entropy_coef_end,
        entropy_coef_min=config.entropy_coef_min,
        entropy_anneal_steps=anneal_steps(config.entropy_anneal_episodes, config.n_envs, config.ppo_updates_per_batch),
        entropy_weights=tuple(getattr(config.entropy_weights, head) for head in HEADS),
    )
    device = next(policy.parameters()).device
    optimizer = Adam(policy.parameters(), lr=config.lr, eps=1e-5, fused=device.type == "cuda")
    # Beside the weights from the start: a GPU divides by a number on the CPU in another way than by one of its own.
    rewards = reward_scale().to(device)
    return Learner(
        policy,
        optimizer,
        rewards,
        settings,
        k.root(config.seed),
        config.contribution_scale,
        imitation=config.imitation_rollouts,
    )


def acting(
    config: TrainingConfig, env: GrowthEnv, controller: RecurrentPolicy | ScriptedPolicy, learner: Learner | None
) -> RecordedPolicy | ScriptedPolicy | TaughtPolicy:
    """Who acts in a run's rollouts: the controller, or at first the schedule that it imitates."""
    if isinstance(controller, ScriptedPolicy):
        return controller
    assert learner is not None, "a policy learns"
    policy, teaching = RecordedPolicy(controller), learner
    if config.imitation_rollouts == 0:
        return policy
    teacher = patient_schedule(config.schedule, env.spec.blueprints, env.spec.rules.max_epochs)
    return TaughtPolicy(policy, ScriptedPolicy(teacher), lambda: teaching.imitates)


def train(
    *,
    run_dir: Path,
    events: EventLog,
    progress: Progress,
    resume: Path | None = None,
    farewell: Callable[[str], None] | None = None,
    watch: Observer | None = None,
    **fields: Any,
) -> Summary:
    """Run a whole training; `fields` are those of `TrainingConfig`.

    `resume` is the checkpoint to go on from, or `run_dir` for its newest sound one; without it `run_dir` must be new or
    empty. With `farewell`, SIGTERM and SIGINT save the run, have it say what became of it, and end the process.
    `watch` is shown every step of the hosts, after events and progress.

    Returns the summary; events and progress get everything on the way. Raises ConfigError for fields that do not fit,
    InputError or ValueError for devices, data or checkpoints that cannot work, all before the first event; RunStopped
    when space, memory or finite numbers run out.
    """
    config = TrainingConfig(**fields)
    with memory_named(config.n_envs, config.batch_size or get_task(config.task).batch_size):
        engine = _engine(config, events, progress, watch)
        groups = [group.model_dump() for group in engine.groups]
        with (
            closing(engine.env.backend),
            run_lock(run_dir),
            CheckpointStore(run_dir, config.to_dict(), groups) as store,
        ):
            if resume is None:
                _require_new(run_dir)
                events.write("run_started", **_facts(config, engine.env))
                engine.mark()
            else:
                engine.restore(*find(run_dir, resume))
                forget_after(run_dir, engine.moment().step)
                events.rewind(engine.events.step)
            store.save(engine.moment())
            with (
                collected_meanwhile(engine.env),
                leaving(lambda: _save_now(engine, store), farewell) if farewell else nullcontext(),
            ):
                try:
                    _loop(engine, store, progress)
                except KeyboardInterrupt:
                    _save_now(engine, store)
                    raise
                store.finish()
            summary = _summary(engine)
            events.write("run_finished", weights_digest=summary["weights_digest"])
            return summary


def _engine(config: TrainingConfig, events: EventLog, progress: Progress, watch: Observer | None) -> Engine:
    env = build_env(config)
    book = RolloutBook(config.param_penalty_weight)
    observe = observer(env, events, progress, book)

    def all_observe(result: TensorDict) -> None:
        observe(result)
        if watch is not None:
            watch(result)

    env.observer = all_observe
    controller = build_controller(config, env)
    learner = build_learner(config, controller) if isinstance(controller, RecurrentPolicy) else None
    policy = acting(config, env, controller, learner)
    collector = BatchFirstCollector(env, policy, rollouts=config.rollouts)
    return Engine(config, env, collector, learner, book, events)


def _loop(engine: Engine, store: CheckpointStore, progress: Progress) -> None:
    """Collect and learn until all rollouts are done, with a checkpoint whenever one is due."""
    config, events, mark = engine.config, engine.events, time.perf_counter()
    for rollout in engine.collector:
        episode, collected = engine.rollouts, time.perf_counter()
        outcome = engine.close_rollout()
        events.write("rollout", episode=episode, **outcome)
        watch = engine.watch()
        metrics: dict[str, Any] | None = None
        if engine.learner is not None:
            metrics = engine.learn(rollout, watch)
            events.write("update", episode=episode, **metrics)
        engine.oversee(episode, metrics, watch)
        events.time("collect", collected - mark, episode=episode)
        mark = time.perf_counter()
        events.time("learn", mark - collected, episode=episode)
        progress.rollout(episode, outcome)
        if engine.refused == 0:
            due = engine.rollouts % config.checkpoint_every == 0 or engine.rollouts == config.rollouts
            if due:
                events.write("checkpoint", episode=episode, rollout=engine.rollouts)
            engine.mark()
            if due:
                store.save(engine.moment())
        elif engine.refused == REFUSALS:
            raise RunStopped(
                f"lr: {config.lr:g}: the policy's update was not finite in {REFUSALS} rollouts in a row; none of them "
                "was made, --resume goes on from the last checkpoint"
            )


def _save_now(engine: Engine, store: CheckpointStore) -> None:
    store.save(engine.moment())
    store.finish()


def _require_new(run_dir: Path) -> None:
    if any(path.name != LOCK for path in run_dir.iterdir()):
        raise InputError([f'run_dir: "{run_dir}": must be new or empty, so that no run is written over'])


def _facts(config: TrainingConfig, env: GrowthEnv) -> dict[str, Any]:
    return {
        "task": config.task,
        "controller": config.controller,
        "slots": list(env.spec.slots),
        "blueprints": list(env.spec.blueprints),
        "max_epochs": env.spec.rules.max_epochs,
        "host_parameters": env.spec.host_parameters,
    }


def _summary(engine: Engine) -> Summary:
    """The outcome of the last rollout's hosts; the test split is touched here and nowhere else."""
    config, env, outcome = engine.config, engine.env, engine.outcome
    growth = env.finished_growth()
    scores = env.backend.evaluate(growth, "test")
    test = (100.0 * scores["correct"][:, -1] / scores["seen"]).mean()
    weights = [g.select("host", "seeds", "slots") for g in growth]
    if engine.learner is not None:
        weights.append(TensorDict.from_module(engine.learner.policy))
    episodes = engine.rollouts * config.n_envs

    def mean(name: str) -> float:
        return sum(outcome[name]) / len(outcome[name])

    return {
        "task": config.task,
        "controller": config.controller,
        "seed": config.seed,
        "episodes": episodes,
        "env_epochs": episodes * env.spec.rules.max_epochs,
        "validation_accuracy": mean("validation_accuracy"),
        "test_accuracy": float(test),
        "objective": mean("objective"),
        "host_parameters": env.spec.host_parameters,
        "parameters": mean("parameters"),
        "seeds_planted": engine.planted,
        "seeds_kept": outcome["kept"],
        "seeds_culled": engine.culled,
        "weights_digest": weights_digest(*weights),
        "timing": {
            "seconds": engine.seconds,
            "env_epochs_per_second": episodes * env.spec.rules.max_epochs / engine.seconds,
        },
    }


_OWN = [p for p in inspect.signature(train).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
_FIELDS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
    for name, field in TrainingConfig.model_fields.items()
]
train.__signature__ = inspect.Signature(_OWN + _FIELDS)  # type: ignore[attr-defined]
