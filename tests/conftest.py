"""Tests that need a GPU are skipped where there is none, so that one command fits every machine."""

import pytest
import torch

NEEDED = {"cuda": 1, "multi_gpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = max((NEEDED[mark.name] for mark in item.iter_markers() if mark.name in NEEDED), default=0)
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))
