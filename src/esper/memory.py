"""Running out of memory, said in terms of what can be changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esper.errors import RunStopped


@contextmanager
def memory_named(n_envs: int, batch_size: int) -> Iterator[None]:
    """Turn running out of memory, on a GPU or on the host, into a RunStopped that names what takes it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise RunStopped(
            f"out of memory: n_envs ({n_envs}) hosts train side by side on batch_size ({batch_size}) samples each; "
            f"make either smaller, or name more devices ({str(error).splitlines()[0] if str(error) else 'no memory'})"
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text
