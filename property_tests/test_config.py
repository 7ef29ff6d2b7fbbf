"""Whatever is in a configuration file, it becomes a configuration or a clear refusal, and never a traceback."""

import json
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from esper.config import PRESETS, ConfigError, TrainingConfig, read_json
from esper.config_fields import Family
from esper.errors import InputError
from esper.flags import parse

FIELDS = tuple(TrainingConfig.model_fields)
STEP = {"epoch": 2, "op": "germinate", "slot": "mid", "blueprint": "norm", "blend": "linear"}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 5),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["early", "mid", "cpu", "cuda", "cuda:0", "norm", "lora", "mnist", "schedule", "loss", "sparse"]),
)
junk = st.recursive(
    scalars | st.just(STEP),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A preset with some fields replaced by anything, and perhaps a key that does not exist."""
    data = TrainingConfig.from_dict(PRESETS[draw(st.sampled_from(sorted(PRESETS)))]).to_dict()
    data.update(draw(st.dictionaries(st.sampled_from(FIELDS), junk, max_size=4)))
    if draw(st.booleans()):
        data.update(draw(st.dictionaries(st.text(max_size=6), junk, max_size=1)))
    return data


@st.composite
def valid(draw: st.DrawFn) -> TrainingConfig:
    """A configuration that differs from the defaults in several fields."""
    task = draw(st.sampled_from(sorted(PRESETS)))
    slots = draw(st.lists(st.sampled_from(["early", "mid", "late"]), min_size=1, max_size=3, unique=True))
    schedule = draw(st.lists(st.integers(0, 20), unique=True, max_size=3))
    data = {
        "task": task,
        "slots": slots,
        "n_envs": draw(st.integers(2, 9)),
        "devices": draw(st.sampled_from([["cpu"], ["cpu", "cpu"], ["cuda:0", "cuda:1"]])),
        "device": draw(st.sampled_from(["cpu", "cuda", "cuda:3"])),
        "lr": draw(st.floats(1e-9, 1.0)),
        "gamma": draw(st.floats(0.01, 1.0)),
        "target_kl": draw(st.none() | st.floats(1e-6, 10.0)),
        "max_epochs": draw(st.none() | st.integers(21, 300)),
        "blueprints": draw(st.none() | st.just(["norm", "attention"])),
        "use_telemetry": draw(st.booleans()),
        "freeze_fossils": draw(st.booleans()),
        "amp": draw(st.sampled_from(["off", "bf16", "fp16"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    if schedule:
        data["controller"] = "schedule"
        data["schedule"] = [{**STEP, "epoch": epoch, "slot": slots[0]} for epoch in schedule]
    return TrainingConfig.from_dict(data)


def completed(defaults: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`data` with what it leaves out, in its sections too."""
    sections = {**defaults, "family": Family().model_dump()}
    return defaults | {
        name: sections[name] | value if isinstance(value, dict) else value for name, value in data.items()
    }


@given(mutated())
def test_a_mutated_config_is_a_config_or_a_list_of_problems(tmp_path_factory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(data))
    refused: tuple[str, ...] = ()
    try:
        config = TrainingConfig.from_json_path(path)
    except ConfigError as error:
        refused = error.problems
    for problem in refused:
        assert problem.startswith((*data, *FIELDS))
        assert problem.count(": ") >= 2 or ": missing: " in problem
    if refused:
        return
    assert TrainingConfig.from_dict(config.to_dict()) == config
    assert config.to_dict() == completed(TrainingConfig().to_dict(), data)


@given(st.text(max_size=40) | st.binary(max_size=40))
def test_any_file_is_read_or_refused(tmp_path_factory, content: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        said = read_json(path)
    except ConfigError as error:
        said = {"refused": str(error)}
    assert isinstance(said, dict)
    assert str(path) in said.get("refused", str(path))


@given(st.sampled_from(FIELDS), junk)
def test_one_wrong_field_is_blamed_alone(field: str, value: Any) -> None:
    found: tuple[str, ...] = ()
    try:
        TrainingConfig.from_dict({field: value})
    except ConfigError as error:
        found = error.problems
    blamed = {problem.split(":")[0].split("[")[0].split(".")[0] for problem in found}
    depends = {
        "controller": "schedule",
        "improvement_threshold": "plateau_threshold",
        "entropy_coef_min": "entropy_coef",
        "n_envs": "devices",
    }
    assert blamed <= {field, depends.get(field, field)}


@given(valid())
def test_json_round_trip(config: TrainingConfig) -> None:
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def _flags(data: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in data.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and name != "schedule":
            flags += [flag, *value]
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return flags


@given(valid())
def test_flags_say_the_same_as_a_file(config: TrainingConfig) -> None:
    assert parse(_flags(config.to_dict())).config == config


@given(st.lists(st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS]) | st.text(max_size=8), max_size=6))
def test_any_command_line_is_a_command_or_a_list_of_problems(arguments: list[str]) -> None:
    assume(not {"-h", "--help"} & set(arguments))
    try:
        command = parse(arguments)
    except InputError as error:
        command = None
        refused = error.problems
    assert refused if command is None else isinstance(command.config, TrainingConfig)
