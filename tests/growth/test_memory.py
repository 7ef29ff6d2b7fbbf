"""Growing and culling again and again leaves no memory behind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from esper.growth.executors.base import Executor
from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from esper.growth.spec import GrowthSpec
from esper.seeds.actions import Op
from esper.seeds.lifecycle import LifecycleRules
from tiny import CPU, Run, germinate, images, tiny_spec

CYCLES = 100
GPU = torch.device("cuda:0")


def held_on_the_cpu() -> int:
    """Bytes of all tensors that anything refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held_on_the_gpu() -> int:
    gc.collect()
    torch.cuda.synchronize(GPU)
    return torch.cuda.memory_allocated(GPU)


EXECUTORS: dict[str, tuple[Callable[[GrowthSpec], Executor], torch.device, Callable[[], int]]] = {
    "loop": (LoopExecutor, CPU, held_on_the_cpu),
    "captured": (lambda spec: CapturedExecutor(spec, GPU), GPU, held_on_the_gpu),
}


@pytest.mark.parametrize("name", ["loop", pytest.param("captured", marks=pytest.mark.cuda)])
def test_a_hundred_cycles_leave_one_percent_at_most(name: str) -> None:
    make, device, held = EXECUTORS[name]
    spec = tiny_spec(rules=LifecycleRules(max_epochs=3 * CYCLES, strict_gates=False))
    run = Run(spec, n=2, splits=images(16, 16, 4), executor=make(spec), device=device)

    def cycle(i: int) -> None:
        """A seed of the next blueprint in the next slot lives for one epoch, in another host each time."""
        host, slot, blueprint = i % 2, i % 3, i // 3 % len(spec.blueprints)
        run.step({host: germinate(slot, blueprint)})
        run.step({host: (Op.CULL, slot)})
        assert not (run.growth["slots", "blueprint"] >= 0).any()

    for i in range(18):  # every plan was met, every program has the room it needs
        cycle(i)
    start = held()
    for i in range(CYCLES):
        cycle(i)
    assert held() <= 1.01 * start
