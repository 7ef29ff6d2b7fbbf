"""Recording what a GPU is given to do as a CUDA graph, which is then given to it again in one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def recorded(work: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """`work` as a recording, and its results, whose tensors each replay fills anew. It is done once before, because
    libraries and constants load when they are first needed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        work()
        torch.cuda.synchronize()
        # Torch's own stream for recordings belongs to the first device that recorded anything.
        stream = torch.cuda.Stream(device)
        with uncollected(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = work()
    return graph, results


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block nothing is collected: collecting an old recording while a new one is made would be an illegal
    operation inside it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
