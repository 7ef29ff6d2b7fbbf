"""Where arms are judged: shared environments, the rows found so far, and how a row comes about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tensordict import TensorDict
from torch import Tensor

from esper.build import build_env
from esper.compare.config import CompareConfig
from esper.compare.play import Outcome, Role, accuracy_on_test, play
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import Controller
from esper.environment.env import GrowthEnv
from esper.environment.rewards import objective
from esper.learn.responses import Aim, Learned, aimed
from esper.tasks import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row of the table. `validation`, `test` (percentage points), `objective`, `parameters`, `training` and
    `evaluation` (FLOPs) have one entry per seed. `chosen` is what was decided on tuning seeds; `search` are the FLOPs
    of all hosts that were trained for that or for the controller, `learning` those of the controller's own passes;
    None where they are not known. `stages` `[N, T, S]` is the stage of every slot in every epoch, `course` and `spent`
    `[N, T]` the validation accuracy after it and the FLOPs of training until then; `aimed`, of a learned controller,
    what `esper.learn.responses.aimed` found."""

    name: str
    validation: Tensor
    test: Tensor
    objective: Tensor
    parameters: Tensor
    training: Tensor
    evaluation: Tensor
    records: TensorDict
    chosen: dict[str, Any]
    search: int | None
    learning: int | None
    stages: Tensor
    course: Tensor
    spent: Tensor
    aimed: dict[str, Aim]


class Trial(NamedTuple):
    """The mean objective of each thing tried on the tuning hosts, and what all of it cost in FLOPs."""

    objectives: list[float]
    flops: int


@dataclass
class Bench:
    """Where arms are judged: the environments they share and the rows found so far. `say` is told what happens; with
    `resume` trainings that were stopped go on."""

    config: CompareConfig
    out: Path
    say: Callable[[str], None]
    resume: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    host_lr: float | None = None
    _tuner: GrowthEnv | None = None

    @cached_property
    def judge(self) -> GrowthEnv:
        """The environment of the evaluation hosts."""
        return self.env(self.config.seeds)

    def env(self, hosts: int, task: Task | None = None, **fields: Any) -> GrowthEnv:
        """An environment of so many hosts; `fields` replace shared ones, `task` the one they name. Nobody learns from
        its reward, so it has no twins."""
        return build_env(self.config.shared.replace(n_envs=hosts, reward_baseline="none", **fields), task=task)

    def objective(self, outcome: Outcome) -> Tensor:
        """The project's objective `[N]`; parameters beyond those of the same host ungrown have their price."""
        plain = self.judge.spec.parameters_of(outcome.keys)
        prices = replace(self.judge.settings.reward, host_parameters=plain)
        return objective(outcome.accuracy, outcome.parameters - plain, prices.budget, prices.param_penalty_weight)

    def tune(self, controller: Controller, tried: int, host_lr: tuple[float, ...] | None = None) -> Trial:
        """How the tuning hosts fare under each of `tried` things at once. Hosts do not depend on each other, so every
        thing meets them as if it were alone: `controller` treats equal shares of the hosts, in order, to one thing
        each; `host_lr` are rates to try instead."""
        hosts = tried * self.config.tuning_seeds
        if self._tuner is None or self._tuner.settings.n_hosts != hosts:
            self._tuner = self.env(hosts)
        rate = self.host_lr if host_lr is None else host_lr
        outcome = play(self._tuner, ScriptedPolicy(controller), Role.TUNING, host_lr=rate, copies=tried)
        return Trial(self.objective(outcome).reshape(tried, -1).mean(1).tolist(), outcome.flops)

    def portions(self, things: Sequence[T]) -> list[Sequence[T]]:
        """What is tried side by side: `things` in order, in as few portions as `hosts_at_once` allows, of sizes that
        differ by one at most."""
        most = max(1, self.config.hosts_at_once // self.config.tuning_seeds)
        count = -(-len(things) // most)
        ends = [len(things) * i // max(1, count) for i in range(count + 1)]
        return [things[a:b] for a, b in pairwise(ends)]

    def evaluate(
        self,
        name: str,
        policy: ScriptedPolicy | Learned,
        env: GrowthEnv | None = None,
        *,
        greedy: bool = False,
        grown: TensorDict | None = None,
        chosen: dict[str, Any] | None = None,
        search: int | None = 0,
        learning: int | None = 0,
    ) -> None:
        """Play the evaluation hosts once and enter the row."""
        env = env or self.judge
        scale = env.settings.observation.contribution_scale
        outcome = play(env, policy, Role.EVALUATION, host_lr=self.host_lr, greedy=greedy, grown=grown)
        row = Row(
            name=name,
            validation=outcome.accuracy,
            test=accuracy_on_test(env),
            objective=self.objective(outcome),
            parameters=outcome.parameters,
            training=outcome.training,
            evaluation=outcome.evaluation,
            records=outcome.records,
            chosen=chosen or {},
            search=search,
            learning=learning,
            stages=outcome.stages,
            course=outcome.course,
            spent=outcome.spent,
            aimed={} if isinstance(policy, ScriptedPolicy) else aimed(policy, outcome.rollout, scale),
        )
        self.rows[name] = row
        self.say(f"{name}: objective {float(row.objective.mean()):.2f}, test {float(row.test.mean()):.2f}")
