"""A stand-in for the engine, so that the command line is tested without training anything."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SUMMARY = {
    "task": "digits",
    "controller": "ppo",
    "seed": 42,
    "episodes": 4,
    "env_epochs": 8,
    "validation_accuracy": 91.25,
    "test_accuracy": 90.5,
    "objective": 90.75,
    "host_parameters": 496,
    "parameters": 1200.5,
    "seeds_planted": 3,
    "seeds_kept": 1,
    "seeds_culled": 2,
    "weights_digest": "0123abcd",
    "timing": {"seconds": 2.0, "env_epochs_per_second": 4.0},
}


class StubEngine:
    """Records how it was called and writes the least a run writes."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error_before: Exception | None = None
        self.error_after: Exception | None = None

    def train(
        self, *, run_dir: Path, events: Any, progress: Any, resume: Path | None, farewell: Any, **fields: Any
    ) -> dict[str, Any]:
        self.calls.append({"run_dir": run_dir, "resume": resume, **fields})
        if self.error_before is not None:
            raise self.error_before
        events.write("run_started", task=fields["task"], controller=fields["controller"])
        if self.error_after is not None:
            raise self.error_after
        events.time("collect", 2.0, episode=0)
        hosts = range(fields["n_envs"])
        for epoch in (1, 2):
            for host in hosts:
                events.write("epoch", episode=0, epoch=epoch, host=host, validation_accuracy=40.0 * epoch)
            progress.epoch(0, epoch, [40.0 * epoch for _ in hosts])
        outcome = {"validation_accuracy": [80.0 for _ in hosts], "returns": [1.0 for _ in hosts]}
        outcome |= {"planted": 3, "kept": 1, "culled": 2}
        events.write("rollout", episode=0, **outcome)
        progress.rollout(0, outcome)
        return SUMMARY


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StubEngine:
    """Stands where `esper.run` is."""
    stub = StubEngine()
    module = ModuleType("esper.run")
    module.train = stub.train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "esper.run", module)
    return stub
