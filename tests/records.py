"""Slot records and step results by hand, and a toy world in which controllers can act without any training."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.control.simple import Controller
from esper.environment.masks import action_masks
from esper.environment.observation import ObservationSettings, observe
from esper.environment.rewards import RewardSettings, objective, reward
from esper.environment.signals import SignalTracker
from esper.seeds.actions import SLOT, Op
from esper.seeds.gates import in_stage
from esper.seeds.lifecycle import LifecycleRules, apply_action, record_epoch, tick
from esper.seeds.slots import LAYOUT, empty_records
from esper.seeds.stages import BLENDED


def make_records(*slots: dict[str, Any] | None) -> TensorDict:
    """Records of one host `[1, S]`; each slot is None (empty) or the fields that differ from an empty one."""
    records = empty_records(1, len(slots))
    for j, fields in enumerate(slots):
        for name, value in ({"healthy": True, **fields} if fields else {}).items():
            records[name][0, j] = value
    return records


def make_result(
    before: TensorDict,
    lived: TensorDict | None = None,
    after: TensorDict | None = None,
    *,
    op: Op = Op.WAIT,
    slot: int = -1,
    success: bool = True,
    **tracker: float,
) -> TensorDict:
    """The result of a step of one host in which nothing changed but what is given."""
    lived = before if lived is None else lived
    after = lived if after is None else after
    touched = torch.zeros(before.batch_size, dtype=torch.bool)
    if slot >= 0 and success:
        touched[0, slot] = True
    outcome = {"op": torch.tensor([int(op)]), "slot": torch.tensor([slot]), "success": torch.tensor([success])}
    for name, kind in (("germinated", Op.GERMINATE), ("culled", Op.CULL), ("fossilized", Op.FOSSILIZE)):
        outcome[name] = touched if op == kind else torch.zeros_like(touched)
    signals = SignalTracker().init(1).update({name: torch.tensor([value]) for name, value in tracker.items()})
    return TensorDict(
        {
            "before": before,
            "lived": lived,
            "after": after,
            "outcome": TensorDict(outcome, batch_size=[1]),
            "tracker": signals,
            "panic": torch.tensor([False]),
            "restarted": torch.tensor([False]),
        },
        batch_size=[1],
    )


RULES = LifecycleRules(max_epochs=25)
PARAMETERS = torch.tensor([100, 300, 50, 80, 400])


def play(
    controller: Controller,
    settings: RewardSettings,
    *,
    value: Tensor,
    removal: Tensor,
    n_hosts: int = 4,
    seed: int = 0,
    wide: bool = True,
) -> tuple[list[TensorDict], Tensor, Tensor]:
    """Episodes in a toy world: results of all steps, total reward `[N]` and objective `[N]`.

    A blended seed of blueprint b adds `value[b]` points to the host's learning curve; taking it away costs
    `removal[b]` points at first, of which the host recovers half in each epoch. Measured contributions are the cost of
    removal.
    """
    spec = ObservationSettings(LAYOUT, 5, RULES.max_epochs, settings.host_parameters, use_telemetry=wide)
    table = PARAMETERS[None, :, None].expand(3, 5, 3)
    host_keys = k.host_keys(k.root(seed), n_hosts)
    records, wound = empty_records(n_hosts, 3), torch.zeros(n_hosts)
    metrics = TensorDict(
        {name: torch.full((n_hosts,), 10.0 if "accuracy" in name else 2.3) for name in _METRICS}, batch_size=[n_hosts]
    )
    tracker = SignalTracker().start(metrics)
    carry, results, total = controller.init(n_hosts), [], torch.zeros(n_hosts)
    for epoch in range(RULES.max_epochs):
        masks = action_masks(records, spec)
        td = TensorDict({"observation": observe(records, tracker, spec), "key": k.fold(host_keys, epoch)}, [n_hosts])
        action, carry = controller.act(td.update(masks), carry)
        assert bool(masks["mask_slot"][torch.arange(n_hosts), action[:, 3], action[:, SLOT]].all())
        acted, outcome = apply_action(records, action, RULES, table, tracker["val_accuracy"])
        lost = outcome["culled"] & in_stage(records, BLENDED)
        wound = wound + torch.where(lost, records["alpha"] * _of(removal, records), 0).sum(1)
        live = in_stage(acted, BLENDED)
        share = torch.where(live, acted["alpha"], 0.0)
        noise = k.normal(k.fold(host_keys, 7, epoch)) * 0.3
        accuracy = 10 + 75 * (1 - torch.exp(torch.tensor(-(epoch + 1) / 5))) + (share * _of(value, acted)).sum(1)
        accuracy = (accuracy - wound + noise).clamp(0, 100)
        wound = wound / 2
        measured = torch.where(live, share * _of(removal, acted), float("nan"))
        ones = torch.ones_like(share)
        gradients = TensorDict({"norm": ones, "ratio": ones, "health": ones}, [n_hosts, 3])
        lived = record_epoch(acted, accuracy, measured, ones, gradients, ones.bool())
        last = epoch == RULES.max_epochs - 1
        after, auto = (lived, torch.zeros_like(lived["healthy"])) if last else tick(lived, RULES)
        wound = wound + torch.where(auto, lived["alpha"] * _of(removal, lived), 0).sum(1)
        loss = 2.3 * (1 - accuracy / 100)
        metrics = TensorDict(dict(zip(_METRICS, (loss, loss, accuracy, accuracy), strict=True)), [n_hosts])
        tracker = SignalTracker().update(tracker, metrics)
        result = TensorDict({"before": records, "lived": lived, "after": after, "outcome": outcome}, [n_hosts])
        result["tracker"] = tracker
        result["panic"] = result["restarted"] = torch.zeros(n_hosts, dtype=torch.bool)
        total = total + reward(result, settings, terminal=last)["total"]
        records = after
        results.append(result)
    extra = records["parameters"].sum(1)
    reached = objective(tracker["val_accuracy"], extra, settings.param_budget, settings.param_penalty_weight)
    return results, total, reached


_METRICS = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")


def _of(table: Tensor, records: TensorDict) -> Tensor:
    return table[records["blueprint"].clamp(min=0)]
