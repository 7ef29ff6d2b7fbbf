"""What a controller is told, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.environment.masks import action_masks
from esper.environment.observation import ObservationSettings, observe
from esper.environment.signals import SignalTracker
from esper.environment.view import View, packed, unpacked
from esper.keys import Purpose
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage
from records import make_records

SETTINGS = ObservationSettings(LAYOUT, 4, 25, 1000, max_seeds=3)


def hosts(seed: int, n: int = 12) -> tuple[TensorDict, TensorDict, Tensor, Tensor]:
    """Records, tracker, keys and sizes of hosts with seeds in all stages."""
    generator = torch.Generator().manual_seed(seed)
    stages = torch.randint(Stage.DORMANT, Stage.RESETTING + 1, (n, len(LAYOUT)), generator=generator)
    fields = {"age": 3, "alpha": 0.5, "blueprint": 1, "contribution": 1.5, "parameters": 70, "gradient_norm": 0.3}
    records = torch.cat([make_records(*({"stage": stage, **fields} for stage in row)) for row in stages.tolist()])
    tracker, settings = SignalTracker().init(n), SignalTracker()
    for _ in range(3):
        numbers = 3.0 * torch.rand(4, n, generator=generator)
        names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
        tracker = settings.update(tracker, TensorDict(dict(zip(names, numbers, strict=True)), [n]))
    return records, tracker, k.host_keys(k.root(seed), n), torch.arange(1000, 1000 + n)


def test_a_view_is_observation_masks_and_a_key_for_every_epoch() -> None:
    records, tracker, keys, sizes = hosts(1)
    told = View(SETTINGS, torch.device("cpu"))(records, tracker, keys, sizes)
    settings = dataclasses.replace(SETTINGS, host_parameters=sizes)
    assert torch.equal(told["observation"], observe(records, tracker, settings))
    assert torch.equal(told["key"], k.fold(keys, Purpose.POLICY, 3))
    masks = action_masks(records, settings)
    assert set(told.keys()) == {"observation", "key", *masks.keys()}
    assert all(torch.equal(told[name], mask) for name, mask in masks.items())


def test_packed_tensors_come_out_as_they_went_in() -> None:
    leaves = [
        torch.tensor([True, False]),
        torch.randn(2, 3),
        torch.tensor([[1, -(2**60), 3], [4, 5, 6]]),
        torch.tensor([[False], [True]]),
        torch.tensor([float("nan"), float("inf")]),
        torch.randn(2, 3, 2),
    ]
    together = packed(leaves)
    assert {dtype: tuple(part.shape) for dtype, part in together.items()} == {
        torch.bool: (2, 2),
        torch.float32: (2, 10),
        torch.int64: (2, 3),
    }
    for given, found in zip(leaves, unpacked(together, leaves), strict=True):
        torch.testing.assert_close(found, given, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize("n", [12, 300])
def test_on_a_gpu_every_view_is_that_of_the_cpu(n: int) -> None:
    here, there = (View(SETTINGS, torch.device(device)) for device in ("cpu", "cuda"))
    seen = [(here(*hosts(seed, n)), there(*hosts(seed, n))) for seed in range(3)]
    for own, told in seen:
        assert told["observation"].is_cuda
        torch.testing.assert_close(told["observation"].cpu(), own["observation"], rtol=1e-6, atol=1e-6)
        for name in set(own.keys()) - {"observation"}:
            assert torch.equal(told[name].cpu(), own[name]), name
