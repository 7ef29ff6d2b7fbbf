"""When Python looks for what nobody refers to any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from tensordict import TensorDict

from esper.environment.env import GrowthEnv
from esper.recording import uncollected


@contextmanager
def collected_meanwhile(env: GrowthEnv) -> Iterator[None]:
    """Within the block Python collects garbage when a step is told, mostly while GPUs work on the next, and at no other
    time: left to itself it mostly does so while they wait, where most objects are made.

    What exists already is not looked through again until the block is left, or that would take a quarter of a second.
    So blocks may not be within each other. Without GPUs nothing waits for Python, and it is left to itself.
    """
    if not env.overlaps:
        yield
        return
    observer = env.observer

    def observe(result: TensorDict) -> None:
        if observer is not None:
            observer(result)
        gc.collect()

    env.observer = observe
    gc.collect()
    gc.freeze()
    try:
        with uncollected():
            yield
    finally:
        gc.unfreeze()
        env.observer = observer
