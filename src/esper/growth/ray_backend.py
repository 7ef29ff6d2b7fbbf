"""Hosts on Ray workers, one learner: a process of its own, on any machine of a cluster, grows each group of hosts.

The growth states go to a worker before an epoch and come back after it, with what its executor has room for, so the
process that learns always holds the last one of every host. A worker that dies is replaced, and its hosts go on from
there, with the numbers they would have had. Checkpoints need nothing from a worker.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.errors import InputError, RunStopped
from esper.growth.backend import LocalBackend, Place
from esper.growth.executors.base import Rooms
from esper.growth.state import placed
from esper.growth.step import EpochSettings, idle
from esper.growth.transport import Packed, pack, unpack
from esper.seeds.blueprints import registry
from esper.seeds.blueprints.registry import Blueprint

START_SECONDS = 600.0
"""How long a worker may take to start; a cluster may first have to find a machine for it."""
REACH_SECONDS = 10.0
"""How long a cluster may take to answer at all."""
ATTEMPTS = 3
"""Workers that may die over one request before the run stops."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to Ray's makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns about GPUs that no worker asked for
    "RAY_worker_niceness": "0",  # growing hosts is the work of this machine; Ray would let everything else go first
}
Make = Callable[..., LocalBackend]
"""Makes what a worker grows its hosts with, from (size, device, *data)."""


def check_ray() -> None:
    """Raises InputError if Ray is missing, naming what to install."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(["collector.backend: \"ray\": needs the package ray: pip install 'esper[ray]'"])


class Answer(NamedTuple):
    """What a worker has done, and what its executor has room for since."""

    rooms: Rooms
    values: tuple[Packed, ...]


class Worker:
    """What runs in a worker's process; made by Ray."""

    def __init__(self, blueprints: Sequence[Blueprint], make: Make, size: int, device: str, *data: Any) -> None:
        for kind in blueprints:
            if kind.name not in registry.names(kind.topology):
                registry.register(kind)
        self._device = torch.device(device)
        self._backend = make(size, self._device, *data)

    def _here(self, growth: Packed) -> TensorDict:
        return placed(unpack(growth), self._device)

    def executor(self) -> str:
        """The name of the executor; answers as soon as the worker is ready."""
        return self._backend.places[0].executor

    def reserve(self, rooms: Rooms) -> None:
        self._backend.reserve([rooms])

    def reset(self, keys: Tensor, host_lr: Tensor, seed_lr: Tensor) -> Answer:
        (growth,), metrics = self._backend.reset(keys, host_lr, seed_lr)
        return self._answer(growth, metrics)

    def run_epoch(self, growth: Packed, actions: Tensor, accuracy: Tensor, epoch: int) -> Answer:
        (grown,), result = self._backend.run_epoch([self._here(growth)], actions, accuracy, epoch)
        return self._answer(grown, result)

    def evaluate(self, growth: Packed, part: str) -> Answer:
        return self._answer(self._backend.evaluate([self._here(growth)], part))

    def _answer(self, *values: TensorDict) -> Answer:
        return Answer(self._backend.rooms()[0], tuple(pack(value) for value in values))


class RayBackend:
    """Grows `groups` of hosts on Ray workers, one worker each; see `Backend` for the contract.

    Args:
        groups: the hosts of each worker.
        devices: the device of each worker; one on `"cuda"` gets a GPU to itself, whichever Ray chooses.
        settings: how an epoch runs.
        make: makes what a worker grows its hosts with; `data` are its last arguments and travel to each machine once.
        blueprints: the run's seeds, which a worker's process may not know yet.
        address: `"local"` for workers on this machine, `"auto"` or `host:port` for those of a running cluster.
        cores: CPU cores reserved per worker.

    Raises InputError if Ray is missing, the cluster cannot be reached or is too small, or a worker does not start.
    """

    def __init__(
        self,
        groups: Sequence[range],
        devices: Sequence[torch.device],
        settings: EpochSettings,
        make: Make,
        data: Sequence[Any],
        blueprints: Sequence[Blueprint],
        address: str = "local",
        cores: int = 1,
    ) -> None:
        check_ray()
        import ray

        kinds = [device.type for device in devices]
        self.settings = settings
        self.workers: list[Any] = []
        self._owned = connect(address, cores * len(groups))
        try:
            _require(ray.cluster_resources(), {"CPU": cores * len(groups), "GPU": kinds.count("cuda")})
            shared = [ray.put(part) for part in data]
            self._makers = [ray.remote(num_cpus=cores, num_gpus=int(kind == "cuda"))(Worker) for kind in kinds]
            self._arguments = [
                (tuple(blueprints), make, len(group), kind, *shared) for group, kind in zip(groups, kinds, strict=True)
            ]
            self.workers += [self._start(i) for i in range(len(groups))]
            executors = ray.get([worker.executor.remote() for worker in self.workers], timeout=START_SECONDS)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            self.close()
            raise InputError([f"devices: {kinds}: a worker did not start ({_line(error)})"]) from error
        except InputError:
            self.close()
            raise
        self.places = tuple(
            Place(group.start, len(group), kind, executor)
            for group, kind, executor in zip(groups, kinds, executors, strict=True)
        )
        self._rooms: list[Rooms] = [{} for _ in groups]
        self._lost = torch.zeros(sum(map(len, groups)), dtype=torch.bool)

    def reset(self, keys: Tensor, host_lr: Tensor, seed_lr: Tensor) -> tuple[list[TensorDict], TensorDict]:
        answers = self._ask("reset", [(keys[p.hosts], host_lr[p.hosts], seed_lr[p.hosts]) for p in self.places])
        return _states(answers)

    def run_epoch(
        self,
        growth: Sequence[TensorDict],
        actions: Tensor,
        accuracy: Tensor,
        epoch: int,
        meanwhile: Callable[[], None] = idle,
    ) -> tuple[list[TensorDict], TensorDict]:
        shares = [
            (pack(g), actions[p.hosts], accuracy[p.hosts], epoch) for p, g in zip(self.places, growth, strict=True)
        ]
        return _states(self._ask("run_epoch", shares, meanwhile))

    def replaced(self) -> Tensor:
        since, self._lost = self._lost, torch.zeros_like(self._lost)
        return since

    def evaluate(self, growth: Sequence[TensorDict], part: str) -> TensorDict:
        answers = self._ask("evaluate", [(pack(g), part) for g in growth])
        scores: TensorDict = torch.cat([unpack(value) for (value,) in answers])
        return scores

    def rooms(self) -> list[Rooms]:
        return list(self._rooms)

    def reserve(self, rooms: Sequence[Rooms]) -> None:
        import ray

        ray.get([worker.reserve.remote(room) for worker, room in zip(self.workers, rooms, strict=True)])
        self._rooms = list(rooms)

    def close(self) -> None:
        """End the workers, and Ray with them if it was started for them."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers.clear()
        if self._owned:
            ray.shutdown()

    def _start(self, index: int) -> Any:
        return self._makers[index].remote(*self._arguments[index])

    def _ask(
        self, request: str, shares: Sequence[tuple[Any, ...]], meanwhile: Callable[[], None] = idle
    ) -> list[tuple[Packed, ...]]:
        """Have every worker do its share, all at once; `meanwhile` is called before they are waited for."""
        asked = [getattr(w, request).remote(*share) for w, share in zip(self.workers, shares, strict=True)]
        meanwhile()
        return [self._answer(i, answer, request, shares[i]) for i, answer in enumerate(asked)]

    def _answer(self, index: int, answer: Any, request: str, share: tuple[Any, ...]) -> tuple[Packed, ...]:
        """A worker's answer, or that of its replacement if it dies before it has answered."""
        from ray import get
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    answer = getattr(self._replacement(index), request).remote(*share)
                done: Answer = get(answer)
                self._rooms[index] = done.rooms
                return done.values
            except RayTaskError as error:
                raise error.cause from error
            except (RayActorError, ObjectLostError) as error:
                why = _line(error)
        raise _stopped(index, f"its worker died {ATTEMPTS} times in a row ({why})")

    def _replacement(self, index: int) -> Any:
        """A new worker in place of a dead one, ready."""
        import ray

        self._lost[self.places[index].hosts] = True
        worker = self.workers[index] = self._start(index)
        try:
            ray.get(worker.reserve.remote(self._rooms[index]), timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise _stopped(index, f"no new worker within {START_SECONDS:g} seconds") from None
        return worker


def connect(address: str, cores: int) -> bool:
    """Join Ray; returns whether it was started here and now. A program that has joined already stays where it is."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    own = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
    try:
        if address not in ("local", "auto"):
            _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:
        legal = "must be local, auto or the host:port of a running cluster"
        raise InputError([f'collector.address: "{address}": {legal} ({_line(error)})']) from error
    return True


def _reach(address: str) -> None:
    """Raises OSError or ValueError if nobody listens at `host:port`; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def _require(there: Mapping[str, float], needed: Mapping[str, int]) -> None:
    """Raises InputError if a cluster is too small; Ray would wait for ever."""
    missing = [f"{n} {what}s, there are {there.get(what, 0):g}" for what, n in needed.items() if there.get(what, 0) < n]
    if missing:
        raise InputError([f"devices: the workers need {'; '.join(missing)}"])


def _states(answers: Sequence[tuple[Packed, ...]]) -> tuple[list[TensorDict], TensorDict]:
    """The growth states of all places, and what was measured, of all hosts."""
    measured: TensorDict = torch.cat([unpack(result) for _, result in answers])
    return [unpack(growth) for growth, _ in answers], measured


def _stopped(index: int, why: str) -> RunStopped:
    return RunStopped(f"devices[{index}]: {why}; --resume goes on from the last checkpoint")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
