"""What a controller learns when growing pays for certain: PPO on hosts whose accuracy is a formula.

    python bench/surrogate.py            # two ways to end an episode, one to begin; a quarter of an hour on two cores
    python bench/surrogate.py --smoke    # seconds

Lifecycle, masks, observation, reward, twins and learner are the project's own; only training and scoring are replaced,
by an executor that makes up accuracies. Blended seeds come to be worth what their kind and slot say, up to a draw of
the host's; what they are worth grows with the epochs that are left, and leaning on a seed makes its removal dear for
a while. So never-grow and a fixed schedule have known levels and learning can be judged apart from growing. Prints
the mean objective and return of every fourth rollout and writes `bench-surrogate.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.environment.env import GrowthEnv
from esper.environment.rewards import objective
from esper.growth.executors import base
from esper.growth.plan import Plan
from esper.growth.spec import GrowthSpec
from esper.learn.collector import BatchFirstCollector
from esper.run import acting, build_learner
from esper.seeds.gates import in_stage
from esper.seeds.stages import BLENDED

GAIN = {
    "norm": (0.3, 0.5, 0.2),
    "attention": (0.0, 0.0, 0.2),
    "depthwise": (1.0, 0.5, 0.0),
    "conv_light": (1.6, 1.0, 0.6),
    "conv_expand": (3.0, 2.0, 1.5),
}
"""What a seed of each kind is worth in each slot, percentage points."""
LEVEL, SPREAD, JITTER, OWN, LEANING, SEEN = 79.0, 6.0, 2.0, 2.5, 6.0, 359
"""Mean and standard deviation of final accuracies of hosts alone, of an epoch's noise at the start, of a seed's worth
over hosts, what removing a seed that is long there costs (all percentage points); samples scored."""
BASE, WORTH, NOISE = 1, 2, 3


@dataclass
class Surrogate(base.Roomless):
    """An executor that trains nothing; see `Executor` for the contract. All state is `[N]` or `[N, S]`."""

    spec: GrowthSpec
    level: Tensor = field(default_factory=lambda: torch.zeros(0))
    worth: Tensor = field(default_factory=lambda: torch.zeros(0))
    leaning: Tensor = field(default_factory=lambda: torch.zeros(0))
    planted: Tensor = field(default_factory=lambda: torch.zeros(0))
    hurt: Tensor = field(default_factory=lambda: torch.zeros(0))

    def begin(self, growth: TensorDict, plan: Plan) -> None:
        """Fresh hosts are drawn; later an epoch moves everything on."""
        key, slots, epoch = growth["key"], growth["slots"], int(growth["epoch"][0])
        if epoch == 0:
            self.level = LEVEL + SPREAD * _draw(key, BASE)
            self.worth, self.leaning = torch.zeros(slots.shape), torch.zeros(slots.shape)
            self.planted, self.hurt = torch.zeros(slots.shape, dtype=torch.int64), torch.zeros(len(key))
        left = 1.0 - epoch / self.spec.rules.max_epochs
        gone = (slots["planted"] != self.planted) | (slots["blueprint"] < 0)
        self.hurt = (self.hurt + torch.where(gone, self.leaning, 0.0).sum(1)) * (1.0 - 0.3 * left)
        self.worth, self.leaning = torch.where(gone, 0.0, self.worth), torch.where(gone, 0.0, self.leaning)
        self.planted = slots["planted"].clone()
        for j in range(slots.shape[1]):
            for b, name in enumerate(self.spec.blueprints):
                here = (slots["blueprint"][:, j] == b) & (slots["alpha"][:, j] > 0)
                goal = 1.3 * (GAIN[name][j] + OWN * _draw(key, WORTH, j, b))
                self.worth[:, j] += torch.where(here, 0.25 * left * (goal - self.worth[:, j]), 0.0)
                self.leaning[:, j] += torch.where(here, 0.15 * (LEANING - self.leaning[:, j]), 0.0)

    def train_step(self, carry: None, *batch: Any) -> None:
        """Nothing is trained."""

    def finish(self, carry: None, growth: TensorDict) -> TensorDict:
        """Nothing was trained."""
        return growth

    def measured(self, carry: None) -> TensorDict:
        """Gradients that open every gate."""
        measured = base.empty_measurements(*self.worth.shape)
        for name in ("host_norm", "seed_norm", "seed_health", "seen"):
            measured[name].fill_(1)
        return measured

    def begin_evaluation(self, growth: TensorDict, plan: Plan, calibration: Tensor | None) -> TensorDict:
        """The scores, at once."""
        n, s = growth["slots"].shape
        epoch, key, alpha = int(growth["epoch"][0]), growth["key"], growth["slots", "alpha"]
        scores = base.empty_scores(n, s)
        scores["seen"].fill_(SEEN)
        if epoch == 0:
            # Untrained hosts are alike, and have no seeds.
            scores["correct"].fill_(round(0.0055 * LEVEL * SEEN))
            scores["loss"] = 3.0 * (SEEN - scores["correct"][:, -1]).double()
            return scores
        risen = 1.0 - 0.45 * torch.exp(torch.tensor(-epoch / 4.0))
        calm = max(0.05, 1.0 - epoch / self.spec.rules.max_epochs)
        reached = self.level * risen + JITTER * calm * _draw(key, NOISE, epoch) - self.hurt
        live = in_stage(growth["slots"], BLENDED)
        for members in range(2**s):
            inside = torch.tensor([bool(members >> j & 1) for j in range(s)])
            grown = torch.where(live & inside, self.worth * alpha, 0.0)
            missed = torch.where(live & ~inside, self.leaning * alpha, 0.0)
            accuracy = (reached + (grown - missed).sum(1)).clamp(3.0, 99.8)
            scores["correct"][:, members] = (accuracy / 100.0 * SEEN).round().long()
        scores["loss"] = 3.0 * (SEEN - scores["correct"][:, -1]).double()
        return scores

    def evaluate_step(self, carry: TensorDict, x: Tensor, y: Tensor) -> TensorDict:
        """All is counted already."""
        return carry

    def finish_evaluation(self, carry: TensorDict) -> TensorDict:
        """What was counted."""
        return carry


def _draw(key: Tensor, *purpose: int) -> Tensor:
    """A standard normal number for each host, `[N]`."""
    return k.normal(k.fold(key, *purpose), 1).squeeze(1)


def surrogate_env(config: TrainingConfig) -> GrowthEnv:
    """The environment of a configuration with a made-up executor; a batch an epoch keeps the data out of the way."""
    env = build_env(config)
    shards = tuple(replace(shard, executor=Surrogate(env.spec)) for shard in env.backend.shards)
    env.backend = replace(env.backend, shards=shards)
    return env


def learn(rollouts: int, hosts: int, **fields: Any) -> list[dict[str, float]]:
    """One training; a row of means for each rollout."""
    config = TrainingConfig(
        task="digits_narrow",
        slots=["early", "mid", "late"],
        n_envs=hosts,
        n_episodes=hosts * rollouts,
        train_samples=64,
        incubation="none",
        gates="permissive",
        executor="loop",
        param_penalty_weight=0.02,
        reward_baseline="twin",
        lr=1e-3,
        minibatches=4,
        target_kl=0.03,
        entropy_coef=0.02,
        **fields,
    )
    env = surrogate_env(config)
    policy = build_controller(config, env)
    learner = build_learner(config, policy) if config.controller == "ppo" else None
    last: list[TensorDict] = []
    env.observer = lambda result: last.__setitem__(slice(None), [result])
    rows = []
    who = acting(config, env, policy, learner)
    for i, rollout in enumerate(BatchFirstCollector(env, who, rollouts=rollouts)):
        if learner is not None:
            learner.learn(rollout)
        end, prices = last[0], env.settings.reward
        accuracy, grown = end["metrics", "val_accuracy"], end["after", "parameters"].sum(1)
        reached = objective(accuracy, grown, prices.budget, prices.param_penalty_weight)
        paid = rollout["next", "reward"].sum(1)
        row = {"objective": reached, "return": paid, "grown": grown}
        rows.append({name: float(values.double().mean()) for name, values in row.items()})
        if i % 4 == 3 or rollouts <= 2:
            print(f"  rollout {i + 1}: " + ", ".join(f"{n} {v:.2f}" for n, v in rows[-1].items()), flush=True)
    return rows


SCHEDULE = [
    {"epoch": 0, "op": "germinate", "slot": "early", "blueprint": "conv_expand", "blend": "linear"},
    {"epoch": 1, "op": "germinate", "slot": "mid", "blueprint": "conv_expand", "blend": "linear"},
    {"epoch": 7, "op": "fossilize", "slot": "early"},
    {"epoch": 8, "op": "fossilize", "slot": "mid"},
]
IMITATION = 4
"""Rollouts in which the schedule acts and the policy learns to act like it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="two rollouts of four hosts")
    parser.add_argument("--out", type=Path, default=Path("bench-surrogate.json"))
    given = parser.parse_args()
    rollouts, hosts = (2, 4) if given.smoke else (given.rollouts, given.hosts)
    arms: dict[str, tuple[int, dict[str, Any]]] = {
        "never": (1, {"controller": "never"}),
        "schedule": (1, {"controller": "schedule", "schedule": SCHEDULE}),
        "terminal": (rollouts, {"episode_end": "terminal"}),
        "truncated": (rollouts, {"episode_end": "truncated"}),
        "imitated": (
            rollouts,
            {"episode_end": "terminal", "schedule": SCHEDULE, "imitation_rollouts": min(IMITATION, rollouts - 1)},
        ),
    }
    found = {}
    for name, (count, fields) in arms.items():
        print(name, flush=True)
        found[name] = learn(count, hosts, **fields)
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
