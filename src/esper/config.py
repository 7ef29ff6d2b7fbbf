"""`TrainingConfig`: the only source of truth about a run, and the presets.

    config = TrainingConfig(task="digits", slots=["early", "mid", "late"], n_envs=8)
    config = TrainingConfig.from_json_path("configs/demo.json")

Importing this module does not load torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from esper.config_fields import Fields, ScheduleStep
from esper.config_problems import problems
from esper.errors import ConfigError

__all__ = ["PRESETS", "ConfigError", "ScheduleStep", "TrainingConfig", "preset", "read_json"]

_ALL_SLOTS = ["early", "mid", "late"]
_QUICK = {
    "n_envs": 8,
    "n_episodes": 400,
    "lr": 1e-3,
    "ppo_updates_per_batch": 8,
    "entropy_coef": 0.01,
    "probability_floor": {"slot": 0.02, "blueprint": 0.02, "blend": 0.02},
}
"""A controller that learns within tens of rollouts (`docs/learning.md`). What is planted, where and how is chosen less
and less often as it learns what planting costs; the floors keep these heads from closing meanwhile."""

_CHANGES: dict[str, dict[str, Any]] = {
    "digits": {"slots": _ALL_SLOTS, **_QUICK},
    "digits_wide": {"slots": _ALL_SLOTS, **_QUICK},
    "digits_narrow": {"slots": _ALL_SLOTS, **_QUICK},
    "digits_deep": {"slots": _ALL_SLOTS, **_QUICK},
    "synthetic": {"slots": _ALL_SLOTS},
    "mnist": {"slots": _ALL_SLOTS, **_QUICK},
    "mnist_narrow": {"slots": _ALL_SLOTS, **_QUICK},
    "pydocs": {"slots": _ALL_SLOTS, "n_envs": 8},
    "cifar10": {"entropy_coef": 0.1},
    "cifar10_deep": {"entropy_coef": 0.08},
    "tinystories": {"sparse_reward_scale": 0.5},
}

# What counts is a host's accuracy at the end, and a truncated end can teach a policy not to grow (docs/learning.md).
PRESETS: dict[str, dict[str, Any]] = {
    task: {"task": task, "episode_end": "terminal", **changes} for task, changes in _CHANGES.items()
}
"""What a task's preset changes about the defaults; a preset is called like its task."""


class TrainingConfig(Fields):
    """Everything that decides a run; immutable. Lists may be given for tuples, nothing else is converted.

    Raises ConfigError with every problem at once.
    """

    def __init__(self, /, **data: Any) -> None:
        found = problems(data)
        if found:
            raise ConfigError(found)
        super().__init__(**data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From plain JSON-like data. Raises ConfigError."""
        return cls(**data)

    @classmethod
    def from_json_path(cls, path: str | Path) -> Self:
        """From a JSON file that holds one object. Raises ConfigError, also for a file that cannot be read."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-like data; `from_dict` gives an equal configuration back."""
        return self.model_dump(mode="json")

    def to_train_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `esper.run.train`: every field under its own name, as tuples, records and scalars."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked as a whole. Raises ConfigError."""
        return self.from_dict({**self.to_dict(), **changes})

    def summary(self) -> str:
        """A few lines for people: the run's size, then every field that is not at its default."""
        changed = [
            f"  {name} = {json.dumps(self.to_dict()[name])}"
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]
        head = f"{self.controller} on {self.task}: {self.n_episodes} episodes, {self.n_envs} hosts side by side"
        return "\n".join((head, *changed))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of a configuration file, for editors."""
        return cls.model_json_schema()


def preset(name: str) -> TrainingConfig:
    """A task's preset. Raises ConfigError naming the presets there are."""
    if name not in PRESETS:
        raise ConfigError([f"preset: {json.dumps(name)}: must be one of {', '.join(PRESETS)}"])
    return TrainingConfig.from_dict(PRESETS[name])


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises ConfigError naming the file if it cannot be read, is not JSON, is not an object, or gives a key twice.
    """
    where = f"config: {json.dumps(str(path))}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError([f"{where}: each key may be given once, not {', '.join(twice)}"])
        return dict(pairs)

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError([f"{where}: must be a file that can be read ({error.strerror})"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{where}: must be JSON ({error})"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"{where}: must hold one object {{...}}, not a {type(data).__name__}"])
    return data
