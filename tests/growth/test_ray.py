"""Hosts on two local Ray workers: the numbers of one process, also when workers die."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Silent, tiny_config, tiny_task
from esper.build import build_env
from esper.errors import InputError, RunStopped
from esper.events import EventLog, load
from esper.growth import ray_backend
from esper.growth.ray_backend import RayBackend
from esper.run import train

ray = pytest.importorskip("ray")

SIZE = {"n_episodes": 12, "devices": ["cpu", "cpu"]}
RAY = {**SIZE, "collector": {"backend": "ray"}}


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    """Ray is started once; runs join it and leave it running."""
    with tiny_task():
        assert ray_backend.connect("local", cores=2)
        yield
        ray.shutdown()


def kill(worker: Any) -> None:
    """The worker dies now, while it has nothing to do."""
    os.kill(ray.get(worker.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def doom(worker: Any) -> None:
    """The worker dies in the middle of its next epoch."""

    def prepare(worker: Any) -> None:
        class Dying:
            def run_epoch(self, *_: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

        worker._backend = Dying()

    ray.get(worker.__ray_call__.remote(prepare))


class Fate:
    """Watches a run; `deaths` says what happens to which worker after how many steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deaths: dict[int, Any]) -> None:
        self.deaths, self.steps = deaths, 0
        make = RayBackend.__init__

        def remember(backend: RayBackend, *arguments: Any, **options: Any) -> None:
            make(backend, *arguments, **options)
            self.backend = backend

        monkeypatch.setattr(RayBackend, "__init__", remember)

    def __call__(self, result: Any) -> None:
        self.steps += 1
        if self.steps in self.deaths:
            die, index = self.deaths[self.steps]
            die(self.backend.workers[index])


def a_run(folder: Path, resume: Path | None = None, watch: Any = None, **fields: Any) -> None:
    config = tiny_config(**fields)
    with EventLog(folder, config.to_dict()) as events:
        train(run_dir=folder, events=events, progress=Silent(), resume=resume, watch=watch, **config.to_train_kwargs())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    a_run(folder, **SIZE)
    return folder


def told(folder: Path) -> list[dict[str, Any]]:
    """Events but for restarts; their running number counts those. The last has the digest of all final weights."""
    return [{**event, "step": None} for event in load(folder) if event["type"] != "host_restarted"]


def test_a_run_goes_on_over_ray_whose_workers_die_with_the_numbers_of_one_process(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies in the middle of an epoch, one between two episodes."""
    folder = tmp_path / "ray"
    shutil.copytree(local, folder)
    fate = Fate(monkeypatch, {3: (doom, 1), 8: (kill, 0)})
    a_run(folder, resume=folder / "checkpoints" / "00000008", watch=fate, **RAY)
    restarts = [(e["episode"], e["host"], e["epoch"], e["data"]) for e in load(folder) if e["type"] == "host_restarted"]
    assert restarts == [
        (1, 2, 3, {"restored_epoch": 3}),
        (1, 3, 3, {"restored_epoch": 3}),
        (2, 0, 0, {"restored_epoch": 0}),
        (2, 1, 0, {"restored_epoch": 0}),
    ]
    assert told(folder) == told(local)
    assert fate.backend.workers == []
    assert ray.is_initialized()


def test_a_run_over_ray_that_loses_too_many_workers_can_be_resumed_without(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ray"
    monkeypatch.setattr(ray_backend, "ATTEMPTS", 1)
    fate = Fate(monkeypatch, {11: (doom, 0)})
    with pytest.raises(RunStopped, match=r"devices\[0\].*died 1 times.*--resume"):
        a_run(folder, watch=fate, **RAY)
    a_run(folder, resume=folder, **SIZE)
    assert told(folder) == told(local)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "somewhere"])
def test_an_address_without_a_cluster_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InputError, match=rf'collector.address: "{address}": must be local, auto or the host:port'):
        build_env(tiny_config(**{**RAY, "collector": {"backend": "ray", "address": address}}))


def test_what_ray_cannot_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"devices: the workers need 2048 CPUs, there are 2"):
        build_env(tiny_config(**{**RAY, "collector": {"backend": "ray", "cores": 1024}}))
    with pytest.raises(InputError, match=r'device: "cuda:999"'):
        build_env(tiny_config(**RAY, device="cuda:999"))
    monkeypatch.setattr(ray_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'esper\[ray\]'"):
        build_env(tiny_config(**RAY))
