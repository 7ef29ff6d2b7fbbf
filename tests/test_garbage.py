"""Python collects while GPUs work, and as it likes where there are none."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from tensordict import TensorDict

from engine import tiny_config, tiny_task
from esper.build import build_env
from esper.environment.env import GrowthEnv
from esper.garbage import collected_meanwhile


@pytest.fixture
def env() -> Iterator[GrowthEnv]:
    with tiny_task():
        yield build_env(tiny_config(n_envs=2))


class Ring:
    """Refers to itself, so that only a collection finds it."""

    def __init__(self) -> None:
        self.itself = self


def discarded() -> weakref.ref:
    return weakref.ref(Ring())


def test_with_gpus_garbage_is_collected_when_an_epoch_is_told(env: GrowthEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    told: list[TensorDict] = []
    env.observer = observer = told.append
    wait = env.action_spec.zero()
    state = env.reset()
    with collected_meanwhile(env):
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        lost = discarded()
        state = env.step(state.set("action", wait))["next"]
        assert lost() is not None, "it has not been told yet"
        env.step(state.set("action", wait))
        assert lost() is None
        assert len(told) == 1
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert env.observer is observer


def test_it_is_left_to_itself_afterwards_whatever_happens(env: GrowthEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    with pytest.raises(KeyboardInterrupt), collected_meanwhile(env):
        raise KeyboardInterrupt
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_without_gpus_nothing_is_different(env: GrowthEnv) -> None:
    with collected_meanwhile(env):
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
        assert env.observer is None
