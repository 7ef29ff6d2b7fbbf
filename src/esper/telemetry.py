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
from esper.growth.governor import Reason
from esper.growth.spec import GrowthSpec
from esper.seeds.actions import SLOT, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS, OCCUPIED, Stage


def record_step(log: EventLog, result: TensorDict, spec: GrowthSpec, episode: int, epoch: int) -> None:
    """Write the events of one step of all hosts; `result` is what `GrowthEnv` hands its observer, `epoch` the number of
    epochs trained before the step."""
    facts = _lists(result)
    for host in range(result.batch_size[0]):
        _record_host(log, _of_host(facts, host), spec, {"episode": episode, "host": host}, epoch)


Facts = dict[str, Any]
"""A TensorDict as nested dicts of plain lists: reading thousands of single numbers from tensors would be slow."""


def _lists(value: TensorDict) -> Facts:
    return {name: part.tolist() if isinstance(part, torch.Tensor) else _lists(part) for name, part in value.items()}


def _of_host(facts: Facts, host: int) -> Facts:
    return {name: _of_host(part, host) if isinstance(part, dict) else part[host] for name, part in facts.items()}


def _record_host(log: EventLog, facts: Facts, spec: GrowthSpec, place: Mapping[str, Any], epoch: int) -> None:
    lived, outcome, metrics = facts["lived"], facts["outcome"], facts["metrics"]
    op = Op(outcome["op"]).name
    if not outcome["success"]:
        slot = LAYOUT[facts["action"][SLOT]]
        log.write("refused", epoch=epoch, slot=slot, op=op, reason="not possible in this slot now", **place)
    if facts["replaced"]:
        log.write("host_restarted", epoch=epoch, restored_epoch=epoch, **place)
    if facts["panic"]:
        governor = facts["governor"]
        log.write(
            "governor_rollback",
            epoch=epoch + 1,
            reason=Reason(governor["reason"]).name.lower(),
            loss=governor["loss"],
            threshold=governor["threshold"],
            restored_epoch=governor["restored_epoch"],
            **place,
        )
    for j, slot in enumerate(spec.slots):
        here = {**place, "slot": slot}
        _record_action(log, facts, j, spec, epoch, here)
        _record_clock(log, facts, j, spec, epoch + 1, here)
        if lived["contribution_age"][j] == 0:
            measured: Facts = {name: lived[name][j] for name in ("contribution", "contribution_se", "alpha")}
            log.write("contribution", epoch=epoch + 1, **measured, **here)
    log.write(
        "epoch",
        epoch=epoch + 1,
        train_loss=metrics["train_loss"],
        train_accuracy=metrics["train_accuracy"],
        validation_loss=metrics["val_loss"],
        validation_accuracy=metrics["val_accuracy"],
        **place,
    )
    if facts["stabilized"]:
        log.write("stabilized", epoch=epoch + 1, validation_loss=metrics["val_loss"], **place)
    log.write("reward", epoch=epoch + 1, op=op, **facts["components"], **place)


def _record_action(log: EventLog, facts: Facts, j: int, spec: GrowthSpec, epoch: int, here: Mapping[str, Any]) -> None:
    """What the controller did to slot `j` before the epoch."""
    before, lived, outcome = facts["before"], facts["lived"], facts["outcome"]
    if outcome["germinated"][j]:
        log.write(
            "germinated",
            epoch=epoch,
            blueprint=spec.blueprints[lived["blueprint"][j]],
            blend=BLENDS[lived["blend"][j]],
            parameters=lived["parameters"][j],
            **here,
        )
    if outcome["culled"][j]:
        log.write("culled", epoch=epoch, reason="controller", **_life(before, j, spec), **here)
    elif outcome["fossilized"][j]:
        log.write("fossilized", epoch=epoch, parameters=before["parameters"][j], **_life(before, j, spec), **here)
    else:
        _stage_change(log, before, lived, j, spec, epoch, here)


def _record_clock(log: EventLog, facts: Facts, j: int, spec: GrowthSpec, epoch: int, here: Mapping[str, Any]) -> None:
    """What happened by itself to slot `j` after the epoch."""
    lived, after, outcome = facts["lived"], facts["after"], facts["outcome"]
    if facts["governor"]["dropped"][j]:
        log.write("culled", epoch=epoch, reason="rollback", **_life(lived, j, spec), **here)
    elif outcome["auto_culled"][j]:
        reason = "negative_contribution" if lived["contribution"][j] <= 0.0 else "probation_timeout"
        log.write("culled", epoch=epoch, reason=reason, **_life(lived, j, spec), **here)
    elif not outcome["culled"][j]:
        _stage_change(log, lived, after, j, spec, epoch, here)


def _life(records: Facts, j: int, spec: GrowthSpec) -> Facts:
    return {
        "blueprint": spec.blueprints[records["blueprint"][j]],
        "contribution": records["contribution"][j],
        "contribution_se": records["contribution_se"][j],
        "improvement": records["accuracy_current"][j] - records["accuracy_initial"][j],
        "age": records["age"][j],
    }


def _stage_change(
    log: EventLog, old: Facts, new: Facts, j: int, spec: GrowthSpec, epoch: int, here: Mapping[str, Any]
) -> None:
    was, now = Stage(old["stage"][j]), Stage(new["stage"][j])
    if was is not now:
        blueprint = new["blueprint"][j]
        name = spec.blueprints[blueprint] if blueprint >= 0 else None
        log.write("stage_changed", epoch=epoch, before=was.name, after=now.name, blueprint=name, **here)


class RolloutBook:
    """Adds up what a rollout's `rollout` event reports; one per run, reset by `close`."""

    def __init__(self, param_penalty_weight: float) -> None:
        self._weight = param_penalty_weight
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
        self._culled += int(
            outcome["culled"].sum() + outcome["auto_culled"].sum() + result["governor", "dropped"].sum()
        )
        self._last = result

    def state(self) -> dict[str, Any]:
        """What the present rollout has added up so far, as plain data."""
        returns = [] if self._returns is None else self._returns.tolist()
        return {"ops": dict(self._ops), "returns": returns, "planted": self._planted, "culled": self._culled}

    def load_state(self, ops: dict[str, int], returns: list[float], planted: int, culled: int) -> None:
        """Go on adding up from what `state` gave."""
        self._ops, self._planted, self._culled = Counter(ops), planted, culled
        self._returns = torch.tensor(returns) if returns else None

    def close(self) -> dict[str, Any]:
        """The data of the `rollout` event; starts the next rollout."""
        if self._last is None or self._returns is None:
            raise RuntimeError("a rollout needs at least one step before it can be closed")
        after, accuracy = self._last["after"], self._last["metrics", "val_accuracy"]
        extra = after["parameters"].sum(1)
        own, budget = self._last["host_parameters"], self._last["param_budget"]
        data = {
            "validation_accuracy": accuracy.tolist(),
            "returns": self._returns.tolist(),
            "objective": objective(accuracy, extra, budget, self._weight).tolist(),
            "parameters": (extra + own).tolist(),
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
