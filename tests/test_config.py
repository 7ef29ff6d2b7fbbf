"""The configuration: its surface, its ranges, its contradictions, and how a mistake is reported."""

import json
from dataclasses import replace
from typing import get_args

import pytest
from pydantic import ValidationError

import esper.seeds.blueprints  # noqa: F401  registers the built-in blueprints
from esper import catalogue
from esper.config import PRESETS, ConfigError, ScheduleStep, TrainingConfig, preset
from esper.config_fields import SlotName
from esper.seeds.blueprints import registry
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS, INCUBATIONS
from esper.tasks import get_task, task_names

PLANT = {"epoch": 3, "op": "germinate", "slot": "mid", "blueprint": "norm", "blend": "linear"}


def problems_of(**data: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**data)
    return caught.value.problems


def test_every_field_is_described() -> None:
    fields = TrainingConfig.json_schema()["properties"]
    assert set(fields) == set(TrainingConfig.model_fields)
    assert [name for name, field in fields.items() if not field.get("description")] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_envs", 0),
        ("n_envs", 2.0),
        ("n_envs", "4"),
        ("n_envs", True),
        ("n_episodes", -1),
        ("max_epochs", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "fast"),
        ("lr", True),
        ("host_lr", -0.1),
        ("gamma", 1.01),
        ("gamma", 0.0),
        ("gae_lambda", -0.1),
        ("clip_ratio", 1.0),
        ("max_seeds", 0),
        ("param_budget", 0),
        ("param_penalty_weight", -0.1),
        ("sparse_reward_scale", 0),
        ("ppo_updates_per_batch", 0),
        ("minibatches", 0),
        ("value_clip", 0),
        ("entropy_anneal_episodes", -1),
        ("lstm_hidden_dim", 0),
        ("embargo_epochs", -1),
        ("checkpoint_every", 0),
        ("target_kl", 0),
        ("use_telemetry", 1),
        ("freeze_fossils", "no"),
        ("amp", True),
        ("reward_family", "wealth"),
        ("telemetry_level", None),
        ("slots", []),
        ("slots", "mid"),
        ("slots", None),
        ("devices", []),
        ("devices", "cpu"),
        ("blueprints", []),
        ("blueprints", ["norm", "attention", "depthwise", "conv_light", "conv_heavy", "conv_expand"]),
        ("data_dir", ""),
        ("task", 3),
        ("task", "chess"),
        ("device", "gpu"),
        ("schedule", {}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_value(field: str, value: object) -> None:
    (problem,) = problems_of(**{field: value})
    assert problem.startswith(f"{field}: ")
    assert problem.count(": ") >= 2
    assert (
        str(value if not isinstance(value, (list, bool, type(None))) else json.dumps(value)).lower() in problem.lower()
    )


@pytest.mark.parametrize(
    ("data", "place", "legal"),
    [
        ({"slots": ["mid", "top"]}, "slots[1]", "one of early, mid, late"),
        ({"slots": ["top"]}, "slots[0]", "one of early, mid, late"),
        ({"slots": ["mid", "mid"]}, "slots", "once"),
        ({"blueprints": ["norm", "norm"]}, "blueprints", "once"),
        ({"blueprints": ["norm", "lora"]}, "blueprints[1]", "conv_light"),
        ({"task": "pydocs", "blueprints": ["conv_light"]}, "blueprints[0]", "lora"),
        ({"blueprints": ["noop"]}, "blueprints[0]", "conv_light"),
        ({"reward_family": "loss", "reward_mode": "sparse"}, "reward_mode", "shaped"),
        ({"reward_family": "loss", "reward_baseline": "twin"}, "reward_baseline", "use none"),
        ({"devices": ["cpu", "cpu"], "n_envs": 1}, "devices", "n_envs (1)"),
        ({"minibatches": 3, "n_envs": 2}, "minibatches", "n_envs (2)"),
        ({"devices": ["cuda"]}, "devices[0]", "cuda:0"),
        ({"devices": ["cpu", "tpu:0"]}, "devices[1]", "cuda:<index>"),
        ({"devices": ["cuda:-1"]}, "devices[0]", "cuda:<index>"),
        ({"device": "cuda:x"}, "device", "cuda:<index>"),
        ({"collector": {"cores": 2}}, "collector.cores", 'only with collector.backend "ray"; use 1'),
        ({"collector": {"address": "auto"}}, "collector.address", 'use "local"'),
        ({"controller": "schedule"}, "schedule", "at least one step"),
        ({"schedule": [PLANT]}, "schedule", "not ppo without imitation_rollouts"),
        ({"imitation_rollouts": 1}, "imitation_rollouts", "no schedule to imitate"),
        (
            {"imitation_rollouts": 3, "n_episodes": 9, "schedule": [PLANT]},
            "imitation_rollouts",
            "rollouts of the run (3)",
        ),
        ({"imitation_rollouts": 1, "controller": "never"}, "imitation_rollouts", "only ppo imitates"),
        ({"controller": "schedule", "schedule": [PLANT, PLANT]}, "schedule[1].epoch", "one step per epoch"),
        ({"controller": "schedule", "schedule": [PLANT], "max_epochs": 3}, "schedule[0].epoch", "max_epochs (3)"),
        ({"controller": "schedule", "schedule": [{**PLANT, "epoch": 25}]}, "schedule[0].epoch", "max_epochs (25)"),
        ({"controller": "schedule", "schedule": [PLANT], "slots": ["late"]}, "schedule[0].slot", "slots (late)"),
        ({"controller": "schedule", "schedule": [{**PLANT, "blend": None}]}, "schedule[0].blend", "needed"),
        (
            {"controller": "schedule", "schedule": [{**PLANT, "op": "cull", "blend": None}]},
            "schedule[0].blueprint",
            "null",
        ),
        (
            {"controller": "schedule", "schedule": [PLANT], "blueprints": ["attention"]},
            "schedule[0].blueprint",
            "blueprints (attention)",
        ),
        ({"controller": "schedule", "schedule": [{**PLANT, "op": "wait"}]}, "schedule[0].op", "germinate"),
        ({"controller": "schedule", "schedule": [{"epoch": 1, "op": "cull"}]}, "schedule[0].slot", "missing"),
        ({"plateau_threshold": 3.0}, "plateau_threshold", "improvement_threshold (2)"),
        ({"entropy_coef": 0.001}, "entropy_coef", "entropy_coef_min (0.01)"),
        ({"entropy_coef_start": 0.1}, "entropy_coef_start", "entropy_anneal_episodes"),
        ({"entropy_anneal_episodes": 5}, "entropy_anneal_episodes", "entropy_coef_end"),
    ],
)
def test_a_contradiction_is_refused_where_it_is(data: dict[str, object], place: str, legal: str) -> None:
    (problem,) = problems_of(**data)
    assert problem.startswith(f"{place}: ")
    assert legal in problem


def test_all_problems_are_reported_at_once() -> None:
    found = problems_of(
        n_env=3, lr="fast", slots=[], devices=["cuda"], reward_family="loss", reward_mode="minimal", task="chess"
    )
    assert sorted(problem.split(":")[0] for problem in found) == [
        "devices[0]",
        "lr",
        "n_env",
        "reward_mode",
        "slots",
        "task",
    ]


def test_a_problem_is_one_line_whatever_the_value() -> None:
    for value in ({"a": [1, {"b": None}]}, {(1, 2): "x"}, object(), "two\nlines", ["x" * 500]):
        (problem,) = problems_of(lr=value)
        assert problem.startswith("lr: ")
        assert "\n" not in problem
        assert len(problem) < 200


def test_an_unknown_key_suggests_the_known_one() -> None:
    (problem,) = problems_of(n_env=3)
    assert "did you mean n_envs?" in problem


def test_a_key_named_like_an_argument_is_just_unknown() -> None:
    (problem,) = problems_of(**{"self": 1})
    assert problem.startswith("self: 1: there is no such field")


def test_nothing_is_guessed_about_a_field_that_is_itself_wrong() -> None:
    (problem,) = problems_of(n_envs="many", devices=["cpu", "cpu"])
    assert problem.startswith("n_envs: ")


def test_a_config_cannot_be_changed_only_replaced() -> None:
    config = TrainingConfig()
    with pytest.raises(ValidationError):
        config.n_envs = 8  # type: ignore[misc]
    assert config.replace(n_envs=8).n_envs == 8
    with pytest.raises(ConfigError):
        config.replace(n_envs=0)


def test_round_trip_through_json() -> None:
    config = TrainingConfig(controller="schedule", schedule=[PLANT], target_kl=None, blueprints=["norm", "depthwise"])
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.schedule == (ScheduleStep(**PLANT),)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[1]", "one object"),
        ("{", "must be JSON"),
        ("", "must be JSON"),
        ('{"seed": 1, "seed": 2}', "once, not seed"),
        ("[" * 100_000, "must be JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "must be JSON"),
        ('{"lr": NaN}', "lr: NaN: must be a number"),
    ],
)
def test_a_bad_file_is_a_config_error(tmp_path, text: str, fragment: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fragment):
        TrainingConfig.from_json_path(path)


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    for name in ("missing.json", ".", "binary.json"):
        with pytest.raises(ConfigError, match="config: "):
            TrainingConfig.from_json_path(tmp_path / name)


def test_train_kwargs_are_the_fields() -> None:
    config = preset("digits")
    assert config.to_train_kwargs() == {name: getattr(config, name) for name in TrainingConfig.model_fields}


def test_every_preset_is_valid_and_named_like_its_task() -> None:
    assert sorted(PRESETS) == sorted(task_names())
    for name in PRESETS:
        assert preset(name).task == name
    with pytest.raises(ConfigError, match="digits"):
        preset("imagenet")


def test_the_summary_names_what_is_not_default() -> None:
    lines = TrainingConfig(n_envs=6, amp="bf16").summary().splitlines()
    assert lines == ["ppo on digits: 100 episodes, 6 hosts side by side", "  n_envs = 6", '  amp = "bf16"']


def test_names_agree_with_the_modules_behind_them() -> None:
    assert get_args(SlotName) == catalogue.SLOTS == LAYOUT
    fields = TrainingConfig.json_schema()
    assert tuple(fields["$defs"]["ScheduleStep"]["properties"]["blend"]["anyOf"][0]["enum"]) == BLENDS
    assert tuple(fields["properties"]["incubation"]["enum"]) == INCUBATIONS
    for topology in ("cnn", "transformer"):
        registered = set(registry.names(topology)) - {"noop"}
        assert registered <= set(catalogue.blueprint_names(topology))
        assert set(catalogue.blueprint_names(topology)) - registered <= {"flex_attention"}
    for task in map(get_task, task_names()):
        assert set(task.blueprints) <= set(catalogue.blueprint_names(task.topology))


def test_a_blueprint_of_ones_own_can_be_named_once_it_is_registered() -> None:
    norm = registry.get("cnn", "norm")
    registry.register(replace(norm, name="mine"))
    try:
        assert TrainingConfig(blueprints=["mine"]).blueprints == ("mine",)
    finally:
        registry.unregister("cnn", "mine")
    with pytest.raises(ConfigError, match="mine"):
        TrainingConfig(blueprints=["mine"])


@pytest.mark.parametrize("fields", [{}, {"devices": ["cuda:0"], "executor": "loop"}, {"devices": ["cuda:0", "cpu"]}])
def test_tf32_needs_recorded_programs(fields: dict[str, object]) -> None:
    (problem,) = problems_of(amp="tf32", n_envs=2, **fields)
    assert problem.startswith('amp: "tf32": is for recorded CUDA programs')
    assert TrainingConfig(amp="tf32", devices=["cuda:0"]).amp == "tf32"


def test_the_captured_executor_needs_gpus() -> None:
    (problem,) = problems_of(executor="captured", devices=["cuda:0", "cpu"], n_envs=2)
    assert problem.startswith('executor: "captured": records CUDA programs')
    assert TrainingConfig(executor="captured", devices=["cuda:0"]).executor == "captured"


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ({}, "family: {}: must draw at least one of train_fraction, label_noise, host_lr_factor, classes, width"),
        ({"label_noise": [0.4, 0.2]}, "family.label_noise: [0.4, 0.2]: the first may not be above the second"),
        (
            {"train_fraction": [0.0, 1.0]},
            "family.train_fraction[0]: 0.0: must be a number > 0 and <= 1",
        ),
        (
            {"host_lr_factor": [1.0]},
            "family.host_lr_factor: [1.0]: must be a list of 2 to 2 entries, each a number > 0 or null",
        ),
        ({"noise": [0.0, 0.1]}, "family.noise: [0.0, 0.1]: there is no such field; did you mean label_noise?"),
    ],
)
def test_a_family_that_cannot_be_drawn_is_refused(family: dict[str, object], problem: str) -> None:
    assert problems_of(family=family) == (problem,)


def test_only_classes_can_be_mistaken() -> None:
    (problem,) = problems_of(task="pydocs", family={"label_noise": [0.0, 0.1]})
    assert problem.startswith("family.label_noise: [0.0, 0.1]: only classes can be mistaken or left out")
    (problem,) = problems_of(family={"classes": [2, 11]})
    assert problem == "family.classes[1]: 11: task digits has 10 classes"
    assert TrainingConfig(task="pydocs", family={"train_fraction": (0.1, 1.0)}).family is not None


def test_only_the_width_of_the_task_s_own_cnn_can_be_drawn() -> None:
    (problem,) = problems_of(task="pydocs", family={"width": [1, 2]})
    assert problem.startswith("family.width: [1, 2]: only cnn hosts have a width to draw")
    (problem,) = problems_of(start_from="grown", family={"width": [1, 2]})
    assert problem == 'family.width: [1, 2]: start_from ("grown") decides the width; use null'
