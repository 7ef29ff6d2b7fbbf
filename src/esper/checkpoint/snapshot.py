"""A run at one moment, as a value and as a folder.

A checkpoint is a folder named by the number of epochs trained, eight digits or more:

| file | content |
|---|---|
| `manifest.json` | format, versions, configuration, device groups, counters, the SHA-256 of every file, its own too |
| `<part>.safetensors` | the tensors of one part of the run |

It appears under its name only when every byte of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tensordict import TensorDict

from esper.checkpoint.tensors import read_tensors, write_tensors
from esper.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Snapshot:
    """`step` epochs of every host are done. `counters` are plain JSON data; `score` is what "best" means, None for a
    moment that has none (within an episode)."""

    step: int
    parts: Mapping[str, TensorDict]
    counters: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None


class Group(BaseModel):
    """Hosts that advance together: which, on what kind of device, by which executor. Part of the numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    first: int
    size: int
    device: str
    executor: str


class Manifest(BaseModel):
    """What `manifest.json` says, apart from its own hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[2]
    step: Annotated[int, Field(ge=0)]
    score: float | None
    versions: dict[str, str]
    config: dict[str, Any]
    groups: list[Group]
    counters: dict[str, Any]
    files: dict[str, str]


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` epochs; names sort like steps."""
    return f"{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, without looking into them."""
    names = [p.name for p in folder.iterdir() if p.name.isascii() and p.name.isdigit()] if folder.is_dir() else []
    return [folder / name for name in sorted(names, key=int)]


def write_snapshot(folder: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> Path:
    """Make the checkpoint of `snapshot` in `folder`; `about` has the manifest's `versions`, `config` and `groups`.

    A reader sees no checkpoint or a whole one, whenever the process or the machine dies. Raises OSError; then nothing
    of the attempt remains.
    """
    path = folder / name_of(snapshot.step)
    beside = folder / f"{_UNFINISHED}{path.name}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        files: dict[str, str] = {}
        for part, value in snapshot.parts.items():
            file = beside / f"{part}.safetensors"
            write_tensors(file, value)
            _sync(file)
            files[file.name] = _file_hash(file)
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "score": snapshot.score,
            **about,
            "counters": dict(snapshot.counters),
            "files": files,
        }
        (beside / MANIFEST).write_bytes(_sealed(manifest))
        _sync(beside / MANIFEST)
        _sync(beside)
        remove(path)
        beside.rename(path)
        _sync(folder)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return path


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError naming what is wrong with it."""
    file = path / MANIFEST
    try:
        content = file.read_bytes()
        data = json.loads(content)
    except FileNotFoundError:
        raise CheckpointError([f'checkpoint: "{path}": must be a folder with a {MANIFEST}']) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from None
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] != FORMAT:
        raise CheckpointError([f'checkpoint: "{path}": has format {data["format"]}; must be format {FORMAT}'])
    said = data.pop("sha256", None) if isinstance(data, dict) else None
    if said is None or _sealed(data) != content:
        raise _damaged(file, "its content does not have the SHA-256 it was written with")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_snapshot(path: Path) -> tuple[Manifest, Snapshot]:
    """A checkpoint, every file checked against its hash. Raises CheckpointError naming the file that is damaged."""
    manifest = read_manifest(path)
    parts: dict[str, TensorDict] = {}
    for name, said in manifest.files.items():
        file = path / name
        if Path(name).name != name:
            raise _damaged(path / MANIFEST, f"{name}: must be a file of the checkpoint")
        try:
            if _file_hash(file) != said:
                raise _damaged(file, "its content does not have the SHA-256 of the manifest")
            parts[name.removesuffix(".safetensors")] = read_tensors(file)
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise _damaged(file, str(error)) from None
    return manifest, Snapshot(manifest.step, parts, manifest.counters, manifest.score)


def remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed no longer has its name."""
    aside = path.with_name(f"{_UNFINISHED}removed-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that died while they wrote or removed a checkpoint left in `folder`."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError([f'checkpoint: "{file}": is damaged: {why}'])


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest, so that no byte of it can change unnoticed."""
    body = json.dumps(manifest, indent=2, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": seal}, indent=2, sort_keys=True) + "\n").encode()


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
