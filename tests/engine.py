"""Tiny whole runs for tests: a registered task of a few random images, and a progress that shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from esper.config import TrainingConfig
from esper.events import EventLog, load
from esper.run import train
from esper.tasks import _REGISTRY, get_task, register_task
from tiny import images

TASK = "tiny"


@contextmanager
def tiny_task() -> Iterator[None]:
    """Have a task called `tiny` while the block runs."""
    register_task(replace(get_task("digits"), name=TASK, load=lambda key, folder: images(), batch_size=16))
    try:
        yield
    finally:
        del _REGISTRY[TASK]


class Silent:
    def epoch(self, episode: int, epoch: int, accuracies: list[float]) -> None:
        pass

    def rollout(self, episode: int, outcome: dict[str, Any]) -> None:
        pass


def tiny_config(**fields: Any) -> TrainingConfig:
    base = {"task": TASK, "slots": ["early", "mid", "late"], "n_envs": 4, "n_episodes": 8, "max_epochs": 8}
    return TrainingConfig(**{**base, "gates": "permissive", "lstm_hidden_dim": 16, **fields})


def run(folder: Path, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and events of a tiny run."""
    config = tiny_config(**fields)
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        summary = train(run_dir=folder, events=events, progress=Silent(), **config.to_train_kwargs())
    return dict(summary), load(folder) if (folder / "events.jsonl").exists() else []
