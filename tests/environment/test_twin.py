"""Twins: the same hosts left alone. They move the reward and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from engine import tiny_config, tiny_task
from esper.build import build_env
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import never_grow, random_legal
from esper.environment import env as environment
from esper.environment.rewards import COMPONENTS
from esper.environment.twin import twin_accuracies

EPOCHS, HOSTS = 4, 3


def episode(policy: ScriptedPolicy, **fields) -> tuple[list[TensorDict], TensorDict]:
    """Every step's result and the rollout `[N, T]` of one episode."""
    with tiny_task():
        env = build_env(tiny_config(n_envs=HOSTS, max_epochs=EPOCHS, incubation="none", **fields))
        results: list[TensorDict] = []
        env.observer = results.append
        return results, env.rollout(EPOCHS, policy, break_when_any_done=False)


def metrics(results: list[TensorDict], name: str = "val_accuracy") -> torch.Tensor:
    return torch.stack([result["metrics", name] for result in results], dim=1)


@pytest.mark.parametrize("fields", [{}, {"devices": ["cpu", "cpu"]}])
def test_a_twin_is_the_host_that_never_grew(fields) -> None:
    alone, _ = episode(ScriptedPolicy(never_grow()))
    plain, _ = episode(ScriptedPolicy(random_legal()))
    grown, rollout = episode(ScriptedPolicy(random_legal()), reward_baseline="twin", **fields)
    after = torch.stack([result["twin"][:, 1] for result in grown], dim=1)
    before = torch.stack([result["twin"][:, 0] for result in grown], dim=1)
    assert torch.equal(after, metrics(alone))
    assert torch.equal(before[:, 1:], after[:, :-1])
    assert torch.equal(before[:, 0], alone[0]["tracker", "previous_val_accuracy"])
    assert torch.equal(metrics(grown), metrics(plain))
    assert not torch.equal(metrics(grown), metrics(alone))
    assert rollout.batch_size == (HOSTS, EPOCHS)


def test_what_is_paid_is_the_progress_beyond_the_twin() -> None:
    alone, _ = episode(ScriptedPolicy(never_grow()))
    plain, _ = episode(ScriptedPolicy(random_legal()))
    grown, rollout = episode(ScriptedPolicy(random_legal()), reward_baseline="twin")
    for a, b, c in zip(grown, plain, alone, strict=True):
        gap = b["components", "objective"] - c["components", "objective"]
        assert torch.allclose(a["components", "objective"], gap, atol=1e-5)
        for name in set(COMPONENTS) - {"objective"}:
            assert torch.equal(a["components", name], b["components", name])
    assert torch.equal(rollout["next", "reward"][:, -1, 0], grown[-1]["reward"])


def test_a_host_that_waits_is_paid_nothing() -> None:
    results, _ = episode(ScriptedPolicy(never_grow()), reward_baseline="twin")
    assert all(bool((result["reward"] == 0).all()) for result in results)


def twins_run(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Have `run(run_epoch, ...)` run the epochs of twins, and of nobody else."""

    def wrapped(backend: Any, *rest: Any) -> torch.Tensor:
        return twin_accuracies(SimpleNamespace(run_epoch=partial(run, backend.run_epoch)), *rest)

    monkeypatch.setattr(environment, "twin_accuracies", wrapped)


def test_a_twin_that_breaks_down_ends_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy is then that of its snapshot."""
    seen = []

    def breaks_down(run_epoch, growth, *rest):
        g = [part.clone() for part in growth]
        g[0]["host", "params"].apply_(lambda leaf: leaf.fill_(torch.nan))
        growth, result = run_epoch(g, *rest)
        seen.append(bool(result["panic"].all()))
        return growth, result

    twins_run(monkeypatch, breaks_down)
    results, rollout = episode(ScriptedPolicy(never_grow()), reward_baseline="twin")
    assert seen == [True] * EPOCHS
    assert not any(bool(result["panic"].any()) for result in results)
    assert not bool(rollout["next", "terminated"].any())
    first = results[0]["tracker", "previous_val_accuracy"]
    assert all(torch.equal(result["twin"][:, 1], first) for result in results)
    assert bool(rollout["next", "reward"].isfinite().all())


def test_twins_run_once_an_episode_and_only_when_it_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    twins_run(monkeypatch, lambda run_epoch, *given: calls.append(given[-1]) or run_epoch(*given))
    with tiny_task():
        env = build_env(tiny_config(n_envs=1, max_epochs=2, reward_baseline="twin"))
        env.reset()
        assert calls == []
        env.rollout(2, ScriptedPolicy(never_grow()), break_when_any_done=False)
    assert calls == [0, 1]
