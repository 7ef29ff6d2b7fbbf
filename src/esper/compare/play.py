"""One episode of paired hosts under one controller, and what came of it.

Hosts are drawn from the run's seed and the number of their episode. Training, tuning and evaluation count their
episodes from far apart, so their hosts never meet; the data and its splits are the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper.environment.env import GrowthEnv
from esper.growth.backend import LocalBackend
from esper.growth.flops import Costs, Ledger
from esper.growth.step import begin
from esper.seeds import bank
from esper.seeds.gates import in_stage
from esper.seeds.lifecycle import put
from esper.seeds.slots import empty_records
from esper.seeds.stages import BLENDED, Stage
from esper.values import changed, joined


class Role(IntEnum):
    """What hosts are for: the number of their first episode. A training has at most 10^9 episodes."""

    TRAINING = 0
    TUNING = 2_000_000_000
    EVALUATION = 3_000_000_000


@dataclass(frozen=True)
class Outcome:
    """How `N` hosts fared: their `keys`, `parameters` at the end (int64, seeds included) and FLOPs of `evaluation`
    (int64), all `[N]`, their slot records `[N, S]`, the stage of every slot in every epoch `stages` `[N, T, S]`, the
    validation accuracy after every epoch `course` `[N, T]` (percentage points), the FLOPs of training until then
    `spent` `[N, T]` (int64), and the `rollout` `[N, T]`."""

    keys: Tensor
    parameters: Tensor
    evaluation: Tensor
    records: TensorDict
    stages: Tensor
    course: Tensor
    spent: Tensor
    rollout: TensorDictBase

    @property
    def accuracy(self) -> Tensor:
        """Validation accuracy at the end, float64 `[N]`, percentage points."""
        return self.course[:, -1]

    @property
    def training(self) -> Tensor:
        """FLOPs of training, int64 `[N]`."""
        return self.spent[:, -1]

    @property
    def flops(self) -> int:
        """What all hosts cost together."""
        return int((self.training + self.evaluation).sum())


def costs_of(env: GrowthEnv) -> Costs:
    """What an environment's hosts cost."""
    backend = _local(env)
    shard, batch = backend.shards[0], backend.settings.batch_size
    return Costs(
        spec=env.spec,
        inputs=tuple(shard.splits.train.inputs.shape[1:]),
        trained=len(shard.splits.train) // batch * batch,
        scored=len(shard.splits.validation),
        calibrating=0 if shard.calibration is None else int(shard.calibration.shape[0]),
    )


@torch.no_grad()
def play(
    env: GrowthEnv,
    policy: TensorDictModuleBase,
    role: Role,
    *,
    host_lr: float | tuple[float, ...] | None = None,
    copies: int = 1,
    greedy: bool = False,
    grown: TensorDict | None = None,
) -> Outcome:
    """Play the first episode of `role`: fresh hosts, `policy` decides, nothing is learned.

    `host_lr` replaces the environment's; with `copies` the hosts are that many times the same, and each copy may have
    its own rate. `greedy` takes the likeliest actions. With `grown`, the records `[N, S]` of hosts at their end, every
    host starts with the seeds that took part in their value, as fossils, untrained.
    """
    settings = replace(env.settings, first_episode=int(role), copies=copies)
    env.settings = settings if host_lr is None else replace(settings, host_lr=host_lr)
    env.state, env.finished = None, None
    ledger = Ledger(costs_of(env), env.settings.n_hosts)
    stages, course, spent = list[Tensor](), list[Tensor](), list[Tensor]()

    def observe(result: TensorDict) -> None:
        ledger.add(result)
        course.append(result["metrics", "val_accuracy"].double())
        spent.append(ledger.training.clone())
        stages.append(result["lived", "stage"])

    env.observer = observe
    primer = getattr(policy, "make_tensordict_primer", lambda: None)()
    whole: EnvBase = env if primer is None else TransformedEnv(env, primer)
    first = whole.reset()
    if grown is not None:
        _fossilize(env, grown)
    keys = torch.cat([g["key"] for g in env.growth()])
    ledger.reset(env.records(), keys)
    exploration = ExplorationType.MODE if greedy else ExplorationType.RANDOM
    with set_exploration_type(exploration):
        rollout = whole.rollout(
            env.spec.rules.max_epochs, policy, auto_reset=False, break_when_any_done=False, tensordict=first
        )
    records = joined([g["slots"] for g in env.finished_growth()])
    return Outcome(
        keys=keys,
        parameters=records["parameters"].sum(1) + env.spec.parameters_of(keys),
        evaluation=ledger.evaluation,
        records=records,
        stages=torch.stack(stages, dim=1),
        course=torch.stack(course, dim=1),
        spent=torch.stack(spent, dim=1),
        rollout=rollout,
    )


def accuracy_on_test(env: GrowthEnv) -> Tensor:
    """Accuracy `[N]` of the hosts of the episode that has just finished on the test split, percentage points."""
    growth = env.finished_growth()
    scores = env.backend.evaluate(growth, "test")
    return 100.0 * scores["correct"][:, -1].double() / scores["seen"]


def _fossilize(env: GrowthEnv, grown: TensorDict) -> None:
    """Give fresh hosts the seeds of `grown` as fossils, with the weights of the first seed planted in each slot."""
    spec, backend, growth = env.spec, _local(env), []
    for shard, g in zip(backend.shards, env.growth(), strict=True):
        rows = grown[shard.hosts]
        kept = in_stage(rows, BLENDED)
        records = put(
            empty_records(shard.size, len(spec.slots)),
            kept,
            **{name: rows[name] for name in ("blueprint", "blend", "parameters")},
            stage=Stage.FOSSILIZED,
            alpha=1.0,
            planted=1,
            healthy=True,
            gradient_health=1.0,
        )
        seeds = bank.plant(g["seeds"], spec.bank, kept, records, g["key"])
        growth.append(changed(g, slots=records, seeds=seeds))
    started, metrics = begin(spec, backend.shards, backend.settings, growth)
    state = env.state
    assert state is not None, "the environment was reset"
    groups = TensorDict({str(i): g for i, g in enumerate(started)})
    env.state = changed(state, growth=groups, tracker=env.settings.tracker.start(metrics))


def _local(env: GrowthEnv) -> LocalBackend:
    """The backend of an environment that compares; `CompareConfig` refuses any other."""
    assert isinstance(env.backend, LocalBackend), "comparisons run in this process"
    return env.backend
