"""What a recorded program has room for is part of a run's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from tiny import tiny_spec

FULL = ((2, 1, 0), (0, 0, 4), (1, 1, 1))
ROOMS = {"seats": FULL, "seeds": FULL, "branches": FULL}


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> CapturedExecutor:
    """One that has nothing to record, so it needs no GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return CapturedExecutor(tiny_spec(), torch.device("cuda:0"))


@pytest.mark.parametrize("rooms", [{}, {"seats": FULL}, ROOMS])
def test_what_is_reserved_is_there(executor: CapturedExecutor, rooms: dict[str, Any]) -> None:
    assert executor.rooms == {}
    executor.reserve(rooms)
    assert executor.rooms == rooms


@pytest.mark.parametrize(
    ("rooms", "named"),
    [
        ({"chairs": FULL}, "chairs"),
        ({"seats": FULL[:2]}, "3 rows of 3"),
        ({"seats": ((1, 2), *FULL[1:])}, "3 rows of 3"),
        ({"seeds": FULL}, "together"),
    ],
)
def test_rooms_of_another_run_are_refused(executor: CapturedExecutor, rooms: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"rooms: .*{named}"):
        executor.reserve(rooms)


def test_an_executor_without_programs_has_none() -> None:
    executor = LoopExecutor(tiny_spec())
    assert executor.rooms == {}
    executor.reserve({})
    with pytest.raises(ValueError, match="rooms: seats; LoopExecutor has none"):
        executor.reserve({"seats": FULL})
