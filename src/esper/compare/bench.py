"""Where arms are judged: shared environments, the rows found so far, and how a row comes about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from esper.build import build_env
from esper.compare.config import CompareConfig
from esper.compare.play import Outcome, Role, accuracy_on_test, play
from esper.control.policy import RecurrentPolicy
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import Controller
from esper.environment.env import GrowthEnv
from esper.environment.rewards import objective


@dataclass(frozen=True)
class Row:
    """One row of the table. `validation`, `test` (percentage points), `objective`, `parameters`, `training` and
    `evaluation` (FLOPs) have one entry per seed. `chosen` is what was decided on tuning seeds; `search` are the FLOPs
    of all hosts that were trained for that or for the controller, `learning` those of the controller's own passes;
    None where they are not known."""

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


@dataclass
class Bench:
    """Where arms are judged: the environments they share and the rows found so far. `say` is told what happens."""

    config: CompareConfig
    out: Path
    say: Callable[[str], None]
    rows: dict[str, Row] = field(default_factory=dict)
    host_lr: float | None = None

    @cached_property
    def judge(self) -> GrowthEnv:
        """The environment of the evaluation hosts."""
        return build_env(self.config.shared.replace(n_envs=self.config.seeds))

    @cached_property
    def tuner(self) -> GrowthEnv:
        """The environment of the tuning hosts."""
        return build_env(self.config.shared.replace(n_envs=self.config.tuning_seeds))

    def objective(self, outcome: Outcome) -> Tensor:
        """The project's objective `[N]`; parameters beyond those of the same host ungrown have their price."""
        plain = self.judge.spec.parameters_of(outcome.keys)
        prices = replace(self.judge.settings.reward, host_parameters=plain)
        return objective(outcome.accuracy, outcome.parameters - plain, prices.budget, prices.param_penalty_weight)

    def tune(self, controller: Controller, env: GrowthEnv | None = None, host_lr: float | None = None) -> Outcome:
        """How the tuning hosts fare."""
        rate = self.host_lr if host_lr is None else host_lr
        return play(env or self.tuner, ScriptedPolicy(controller), Role.TUNING, host_lr=rate)

    def evaluate(
        self,
        name: str,
        policy: ScriptedPolicy | RecurrentPolicy,
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
        )
        self.rows[name] = row
        self.say(f"{name}: objective {float(row.objective.mean()):.2f}, test {float(row.test.mean()):.2f}")
