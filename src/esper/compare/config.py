"""`CompareConfig`: which arms are compared on which task, over how many seeds. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from esper.config import TrainingConfig, read_json
from esper.config_fields import AsTuple, Positive, ScheduleStep, SlotName
from esper.errors import ConfigError
from esper.tasks import get_task

DECIDED = ("controller", "schedule", "n_envs", "n_episodes")
"""Fields of a training that an arm decides."""
OBSERVATION = ("use_telemetry", "contribution_scale")
"""Those of `LEARNING` that say what a controller sees."""
LEARNING = (
    *OBSERVATION,
    "imitation_rollouts",
    "lstm_hidden_dim",
    "reward_family",
    "reward_mode",
    "reward_baseline",
    "sparse_reward_scale",
    "lr",
    "clip_ratio",
    "episode_end",
    "gamma",
    "gae_lambda",
    "ppo_updates_per_batch",
    "minibatches",
    "target_kl",
    "value_coef",
    "value_clip",
    "max_grad_norm",
    "entropy_coef",
    "entropy_coef_start",
    "entropy_coef_end",
    "entropy_coef_min",
    "entropy_anneal_episodes",
    "entropy_weights",
    "initial_patience",
    "probability_floor",
)
"""Fields in which a controller's training may differ from the shared ones: none changes what a host does."""

Point = Annotated[tuple[ScheduleStep, ...], Field(min_length=1), AsTuple]


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class _Arm(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")] | None = None
    """What the arm is called; null for its kind."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows it adds to the table."""
        return (self.name or self.kind,)  # type: ignore[attr-defined]


class Never(_Arm):
    """Hosts alone: what every other arm is compared to."""

    kind: Literal["never"]
    host_lrs: Annotated[tuple[Positive, ...], AsTuple] = ()
    """Learning rates to choose from on the tuning seeds; every arm then uses the best. Empty keeps the given one."""


class RandomLegal(_Arm):
    """Legal actions drawn uniformly."""

    kind: Literal["random"]


class Heuristic(_Arm):
    """The rules of thumb."""

    kind: Literal["heuristic"]


def _distinct(slots: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(slots)) < len(slots):
        raise ValueError("no slot may be named twice")
    return slots


Several = Annotated[tuple[SlotName, ...], Field(min_length=2), AsTuple, AfterValidator(_distinct)]


class Grid(_Strict):
    """Every blueprint in every slot from every epoch on, planted and fossilised as soon as that is possible."""

    slots: Annotated[tuple[SlotName | Several, ...], Field(min_length=1), AsTuple] | None = None
    """Slots, or lists of slots that are all planted, one an epoch in the order given. Null for each of the run's slots
    alone."""
    blueprints: Annotated[tuple[str, ...], Field(min_length=1), AsTuple] | None = None
    """Null for all of the run's blueprints."""
    epochs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AsTuple] = (0,)
    """Epochs trained before the seed is planted."""
    blends: Annotated[tuple[Literal["linear", "sigmoid", "gated"], ...], Field(min_length=1), AsTuple] = ("linear",)
    """How it is blended in."""
    mixed: bool = False
    """Where several slots are planted, every combination of blueprints, rather than the same in all of them."""


class Schedule(_Arm):
    """The best of a sweep of fixed schedules, chosen on the tuning seeds by the objective."""

    kind: Literal["schedule"]
    points: Annotated[tuple[Point, ...], AsTuple] = ()
    """Schedules to try; each step is taken in the first epoch from its own on in which it is possible and those before
    it at its slot are done."""
    grid: Grid | None = None
    """More of them, made by rule."""


class Ppo(_Arm):
    """A controller that has learned, evaluated without updates: its likeliest actions, and actions drawn."""

    kind: Literal["ppo"]
    episodes: Annotated[int, Field(ge=1, le=10**9)] = 400
    """Episodes of training."""
    hosts: Annotated[int, Field(ge=1, le=65536)] = 8
    """Hosts side by side while training."""
    learning: dict[str, Any] = {}
    """How it learns, where that differs from the shared training fields."""
    imitates: str | None = None
    """A row before it, of a schedule that acts in the first `imitation_rollouts` of its training."""
    run: Annotated[str, Field(min_length=1)] | None = None
    """Directory of a finished run whose last checkpoint is evaluated instead of training one."""

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(f"{self.name or self.kind}-{how}" for how in ("greedy", "sampled"))


class StaticFinal(_Arm):
    """The architectures an arm ended with, seed by seed, there from the first epoch."""

    kind: Literal["static-final"]
    of: str
    """The row whose seeds are taken: those that took part in the network's value at the end."""


class StaticEqual(_Arm):
    """A wider host without seeds: the narrowest with at least the mean parameters of another row."""

    kind: Literal["static-equal"]
    of: str
    """The row it has to match."""


Arm = Annotated[
    Never | RandomLegal | Heuristic | Schedule | Ppo | StaticFinal | StaticEqual, Field(discriminator="kind")
]


class CompareConfig(_Strict):
    """Everything that decides a comparison. Raises ConfigError (through `from_dict`) with every problem at once."""

    training: dict[str, Any]
    """Fields of `TrainingConfig` that all arms share; what decides who grows belongs to the arms."""
    seeds: Annotated[int, Field(ge=2, le=65536)] = 16
    """Paired hosts on which every arm is judged."""
    tuning_seeds: Annotated[int, Field(ge=2, le=65536)] = 16
    """Other hosts, on which learning rates and schedules are chosen."""
    hosts_at_once: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rates and schedules are tried side by side, as many as make this many hosts; at least one at a time."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1), AsTuple]
    """What is compared; the first is never."""

    @cached_property
    def shared(self) -> TrainingConfig:
        """The shared fields as a configuration."""
        return TrainingConfig.from_dict(self.training)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From plain JSON-like data."""
        try:
            config = cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(_line(item) for item in error.errors(include_url=False)) from None
        problems = list(_problems(config))
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def from_json_path(cls, path: str | Path) -> Self:
        """From a JSON file that holds one object."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-like data; `from_dict` gives an equal configuration back."""
        return self.model_dump(mode="json")


def grid_points(grid: Grid, training: TrainingConfig) -> tuple[Point, ...]:
    """The schedules of a grid: germinate, then fossilise as soon as the gate opens."""
    blueprints = grid.blueprints or training.blueprints or get_task(training.task).blueprints
    groups = tuple((slots,) if isinstance(slots, str) else slots for slots in grid.slots or training.slots)

    def kinds(slots: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
        return product(blueprints, repeat=len(slots)) if grid.mixed else ((b,) * len(slots) for b in blueprints)

    return tuple(
        (
            *(
                ScheduleStep(epoch=epoch, op="germinate", slot=s, blueprint=b, blend=blend)
                for s, b in zip(slots, planted, strict=True)
            ),
            *(ScheduleStep(epoch=epoch, op="fossilize", slot=s) for s in slots),
        )
        for slots in groups
        for planted in kinds(slots)
        for blend in grid.blends
        for epoch in grid.epochs
    )


def points_of(arm: Schedule, training: TrainingConfig) -> tuple[Point, ...]:
    """Every schedule an arm tries."""
    return (*arm.points, *(() if arm.grid is None else grid_points(arm.grid, training)))


def ppo_training(arm: Ppo, training: TrainingConfig, taught: Sequence[Mapping[str, Any]] = ()) -> TrainingConfig:
    """The training that gives an arm its controller; `taught` are the steps of the schedule that it imitates at first.
    Raises ConfigError for fields that do not fit."""
    return training.replace(
        controller="ppo", schedule=list(taught), n_envs=arm.hosts, n_episodes=arm.episodes, **arm.learning
    )


def _line(item: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).removeprefix(".")
    return f"{place}: {item['input']!r:.120}: {item['msg']}"


def _problems(config: CompareConfig) -> Iterator[str]:
    for name in sorted(set(DECIDED) & config.training.keys()):
        yield f"training.{name}: {config.training[name]!r}: is decided by the arms; leave it out"
    if config.arms[0].kind != "never" or sum(arm.kind == "never" for arm in config.arms) > 1:
        yield "arms: never must come first, and only there: everything is compared to it"
    try:
        training = config.shared
    except ConfigError as error:
        yield from (f"training.{problem}" for problem in error.problems)
        return
    if training.collector.backend != "local":
        yield f"training.collector.backend: {training.collector.backend!r}: comparisons run in one process; use 'local'"
    known: list[str] = []
    schedules: list[str] = []
    for i, arm in enumerate(config.arms):
        place = f"arms[{i}]"
        for row in arm.rows:
            if row in known:
                yield f"{place}.name: {row!r}: is taken by an arm before it"
        if isinstance(arm, StaticFinal | StaticEqual) and arm.of not in known:
            yield f"{place}.of: {arm.of!r}: must be a row before it: {', '.join(known) or 'there is none'}"
        if isinstance(arm, StaticEqual) and training.family is not None and training.family.width is not None:
            yield f"{place}: static-equal: there is no one host to widen where family.width draws; leave the arm out"
        if isinstance(arm, Schedule):
            yield from _schedule(arm, training, place)
            schedules += arm.rows
        if isinstance(arm, Ppo):
            yield from _ppo(arm, training, schedules, place)
        known += arm.rows


def _schedule(arm: Schedule, training: TrainingConfig, place: str) -> Iterator[str]:
    points = points_of(arm, training)
    if not points:
        yield f"{place}: points or grid is needed"
    if arm.grid is not None and arm.grid.mixed and all(isinstance(slots, str) for slots in arm.grid.slots or ()):
        yield f"{place}.grid.mixed: true: has an effect only where slots has a list of several to plant; use false"
    blueprints = training.blueprints or get_task(training.task).blueprints
    last = (training.max_epochs or get_task(training.task).max_epochs) - 1
    found = set()
    for step in (step for point in points for step in point):
        if step.slot not in training.slots:
            found.add(f"{place}: slot {step.slot!r}: must be one of {', '.join(training.slots)}")
        if step.epoch > last:
            found.add(f"{place}: epoch {step.epoch}: must be at most {last}")
        if step.op == "germinate" and step.blueprint not in blueprints:
            found.add(f"{place}: blueprint {step.blueprint!r}: must be one of {', '.join(blueprints)}")
    yield from sorted(found)


def _ppo(arm: Ppo, training: TrainingConfig, schedules: Sequence[str], place: str) -> Iterator[str]:
    given = [name for name in ("learning", "imitates") if getattr(arm, name)]
    if arm.run is not None and given:
        for name in given:
            yield f"{place}.{name}: {getattr(arm, name)!r}: means nothing for a run that has finished; leave it out"
        return
    if arm.imitates is not None and arm.imitates not in schedules:
        legal = f"must be a schedule before it: {', '.join(schedules) or 'there is none'}"
        yield f"{place}.imitates: {arm.imitates!r}: {legal}"
    imitation = arm.learning.get("imitation_rollouts", 0)
    if (arm.imitates is None) != (imitation == 0):
        legal = "must be at least 1 to imitate" if arm.imitates is not None else "needs imitates, the row to imitate"
        yield f"{place}.learning.imitation_rollouts: {imitation!r}: {legal}"
    # What is imitated is found later; here any schedule stands for it.
    taught = [{"epoch": 0, "op": "cull", "slot": training.slots[0]}] if imitation else []
    for name in sorted(set(arm.learning) - set(LEARNING)):
        yield f"{place}.learning.{name}: {arm.learning[name]!r}: must be one of {', '.join(LEARNING)}"
    known = {name: value for name, value in arm.learning.items() if name in LEARNING}
    try:
        ppo_training(arm.model_copy(update={"learning": known}), training, taught)
    except ConfigError as error:
        yield from (f"{place}.learning.{problem}" for problem in error.problems)
