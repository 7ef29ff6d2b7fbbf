"""Grown hosts for the benches, and the data they train on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from tensordict import TensorDict

from esper import keys as k
from esper.data.splits import Splits
from esper.data.synthetic import load_synthetic
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds import bank, blueprints  # noqa: F401  (registers them)
from esper.seeds.lifecycle import LifecycleRules
from esper.seeds.stages import BLENDING_EPOCHS, Stage
from esper.tasks import CNN_BLUEPRINTS, TRANSFORMER_BLUEPRINTS, get_task, register_task

SLOTS = ("early", "mid", "late")


@cache
def register(name: str, train: int, validation: int, batch: int) -> Splits:
    """The synthetic task (base-8 host) under a name of its own, with that many images; returns them."""
    splits = load_synthetic(k.root(0), train, validation, 64)
    register_task(replace(get_task("synthetic"), name=name, load=lambda key, folder: splits, batch_size=batch))
    return splits


def make_spec(host: CNNHost | TransformerHost, amp: str = "off") -> GrowthSpec:
    """Three slots and all usual blueprints."""
    kinds = CNN_BLUEPRINTS if isinstance(host, CNNHost) else TRANSFORMER_BLUEPRINTS
    return GrowthSpec(host, SLOTS, kinds, LifecycleRules(25), amp=amp)


def make_growth(
    spec: GrowthSpec, n: int, cells: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TensorDict:
    """Fresh hosts, filled."""
    lr = torch.full((n,), 0.05, dtype=torch.float64)
    return filled(spec, fresh_growth(spec, k.host_keys(k.root(1), n), lr, lr, dtype, device), cells)


def filled(spec: GrowthSpec, growth: TensorDict, cells: str) -> TensorDict:
    """Hosts with blended seeds in no slot (`"none"`), in every other one (`"half"`: two seeds and one seed in turn) or
    in `"all"`, the kinds in turn."""
    n = growth.batch_size[0]
    records = growth["slots"].clone()
    host, slot = torch.meshgrid(torch.arange(n), torch.arange(len(SLOTS)), indexing="ij")
    number = host * len(SLOTS) + slot
    here = {"none": number < 0, "half": number % 2 == 0, "all": number >= 0}[cells]
    kinds = (number // 2 + host // 7) % len(spec.blueprints)
    # Some are further along than others, so that not all are judged at once.
    ramp = number % BLENDING_EPOCHS
    values = {"stage": int(Stage.BLENDING), "blueprint": kinds, "blend": 0, "alpha": 0.4, "ramp_step": ramp}
    for name, value in (values | {"planted": 1}).items():
        records[name] = torch.where(here, value, records[name])
    growth["slots"] = records
    growth["seeds"] = bank.plant(growth["seeds"], spec.bank, here, records, growth["key"])
    return growth
