"""One epoch: what its steps are given, and what its numbers are made into before they enter the records."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from engine import tiny_config, tiny_task
from esper.build import build_env
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import never_grow
from esper.growth.optim import schedule
from esper.growth.step import _gradients
from records import make_records


def test_every_step_has_its_own_rate_and_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    with tiny_task():
        env = build_env(tiny_config(n_envs=2, max_epochs=3, lr_schedule="cosine"))
        kind = type(env.backend.shards[0].executor)
        train_step = kind.train_step

        def watched(self, carry, x, y, host_lr, seed_lr, keys, measure):
            given.append((host_lr, seed_lr, keys))
            return train_step(self, carry, x, y, host_lr, seed_lr, keys, measure)

        monkeypatch.setattr(kind, "train_step", watched)
        env.rollout(3, ScriptedPolicy(never_grow()), break_when_any_done=False)
    rates = env.finished_growth()[0]["rates"]
    assert len(given) % 3 == 0
    assert len(given) > 3
    for number, (host_lr, seed_lr, _) in enumerate(given):
        share = schedule("cosine", number, len(given))
        torch.testing.assert_close(host_lr, rates["host"] * share)
        torch.testing.assert_close(seed_lr, rates["seed"] * share)
    assert len(torch.cat([keys for _, _, keys in given]).unique()) == 2 * len(given)


def test_gradients_are_compared_per_parameter() -> None:
    # Norms by the square root of how many parameters they are of: a seed as active as its host has ratio 1.
    records = make_records({"parameters": 400}, {"parameters": 25}, None)
    measured = TensorDict(
        {
            "host_norm": torch.tensor([0.5]).double(),
            "seed_norm": torch.tensor([[2.0, 0.25, math.nan]]).double(),
            "seed_health": torch.tensor([[1.0, 0.5, math.nan]]),
        },
        [1],
    )
    found = _gradients(torch.tensor([100]), records, measured)
    assert found["ratio"][0, :2].tolist() == pytest.approx([(2.0 / 20.0) / (0.5 / 10.0), (0.25 / 5.0) / (0.5 / 10.0)])
    assert found["norm"][0, :2].tolist() == [2.0, 0.25]
    assert found["health"][0, :2].tolist() == [1.0, 0.5]
    assert found["norm"][0, 2].isnan()


@pytest.mark.parametrize(("seed_norm", "host_norm", "size"), [(1e-9, 0.5, 100), (2.0, 1e-9, 100), (2.0, 0.5, 0)])
def test_gradients_that_are_hardly_there_have_ratio_zero(seed_norm: float, host_norm: float, size: int) -> None:
    measured = TensorDict(
        {
            "host_norm": torch.tensor([host_norm]).double(),
            "seed_norm": torch.tensor([[seed_norm]]).double(),
            "seed_health": torch.ones(1, 1),
        },
        [1],
    )
    found = _gradients(torch.tensor([100]), make_records({"parameters": size}), measured)
    assert found["ratio"].tolist() == [[0.0]]
