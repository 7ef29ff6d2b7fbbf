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

_OPS = [op.name for op in Op]


def record_step(log: EventLog, result: TensorDict, spec: GrowthSpec, episode: int, epoch: int) -> None:
    """Write the events of one step of all hosts; `result` is what `GrowthEnv` hands its observer, `epoch` the number of
    epochs trained before the step."""
    facts, eventful = _lists(result), _eventful(result).tolist()
    for i, slots in enumerate(eventful):
        _record_host(log, facts, i, slots, spec, {"episode": episode, "host": i}, epoch)


Facts = dict[str, Any]
"""A TensorDict as nested dicts of plain lists: reading thousands of single numbers from tensors would be slow."""


def _lists(value: TensorDict) -> Facts:
    return {name: part.tolist() if isinstance(part, torch.Tensor) else _lists(part) for name, part in value.items()}


def _eventful(result: TensorDict) -> torch.Tensor:
    """Slots `[N, S]` to which something happened: most are left alone in most epochs, and need not be looked at."""
    outcome, stages = result["outcome"], [result[name, "stage"] for name in ("before", "lived", "after")]
    done = outcome["germinated"] | outcome["culled"] | outcome["fossilized"] | outcome["auto_culled"]
    moved = (stages[0] != stages[1]) | (stages[1] != stages[2])
    eventful: torch.Tensor = done | moved | result["governor", "dropped"]
    return eventful


def _record_host(
    log: EventLog,
    facts: Facts,
    i: int,
    eventful: list[bool],
    spec: GrowthSpec,
    place: Mapping[str, Any],
    epoch: int,
) -> None:
    lived, outcome, metrics = facts["lived"], facts["outcome"], facts["metrics"]
    op = _OPS[outcome["op"][i]]
    if not outcome["success"][i]:
        slot = LAYOUT[facts["action"][i][SLOT]]
        log.write("refused", epoch=epoch, slot=slot, op=op, reason="not possible in this slot now", **place)
    if facts["replaced"][i]:
        log.write("host_restarted", epoch=epoch, restored_epoch=epoch, **place)
    if facts["panic"][i]:
        governor = facts["governor"]
        log.write(
            "governor_rollback",
            epoch=epoch + 1,
            reason=Reason(governor["reason"][i]).name.lower(),
            loss=governor["loss"][i],
            threshold=governor["threshold"][i],
            restored_epoch=governor["restored_epoch"][i],
            **place,
        )
    for j, slot in enumerate(spec.slots):
        here = {**place, "slot": slot}
        if eventful[j]:
            _record_action(log, facts, (i, j), spec, epoch, here)
            _record_clock(log, facts, (i, j), spec, epoch + 1, here)
        if lived["contribution_age"][i][j] == 0:
            measured: Facts = {name: lived[name][i][j] for name in ("contribution", "contribution_se", "alpha")}
            log.write("contribution", epoch=epoch + 1, **measured, **here)
    log.write(
        "epoch",
        epoch=epoch + 1,
        train_loss=metrics["train_loss"][i],
        train_accuracy=metrics["train_accuracy"][i],
        validation_loss=metrics["val_loss"][i],
        validation_accuracy=metrics["val_accuracy"][i],
        **place,
    )
    if facts["stabilized"][i]:
        log.write("stabilized", epoch=epoch + 1, validation_loss=metrics["val_loss"][i], **place)
    components = {name: column[i] for name, column in facts["components"].items()}
    log.write("reward", epoch=epoch + 1, op=op, **components, **place)


def _record_action(
    log: EventLog, facts: Facts, at: tuple[int, int], spec: GrowthSpec, epoch: int, here: Mapping[str, Any]
) -> None:
    """What the controller did to a slot before the epoch; `at` are the numbers of host and slot."""
    (i, j), before, lived, outcome = at, facts["before"], facts["lived"], facts["outcome"]
    if outcome["germinated"][i][j]:
        log.write(
            "germinated",
            epoch=epoch,
            blueprint=spec.blueprints[lived["blueprint"][i][j]],
            blend=BLENDS[lived["blend"][i][j]],
            parameters=lived["parameters"][i][j],
            **here,
        )
    if outcome["culled"][i][j]:
        log.write("culled", epoch=epoch, reason="controller", **_life(before, at, spec), **here)
    elif outcome["fossilized"][i][j]:
        log.write("fossilized", epoch=epoch, parameters=before["parameters"][i][j], **_life(before, at, spec), **here)
    else:
        _stage_change(log, before, lived, at, spec, epoch, here)


def _record_clock(
    log: EventLog, facts: Facts, at: tuple[int, int], spec: GrowthSpec, epoch: int, here: Mapping[str, Any]
) -> None:
    """What happened by itself to a slot after the epoch."""
    (i, j), lived, after, outcome = at, facts["lived"], facts["after"], facts["outcome"]
    if facts["governor"]["dropped"][i][j]:
        log.write("culled", epoch=epoch, reason="rollback", **_life(lived, at, spec), **here)
    elif outcome["auto_culled"][i][j]:
        reason = "negative_contribution" if lived["contribution"][i][j] <= 0.0 else "probation_timeout"
        log.write("culled", epoch=epoch, reason=reason, **_life(lived, at, spec), **here)
    elif not outcome["culled"][i][j]:
        _stage_change(log, lived, after, at, spec, epoch, here)


def _life(records: Facts, at: tuple[int, int], spec: GrowthSpec) -> Facts:
    i, j = at
    return {
        "blueprint": spec.blueprints[records["blueprint"][i][j]],
        "contribution": records["contribution"][i][j],
        "contribution_se": records["contribution_se"][i][j],
        "improvement": records["accuracy_current"][i][j] - records["accuracy_initial"][i][j],
        "age": records["age"][i][j],
    }


def _stage_change(
    log: EventLog,
    old: Facts,
    new: Facts,
    at: tuple[int, int],
    spec: GrowthSpec,
    epoch: int,
    here: Mapping[str, Any],
) -> None:
    i, j = at
    was, now = Stage(old["stage"][i][j]), Stage(new["stage"][i][j])
    if was is not now:
        blueprint = new["blueprint"][i][j]
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
        self._ops.update(_OPS[op] for op in outcome["op"].tolist())
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
