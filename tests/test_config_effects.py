"""Every field of a configuration has an effect: changed alone, it changes what is built or what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.control.policy import RecurrentPolicy
from esper.events import load, write_json
from esper.oversight import oversight_settings
from esper.run import build_learner
from esper.train import main

PLANT = {"epoch": 0, "op": "germinate", "slot": "mid", "blueprint": "norm", "blend": "linear"}
SCHEDULE = {"controller": "schedule", "schedule": [PLANT]}
ANNEALED = {"entropy_anneal_episodes": 8, "entropy_coef_start": 0.2}

BUILT: dict[str, tuple[Any, dict[str, Any]]] = {
    "task": ("synthetic", {}),
    "slots": (["mid"], {}),
    "blueprints": (["norm"], {}),
    "max_seeds": (1, {}),
    "family": ({"train_fraction": [0.5, 1.0]}, {}),
    "data_dir": ("elsewhere", {"task": "cifar10"}),
    "train_samples": (17, {}),
    "seed": (43, {}),
    "start_from": ("nowhere", {}),
    "n_envs": (3, {}),
    "max_epochs": (9, {}),
    "batch_size": (8, {}),
    "host_lr": (0.01, {}),
    "seed_lr": (0.01, {}),
    "lr_schedule": ("constant", {}),
    "incubation": ("none", {}),
    "gates": ("strict", {}),
    "freeze_fossils": (True, {}),
    "embargo_epochs": (2, {}),
    "coalition_statistics": ("running", {}),
    "devices": (["cpu", "cpu"], {}),
    "device": ("cuda:999", {}),
    "collector": ({"backend": "ray"}, {"devices": ["cuda:998"]}),
    "executor": ("stacked", {}),
    "amp": ("bf16", {}),
    "controller": ("never", {}),
    "schedule": ([{**PLANT, "epoch": 1}], SCHEDULE),
    "use_telemetry": (False, {}),
    "contribution_scale": (50.0, {}),
    "lstm_hidden_dim": (8, {}),
    "reward_family": ("loss", {}),
    "reward_mode": ("sparse", {}),
    "reward_baseline": ("twin", {}),
    "param_budget": (77, {}),
    "param_penalty_weight": (0.3, {}),
    "sparse_reward_scale": (2.0, {}),
    "imitation_rollouts": (2, {"schedule": [PLANT], "imitation_rollouts": 1, "n_episodes": 12}),
    "lr": (1e-3, {}),
    "clip_ratio": (0.1, {}),
    "gamma": (0.9, {}),
    "gae_lambda": (0.5, {}),
    "ppo_updates_per_batch": (2, {}),
    "minibatches": (2, {}),
    "target_kl": (None, {}),
    "value_coef": (0.25, {}),
    "value_clip": (None, {}),
    "max_grad_norm": (0.1, {}),
    "entropy_coef": (0.1, {}),
    "entropy_coef_start": (0.3, ANNEALED),
    "entropy_coef_end": (0.02, ANNEALED),
    "entropy_coef_min": (0.02, {}),
    "entropy_anneal_episodes": (80, ANNEALED),
    "entropy_weights": ({"op": 2.0}, {}),
    "episode_end": ("terminal", {}),
    "initial_patience": (3.0, {}),
    "probability_floor": ({"op": 0.1}, {}),
    "plateau_threshold": (0.1, {}),
    "improvement_threshold": (7.0, {}),
    "escalation_rollouts": (1, {}),
}
"""Fields seen in what is built: the other value, and what the configuration has besides."""

LEFT_BEHIND: dict[str, Any] = {
    "n_episodes": 6,
    "telemetry_level": "off",
    "checkpoint_every": 2,
    "tracker": "csv",
}
"""Fields seen in the files of a run only."""


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with tiny_task():
        return left_behind(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


def built(config: TrainingConfig) -> dict[str, str]:
    """Everything a run is made of, as text; or why it cannot be made."""
    try:
        env = build_env(config)
    except (ValueError, OSError) as error:
        return {"refused": str(error)}
    controller = build_controller(config, env)
    shards = [(s.device, s.first, s.size, type(s.executor), s.splits.train.targets.shape) for s in env.backend.shards]
    parts: dict[str, Any] = {
        "spec": env.spec,
        "settings": env.settings,
        "epochs": env.backend.settings,
        "shards": shards,
        "calibration": [s.calibration is None for s in env.backend.shards],
        "controller": type(controller),
        "oversight": oversight_settings(config),
    }
    if isinstance(controller, RecurrentPolicy):
        learner = build_learner(config, controller)
        shapes = {name: tuple(p.shape) for name, p in controller.named_parameters()}
        parts |= {"policy": shapes, "floors": controller.floors, "learner": learner.settings}
        parts["first biases"] = controller.heads["op"][-1].bias.tolist()
        parts["imitation"] = learner.imitation
        parts["lr"] = [group["lr"] for group in learner.optimizer.param_groups]
    else:
        observation = env.reset()
        observation["is_init"] = observation["is_init"].squeeze(-1)
        parts["action"] = controller.controller.act(observation, controller.controller.init(config.n_envs))[0].tolist()
    return {name: str(part) for name, part in parts.items()}


def left_behind(folder: Path, **fields: Any) -> dict[str, Any]:
    """Names of the files that the command line leaves, and the types of the events in order."""
    size = {"n_envs": 2, "n_episodes": 4, "max_epochs": 2, "slots": ["mid"], "telemetry_level": "minimal"}
    config = tiny_config(**{**size, **fields})
    write_json(folder.with_suffix(".json"), config.to_dict())
    assert main(["--config", str(folder.with_suffix(".json")), "--run-dir", str(folder)]) == 0
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {"files": files, "events": [event["type"] for event in load(folder)]}


def test_every_field_is_looked_at() -> None:
    assert BUILT.keys() | LEFT_BEHIND.keys() == TrainingConfig.model_fields.keys()
    assert not BUILT.keys() & LEFT_BEHIND.keys()


@pytest.mark.parametrize("field", BUILT)
def test_a_field_changes_what_is_built(field: str) -> None:
    value, base = BUILT[field]
    plain, changed = tiny_config(**base), tiny_config(**{**base, field: value})
    assert plain.to_dict()[field] != changed.to_dict()[field]
    assert built(plain) == built(plain)
    assert built(plain) != built(changed)


@pytest.mark.parametrize("field", LEFT_BEHIND)
def test_a_field_changes_what_a_run_leaves_behind(field: str, plain_run: dict[str, Any], tmp_path: Path) -> None:
    assert left_behind(tmp_path / "changed", **{field: LEFT_BEHIND[field]}) != plain_run


def test_the_same_configuration_leaves_the_same_behind(plain_run: dict[str, Any], tmp_path: Path) -> None:
    assert left_behind(tmp_path / "again") == plain_run


def test_the_surface_is_frozen() -> None:
    """Names, defaults and what is legal. A change here is a change for every user: rewrite the file on purpose."""
    assert json.loads((Path(__file__).parent / "config_surface.json").read_text()) == surface()


def surface() -> dict[str, Any]:
    """Every field with its JSON schema, without the words."""

    def bare(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: bare(value) for key, value in part.items() if key not in ("title", "description")}
        return [bare(item) for item in part] if isinstance(part, list) else part

    schema = TrainingConfig.json_schema()
    records = {name: bare(part["properties"]) for name, part in schema["$defs"].items()}
    return {"fields": bare(schema["properties"]), "records": records}
