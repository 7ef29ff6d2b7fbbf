"""Write a grown network as an ordinary module: `python -m esper.export RUN --out grown/`.

Exported are one host of the run's last whole episode and its fossils. A seed that is still in training, blending or on
probation is not part of what was kept, so it is left out; the accuracy written next to the network is that of host and
fossils alone. BatchNorm statistics are those with which that accuracy was measured: estimated anew on the run's
calibration batch, unless the run scored with running ones.

`esper.exported.load_exported` reads the folder without any training code; `esper.growth.grown.grown_start` makes it the
host of a new run. Seeds of blueprints registered by a user are run by their own `apply`, which has to be a function
that can be imported by name when the folder is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.build import build_spec
from esper.checkpoint.snapshot import Manifest, checkpoints, read_snapshot
from esper.checkpoint.store import FOLDER
from esper.config import TrainingConfig
from esper.data.batches import calibration_batch, evaluation_batches
from esper.data.family import class_names
from esper.data.splits import Splits
from esper.errors import CheckpointError, InputError
from esper.events import write_json
from esper.exported import ARCHITECTURE, BODIES, FORMAT, WEIGHTS, Grown, build, resolve
from esper.growth.forward import correct, forward
from esper.growth.grown import Fossil, GrownHost, parts, state_name
from esper.growth.plan import HostPlan, Mode, SlotPlan
from esper.growth.spec import GrowthSpec
from esper.growth.trees import as_tree
from esper.hosts.base import Tree
from esper.seeds import blending
from esper.seeds.blueprints import registry
from esper.seeds.blueprints.registry import Blueprint
from esper.seeds.stages import Stage
from esper.tasks import get_task

_BATCH = 512


def as_module(
    spec: GrowthSpec, growth: TensorDict, host: int, calibration: Tensor | None = None
) -> tuple[dict[str, Any], Grown]:
    """Row `host` of `growth` `[N]` with its fossils as an ordinary module, and the architecture that describes it.

    `calibration` `[B, ...]` is the batch on which BatchNorm statistics are estimated anew; None keeps the running ones.
    Raises ValueError if a fossil's blueprint is a user's whose `apply` cannot be imported by name, TypeError for a host
    of a kind that has no module.
    """
    growth = growth.select("host", "seeds", "slots")[host : host + 1].cpu()
    plan = _fossil_plan(spec, growth["slots"])
    base, older = parts(spec.host)
    newer = [
        Fossil(place.name, place.boundary, entry.blueprint, place.channels, entry.gated)
        for place, entry in zip(spec.sites, plan, strict=True)
        if entry is not None
    ]
    fossils = (*older, *newer)
    params, statistics, grafts = _weights(spec, growth, plan, calibration)
    leaves = [*_leaves(params), *_leaves(statistics), *_leaves(grafts, ("grafts",))]
    architecture: dict[str, Any] = {
        "format": FORMAT,
        "topology": base.topology,
        "host": asdict(base),
        "grafts": [asdict(f) | {"foreign": _foreign(registry.get(base.topology, f.blueprint), f)} for f in fossils],
        "dtype": str(leaves[0][1].dtype).removeprefix("torch."),
        "input": None,
        "about": {},
    }
    network = build(architecture)
    state = network.state_dict()
    network.load_state_dict({**state, **{state_name(path, state): leaf for path, leaf in leaves}})
    return architecture, network


def write(out: Path, architecture: Mapping[str, Any], network: Grown) -> None:
    """Write a module and its architecture to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: leaf.clone() for name, leaf in network.state_dict().items()}, out / WEIGHTS)
    write_json(out / ARCHITECTURE, architecture)


def _fossil_plan(spec: GrowthSpec, records: TensorDict) -> HostPlan:
    """What remains of a host when everything but its fossils is left out."""
    cells = zip(*(records[name][0].tolist() for name in ("stage", "blueprint", "blend")), strict=True)
    return tuple(
        SlotPlan(spec.blueprints[blueprint], Mode.BLEND, blend == blending.GATED) if stage == Stage.FOSSILIZED else None
        for stage, blueprint, blend in cells
    )


def _weights(
    spec: GrowthSpec, growth: TensorDict, plan: HostPlan, calibration: Tensor | None
) -> tuple[Tree, Tree, Tree]:
    """Parameters and statistics of the plain host, and the grafts by position, all without the leading row."""
    params = as_tree(growth["host", "params"][0])
    statistics: Tree = as_tree(growth["host", "statistics"][0])
    seeds = [
        None if entry is None else spec.bank.kinds[slot, entry.blueprint].open(growth["seeds", "params"][0])
        for slot, entry in zip(spec.slots, plan, strict=True)
    ]
    if calibration is not None:
        with torch.no_grad():
            alpha = torch.ones(len(plan), dtype=next(iter(_leaves(params)))[1].dtype)
            _, statistics = forward(spec, plan, params, statistics, seeds, alpha, calibration.cpu(), momentum=1.0)
    grafts: dict[str, Any] = {}
    if isinstance(spec.host, GrownHost):
        grafts, params = dict(params["grafts"]), params["base"]
    for entry, seed in zip(plan, seeds, strict=True):
        if entry is not None and seed is not None:
            grafts[str(len(grafts))] = seed if entry.gated else {"body": seed["body"]}
    return params, statistics, grafts


def _leaves(tree: Tree, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    found: list[tuple[tuple[str, ...], Tensor]] = []
    for name, value in tree.items():
        found += [((*prefix, name), value)] if isinstance(value, Tensor) else _leaves(value, (*prefix, name))
    return found


def _foreign(blueprint: Blueprint, fossil: Fossil) -> dict[str, Any] | None:
    """How a seed of a user's blueprint is run outside: its `apply` by name, and the shapes of its parameters."""
    if blueprint.apply.__module__.startswith("esper.") and blueprint.name in BODIES[blueprint.topology]:
        return None
    name = f"{blueprint.apply.__module__}:{blueprint.apply.__qualname__}"
    try:
        found = resolve(name)
    except (ImportError, AttributeError):
        found = None
    if found is not blueprint.apply:
        raise ValueError(f"blueprint {blueprint.name!r}: {name} must be a function that can be imported by this name")

    def shapes(tree: TensorDict) -> dict[str, Any]:
        return {
            key: shapes(value) if isinstance(value, TensorDict) else list(value.shape[1:])
            for key, value in tree.items()
        }

    body = blueprint.init(torch.zeros(1, dtype=torch.int64), fossil.channels, torch.float32)
    return {"apply": name, "shapes": shapes(body)}


def export_run(run: Path, out: Path, host: int | None = None) -> dict[str, Any]:
    """Export a host (default: the one of best validation accuracy) of the last whole episode in a run's checkpoints.

    Blueprints of one's own have to be registered before. Returns what is written as the architecture's `about`: task,
    seed of the run, host, parameters, and the validation accuracy of the network just written, percentage points.
    Raises InputError for a run without a whole episode, a host it lacks, or an `out` that is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError([f'out: "{out}": must be new or empty, so that nothing is written over'])
    manifest, finished = _last_whole_episode(run)
    config = TrainingConfig.from_dict(manifest.config)
    chosen = int(finished["tracker", "val_accuracy"].argmax()) if host is None else host
    if not 0 <= chosen < config.n_envs:
        raise InputError([f"host: {chosen}: must be 0 to {config.n_envs - 1}"])
    task = get_task(config.task)
    splits = task.load(k.root(config.seed), Path(config.data_dir))
    calibration = None
    if config.coalition_statistics == "recalibrated":
        calibration = calibration_batch(splits, k.root(config.seed), config.batch_size or task.batch_size)
    shards = [finished["growth", str(i)].select("host", "seeds", "slots", "key") for i in range(len(manifest.groups))]
    growth: TensorDict = torch.cat(shards)
    architecture, network = as_module(build_spec(config, task), growth, chosen, calibration)
    about = {
        "task": config.task,
        "seed": config.seed,
        "host": chosen,
        "parameters": sum(p.numel() for p in network.parameters()),
        "validation_accuracy": accuracy(network, _told(config, splits, growth["key"][chosen : chosen + 1])),
    }
    write(out, {**architecture, "input": _preparation(splits), "about": about}, network)
    return about


def _last_whole_episode(run: Path) -> tuple[Manifest, TensorDict]:
    problems: list[str] = []
    for path in reversed(checkpoints(run / FOLDER)):
        try:
            manifest, snapshot = read_snapshot(path)
        except CheckpointError as error:
            problems += error.problems
            continue
        if "finished" in snapshot.parts:
            return manifest, snapshot.parts["finished"]
    raise InputError([*problems, f'run: "{run}": must have a checkpoint from the end of an episode'])


def _told(config: TrainingConfig, splits: Splits, key: Tensor) -> Splits:
    """The splits with the validation targets of the host with `key` `[1]`."""
    names = None if config.family is None else class_names(config.family, splits.train, key)
    if names is None:
        return splits
    return replace(splits, validation=replace(splits.validation, targets=names[0][splits.validation.targets]))


def _preparation(splits: Splits) -> dict[str, Any] | None:
    if splits.mean is None or splits.std is None:
        return None
    return {"mean": splits.mean.flatten().tolist(), "std": splits.std.flatten().tolist()}


def accuracy(network: torch.nn.Module, splits: Splits) -> float:
    """Validation accuracy of a network, percentage points."""
    hits = seen = 0
    with torch.no_grad():
        for x, y in evaluation_batches(splits, splits.validation, _BATCH):
            hits += int(correct(network(x), y).sum())
            seen += y.numel()
    return 100.0 * hits / seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="esper.export", description="Write a grown network as an ordinary module.")
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, new or empty")
    parser.add_argument("--host", type=int, help="which host; default: the best by validation accuracy")
    options = parser.parse_args(arguments)
    try:
        about = export_run(options.run, options.out, options.host)
    except (InputError, ValueError, OSError, ImportError) as error:
        print(f"esper.export: {error}", file=sys.stderr)
        return 2
    print(
        f"host {about['host']} of {options.run}: {about['parameters']} parameters, "
        f"validation accuracy {about['validation_accuracy']:.2f}; written to {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
