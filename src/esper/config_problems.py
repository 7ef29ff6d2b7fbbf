"""Everything that is wrong with a configuration, found in one go and said in the user's terms.

A problem reads `"field: value: what is legal"`. What is legal is taken from the JSON schema of the field, so it cannot
drift from what is checked.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from esper.catalogue import blueprint_names
from esper.config_fields import Fields
from esper.tasks import Task, get_task, task_names

Schema = Mapping[str, Any]

_WORDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a text", "null": "null"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Finding(NamedTuple):
    """A contradiction between valid fields: the one to name, what is legal, and the other fields it depends on."""

    place: str
    value: Any
    legal: str
    depends_on: tuple[str, ...] = ()


def problems(data: Mapping[str, Any]) -> list[str]:
    """All problems of `data`; empty if it makes a configuration. Contradictions involving a field that is itself wrong
    are left out, since they would be guesses."""
    found: list[str] = []
    wrong: set[str] = set()
    try:
        Fields.model_validate(dict(data))
    except ValidationError as error:
        schema = Fields.model_json_schema()
        items = error.errors(include_url=False, include_context=False)
        for item in items:
            # A list whose entries are refused is also called too short: the entries are the problem.
            if item["type"] == "too_short" and any(other["loc"][:-1] == item["loc"] for other in items):
                continue
            found.append(_describe(schema, item["loc"], item["type"], item["input"]))
            wrong.add(str(item["loc"][0]))
    sound = Fields.model_validate({name: value for name, value in data.items() if name not in wrong})
    for finding in _contradictions(sound):
        field = re.split(r"[\[.]", finding.place)[0]
        if not wrong & {field, *finding.depends_on}:
            found.append(_line(finding.place, finding.value, finding.legal))
    return found


def _line(place: str, value: Any, legal: str) -> str:
    shown = json.dumps(value, default=str, skipkeys=True)
    return f"{place}: {shown if len(shown) <= 120 else shown[:117] + '...'}: {legal}"


def _describe(schema: Schema, loc: tuple[int | str, ...], kind: str, value: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    if kind == "extra_forbidden":
        known = list(_properties(schema, _descend(schema, loc[:-1])))
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known fields are {', '.join(known)}"
        return _line(place, value, f"there is no such field; {hint}")
    if kind == "missing":
        return f"{place}: missing: {legal(schema, _descend(schema, loc))}"
    return _line(place, value, f"must be {legal(schema, _descend(schema, loc))}")


def _resolve(schema: Schema, part: Schema) -> Schema:
    name = part.get("$ref")
    return part if name is None else schema["$defs"][name.rsplit("/", 1)[1]]


def alternatives(schema: Schema, part: Schema) -> list[Schema]:
    """What a part of a JSON schema allows: itself, or the options it lists, with references followed."""
    return [_resolve(schema, option) for option in part.get("anyOf", [part])]


def _properties(schema: Schema, part: Schema) -> Schema:
    properties: Schema = next(option for option in alternatives(schema, part) if "properties" in option)["properties"]
    return properties


def _descend(schema: Schema, loc: tuple[int | str, ...]) -> Schema:
    part = schema
    for step in loc:
        if isinstance(step, int):
            part = next(option for option in alternatives(schema, part) if "items" in option)["items"]
        else:
            part = _properties(schema, part)[step]
    return part


def legal(schema: Schema, part: Schema) -> str:
    """What a part of a JSON schema allows, in words."""
    return " or ".join(_legal_type(schema, option) for option in alternatives(schema, part))


def _legal_type(schema: Schema, part: Schema) -> str:
    if "enum" in part:
        return "one of " + ", ".join(part["enum"])
    if part["type"] == "array":
        least, most = part.get("minItems", 0), part.get("maxItems")
        count = f"{least} to {most}" if most is not None else f"{least} or more"
        return f"a list of {count} entries, each {legal(schema, part['items'])}"
    if part["type"] == "object":
        return "an object with the fields " + ", ".join(part["properties"])
    words = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "a text",
        "null": "null",
    }
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for key, sign in bounds.items() if key in part]
    least_text = " that is not empty" if part.get("minLength") else ""
    return words[part["type"]] + least_text + (" " + " and ".join(limits) if limits else "")


def _contradictions(config: Fields) -> Iterator[Finding]:
    for name in ("slots", "blueprints"):
        chosen = getattr(config, name) or ()
        if len(set(chosen)) != len(chosen):
            yield Finding(name, chosen, "each may be named once")
    yield from _devices(config)
    yield from _learner(config)
    yield from _steps(config)
    yield from _family(config)
    if config.task in task_names():
        yield from _task(config, get_task(config.task))
    else:
        yield Finding("task", config.task, f"must be one of {', '.join(task_names())}")


def _learner(config: Fields) -> Iterator[Finding]:
    if config.reward_family == "loss" and config.reward_mode != "shaped":
        legal = "the loss family knows only the shaped mode"
        yield Finding("reward_mode", config.reward_mode, legal, ("reward_family",))
    if config.reward_family == "loss" and config.reward_baseline != "none":
        legal = "the loss family does not pay for the objective; use none"
        yield Finding("reward_baseline", config.reward_baseline, legal, ("reward_family",))
    if config.minibatches > config.n_envs:
        legal = f"must be at most n_envs ({config.n_envs}), so that each has a host"
        yield Finding("minibatches", config.minibatches, legal, ("n_envs",))
    for name in ("entropy_coef", "entropy_coef_start", "entropy_coef_end"):
        weight = getattr(config, name)
        if weight is not None and weight < config.entropy_coef_min:
            legal = f"must be at least entropy_coef_min ({config.entropy_coef_min:g})"
            yield Finding(name, weight, legal, ("entropy_coef_min",))
    ends = {name: getattr(config, name) for name in ("entropy_coef_start", "entropy_coef_end")}
    episodes = config.entropy_anneal_episodes
    if episodes and set(ends.values()) == {None}:
        legal = "annealing needs entropy_coef_start or entropy_coef_end; without it use 0"
        yield Finding("entropy_anneal_episodes", episodes, legal, tuple(ends))
    for name, weight in ends.items():
        if weight is not None and not episodes:
            legal = "has an effect only with entropy_anneal_episodes >= 1; use null"
            yield Finding(name, weight, legal, ("entropy_anneal_episodes",))


def _devices(config: Fields) -> Iterator[Finding]:
    for index, name in enumerate(config.devices):
        if not re.fullmatch(r"cpu|cuda:(0|[1-9]\d{0,3})", name):
            index_missing = "a host device needs its index: cuda:0" if name == "cuda" else "must be cpu or cuda:<index>"
            yield Finding(f"devices[{index}]", name, index_missing)
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,3}))?", config.device):
        yield Finding("device", config.device, "must be cpu, cuda or cuda:<index>")
    on_gpus = all(name.startswith("cuda") for name in config.devices)
    if config.executor == "captured" and not on_gpus:
        yield Finding("executor", config.executor, "records CUDA programs, so every device must be a GPU", ("devices",))
    if config.amp == "tf32" and not (on_gpus and config.executor in ("auto", "captured")):
        legal = "is for recorded CUDA programs: every device must be a GPU and the executor auto or captured"
        yield Finding("amp", config.amp, legal, ("devices", "executor"))
    if len(config.devices) > config.n_envs:
        legal = f"at most n_envs ({config.n_envs}) devices, so that each gets a host"
        yield Finding("devices", config.devices, legal, ("n_envs",))
    for name in ("address", "cores"):
        value, default = getattr(config.collector, name), type(config.collector).model_fields[name].default
        if config.collector.backend == "local" and value != default:
            legal = f'has an effect only with collector.backend "ray"; use {json.dumps(default)}'
            yield Finding(f"collector.{name}", value, legal)


def _steps(config: Fields) -> Iterator[Finding]:
    if config.controller == "schedule" and not config.schedule:
        yield Finding("schedule", [], "the schedule controller needs at least one step", ("controller",))
    imitation = config.imitation_rollouts
    if imitation and config.controller != "ppo":
        legal = f"only ppo imitates, not {config.controller}; use 0"
        yield Finding("imitation_rollouts", imitation, legal, ("controller",))
    elif imitation and imitation >= config.rollouts:
        legal = f"must be below the rollouts of the run ({config.rollouts}), or the policy never acts"
        yield Finding("imitation_rollouts", imitation, legal, ("n_episodes", "n_envs"))
    elif imitation and not config.schedule:
        yield Finding("imitation_rollouts", imitation, "there is no schedule to imitate; use 0", ("schedule",))
    if config.controller != "schedule" and config.schedule and not imitation:
        legal = f"only the schedule controller follows one, not {config.controller} without imitation_rollouts; use []"
        depends = ("controller", "imitation_rollouts")
        yield Finding("schedule", [step.model_dump() for step in config.schedule], legal, depends)
    taken: set[int] = set()
    for index, step in enumerate(config.schedule):
        place = f"schedule[{index}]"
        if step.epoch in taken and config.controller == "schedule":
            yield Finding(f"{place}.epoch", step.epoch, "one step per epoch")
        taken.add(step.epoch)
        if step.slot not in config.slots:
            yield Finding(f"{place}.slot", step.slot, f"must be one of slots ({', '.join(config.slots)})", ("slots",))
        for name in ("blueprint", "blend"):
            value = getattr(step, name)
            if (value is None) == (step.op == "germinate"):
                legal = f"{'needed' if step.op == 'germinate' else 'must be null'} for {step.op}"
                yield Finding(f"{place}.{name}", value, legal)


def _family(config: Fields) -> Iterator[Finding]:
    if config.family is None:
        return
    ranges = config.family.model_dump(exclude_none=True)
    if not ranges:
        yield Finding("family", {}, f"must draw at least one of {', '.join(type(config.family).model_fields)}")
    width = ranges.pop("width", None)
    if width is not None and config.start_from is not None:
        legal = f"start_from ({json.dumps(config.start_from)}) decides the width; use null"
        yield Finding("family.width", width, legal, ("start_from",))
    for name, (least, greatest) in ranges.items():
        if least > greatest:
            yield Finding(f"family.{name}", [least, greatest], "the first may not be above the second")


def _task(config: Fields, task: Task) -> Iterator[Finding]:
    known = blueprint_names(task.topology)
    for index, name in enumerate(config.blueprints or ()):
        if name not in known:
            legal = f"must be one of {', '.join(known)} (task {task.name} grows {task.topology} hosts)"
            yield Finding(f"blueprints[{index}]", name, legal, ("task",))
    for name in ("label_noise", "classes"):
        value = None if config.family is None else getattr(config.family, name)
        if value is not None and task.kind != "classification":
            legal = f"only classes can be mistaken or left out (task {task.name} predicts tokens); use null"
            yield Finding(f"family.{name}", value, legal, ("task",))
        elif value is not None and name == "classes" and value[1] > task.n_outputs:
            yield Finding("family.classes[1]", value[1], f"task {task.name} has {task.n_outputs} classes", ("task",))
    if config.family is not None and config.family.width is not None and task.topology != "cnn":
        legal = f"only cnn hosts have a width to draw (task {task.name} grows {task.topology} hosts); use null"
        yield Finding("family.width", config.family.width, legal, ("task",))
    plateau = task.plateau_threshold if config.plateau_threshold is None else config.plateau_threshold
    improvement = task.improvement_threshold if config.improvement_threshold is None else config.improvement_threshold
    if plateau > improvement:
        legal = f"must be at most improvement_threshold ({improvement:g})"
        yield Finding("plateau_threshold", plateau, legal, ("improvement_threshold", "task"))
    offered = config.blueprints or task.blueprints
    max_epochs = config.max_epochs or task.max_epochs
    for index, step in enumerate(config.schedule):
        place = f"schedule[{index}]"
        if step.blueprint is not None and step.blueprint not in offered:
            legal = f"must be one of blueprints ({', '.join(offered)})"
            yield Finding(f"{place}.blueprint", step.blueprint, legal, ("blueprints", "task"))
        if step.epoch >= max_epochs:
            legal = f"must be below max_epochs ({max_epochs})"
            yield Finding(f"{place}.epoch", step.epoch, legal, ("max_epochs", "task"))
