"""The table of events: every type, the level from which it is written, its severity and what its data holds.

The JSON schema `docs/events.schema.json`, the columns of `esper.table` and the page of events in the documentation are
made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Level = Literal["off", "minimal", "normal", "debug"]
Severity = Literal["debug", "info", "warning", "error", "critical"]

LEVELS: tuple[Level, ...] = ("off", "minimal", "normal", "debug")
SEVERITIES: tuple[Severity, ...] = ("debug", "info", "warning", "error", "critical")


class DataField(NamedTuple):
    """One entry of an event's data: what it holds (a key of `KINDS`) and what it means."""

    kind: str
    about: str


class EventType(NamedTuple):
    """A row of the event table.

    `data` are the entries every event of the type has. `others` is what further entries hold (a key of `KINDS`), under
    names the table does not know; empty where there are none.
    """

    level: Level
    severity: Severity
    about: str
    data: Mapping[str, DataField]
    others: str = ""


_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, {"type": "null"}, {"enum": ["inf", "-inf"]}]}
KINDS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "text or null": {"type": ["string", "null"]},
    "count": {"type": "integer"},
    "number": _NUMBER,
    "texts": {"type": "array", "items": {"type": "string"}},
    "numbers per host": {"type": "array", "items": _NUMBER},
    "counts by name": {"type": "object", "additionalProperties": {"type": "integer"}},
    "anything": {},
}
"""What an entry can hold, as JSON schema. A number is null where it was not measured."""

_BLUEPRINT = DataField("text", "blueprint of the seed")
_PARAMETERS = DataField("count", "trainable parameters of the seed")
_CONTRIBUTION = DataField("number", "accuracy of all live slots minus accuracy without this one, points")
_CONTRIBUTION_SE = DataField("number", "paired standard error of the contribution, points")
_LIFE = {
    "blueprint": _BLUEPRINT,
    "contribution": _CONTRIBUTION,
    "contribution_se": _CONTRIBUTION_SE,
    "improvement": DataField("number", "accuracy now minus accuracy after the seed's first epoch, points"),
    "age": DataField("count", "epochs trained since germination"),
}
_ALARM = {
    "reason": DataField("text", "what the governor saw"),
    "loss": DataField("number", "validation loss, nats"),
    "threshold": DataField("number", "loss from which the governor acts, nats"),
}

EVENTS: dict[str, EventType] = {
    "run_started": EventType(
        "minimal",
        "info",
        "A run begins.",
        {
            "task": DataField("text", "what is trained on what"),
            "controller": DataField("text", "who decides"),
            "slots": DataField("texts", "the run's slots, in order"),
            "blueprints": DataField("texts", "seeds that can be planted, in order of the blueprint head"),
            "max_epochs": DataField("count", "epochs of an episode"),
            "host_parameters": DataField("count", "parameters of a host without seeds, of the widest if they differ"),
        },
    ),
    "hosts": EventType(
        "minimal",
        "info",
        "What the hosts of an episode have drawn from their family.",
        {
            "train_fraction": DataField("numbers per host", "part of the training split it trains on"),
            "label_noise": DataField("numbers per host", "part of its training samples with a wrong label"),
            "host_lr_factor": DataField("numbers per host", "factor on the learning rate of hosts"),
            "classes": DataField("numbers per host", "classes it tells apart; null if all, as without a family"),
            "host_lr": DataField("numbers per host", "learning rate at the start of the episode"),
            "host_parameters": DataField("numbers per host", "parameters without seeds"),
        },
    ),
    "germinated": EventType(
        "normal",
        "info",
        "A seed was planted.",
        {
            "blueprint": _BLUEPRINT,
            "blend": DataField("text", "how it will be blended in"),
            "parameters": _PARAMETERS,
        },
    ),
    "stage_changed": EventType(
        "normal",
        "info",
        "A slot moved to another stage by itself.",
        {
            "before": DataField("text", "stage name"),
            "after": DataField("text", "stage name"),
            "blueprint": DataField("text or null", "blueprint of the seed, null without one"),
        },
    ),
    "fossilized": EventType("normal", "info", "A seed was kept for good.", {**_LIFE, "parameters": _PARAMETERS}),
    "culled": EventType(
        "normal",
        "info",
        "A seed was removed.",
        {**_LIFE, "reason": DataField("text", "controller, negative_contribution or probation_timeout")},
    ),
    "refused": EventType(
        "normal",
        "warning",
        "An action changed nothing.",
        {"op": DataField("text", "what was asked for"), "reason": DataField("text", "why it was not done")},
    ),
    "epoch": EventType(
        "normal",
        "info",
        "A host has trained and validated for one epoch.",
        {
            "train_loss": DataField("number", "mean training loss, nats"),
            "train_accuracy": DataField("number", "training accuracy, points"),
            "validation_loss": DataField("number", "validation loss, nats"),
            "validation_accuracy": DataField("number", "validation accuracy, points"),
        },
    ),
    "contribution": EventType(
        "normal",
        "info",
        "What one live slot was worth in one epoch.",
        {
            "contribution": _CONTRIBUTION,
            "contribution_se": _CONTRIBUTION_SE,
            "alpha": DataField("number", "share of the seed in the forward value, 0 to 1"),
        },
    ),
    "stabilized": EventType(
        "normal",
        "info",
        "A host's training has settled for the first time in the episode.",
        {"validation_loss": DataField("number", "validation loss, nats")},
    ),
    "reward": EventType(
        "debug",
        "debug",
        "What one step of one host was paid.",
        {"op": DataField("text", "what the controller did"), "total": DataField("number", "sum of the components")},
        others="number",
    ),
    "governor_panic": EventType(
        "normal",
        "error",
        "The governor saw a host fail.",
        {**_ALARM, "consecutive": DataField("count", "failures in a row")},
    ),
    "governor_rollback": EventType(
        "minimal",
        "critical",
        "The governor took a host back to its last good snapshot.",
        {**_ALARM, "restored_epoch": DataField("count", "epoch of the snapshot")},
    ),
    "host_restarted": EventType(
        "minimal",
        "warning",
        "The worker of a host died; the host went on from its last state on a new worker, with the same numbers.",
        {"restored_epoch": DataField("count", "epochs trained in the state it went on from")},
    ),
    "rollout": EventType(
        "minimal",
        "info",
        "Every host has finished an episode.",
        {
            "validation_accuracy": DataField("numbers per host", "at the end, points"),
            "returns": DataField("numbers per host", "sum of rewards"),
            "objective": DataField("numbers per host", "accuracy minus the price of growth, points"),
            "parameters": DataField("numbers per host", "of host and seeds"),
            "ops": DataField("counts by name", "how often each op was chosen"),
            "planted": DataField("count", "seeds planted"),
            "kept": DataField("count", "seeds fossilised"),
            "culled": DataField("count", "seeds removed"),
            "growing": DataField("count", "seeds undecided when the episode ended"),
        },
    ),
    "update": EventType(
        "minimal",
        "info",
        "The controller has learned from a rollout; `name/head` for metrics of one head.",
        {"updates": DataField("number", "optimiser steps taken")},
        others="number",
    ),
    "gradients": EventType(
        "debug",
        "debug",
        "Gradients of an update's last step, before clipping.",
        {"layers": DataField("anything", "a record per parameter of the policy: size, norm, mean, std, min, max, ...")},
    ),
    "anomaly": EventType(
        "minimal",
        "warning",
        "Something that training should not do, with the diagnostic that goes with it.",
        {"kind": DataField("text", "what it is"), "detail": DataField("anything", "how it showed")},
        others="anything",
    ),
    "escalated": EventType(
        "minimal",
        "warning",
        "The level is debug for a while.",
        {"rollouts": DataField("count", "for how many rollouts")},
    ),
    "settled": EventType("minimal", "info", "The level is the configured one again.", {}),
    "trend": EventType(
        "minimal",
        "info",
        "Where accuracy is going between rollouts.",
        {
            "kind": DataField("text", "plateau, improvement or degradation"),
            "change": DataField("number", "of mean accuracy, points"),
        },
    ),
    "checkpoint": EventType(
        "minimal", "info", "The run can be resumed from here.", {"rollout": DataField("count", "rollouts finished")}
    ),
    "run_finished": EventType(
        "minimal", "info", "A run is over.", {"weights_digest": DataField("text", "SHA-256 of all final weights")}
    ),
}
"""Every type of event. Accuracies, contributions and improvements are percentage points, losses nats, ages epochs."""

PLACES: dict[str, tuple[str, str]] = {
    "step": ("integer", "events of the run before this one, written or not"),
    "type": ("string", "type of the event"),
    "episode": ("integer", "resets of the hosts before this one, the same for all hosts; null if it means nothing"),
    "epoch": ("integer", "epochs trained in the episode when it happened; null if it means nothing"),
    "host": ("integer", "index of the host; null if it concerns all"),
    "slot": ("string", "name of the slot; null if it concerns none"),
    "severity": ("string", "debug, info, warning, error or critical"),
}
"""What every event has besides its data: JSON type and meaning."""


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of one line of `events.jsonl`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of events.jsonl",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in EVENTS],
        "$defs": {name: _schema_of(name, row) for name, row in EVENTS.items()},
    }


def _schema_of(name: str, row: EventType) -> dict[str, Any]:
    data: dict[str, Any] = {
        "type": "object",
        "properties": {key: {**KINDS[entry.kind], "description": entry.about} for key, entry in row.data.items()},
        "required": list(row.data),
        "additionalProperties": KINDS[row.others] if row.others else False,
    }
    properties: dict[str, Any] = {}
    for key, (kind, about) in PLACES.items():
        always = key in ("step", "severity")
        properties[key] = {"type": kind if always else [kind, "null"], "description": about}
    properties["type"] = {"const": name}
    properties["severity"]["enum"] = list(SEVERITIES)
    return {
        "title": name,
        "description": f"{row.about} Written from level {row.level} on.",
        "type": "object",
        "properties": {**properties, "data": data},
        "required": [*properties, "data"],
        "additionalProperties": False,
    }
