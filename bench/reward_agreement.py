"""Does the reward pay for what a run is judged by? Scripted controllers ranked by return and by objective.

    python bench/reward_agreement.py --task digits --hosts 8 --out reward-agreement.json

Every controller drives the same hosts (same weights, same order of batches) for one episode of the task's own length.
The script prints mean objective and mean undiscounted return of each controller under every reward, and for every
reward the rank correlation (Spearman) of the two columns; it exits with 1 if that of the default reward is below 0.9.
A reward does not influence a scripted controller, so one episode serves all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from tensordict import TensorDict

from esper.build import build_env
from esper.config import ScheduleStep, TrainingConfig
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import Controller, never_grow, patient_schedule, random_legal
from esper.environment.rewards import RewardSettings, reward
from esper.learn.collector import BatchFirstCollector
from esper.seeds.slots import LAYOUT
from esper.telemetry import RolloutBook

LEAST = 0.9


def plant(blueprint: str, slot: str = "mid", epoch: int = 0) -> ScheduleStep:
    return ScheduleStep(epoch=epoch, op="germinate", slot=slot, blueprint=blueprint, blend="linear")


def end(op: str, slot: str = "mid", epoch: int = 0) -> ScheduleStep:
    return ScheduleStep(epoch=epoch, op=op, slot=slot)


def controllers(blueprints: Sequence[str], max_epochs: int) -> dict[str, Controller]:
    """Ways to grow or not to grow; each step of a script is taken as soon as it is possible."""

    def script(*steps: ScheduleStep) -> Controller:
        return patient_schedule(steps, blueprints, max_epochs)

    first = blueprints[0]
    everywhere = [plant(first, slot) for slot in LAYOUT] + [end("fossilize", slot) for slot in LAYOUT]
    loop = [step for _ in range(max_epochs) for step in (plant(first), end("cull"))]
    return {
        "never grow": never_grow(),
        **{f"grow {name} and keep": script(plant(name), end("fossilize")) for name in blueprints},
        f"grow {first} everywhere and keep": script(*everywhere),
        f"grow {first}, cull half way": script(plant(first), end("cull", epoch=max_epochs // 2)),
        f"germinate {first}, cull, again": script(*loop),
        "random legal": random_legal(),
    }


def rewards(settings: RewardSettings) -> dict[str, RewardSettings]:
    """The run's reward settings in every family and mode."""
    modes = {f"contribution {mode}": replace(settings, mode=mode) for mode in ("shaped", "sparse", "minimal")}
    return {**modes, "loss": replace(settings, family="loss")}


def episode(config: TrainingConfig, controller: Controller) -> dict[str, Any]:
    """Mean objective, and mean return under every reward, of one episode."""
    env = build_env(config)
    book = RolloutBook(config.param_penalty_weight)
    variants = rewards(env.settings.reward)
    returns = dict.fromkeys(variants, 0.0)

    def observe(result: TensorDict) -> None:
        book.add(result)
        last = env.epoch >= env.spec.rules.max_epochs
        for name, settings in variants.items():
            returns[name] += float(reward(result, settings, terminal=last)["total"].mean())

    env.observer = observe
    collector = BatchFirstCollector(env, ScriptedPolicy(controller), rollouts=1)
    for _ in collector:
        pass
    collector.shutdown()
    outcome = book.close()
    return {
        "objective": sum(outcome["objective"]) / config.n_envs,
        "validation_accuracy": sum(outcome["validation_accuracy"]) / config.n_envs,
        "parameters": sum(outcome["parameters"]) / config.n_envs,
        "kept": outcome["kept"] / config.n_envs,
        "returns": returns,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="epochs of the episode (default: the task's)")
    parser.add_argument("--out", type=Path, default=Path("reward-agreement.json"))
    given = parser.parse_args()
    config = TrainingConfig(
        task=given.task, slots=list(LAYOUT), n_envs=given.hosts, max_epochs=given.epochs, seed=given.seed
    )
    spec = build_env(config).spec
    rows = {}
    for name, controller in controllers(spec.blueprints, spec.rules.max_epochs).items():
        start = time.perf_counter()
        rows[name] = episode(config, controller)
        row = rows[name]
        paid = "  ".join(f"{kind} {value:8.3f}" for kind, value in row["returns"].items())
        print(
            f"{name:32s} objective {row['objective']:6.2f}  accuracy {row['validation_accuracy']:6.2f}  "
            f"kept {row['kept']:4.2f}  {paid}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    objectives = [row["objective"] for row in rows.values()]
    agreement = {
        kind: float(spearmanr(objectives, [row["returns"][kind] for row in rows.values()]).statistic)
        for kind in next(iter(rows.values()))["returns"]
    }
    for kind, correlation in agreement.items():
        print(f"rank correlation of return and objective, {kind}: {correlation:.3f}")
    given.out.write_text(
        json.dumps({"config": config.to_dict(), "controllers": rows, "agreement": agreement}, indent=2)
    )
    return 0 if agreement["contribution shaped"] >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
