"""Two GPUs in one process: every device gets hosts and computes, without touching the network (plan steps 5 and 8)."""

from __future__ import annotations

import socket

import pytest
import torch

from engine import run, tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.learn.collector import BatchFirstCollector

pytestmark = pytest.mark.multi_gpu
DEVICES = ["cuda:0", "cuda:1"]


@pytest.fixture(autouse=True)
def _hermetic(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a smoke test must not open connections")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with tiny_task():
        yield


@pytest.mark.parametrize("use_telemetry", [True, False])
def test_both_devices_compute(tmp_path, use_telemetry: bool) -> None:
    torch.cuda.init()
    for index in range(2):
        torch.cuda.reset_peak_memory_stats(index)
    config = tiny_config(devices=DEVICES, use_telemetry=use_telemetry, n_envs=4, max_epochs=3)
    env = build_env(config)
    rollout = next(iter(BatchFirstCollector(env, build_controller(config, env), rollouts=1)))
    assert rollout.batch_size == torch.Size([4, 3])
    assert [(str(s.device), s.first, s.size) for s in env.backend.shards] == [("cuda:0", 0, 2), ("cuda:1", 2, 2)]
    for index, growth in enumerate(env.finished_growth()):
        weights = growth["host", "params", "head", "weight"]
        assert str(weights.device) == DEVICES[index]
        assert float(growth["host", "moments", "head", "weight"].abs().sum()) > 0.0
        assert torch.cuda.max_memory_allocated(index) > 0


def test_decisions_are_those_of_one_device_with_the_same_grouping(tmp_path) -> None:
    """Two groups on one GPU or one group on each of two: the same events and the same weights."""
    fields = {"controller": "random", "max_epochs": 6, "n_episodes": 4}
    together, here = run(tmp_path / "one", devices=["cuda:0", "cuda:0"], **fields)
    apart, there = run(tmp_path / "two", devices=DEVICES, **fields)
    assert here == there
    assert together["weights_digest"] == apart["weights_digest"]
