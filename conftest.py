"""For all tests: one thread per process, and no GPU tests where there is no GPU."""

import os

# Several test processes with several spinning threads each would starve one another; read once, when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

NEEDED = {"cuda": 1, "multi_gpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One command fits every machine: tests that need more GPUs than there are get skipped."""
    for item in items:
        needed = max((NEEDED[mark.name] for mark in item.iter_markers() if mark.name in NEEDED), default=0)
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))
