"""Whatever is done to a checkpoint or to the configuration of a run: a clear refusal, or a run that goes on right."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from engine import tiny_config, tiny_task
from esper import train as command_line
from esper.build import build_controller, build_env
from esper.checkpoint import snapshot as snapshots
from esper.checkpoint.compatible import differences
from esper.checkpoint.snapshot import MANIFEST, Snapshot, checkpoints, read_manifest, write_snapshot
from esper.checkpoint.store import FOLDER, find
from esper.checkpoint.tensors import read_tensors, write_tensors
from esper.engine import Engine
from esper.errors import CheckpointError
from esper.events import EventLog
from esper.flags import Command
from esper.learn.collector import BatchFirstCollector
from esper.run import build_learner
from esper.telemetry import RolloutBook
from tiny import differing

CONFIG: dict[str, Any] = {
    "n_envs": 1,
    "max_epochs": 2,
    "n_episodes": 3,
    "slots": ["mid"],
    "blueprints": ["norm"],
    "lstm_hidden_dim": 4,
}
FILES = [MANIFEST, "collector.safetensors", "environment.safetensors", "learner.safetensors"]


class Place:
    """A run that has saved step 0 and step 1, the engine that can take up either, and a copy to spoil."""

    def __init__(self, root: Path) -> None:
        config = tiny_config(**CONFIG)
        self.run_dir, self.sound = root / "run", root / "sound"
        self.events = EventLog(self.run_dir, config.to_dict(), "off")
        env = build_env(config)
        policy = build_controller(config, env)
        collector = BatchFirstCollector(env, policy, rollouts=3)
        book = RolloutBook(0.1)
        env.observer = book.add
        self.engine = Engine(config, env, collector, build_learner(config, policy), book, self.events)
        about = {
            "versions": {},
            "config": config.to_dict(),
            "groups": [group.model_dump() for group in self.engine.groups],
        }
        self.moments: dict[int, Snapshot] = {}
        for step in (0, 1):
            if step:
                self._advance()
            self.moments[step] = self.engine.moment()
            write_snapshot(self.sound, self.moments[step], about)
        self.config = config

    def _advance(self) -> None:
        self.engine.collector.advance()
        self.engine.mark()

    def fresh(self) -> Path:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.sound, self.run_dir / FOLDER)
        (self.run_dir / "config.json").write_text(json.dumps(self.config.to_dict()))
        return checkpoints(self.run_dir / FOLDER)[-1]

    def go_on(self) -> str | Snapshot:
        """What a resumed run says, or where it is."""
        before = contents(self.run_dir)
        try:
            self.engine.restore(*find(self.run_dir, self.run_dir))
        except CheckpointError as error:
            return str(error)
        finally:
            assert contents(self.run_dir) == before
        return self.engine.moment()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    logging.getLogger("esper").setLevel(logging.ERROR)
    with tiny_task():
        yield Place(tmp_path_factory.mktemp("place"))
    logging.getLogger("esper").setLevel(logging.NOTSET)


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([]) | st.just({})


@st.composite
def damage(draw: st.DrawFn) -> Callable[[Path], set[int | None]]:
    """Something that may happen to one file: bytes changed, cut off, added, the file gone, replaced or emptied."""
    name, where, amount = draw(st.sampled_from(FILES)), draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))
    kind = draw(st.sampled_from(["change", "cut", "add", "remove", "swap", "folder"]))
    other = draw(st.sampled_from(FILES))

    def apply(checkpoint: Path) -> set[int | None]:
        path, original = checkpoint / name, contents(checkpoint)
        content = path.read_bytes()
        at = int(where * (len(content) - 1))
        if kind == "change":
            path.write_bytes(content[:at] + amount + content[at + len(amount) :])
        elif kind == "cut":
            path.write_bytes(content[:at])
        elif kind == "add":
            path.write_bytes(content + amount)
        elif kind == "swap":
            path.write_bytes((checkpoint / other).read_bytes())
        else:
            path.unlink()
            if kind == "folder":
                path.mkdir()
        return {1 if contents(checkpoint) == original else 0}

    return apply


@st.composite
def forgery(draw: st.DrawFn) -> Callable[[Path], set[int | None]]:
    """A change of one entry of the manifest, whose hash is then made anew: what another version might write."""
    place = draw(
        st.sampled_from(
            [
                *((name,) for name in ("format", "step", "score", "versions", "config", "groups", "counters", "files")),
                *(("counters", name) for name in ("rollouts", "updates", "events", "outcome", "book", "seconds")),
                *(("config", name) for name in ("n_envs", "gamma", "task", "n_episodes")),
                *(("files", name) for name in ("../x", "learner.safetensors")),
                ("groups", 0),
                ("more",),
            ]
        )
    )
    value, gone = draw(junk), draw(st.booleans())

    def apply(checkpoint: Path) -> set[int | None]:
        manifest = unsealed(checkpoint)
        target: Any = manifest
        for step in place[:-1]:
            target = target[step]
        if gone and place[-1] in target:
            del target[place[-1]]
        else:
            target[place[-1]] = value
        (checkpoint / MANIFEST).write_bytes(snapshots._sealed(manifest))
        return {None, 0, 1}

    return apply


@st.composite
def other_tensors(draw: st.DrawFn) -> Callable[[Path], set[int | None]]:
    """A leaf gone, added, of another type or under another name, with hashes to match."""
    file, which = draw(st.sampled_from(FILES[1:])), draw(st.integers(0))
    kind = draw(st.sampled_from(["drop", "grow", "type", "rename", "flatten"]))

    def apply(checkpoint: Path) -> set[int | None]:
        value = read_tensors(checkpoint / file)
        names = list(value.keys(include_nested=True, leaves_only=True))
        name = names[which % len(names)]
        changed = {
            "drop": lambda: value.exclude(name),
            "rename": lambda: value.exclude(name).update({"elsewhere": value.get(name).reshape(-1)}),
            "grow": lambda: value.clone(recurse=False).update({"elsewhere": torch.ones(3)}),
            "type": lambda: _retyped(value, name),
            "flatten": lambda: TensorDict({"all": value.get(name)}),
        }
        write_tensors(checkpoint / file, changed[kind]())
        manifest = unsealed(checkpoint)
        manifest["files"][file] = snapshots._file_hash(checkpoint / file)
        (checkpoint / MANIFEST).write_bytes(snapshots._sealed(manifest))
        return {None}

    return apply


def unsealed(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["sha256"]
    return manifest


@given(damage() | forgery() | other_tensors())
def test_a_changed_checkpoint_is_refused_passed_over_or_right(
    place: Place, change: Callable[[Path], set[int | None]]
) -> None:
    """A damaged one is passed over for the one before. One that is whole but does not fit is refused. Whatever the run
    goes on from is what was once saved."""
    expected = change(place.fresh())
    outcome = place.go_on()
    if isinstance(outcome, str):
        assert None in expected, outcome
        assert "problem" in outcome
        return
    assert outcome.step in expected
    for part, value in place.moments[outcome.step].parts.items():
        assert differing(outcome.parts[part], value) == []


def _retyped(value: TensorDict, name: Any) -> TensorDict:
    changed = value.clone()
    leaf = changed.get(name)
    changed.set(name, leaf.to(torch.int16 if leaf.dtype != torch.int16 else torch.int32))
    return changed


@st.composite
def configuration(draw: st.DrawFn) -> bytes:
    """The run's own `config.json` with fields changed, or not JSON at all."""
    data = tiny_config(**CONFIG).to_dict()
    fields = st.sampled_from(sorted(data))
    numbers = st.integers(1, 9) | st.floats(0.01, 0.99) | st.sampled_from(["off", "debug", "tiny", "digits", "data/x"])
    data.update(draw(st.dictionaries(fields, junk | numbers, max_size=3)))
    data.update(draw(st.dictionaries(st.text(max_size=5), junk, max_size=1)) if draw(st.booleans()) else {})
    content = json.dumps(data).encode()
    return content if draw(st.integers(0, 9)) else content[: draw(st.integers(0, len(content)))]


@given(configuration(), st.booleans())
def test_a_changed_config_is_refused_or_goes_on(place: Place, content: bytes, resume: bool) -> None:
    """Through the command line, up to where training would begin: code 2 with a message, or a run that may go on."""
    place.fresh()
    file = place.run_dir / "config.json"
    file.write_bytes(content)
    before = contents(place.run_dir)
    allowed: list[Command] = []

    def start(command: Command, run_dir: Path) -> None:
        manifest = read_manifest(checkpoints(run_dir / FOLDER)[-1])
        problems = differences(manifest.config, command.config.to_dict(), 0)
        if problems:
            raise CheckpointError(problems)
        allowed.append(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "run", start)
        arguments = ["--resume"] if resume else ["--config", str(file)]
        code = command_line.main([*arguments, "--run-dir", str(place.run_dir)])
    assert code == (0 if allowed else command_line.BAD_INPUT)
    assert contents(place.run_dir) == before
    if allowed:
        assert resume
        same = {**allowed[0].config.to_dict(), "n_episodes": 0, "telemetry_level": 0, "checkpoint_every": 0}
        assert {**same, "data_dir": 0} == {
            **place.config.to_dict(),
            "n_episodes": 0,
            "telemetry_level": 0,
            "checkpoint_every": 0,
            "data_dir": 0,
        }
