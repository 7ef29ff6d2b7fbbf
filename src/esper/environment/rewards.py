"""What a step was worth, computed from what happened in it (plan step 13).

One tenth of a unit of reward is one percentage point of the objective. Every function takes the `result` of a step, a
TensorDict `[N]` with the slot records `before` (what the controller saw), `lived` (after training and validation) and
`after` (after the mechanical tick), the action's `outcome`, the `tracker` after the epoch, `panic` and `restarted`
(bool, this step or the one before was a panic), and returns the components `[N]` plus their sum `total`. Sums over
slots make equal seeds earn equally wherever they grow. A result may have a `twin` `[N, 2]`, the accuracy before and
after the epoch of the same host without seeds; `objective` then pays what goes beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.environment.potentials import POTENTIAL_FIELDS, credited, stage_potential
from esper.seeds import gates
from esper.seeds.actions import Op
from esper.seeds.stages import CULLABLE, MIN_FOSSILIZE_CONTRIBUTION, Stage, probation_epochs

COMPONENTS = (
    "objective",
    "shaping",
    "attribution",
    "harm",
    "blending_warning",
    "indecision",
    "rent",
    "action",
    "fossils",
    "loss",
    "panic",
)
"""Everything a reward is made of; a family leaves the parts it does not have at zero."""

PER_POINT = 0.1
_MAX_POINTS = 10.0  # contributions count up to here
_LOSS_WEIGHT, _MAX_TYPICAL, _REGRESSION, _LOSS_SHAPING, _MAX_LOSS_RENT = 5.0, 5.0, 0.5, 0.1, 5.0
_GRACE_EPOCHS = 3
_BUDGET = 4


@dataclass(frozen=True)
class LossSettings:
    """The task's constants of the loss family: losses in nats, `typical_delta` the usual change of an epoch."""

    baseline: float
    target: float
    typical_delta: float
    rent_weight: float


@dataclass(frozen=True)
class RewardSettings:
    """Which reward, and its prices in units of reward. `gamma` is the discount that PPO uses.

    The defaults keep everything but the objective small against it: over an episode, the rent, the warnings and the
    bonuses of a seed come to some tenths of a percentage point each, and leaving it undecided costs at most three
    points in all. Amounts that recur every epoch are per episode, so they do not depend on its length.
    `host_parameters` are those of every host, or int64 `[N]`; without a `param_budget` it is four times that. Raises
    ValueError for a family or mode that does not exist, for a mode the loss family does not have, and for a loss
    family without its constants.
    """

    gamma: float
    max_epochs: int
    host_parameters: int | Tensor
    param_budget: int | None
    param_penalty_weight: float = 0.1
    family: str = "contribution"
    mode: str = "shaped"
    loss: LossSettings | None = None
    sparse_reward_scale: float = 1.0
    shaping_weight: float = 0.01
    contribution_weight: float = 0.01
    rent_weight: float = 0.05
    max_rent: float = 0.8
    warning: float = 0.01
    indecision: float = 0.1
    max_indecision: float = 0.3
    rejected_germinate: float = 0.3
    rejected_fossilize: float = 1.0
    failed_gate: float = 0.2
    rejected_cull: float = 0.2
    rejected_young_cull: float = 0.3
    rejected_fossil_cull: float = 1.0
    cost_germinate: float = 0.002
    cost_cull: float = 0.0005
    cost_fossilize: float = 0.001
    fossilize_base: float = 0.005
    fossilize_scale: float = 0.001
    cull_good_base: float = 0.01
    cull_good_scale: float = 0.001
    fossil_bonus: float = 0.01
    early_cull: float = 0.1
    panic: float = 10.0

    def __post_init__(self) -> None:
        if self.family not in ("contribution", "loss"):
            raise ValueError(f"family: {self.family!r}; legal are contribution and loss")
        if self.mode not in ("shaped", "sparse", "minimal"):
            raise ValueError(f"mode: {self.mode!r}; legal are shaped, sparse and minimal")
        if self.family == "loss" and self.mode != "shaped":
            raise ValueError(f"mode: {self.mode!r}; the loss family is only shaped")
        if self.family == "loss" and self.loss is None:
            raise ValueError("loss: None; the loss family needs the task's LossSettings")

    @property
    def budget(self) -> int | Tensor:
        """Parameters of seeds that cost one `param_penalty_weight`, of every host or int64 `[N]`."""
        return _BUDGET * self.host_parameters if self.param_budget is None else self.param_budget


def reward(result: TensorDict, settings: RewardSettings, *, terminal: bool) -> TensorDict:
    """The components and `total` of the run's reward; `terminal` says that the episode ends with this step."""
    if settings.family == "loss":
        return compute_loss_reward(result, settings, terminal=terminal)
    if settings.mode == "sparse":
        return sparse_reward(result, settings, terminal=terminal)
    if settings.mode == "minimal":
        return minimal_reward(result, settings, terminal=terminal)
    return contribution_reward(result, settings, terminal=terminal)


def objective(
    accuracy: Tensor, extra_parameters: Tensor, param_budget: int | Tensor, param_penalty_weight: float
) -> Tensor:
    """What a run is judged by, percentage points: validation accuracy minus the price of growth,
    `param_penalty_weight` x 100 for `param_budget` parameters of seeds. Shapes broadcast."""
    return accuracy - param_penalty_weight * 100.0 * extra_parameters / param_budget


def contribution_reward(result: TensorDict, settings: RewardSettings, *, terminal: bool) -> TensorDict:
    """The shaped reward of the contribution family.

    - `objective`: the change of the objective. It sums to the objective reached minus that of the untrained host (with
      a twin: minus the twin's), so it is what ranks controllers. It is paid as it changes because where the end of
      an episode is a truncation, a value that looks past it would count a lump paid there again.
    - `shaping`: gamma Phi(s') - Phi(s) of the seeds' stages, to point the way (Ng, Harada & Russell 1999).
    - `attribution`: the same with what each seed is credited for as Phi, so that credit shows in the epoch in which
      it is measured and holding a seed for long earns nothing extra. Both potentials are 0 for an empty slot and
      after the last step: discounted, they sum to exactly zero and cannot change which controller is best.
    - `harm`: a negative contribution, every epoch it is measured. Removing the seed ends the charge and returns
      nothing.
    - `blending_warning`: accuracy has fallen since the seed came and it is being blended in.
    - `indecision`: leaving a seed that could have been fossilised, linear and capped for each seed.
    - `rent`: every epoch of every seed's parameters, so of two ways to the same network the later, cheaper one is
      better.
    - `action`: the price of acting, of asking for the impossible and of culling a good seed, a bonus for fossilising
      one.
    - `fossils`: at the end, for fossils that still contribute.
    - `panic`: a host that broke down.
    """
    before, lived = result["before"], result["lived"]
    share = 1.0 / settings.max_epochs
    steps = _before_and_after(result)
    parts = {
        "objective": PER_POINT * _objective_change(result, settings),
        "shaping": settings.shaping_weight
        * _difference(stage_potential(steps, settings.max_epochs), result, settings, terminal),
        "attribution": settings.contribution_weight * _difference(credited(steps), result, settings, terminal),
        "harm": settings.contribution_weight * share * _measured(lived).clamp(-_MAX_POINTS, 0.0).sum(dim=1),
        "blending_warning": -settings.warning * share * _warning(lived),
        "indecision": -_indecision(before, result["outcome"], settings),
        "rent": -share * _rent(lived["parameters"], settings.rent_weight, settings.max_rent, settings.host_parameters),
        "action": _action(before, result["outcome"], settings),
        "panic": -settings.panic * result["panic"].float(),
    }
    if terminal:
        after = result["after"]
        worth = torch.where(after["stage"] == Stage.FOSSILIZED, _points(after), 0.0)
        worth = torch.where(worth >= MIN_FOSSILIZE_CONTRIBUTION, worth / _MAX_POINTS, 0.0)
        parts["fossils"] = settings.fossil_bonus * worth.sum(dim=1)
    return _sum_up(parts, result)


def sparse_reward(result: TensorDict, settings: RewardSettings, *, terminal: bool) -> TensorDict:
    """The objective as a share of 100 points, clamped to -1..1 and then scaled, at the end and nothing before."""
    parts = {"panic": -settings.panic * result["panic"].float()}
    if terminal:
        extra = result["after"]["parameters"].sum(dim=1)
        reached = result["tracker", "val_accuracy"]
        if "twin" in result.keys():  # noqa: SIM118
            reached = reached - result["twin"][:, 1]
        points = objective(reached, extra, settings.budget, settings.param_penalty_weight)
        parts["objective"] = settings.sparse_reward_scale * (points / 100.0).clamp(-1.0, 1.0)
    return _sum_up(parts, result)


def minimal_reward(result: TensorDict, settings: RewardSettings, *, terminal: bool) -> TensorDict:
    """The sparse reward, and a price for culling a seed before it has lived as long as a probation lasts."""
    parts = sparse_reward(result, settings, terminal=terminal).to_dict()
    culled, age = result["outcome", "culled"], result["before", "age"]
    early = (culled & (age < probation_epochs(settings.max_epochs))).any(dim=1)
    return _sum_up({**parts, "action": -settings.early_cull * early.float()}, result)


def compute_loss_reward(result: TensorDict, settings: RewardSettings, *, terminal: bool) -> TensorDict:
    """The loss family: pays a falling validation loss in units of the task's usual change, half as much for a rise.

    `loss` is 5 x, x the change (positive for improvement, 0 in the first epoch) in typical changes within -5..5, and
    at the end up to 1 for the part of the way from baseline to target. `shaping` is that of the stages, `rent` the
    task's, waived while a seed is young, `action` and `panic` as in the contribution family.
    """
    loss = settings.loss
    if loss is None:
        raise ValueError("loss: None; the loss family needs the task's LossSettings")
    lived, tracker = result["lived"], result["tracker"]
    x = (tracker["loss_delta"] / loss.typical_delta).clamp(-_MAX_TYPICAL, _MAX_TYPICAL)
    paid = _LOSS_WEIGHT * torch.where(x < 0, _REGRESSION * x, x)
    if terminal:
        way = (loss.baseline - tracker["val_loss"]) / (loss.baseline - loss.target)
        paid = paid + way.nan_to_num(nan=0.0).clamp(0.0, 1.0)
    # The loss on record after a rollback is that of a network the host no longer is.
    paid = torch.where(result["panic"], 0.0, paid)
    grace = max(_GRACE_EPOCHS, settings.max_epochs // 10)
    grown = (lived["age"] >= grace) | (lived["stage"] == Stage.FOSSILIZED)
    settled = torch.where(grown, lived["parameters"], 0)
    parts = {
        "loss": paid,
        "shaping": _LOSS_SHAPING
        * _difference(stage_potential(_before_and_after(result), settings.max_epochs), result, settings, terminal),
        "rent": -_rent(settled, loss.rent_weight, _MAX_LOSS_RENT, settings.host_parameters),
        "action": _action(result["before"], result["outcome"], settings),
        "panic": -settings.panic * result["panic"].float(),
    }
    return _sum_up(parts, result)


def _sum_up(parts: Mapping[str, Tensor], result: TensorDict) -> TensorDict:
    nothing = torch.zeros(result.batch_size[0])
    row = {name: parts.get(name, nothing) for name in COMPONENTS}
    # Summed in double precision, so that the rounded total is within half a float32 step of the exact sum.
    total = torch.stack(list(row.values())).double().sum(dim=0).float()
    return TensorDict({**row, "total": total}, batch_size=result.batch_size[:1])


def _objective_change(result: TensorDict, settings: RewardSettings) -> Tensor:
    tracker = result["tracker"]
    gain = tracker["val_accuracy"].double() - tracker["previous_val_accuracy"].double()
    if "twin" in result.keys():  # noqa: SIM118
        twin = result["twin"].double()
        gain = gain - (twin[:, 1] - twin[:, 0])
    grown = result["after", "parameters"].sum(dim=1) - result["before", "parameters"].sum(dim=1)
    return objective(gain, grown, settings.budget, settings.param_penalty_weight).float()


def _before_and_after(result: TensorDict) -> TensorDict:
    """The records before and after the step, as far as potentials read them, `[2, N, S]`: seen together they take half
    the operations."""
    before, after = result["before"], result["after"]
    both = {name: torch.stack([before[name], after[name]]) for name in POTENTIAL_FIELDS}
    return TensorDict(both, batch_size=[2, *before.batch_size])


def _difference(potential: Tensor, result: TensorDict, settings: RewardSettings, terminal: bool) -> Tensor:
    """gamma Phi(s') - Phi(s) summed over slots, of Phi `[2, N, S]` before and after, with Phi(s') = 0 where an episode
    or a segment ends, and Phi(s) = 0 where a segment begins: the fossils of a host that was taken back were paid for
    in an earlier one."""
    old, new = potential
    ended, begun = result["panic"][:, None] | terminal, result["restarted"][:, None]
    change: Tensor = (settings.gamma * torch.where(ended, 0.0, new) - torch.where(begun, 0.0, old)).sum(dim=1)
    return change


def _points(records: TensorDict) -> Tensor:
    """Contributions within -10..10; 0 where none was ever measured."""
    points: Tensor = records["contribution"].clamp(-_MAX_POINTS, _MAX_POINTS).nan_to_num(nan=0.0)
    return points


def _measured(records: TensorDict) -> Tensor:
    """Contributions measured in this epoch; 0 elsewhere."""
    return torch.where(records["contribution_age"] == 0, _points(records), 0.0)


def _warning(lived: TensorDict) -> Tensor:
    falling = (lived["stage"] == Stage.BLENDING) & (lived["accuracy_current"] < lived["accuracy_initial"])
    size = 1.0 + (0.5 * lived["epochs_in_stage"]).clamp(max=3.0)
    return torch.where(falling, size, 0.0).sum(dim=1)


def _indecision(before: TensorDict, outcome: TensorDict, settings: RewardSettings) -> Tensor:
    """Rises by `indecision` with every epoch after the first that a seed is left undecided, up to `max_indecision` in
    all, whatever else is done instead."""
    left = gates.may_fossilize(before) & ~outcome["fossilized"]
    waited = (before["epochs_in_stage"] - 1).clamp(min=0)
    so_far, before_that = ((settings.indecision * n).clamp(max=settings.max_indecision) for n in (waited, waited - 1))
    return torch.where(left & (waited > 0), so_far - before_that, 0.0).sum(dim=1)


def _rent(parameters: Tensor, weight: float, most: float, host_parameters: int | Tensor) -> Tensor:
    return (weight * torch.log1p(parameters.sum(dim=1) / host_parameters)).clamp(max=most)


def _action(before: TensorDict, outcome: TensorDict, settings: RewardSettings) -> Tensor:
    """The price of what was asked for and done; a rejected action pays one penalty, once."""
    op, slot, n_slots = outcome["op"], outcome["slot"], before.batch_size[1]
    column = slot.clamp(0, n_slots - 1)[:, None]
    stage, contribution, points = (
        value.gather(1, column).squeeze(1) for value in (before["stage"], before["contribution"], _points(before))
    )
    stage = torch.where((slot >= 0) & (slot < n_slots), stage, Stage.UNKNOWN)
    kept = settings.fossilize_base + settings.fossilize_scale * points
    lost = -(settings.cull_good_base + settings.cull_good_scale * points)
    done = torch.where(op == Op.FOSSILIZE, kept, torch.where((op == Op.CULL) & (contribution >= 0), lost, 0.0))
    asked, refused = (torch.tensor(prices, device=op.device) for prices in _prices(settings))
    return torch.where(outcome["success"], done, -refused[op, stage]) - asked[op]


def _prices(settings: RewardSettings) -> tuple[list[float], list[list[float]]]:
    """What asking for each op costs, and what it costs to be refused it, by the stage of the slot asked for."""
    stages = range(max(Stage) + 1)
    cull = [settings.rejected_young_cull if stage in CULLABLE else settings.rejected_cull for stage in stages]
    cull[Stage.FOSSILIZED] = settings.rejected_fossil_cull
    fossilize = [settings.rejected_fossilize for _ in stages]
    fossilize[Stage.PROBATIONARY] = settings.failed_gate
    refused = {
        Op.WAIT: [0.0 for _ in stages],
        Op.GERMINATE: [settings.rejected_germinate for _ in stages],
        Op.CULL: cull,
        Op.FOSSILIZE: fossilize,
    }
    asked = {
        Op.WAIT: 0.0,
        Op.GERMINATE: settings.cost_germinate,
        Op.CULL: settings.cost_cull,
        Op.FOSSILIZE: settings.cost_fossilize,
    }
    return [asked[op] for op in Op], [refused[op] for op in Op]
