"""The whole of policy, rollout, loss and update learns what it should."""

import time

import pytest
from torchrl.envs.utils import check_env_specs

from esper.control.policy import RecurrentPolicy
from learn.learning_tasks import Bandit, Memory, SmallEnv, collect, learn, mean_return

OPTIMUM = 1.0
BUDGET = {Bandit: 30, Memory: 45}


def reaches_optimum(task: type[SmallEnv], seed: int) -> bool:
    started = time.process_time()
    reached = learn(task(seed), seed, BUDGET[task])
    return reached >= 0.95 * OPTIMUM and time.process_time() - started < 60


@pytest.mark.parametrize("task", BUDGET)
def test_reaches_the_optimum(task: type[SmallEnv]) -> None:
    assert reaches_optimum(task, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("task", BUDGET)
def test_reaches_the_optimum_from_every_seed(task: type[SmallEnv], seed: int) -> None:
    assert reaches_optimum(task, seed)


@pytest.mark.parametrize("task", BUDGET)
def test_the_tasks_are_not_trivial(task: type[SmallEnv]) -> None:
    env = task(0)
    check_env_specs(env)
    assert mean_return(collect(env, RecurrentPolicy(env.features, 32, seed=0))) < 0.5 * OPTIMUM
