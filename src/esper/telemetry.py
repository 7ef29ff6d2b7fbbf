"""From what happened in an environment step to events. Reads results, changes nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict

from esper.environment.rewards import objective
from esper.events import EventLog
from esper.growth.spec import GrowthSpec
from esper.seeds.actions import Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS, OCCUPIED, Stage


def record_step(log: EventLog, result: TensorDict, spec: GrowthSpec, episode: int, epoch: int) -> None:
    """Write the events of one step of all hosts; `result` is what `GrowthEnv` hands its observer, `epoch` the number of
    epochs trained before the step."""
    for host in range(result.batch_size[0]):
        _record_host(log, result[host], spec, {"episode": episode, "host": host}, epoch)


def _record_host(log: EventLog, result: TensorDict, spec: GrowthSpec, place: Mapping[str, Any], epoch: int) -> None:
    before, lived, after = result["before"], result["lived"], result["after"]
    outcome, metrics = result["outcome"], result["metrics"]
    op = Op(int(outcome["op"]))
    if not bool(outcome["success"]):
        slot = LAYOUT[int(result["action"][0])]
        log.write("refused", epoch=epoch, slot=slot, op=op.name, reason="not possible in this slot now", **place)
    for j, slot in enumerate(spec.slots):
        here = {**place, "slot": slot}
        if bool(outcome["germinated"][j]):
            log.write(
                "germinated",
                epoch=epoch,
                blueprint=spec.blueprints[int(lived["blueprint"][j])],
                blend=BLENDS[int(lived["blend"][j])],
                parameters=int(lived["parameters"][j]),
                **here,
            )
        if bool(outcome["culled"][j]):
            log.write("culled", epoch=epoch, reason="controller", **_life(before, j, spec), **here)
        if bool(outcome["fossilized"][j]):
            life = _life(before, j, spec)
            log.write("fossilized", epoch=epoch, parameters=int(before["parameters"][j]), **life, **here)
        elif not bool(outcome["culled"][j]):
            _stage_change(log, before, lived, j, spec, epoch, here)
        if bool(outcome["auto_culled"][j]):
            reason = "negative_contribution" if float(lived["contribution"][j]) <= 0.0 else "probation_timeout"
            log.write("culled", epoch=epoch + 1, reason=reason, **_life(lived, j, spec), **here)
        elif not bool(outcome["culled"][j]):
            _stage_change(log, lived, after, j, spec, epoch + 1, here)
        if int(lived["contribution_age"][j]) == 0:
            log.write(
                "contribution",
                epoch=epoch + 1,
                contribution=float(lived["contribution"][j]),
                contribution_se=float(lived["contribution_se"][j]),
                alpha=float(lived["alpha"][j]),
                **here,
            )
    log.write(
        "epoch",
        epoch=epoch + 1,
        train_loss=float(metrics["train_loss"]),
        train_accuracy=float(metrics["train_accuracy"]),
        validation_loss=float(metrics["val_loss"]),
        validation_accuracy=float(metrics["val_accuracy"]),
        **place,
    )
    paid: dict[str, Any] = {name: float(value) for name, value in result["components"].items()}
    log.write("reward", epoch=epoch + 1, op=op.name, **paid, **place)


def _life(records: TensorDict, j: int, spec: GrowthSpec) -> dict[str, Any]:
    return {
        "blueprint": spec.blueprints[int(records["blueprint"][j])],
        "contribution": float(records["contribution"][j]),
        "contribution_se": float(records["contribution_se"][j]),
        "improvement": float(records["accuracy_current"][j] - records["accuracy_initial"][j]),
        "age": int(records["age"][j]),
    }


def _stage_change(
    log: EventLog, old: TensorDict, new: TensorDict, j: int, spec: GrowthSpec, epoch: int, here: Mapping[str, Any]
) -> None:
    was, now = Stage(int(old["stage"][j])), Stage(int(new["stage"][j]))
    if was is not now:
        blueprint = int(new["blueprint"][j])
        name = spec.blueprints[blueprint] if blueprint >= 0 else None
        log.write("stage_changed", epoch=epoch, before=was.name, after=now.name, blueprint=name, **here)


class RolloutBook:
    """Adds up what a rollout's `rollout` event reports; one per run, reset by `close`."""

    def __init__(self, spec: GrowthSpec, param_budget: int, param_penalty_weight: float) -> None:
        self.spec = spec
        self._price = (param_budget, param_penalty_weight)
        self._clear()

    def _clear(self) -> None:
        self._ops: Counter[str] = Counter()
        self._returns: torch.Tensor | None = None
        self._planted = self._culled = 0
        self._last: TensorDict | None = None

    def add(self, result: TensorDict) -> None:
        """Take in one step of all hosts."""
        outcome = result["outcome"]
        self._ops.update(Op(int(op)).name for op in outcome["op"])
        self._returns = result["reward"] + (0.0 if self._returns is None else self._returns)
        self._planted += int(outcome["germinated"].sum())
        self._culled += int(outcome["culled"].sum() + outcome["auto_culled"].sum())
        self._last = result

    def close(self) -> dict[str, Any]:
        """The data of the `rollout` event; starts the next rollout."""
        if self._last is None or self._returns is None:
            raise RuntimeError("a rollout needs at least one step before it can be closed")
        after, accuracy = self._last["after"], self._last["metrics", "val_accuracy"]
        extra = after["parameters"].sum(1)
        budget, weight = self._price
        data = {
            "validation_accuracy": accuracy.tolist(),
            "returns": self._returns.tolist(),
            "objective": objective(accuracy, extra, budget, weight).tolist(),
            "parameters": (extra + self.spec.host_parameters).tolist(),
            "ops": dict(sorted(self._ops.items())),
            "planted": self._planted,
            "kept": int((after["stage"] == Stage.FOSSILIZED).sum()),
            "culled": self._culled,
            "growing": int(sum((after["stage"] == stage).sum() for stage in OCCUPIED if stage != Stage.FOSSILIZED)),
        }
        self._clear()
        return data


def weights_digest(*values: TensorDict) -> str:
    """SHA-256 of every leaf of the given states: names, shapes, types and bytes, in order of name."""
    digest = hashlib.sha256()
    for value in values:
        flat = value.flatten_keys(".")
        for name in sorted(flat.keys()):
            leaf = flat[name].detach().cpu().contiguous()
            digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
