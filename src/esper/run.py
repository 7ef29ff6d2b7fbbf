"""The engine: collect, learn, repeat (plan steps 8 to 10). One loop for every controller.

`train` is what the command line calls; its keyword arguments are the fields of `TrainingConfig`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch.optim import Adam, Optimizer

from esper import keys as k
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.control.policy import RecurrentPolicy
from esper.environment.env import GrowthEnv
from esper.environment.observation import feature_mask
from esper.events import EventLog, Summary
from esper.growth.plan import make_plan
from esper.growth.step import evaluate
from esper.keys import Purpose
from esper.learn.collector import BatchFirstCollector
from esper.learn.normalizers import RunningMeanStd, reward_scale, scale_reward, update, update_reward_scale
from esper.learn.update import PPOSettings, anneal_steps, entropy_coefficient, ppo_update
from esper.telemetry import RolloutBook, record_step, weights_digest


class Progress(Protocol):
    """What shows a run while it runs."""

    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None: ...

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None: ...


@dataclass
class Learner:
    """A policy and what it learns with. `rollouts` counts updates and keys their draws."""

    policy: RecurrentPolicy
    optimizer: Optimizer
    rewards: RunningMeanStd
    settings: PPOSettings
    key: torch.Tensor
    rollouts: int = 0

    def learn(self, rollout: TensorDictBase) -> dict[str, float]:
        """Update from one rollout `[N, T]`: rewards scaled and observations standardised by the statistics that held
        while it was collected; both statistics then learn from it, once, unless the update was refused."""
        raw = rollout["next", "reward"].squeeze(-1)
        scaled = rollout.copy()
        scaled["next", "reward"] = scale_reward(self.rewards, raw).unsqueeze(-1)
        metrics = ppo_update(
            self.policy,
            self.optimizer,
            scaled,
            self.settings,
            entropy_coef=entropy_coefficient(self.rollouts * self.settings.ppo_updates_per_batch, self.settings),
            key=k.fold(self.key, Purpose.MINIBATCH, self.rollouts),
        )
        self.rollouts += 1
        if metrics["updates"] > 0:
            observation = rollout["observation"]
            mask = feature_mask(observation.flatten(0, 1)).unflatten(0, observation.shape[:2])
            self.policy.load_statistics(update(self.policy.statistics, observation, mask))
            done = rollout["next", "done"].squeeze(-1)
            self.rewards = update_reward_scale(self.rewards, raw, done, self.settings.gamma)
        return metrics


def build_learner(config: TrainingConfig, policy: RecurrentPolicy) -> Learner:
    """The learner of a run."""
    settings = PPOSettings(
        ppo_updates_per_batch=config.ppo_updates_per_batch,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_ratio=config.clip_ratio,
        value_coef=config.value_coef,
        max_grad_norm=config.max_grad_norm,
        target_kl=config.target_kl,
        entropy_coef=config.entropy_coef,
        entropy_coef_start=config.entropy_coef_start,
        entropy_coef_end=config.entropy_coef_end,
        entropy_coef_min=config.entropy_coef_min,
        entropy_anneal_steps=anneal_steps(config.entropy_anneal_episodes, config.n_envs, config.ppo_updates_per_batch),
    )
    optimizer = Adam(policy.parameters(), lr=config.lr, eps=1e-5)
    return Learner(policy, optimizer, reward_scale(), settings, k.root(config.seed))


def train(*, run_dir: Path, events: EventLog, progress: Progress, resume: Path | None = None, **fields: Any) -> Summary:
    """Run a whole training; `fields` are those of `TrainingConfig`.

    Returns the summary; events and progress get everything on the way. Raises ConfigError for fields that do not fit,
    InputError or ValueError for devices or data that cannot work, all before the first event.
    """
    config = TrainingConfig(**fields)
    started = time.perf_counter()
    env = build_env(config)
    book = RolloutBook(env.spec, env.settings.reward.param_budget, config.param_penalty_weight)
    env.observer = _observer(env, events, progress, book)
    controller = build_controller(config, env)
    learner = build_learner(config, controller) if isinstance(controller, RecurrentPolicy) else None
    rollouts = -(-config.n_episodes // config.n_envs)
    events.write("run_started", **_facts(config, env))
    totals = {"planted": 0, "culled": 0}
    collector = BatchFirstCollector(env, controller, rollouts=rollouts)
    outcome: dict[str, Any] = {}
    mark = time.perf_counter()
    for episode, rollout in enumerate(collector):
        collected = time.perf_counter()
        outcome = book.close()
        events.write("rollout", episode=episode, **outcome)
        for name in totals:
            totals[name] += outcome[name]
        if learner is not None:
            events.write("update", episode=episode, **learner.learn(rollout))
        events.time("collect", collected - mark, episode=episode)
        mark = time.perf_counter()
        events.time("learn", mark - collected, episode=episode)
        progress.rollout(episode, outcome)
    collector.shutdown()
    summary = _summary(config, env, outcome, totals, rollouts, controller, time.perf_counter() - started)
    events.write("run_finished", weights_digest=summary["weights_digest"])
    return summary


def _observer(env: GrowthEnv, events: EventLog, progress: Progress, book: RolloutBook) -> Callable[[TensorDict], None]:
    def observe(result: TensorDict) -> None:
        record_step(events, result, env.spec, env.episode, env.epoch - 1)
        book.add(result)
        progress.epoch(env.episode, env.epoch, result["metrics", "val_accuracy"].tolist())

    return observe


def _facts(config: TrainingConfig, env: GrowthEnv) -> dict[str, Any]:
    return {
        "task": config.task,
        "controller": config.controller,
        "slots": list(env.spec.slots),
        "blueprints": list(env.spec.blueprints),
        "max_epochs": env.spec.rules.max_epochs,
        "host_parameters": env.spec.host_parameters,
    }


def _summary(
    config: TrainingConfig,
    env: GrowthEnv,
    outcome: dict[str, Any],
    totals: dict[str, int],
    rollouts: int,
    controller: Any,
    seconds: float,
) -> Summary:
    """The outcome of the last rollout's hosts; the test split is touched here and nowhere else."""
    growth = env.finished_growth()
    plans = [make_plan(g["slots"].cpu(), env.spec) for g in growth]
    scores = evaluate(env.shards, growth, plans, env.epochs, "test")
    test = (100.0 * scores["correct"][:, -1] / scores["seen"]).mean()
    weights = [g.select("host", "seeds", "slots") for g in growth]
    if isinstance(controller, RecurrentPolicy):
        weights.append(TensorDict.from_module(controller))

    def mean(name: str) -> float:
        return sum(outcome[name]) / len(outcome[name])

    return {
        "task": config.task,
        "controller": config.controller,
        "seed": config.seed,
        "episodes": rollouts * config.n_envs,
        "env_epochs": rollouts * config.n_envs * env.spec.rules.max_epochs,
        "validation_accuracy": mean("validation_accuracy"),
        "test_accuracy": float(test),
        "objective": mean("objective"),
        "host_parameters": env.spec.host_parameters,
        "parameters": mean("parameters"),
        "seeds_planted": totals["planted"],
        "seeds_kept": outcome["kept"],
        "seeds_culled": totals["culled"],
        "weights_digest": weights_digest(*weights),
        "timing": {
            "seconds": seconds,
            "env_epochs_per_second": rollouts * config.n_envs * env.spec.rules.max_epochs / seconds,
        },
    }


_OWN = [p for p in inspect.signature(train).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
_FIELDS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
    for name, field in TrainingConfig.model_fields.items()
]
train.__signature__ = inspect.Signature(_OWN + _FIELDS)  # type: ignore[attr-defined]
