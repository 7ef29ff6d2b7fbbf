"""The names of slots and blueprints a configuration may use, known before torch is loaded.

Registering a blueprint of one's own adds its name. Tests hold these tables equal to what the modules behind them offer.
"""

from __future__ import annotations

SLOTS = ("early", "mid", "late")
"""Slots in forward order, the policy's layout."""

_BLUEPRINTS: dict[str, tuple[str, ...]] = {
    "cnn": ("norm", "attention", "depthwise", "conv_light", "conv_heavy", "conv_expand"),
    "transformer": ("norm", "lora", "attention", "mlp", "flex_attention"),
}


def blueprint_names(topology: str) -> tuple[str, ...]:
    """Blueprints that can be planted in hosts of a topology; none for a topology nobody has blueprints for."""
    return _BLUEPRINTS.get(topology, ())


def add_blueprint(topology: str, name: str) -> None:
    """Let configurations name a blueprint for hosts of a topology. `noop` plants nothing and is never offered."""
    if name != "noop":
        _BLUEPRINTS[topology] = (*(known for known in blueprint_names(topology) if known != name), name)


def remove_blueprint(topology: str, name: str) -> None:
    """Forget a blueprint's name."""
    _BLUEPRINTS[topology] = tuple(known for known in blueprint_names(topology) if known != name)
