"""Checkpoints of what lies on a GPU."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from esper.checkpoint import store as stores
from esper.checkpoint.snapshot import Snapshot, read_snapshot
from esper.checkpoint.store import FOLDER, CheckpointStore

pytestmark = pytest.mark.cuda
_LONG = 2_000_000_000  # clock cycles, a second


def test_writing_waits_for_what_was_given_before_and_not_for_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, working = torch.zeros(1000, device="cuda"), threading.Event()
    write = stores.write_snapshot

    def write_late(*given):
        working.wait()
        return write(*given)

    monkeypatch.setattr(stores, "write_snapshot", write_late)
    with CheckpointStore(tmp_path, {}, []) as store:
        # Kernels are loaded and streams made when they are first needed, which waits for all that is going on.
        working.set()
        store.save(Snapshot(0, {"part": TensorDict({"value": value + 1.0})}))
        store.finish()
        working.clear()
        torch.cuda._sleep(_LONG // 4)
        value = value + 1.0
        store.save(Snapshot(1, {"part": TensorDict({"value": value})}))
        torch.cuda._sleep(12 * _LONG)  # other processes may keep the card and the disk busy
        after = torch.cuda.current_stream().record_event()
        working.set()
        store.finish()
        assert not after.query()
    _, found = read_snapshot(tmp_path / FOLDER / "00000001")
    assert torch.equal(found.parts["part"]["value"], torch.ones(1000))
