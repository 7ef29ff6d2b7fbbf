"""Files, store and lock: nothing half written counts, damage is named, little is kept, nobody waits."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict

from esper.checkpoint import snapshot as snapshots
from esper.checkpoint.lock import LOCK, run_lock
from esper.checkpoint.snapshot import (
    MANIFEST,
    Snapshot,
    checkpoints,
    name_of,
    read_manifest,
    read_snapshot,
    write_snapshot,
)
from esper.checkpoint.store import FOLDER, KEEP_LAST, CheckpointStore, find, forget_after
from esper.checkpoint.tensors import like, read_tensors, write_tensors
from esper.errors import CheckpointError, InputError, RunStopped
from tiny import differing

ABOUT = {"versions": {"torch": "2"}, "config": {"seed": 1}, "groups": []}


def state(n: int = 2, fill: float = 1.5) -> TensorDict:
    """Every kind of leaf that a run has."""
    wide = torch.arange(12.0).reshape(3, 4)
    shared = torch.full((n,), fill)
    return TensorDict(
        {
            "z": TensorDict({"b": torch.tensor([True, False]), "a": torch.arange(n), "empty": TensorDict()}),
            "scalar": torch.tensor(2**62 + 1),
            "double": torch.tensor([0.1, float("nan"), float("-inf")], dtype=torch.float64),
            "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
            "nothing": torch.zeros(0, 3),
            "view": wide[1:, 1:],
            "transposed": wide.T,
            "one": shared,
            "same": shared,
            "rows": TensorDict({"r": torch.ones(n, 2)}, batch_size=[n]),
        }
    )


def snapshot(step: int, score: float | None = None) -> Snapshot:
    return Snapshot(step, {"first": state(fill=step), "second": state(3)}, {"events": step}, score)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


def test_tensors_keep_bits_types_shapes_order_and_empty_places(tmp_path: Path) -> None:
    value = state()
    write_tensors(tmp_path / "x.safetensors", value)
    back = read_tensors(tmp_path / "x.safetensors")
    assert differing(back, value) == []
    assert list(back.keys(include_nested=True)) == list(value.keys(include_nested=True))
    assert back["rows"].batch_size == (2,)
    assert list(back["z", "empty"].keys()) == []
    assert back["half"].view(torch.int16).tolist() == value["half"].view(torch.int16).tolist()
    with pytest.raises(ValueError, match="'a/b'"):
        write_tensors(tmp_path / "y.safetensors", TensorDict({"a/b": torch.ones(1)}))


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="tree"):
        read_tensors(tmp_path / "x.safetensors")


def test_like_names_what_does_not_fit() -> None:
    template = TensorDict({"a": TensorDict({"b": torch.ones(2)}), "c": torch.ones(1)})
    fits = TensorDict({"c": torch.zeros(1), "a": TensorDict({"b": torch.zeros(2)})})
    assert list(like(fits, template).keys()) == ["c", "a"]
    with pytest.raises(ValueError, match=r"a/b: float32 \[3\]; must be float32 \[2\]"):
        like(TensorDict({"c": torch.ones(1), "a": TensorDict({"b": torch.ones(3)})}), template)
    with pytest.raises(ValueError, match="c: absent"):
        like(fits.exclude("c"), template)
    with pytest.raises(ValueError, match=r"d: float32 \[1\]; must be absent"):
        like(fits.clone().update({"d": torch.ones(1)}), template)


def test_a_flipped_byte_in_any_file_is_named_and_the_checkpoint_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / FOLDER
    write_snapshot(folder, snapshot(1), ABOUT)
    path = write_snapshot(folder, snapshot(2), ABOUT)
    assert {file.name for file in path.iterdir()} == {MANIFEST, "first.safetensors", "second.safetensors"}
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for at in [0, 7, 8, size // 3, size // 2, size - 2, size - 1]:
            flip(file, at)
            with pytest.raises(CheckpointError) as refused:
                read_snapshot(path)
            assert f'"{file}"' in str(refused.value)
            with caplog.at_level(logging.WARNING, "esper"):
                assert find(tmp_path, tmp_path)[1].step == 1
            assert str(file) in caplog.text
            with pytest.raises(CheckpointError, match=file.name):
                find(tmp_path, path)
            flip(file, at)
    assert find(tmp_path, tmp_path)[1].step == 2


def test_a_missing_file_is_named_and_nothing_left_is_said(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / FOLDER, snapshot(1), ABOUT)
    (path / "second.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"second\.safetensors"):
        find(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from"):
        find(tmp_path / "elsewhere", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="must be a checkpoint in"):
        find(tmp_path, tmp_path / "elsewhere" / "00000001")


@pytest.mark.parametrize("other", [1, 3])
def test_a_format_of_the_past_or_the_future_is_refused(tmp_path: Path, other: int) -> None:
    path = write_snapshot(tmp_path, snapshot(1), ABOUT)
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_bytes(snapshots._sealed({**data, "format": other}))
    with pytest.raises(CheckpointError, match=f"has format {other}; must be format 2"):
        read_manifest(path)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    scores = [1.0, 9.0, 3.0, 9.0, None, 2.0, None, 4.0]
    with CheckpointStore(tmp_path, {}, []) as store:
        for step, score in enumerate(scores):
            store.save(snapshot(step, score))
            store.finish()
    kept = [int(path.name) for path in checkpoints(tmp_path / FOLDER)]
    assert kept == [3, *range(len(scores) - KEEP_LAST, len(scores))]


def test_saving_never_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk hangs; a thousand saves take no time, and of those that had to wait the newest is written."""
    released, writing, written = threading.Event(), threading.Event(), []

    def slow(folder: Path, given: Snapshot, about: object) -> None:
        writing.set()
        released.wait(timeout=20.0)
        written.append(given.step)

    monkeypatch.setattr("esper.checkpoint.store.write_snapshot", slow)
    with CheckpointStore(tmp_path, {}, []) as store:
        store.save(snapshot(0))
        writing.wait()
        waiting = [snapshot(step) for step in range(1, 1000)]
        start = time.perf_counter()
        for one in waiting:
            store.save(one)
        took = time.perf_counter() - start
        released.set()
        store.finish()
    assert took < 5.0  # waiting for the writer would take until `released`
    assert written == [0, 999]


def test_a_writer_that_fails_in_whatever_way_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that breaks, say: the run must not wait for the writer for ever."""

    def breaks(*given: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("esper.checkpoint.store.write_snapshot", breaks)
    with CheckpointStore(tmp_path, {}, []) as store:
        store.save(snapshot(0))
        with pytest.raises(RunStopped, match="could not be written: CUDA error"):
            store.finish()


def test_what_is_not_finished_is_not_there_and_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / FOLDER
    write_snapshot(folder, snapshot(1), ABOUT)

    def dies(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "_sync", dies)
        with pytest.raises(KeyboardInterrupt):
            write_snapshot(folder, snapshot(2), ABOUT)
    assert len(list(folder.iterdir())) == 2
    assert find(tmp_path, tmp_path)[1].step == 1
    write_snapshot(folder, snapshot(3), ABOUT)
    forget_after(tmp_path, 1)
    assert [path.name for path in folder.iterdir()] == [name_of(1)]


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: TensorDict) -> None:
        path.write_bytes(b"part of it")
        raise OSError(28, "No space left on device", str(path))

    with CheckpointStore(tmp_path, {}, []) as store:
        store.save(snapshot(1))
        store.finish()
        with monkeypatch.context() as patch:
            patch.setattr(snapshots, "write_tensors", full)
            store.save(snapshot(2))
            with pytest.raises(RunStopped, match="No space left on device"):
                store.finish()
            with pytest.raises(RunStopped, match="--resume goes on"):
                store.save(snapshot(3))
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [name_of(1)]
    assert find(tmp_path, tmp_path)[1].step == 1


def test_a_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with run_lock(run_dir):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), run_lock(run_dir):
            pass
        assert (run_dir / LOCK).exists()
    assert list(run_dir.iterdir()) == []
    (run_dir / LOCK).write_text("4194303")
    with run_lock(run_dir):
        assert (run_dir / LOCK).read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: str, *arguments: object) -> int:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr("esper.checkpoint.lock.os.open", read_only)
    with (
        pytest.raises(InputError, match=r"run_dir: .*must be a folder that can be written \(Read-only"),
        run_lock(tmp_path),
    ):
        pass


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tensordict import TensorDict
from esper.checkpoint.store import CheckpointStore, find, forget_after
from esper.checkpoint.snapshot import Snapshot

torch.set_num_threads(1)
run_dir, draw, recovered, torn = Path(sys.argv[1]), random.Random(0), 0, 0
first = 0
for life in range(50):
    answer, ask = os.pipe()
    child = os.fork()
    if child == 0:
        with CheckpointStore(run_dir, {}, []) as store:
            for step in range(first + 1, first + 10_000):
                value = TensorDict({str(i): torch.full((64,), step) for i in range(6)})
                store.save(Snapshot(step, {"a": value, "b": value.clone()}, {"step": step}, float(step % 5)))
                store.finish()
                os.write(ask, step.to_bytes(4, "big"))
    os.close(ask)
    os.read(answer, 4)
    time.sleep(draw.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = b""
    while data := os.read(answer, 4096):
        said += data
    os.close(answer)
    last = int.from_bytes(said[-4:], "big") if said else first + 1
    torn += any(path.name.startswith(".") for path in (run_dir / "checkpoints").iterdir())
    manifest, snapshot = find(run_dir, run_dir)
    whole = all(bool((leaf == snapshot.step).all()) for part in snapshot.parts.values() for leaf in part.values())
    recovered += whole and snapshot.step >= last and manifest.counters == {"step": snapshot.step}
    forget_after(run_dir, snapshot.step)
    first = snapshot.step
print(recovered, torn)
"""


def test_fifty_of_fifty_kills_while_saving_recover(tmp_path: Path) -> None:
    """Each child saves without a pause and is killed at a random moment; what it reported as saved is there, whole."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recovered, torn = map(int, done.stdout.split())
    assert recovered == 50
    assert torn > 10
