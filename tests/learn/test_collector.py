"""`BatchFirstCollector` against TorchRL's own way of stepping an environment."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from engine import tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.growth import step
from esper.growth.spec import GrowthSpec
from esper.learn.collector import BatchFirstCollector
from esper.seeds.actions import Op
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


@pytest.mark.parametrize("kept", ["root", "next", "nowhere"])
def test_what_a_policy_carries_need_not_be_returned_and_never_replaces_what_is_told(kept: str) -> None:
    config = tiny_config(max_epochs=3)

    class Counting:
        def make_tensordict_primer(self) -> TensorDictPrimer:
            return TensorDictPrimer({"count": Unbounded(shape=(1,))}, expand_specs=True)

        def __call__(self, td: TensorDict) -> TensorDict:
            wait = torch.tensor([0, 0, 0, Op.WAIT]).expand(*td.batch_size, 4).clone()
            chosen = TensorDict({"action": wait}, td.batch_size)
            if kept == "root":
                chosen["count"] = td["count"] + 1
            elif kept == "next":
                chosen["next", "count"] = td["count"] + 1
                chosen["next", "observation"] = torch.full_like(td["observation"], 7.0)
            return chosen

    (rollout,) = BatchFirstCollector(build_env(config), Counting(), rollouts=1)
    expected = {"root": [1, 2, 3], "next": [0, 1, 2], "nowhere": [0, 0, 0]}[kept]
    assert rollout["count"][0].flatten().tolist() == expected
    assert not (rollout["next", "observation"] == 7.0).all(-1).any()
