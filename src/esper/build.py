"""From a configuration to the running parts: task, environment, policy, collector.

Every function does one step, so that a notebook can take any of them and swap the rest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from esper import keys as k
from esper.config import TrainingConfig
from esper.control.heuristic import HeuristicSettings, heuristic
from esper.control.policy import RecurrentPolicy
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import fixed_schedule, never_grow, random_legal
from esper.data.batches import calibration_batch, require_batches
from esper.data.splits import Splits
from esper.devices import check_devices, host_groups
from esper.environment.env import EnvSettings, GrowthEnv, Observer
from esper.environment.observation import ObservationSettings
from esper.environment.rewards import LossSettings, RewardSettings
from esper.environment.signals import SignalTracker
from esper.growth.backend import Backend, LocalBackend
from esper.growth.executors.base import Executor
from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.governor import GovernorSettings, history_epochs
from esper.growth.grown import grown_start
from esper.growth.ray_backend import RayBackend, check_ray
from esper.growth.spec import GrowthSpec
from esper.growth.step import EpochSettings, Shard
from esper.hosts.base import Host
from esper.hosts.cnn import CNNHost
from esper.hosts.padded import PaddedHost
from esper.seeds.actions import HEADS
from esper.seeds.lifecycle import LifecycleRules
from esper.seeds.nursery import Nursery
from esper.seeds.slots import ordered_slots
from esper.tasks import Task, get_task

_SCORED_IMAGES = 512


def build_spec(config: TrainingConfig, task: Task) -> GrowthSpec:
    """What grows, and by which rules."""
    max_epochs = config.max_epochs or task.max_epochs
    rules = LifecycleRules(
        max_epochs=max_epochs,
        blending_epochs=task.blending_epochs,
        train_to_blend_fraction=task.train_to_blend_fraction,
        strict_gates=config.gates == "strict",
        incubation=config.incubation,
        embargo_epochs=config.embargo_epochs,
        max_seeds=config.max_seeds,
    )
    return GrowthSpec(
        host=_starting_host(config, task),
        slots=ordered_slots(config.slots),
        blueprints=config.blueprints or task.blueprints,
        rules=rules,
        momentum=task.momentum,
        host_weight_decay=task.host_weight_decay,
        seed_weight_decay=task.seed_weight_decay,
        lr_schedule=config.lr_schedule,
        freeze_fossils=config.freeze_fossils,
        coalition_statistics=config.coalition_statistics,
        amp=config.amp,
        governor=GovernorSettings(
            absolute=task.governor_loss_threshold,
            random_guess_loss=task.random_guess_loss,
            min_history=history_epochs(max_epochs),
        ),
    )


_FITS = ("in_channels", "num_classes", "vocab_size", "block_size")


def _starting_host(config: TrainingConfig, task: Task) -> Host:
    """The task's own host, the widest of a family in which the others fit, or a grown one that takes and gives the
    same. Raises ValueError for one that cannot."""
    own = task.host()
    if config.family is not None and config.family.width is not None:
        if not isinstance(own, CNNHost):
            raise ValueError(f"family.width: {type(own).__name__} of task {task.name}: must be a CNNHost")
        return PaddedHost(replace(own, base_channels=max(config.family.width)), config.family.width)
    if config.start_from is None:
        return own
    grown = grown_start(config.start_from)
    wanted = {name: getattr(own, name) for name in _FITS if hasattr(own, name)}
    given = {name: getattr(grown.base, name) for name in _FITS if hasattr(grown.base, name)}
    if wanted != given:
        raise ValueError(f"start_from: {config.start_from!r} has {given}; hosts of task {task.name} need {wanted}")
    return grown


def build_executor(config: TrainingConfig, spec: GrowthSpec, device: torch.device, cores: int) -> Executor:
    """`"auto"` is the loop over `cores` CPU cores on a CPU and the captured program on a GPU."""
    kind: str = config.executor
    if kind == "auto":
        kind = "loop" if device.type == "cpu" else "captured"
    if device.type == "cuda":
        # cuDNN would round float32 convolutions to tf32, and executors are held to float32.
        torch.backends.cudnn.allow_tf32 = False
    match kind:
        case "loop":
            return LoopExecutor(spec, workers=cores)
        case "captured":
            return CapturedExecutor(spec, device)
        case _:
            return StackedExecutor(spec, device)


def host_devices(config: TrainingConfig) -> tuple[torch.device, ...]:
    """The device of each group of hosts; those of Ray workers are theirs, whichever GPU they get.

    Raises InputError naming every device this machine lacks, or the extra that Ray needs.
    """
    if config.collector.backend == "local":
        return check_devices(config.devices, config.device)[0]
    check_ray()
    check_devices((), config.device)
    return tuple(torch.device(name.partition(":")[0]) for name in config.devices)


def build_backend(config: TrainingConfig, spec: GrowthSpec, splits: Splits, settings: EpochSettings) -> Backend:
    """Hosts in contiguous groups, one per device, each with its copy of the data."""
    devices = host_devices(config)
    require_batches(splits, settings.batch_size)
    calibration = None
    if spec.coalition_statistics == "recalibrated" and spec.has_statistics:
        calibration = calibration_batch(splits, k.root(config.seed), settings.batch_size)
    groups = host_groups(config.n_envs, len(devices))
    if config.collector.backend == "ray":
        make = partial(_group, config, spec, settings)
        return RayBackend(
            groups,
            devices,
            settings,
            make,
            (splits, calibration),
            spec.kinds,
            address=config.collector.address,
            cores=config.collector.cores,
        )
    cores = max(1, len(os.sched_getaffinity(0)))
    shards = [
        _shard(config, spec, group, device, cores, splits, calibration)
        for group, device in zip(groups, devices, strict=True)
    ]
    return LocalBackend(spec, tuple(shards), settings)


def _group(
    config: TrainingConfig,
    spec: GrowthSpec,
    settings: EpochSettings,
    size: int,
    device: torch.device,
    splits: Splits,
    calibration: Tensor | None,
) -> LocalBackend:
    """One worker's hosts, in its own process."""
    shard = _shard(config, spec, range(size), device, config.collector.cores, splits, calibration)
    return LocalBackend(spec, (shard,), settings)


def _shard(
    config: TrainingConfig,
    spec: GrowthSpec,
    hosts: range,
    device: torch.device,
    cores: int,
    splits: Splits,
    calibration: Tensor | None,
) -> Shard:
    return Shard(
        device=device,
        first=hosts.start,
        size=len(hosts),
        executor=build_executor(config, spec, device, cores),
        splits=splits.to(device),
        calibration=None if calibration is None else calibration.to(device),
        # A CPU has no time left over in which to draw ahead.
        nursery=Nursery(spec.bank, device) if device.type == "cuda" else None,
    )


def build_env(config: TrainingConfig, observer: Observer | None = None, task: Task | None = None) -> GrowthEnv:
    """The environment of a run; `task` stands in for the one that the configuration names. Raises InputError or
    ValueError for devices, data or sizes that cannot work."""
    task = task or get_task(config.task)
    spec = build_spec(config, task)
    splits = task.load(k.root(config.seed), Path(config.data_dir))
    if config.train_samples is not None:
        splits = splits.limited(config.train_samples)
    batch_size = config.batch_size or task.batch_size
    # Logits over a vocabulary are too large to score more blocks at a time than are trained on.
    evaluation_batch = batch_size if task.kind == "lm" else max(batch_size, _SCORED_IMAGES)
    epochs = EpochSettings(batch_size, evaluation_batch, augment=task.augment, family=config.family)
    backend = build_backend(config, spec, splits, epochs)
    settings = EnvSettings(
        seed=config.seed,
        n_hosts=config.n_envs,
        host_lr=config.host_lr or task.host_lr,
        seed_lr=config.seed_lr or task.seed_lr,
        observation=ObservationSettings(
            slots=spec.slots,
            n_blueprints=len(spec.blueprints),
            max_epochs=spec.rules.max_epochs,
            host_parameters=spec.host_parameters,
            max_seeds=spec.rules.max_seeds,
            use_telemetry=config.use_telemetry,
            contribution_scale=config.contribution_scale,
        ),
        tracker=SignalTracker(),
        twins=config.reward_baseline == "twin",
        terminal_end=config.episode_end == "terminal",
        reward=RewardSettings(
            family=config.reward_family,
            mode=config.reward_mode,
            gamma=config.gamma,
            max_epochs=spec.rules.max_epochs,
            host_parameters=spec.host_parameters,
            param_budget=config.param_budget,
            param_penalty_weight=config.param_penalty_weight,
            sparse_reward_scale=config.sparse_reward_scale,
            loss=LossSettings(task.baseline_loss, task.target_loss, task.typical_loss_delta_std, task.loss_rent_weight),
        ),
    )
    return GrowthEnv(spec, backend, settings, device=config.device, observer=observer)


def build_controller(config: TrainingConfig, env: GrowthEnv) -> RecurrentPolicy | ScriptedPolicy:
    """Who decides: the learning policy, or a scripted controller behind the same TorchRL interface."""
    max_epochs = env.spec.rules.max_epochs
    match config.controller:
        case "ppo":
            floors = [getattr(config.probability_floor, head) for head in HEADS]
            width = env.settings.observation.width
            policy = RecurrentPolicy(
                width, config.lstm_hidden_dim, seed=config.seed, floors=floors, patience=config.initial_patience
            )
            return policy.to(config.device)
        case "heuristic":
            return ScriptedPolicy(
                heuristic(HeuristicSettings(max_epochs, contribution_scale=config.contribution_scale))
            )
        case "random":
            return ScriptedPolicy(random_legal())
        case "schedule":
            return ScriptedPolicy(fixed_schedule(config.schedule, env.spec.blueprints, max_epochs))
        case "never":
            return ScriptedPolicy(never_grow())
