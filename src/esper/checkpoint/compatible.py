"""Which changes of a configuration a run survives when it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from esper.config_fields import Fields

MAY_CHANGE = ("n_episodes", "telemetry_level", "checkpoint_every", "data_dir", "devices", "device", "collector")
"""Fields that do not enter the numbers, within the limits that `differences` sets."""


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], episodes_done: int) -> list[str]:
    """Every reason why a run saved with configuration `saved` cannot go on as `wanted`, by field; empty if it can.

    The number of episodes may change but not fall below those done; a device may be another of its kind. A field that
    was not there when `saved` was written has its default, with which nothing is different.
    """
    found = []
    completed = {**Fields().model_dump(mode="json"), **saved}
    for name in sorted(completed.keys() | wanted.keys()):
        before, now = completed.get(name), wanted.get(name)
        if name in ("devices", "device") and _kinds(before) == _kinds(now):
            continue
        if name in ("devices", "device") or (name not in MAY_CHANGE and before != now):
            found.append(f"{name}: {json.dumps(now)}: must be {json.dumps(before)}, as in the checkpoint")
    episodes = wanted["n_episodes"]
    if episodes < episodes_done:
        found.append(f"n_episodes: {episodes}: must be at least {episodes_done}, which are done")
    return found


def regrouped(saved: Sequence[Any], wanted: Sequence[Any]) -> list[str]:
    """The difference between two groupings of hosts, if there is one."""
    if list(saved) == list(wanted):
        return []
    return [f"devices: {_groups(wanted)}: must be {_groups(saved)}, as in the checkpoint"]


def _groups(groups: Iterable[Any]) -> str:
    return ", ".join(f"{g.size} from host {g.first} on {g.device} ({g.executor})" for g in groups)


def _kinds(devices: Any) -> list[str]:
    names = [devices] if isinstance(devices, str) else list(devices or ())
    return [str(name).split(":")[0] for name in names]
