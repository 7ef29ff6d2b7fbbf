"""`BatchFirstCollector` against TorchRL's own way of stepping an environment."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from engine import tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.growth import step
from esper.growth.spec import GrowthSpec
from esper.learn.collector import BatchFirstCollector
from tiny import differing


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


def test_rollouts_are_those_of_torchrl_where_hosts_panic_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config, finite = tiny_config(max_epochs=6), step.finite_parts

    def broken(spec: GrowthSpec, growth: TensorDict) -> torch.Tensor:
        sound = finite(spec, growth)
        sound[1] &= growth["epoch"][1] != 3
        return sound

    monkeypatch.setattr(step, "finite_parts", broken)
    env = build_env(config)
    collected = list(BatchFirstCollector(env, build_controller(config, env), rollouts=2))
    env = build_env(config)
    policy = build_controller(config, env)
    whole = TransformedEnv(env, policy.make_tensordict_primer())
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        carrier = whole.reset()
        for rollout in collected:
            steps = []
            for _ in range(config.max_epochs):
                taken, carrier = whole.step_and_maybe_reset(policy(carrier))
                steps.append(taken)
            assert differing(rollout, torch.stack(steps, 1)) == []
            assert rollout["next", "terminated"].squeeze(-1).nonzero().tolist() == [[1, 3]]
            assert rollout["is_init"].squeeze(-1).nonzero().tolist() == [[0, 0], [1, 0], [1, 4], [2, 0], [3, 0]]
