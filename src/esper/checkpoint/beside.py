"""Reading what lies on GPUs beside what they are doing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from tensordict import TensorDict

Marks = Mapping[torch.device, torch.cuda.Event]


def marked(values: Iterable[TensorDict]) -> Marks:
    """On every GPU that holds part of `values`: when it will have done all that it has been given so far."""
    devices = {leaf.device for value in values for leaf in value.values(True, True) if leaf.is_cuda}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}


@contextmanager
def beside(marks: Marks) -> Iterator[None]:
    """What this thread has GPUs do within the block waits for the marks, but not for what they were given since, which
    in turn does not wait for it."""
    with ExitStack() as streams:
        for device, mark in marks.items():
            stream = _stream(device)
            stream.wait_event(mark)
            streams.enter_context(torch.cuda.stream(stream))
        yield


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """An urgent one, of which nothing else is taken: streams come from a pool in turn, and one of the others may be
    recorded at this moment."""
    return torch.cuda.Stream(device, priority=-1)
