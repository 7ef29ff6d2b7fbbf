"""For GPU tests of what must not wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_waiting() -> Iterator[None]:
    """Whatever waits for a CUDA device within the block is an error."""
    with warnings.catch_warnings():
        # PyTorch says once that it does not see every wait.
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
