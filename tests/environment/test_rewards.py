"""Rewards: values worked out by hand, signs, and agreement with the objective."""

import pytest
import torch
from tensordict import TensorDict

from esper.control.heuristic import HeuristicSettings, heuristic
from esper.control.simple import Controller, never_grow, patient_schedule, random_legal
from esper.environment.potentials import bounded_attribution
from esper.environment.rewards import COMPONENTS, LossSettings, RewardSettings, objective, reward
from esper.seeds.actions import Op
from esper.seeds.stages import Stage
from records import make_records, make_result, play

BASE = RewardSettings(gamma=0.995, max_epochs=25, host_parameters=10_000, param_budget=500_000)
CIFAR = LossSettings(baseline=2.3, target=0.3, typical_delta=0.05, rent_weight=0.05)
LOSS = RewardSettings(0.995, 25, 10_000, 500_000, family="loss", loss=CIFAR)


def component(name: str, result, settings=BASE, terminal=False) -> float:
    return float(reward(result, settings, terminal=terminal)[name])


@pytest.mark.parametrize(
    ("contribution", "improvement", "progress", "expected"),
    [
        pytest.param(3.0, 4.0, 5.0, 3.0, id="row 4"),
        pytest.param(12.0, 1.5, 3.0, 5.94, id="row 6"),
        pytest.param(4.0, -0.3, -1.0, 0.0, id="row 8"),
        pytest.param(3.0, 3.0, 5.0, 3.0, id="row 15"),
        pytest.param(4.0, -0.3, 9.0, 4 * 0.047426, id="row 8, the discount alone"),
        pytest.param(2.0, -80.0, 9.0, 0.0, id="a collapse does not overflow"),
        pytest.param(8.0, 0.0, 20.0, 8 - 0.24, id="out of proportion to no improvement"),
        pytest.param(-2.0, 4.0, 5.0, 0.0, id="harm earns no credit"),
        pytest.param(float("nan"), 4.0, 5.0, 0.0, id="never measured"),
    ],
)
def test_attribution(contribution, improvement, progress, expected):
    value = bounded_attribution(torch.tensor(contribution), torch.tensor(improvement), torch.tensor(progress))
    assert float(value) == pytest.approx(expected, abs=1e-5)


PROBATION = {"stage": Stage.PROBATIONARY, "alpha": 1.0, "age": 12, "epochs_in_stage": 3, "contribution": 3.0}
TRAINING = {"stage": Stage.TRAINING, "age": 3, "epochs_in_stage": 3}
FOSSIL = {**PROBATION, "stage": Stage.FOSSILIZED}


@pytest.mark.parametrize(
    ("op", "seed", "success", "expected"),
    [
        pytest.param(Op.WAIT, TRAINING, True, 0.0, id="waiting is free"),
        pytest.param(Op.GERMINATE, TRAINING, False, -0.32, id="row 2"),
        pytest.param(Op.GERMINATE, None, True, -0.02, id="row 1 without the stage potential"),
        pytest.param(Op.CULL, None, False, -0.205, id="row 13, empty"),
        pytest.param(Op.CULL, FOSSIL, False, -1.005, id="row 13, fossil"),
        pytest.param(Op.CULL, {**TRAINING, "age": 0}, False, -0.305, id="too young"),
        pytest.param(Op.CULL, TRAINING, True, -0.005, id="row 12 without a proxy"),
        pytest.param(Op.CULL, {**PROBATION, "contribution": -2.0}, True, -0.005, id="rows 10 and 14 without the bonus"),
        pytest.param(Op.CULL, {**PROBATION, "contribution": 4.0}, True, -0.505, id="row 11"),
        pytest.param(Op.FOSSILIZE, PROBATION, True, 0.79, id="row 15"),
        pytest.param(Op.FOSSILIZE, {**PROBATION, "stage": Stage.BLENDING}, False, -1.01, id="row 18"),
        pytest.param(Op.FOSSILIZE, {**PROBATION, "contribution": 0.5}, False, -0.21, id="the gate refuses"),
    ],
)
def test_action_prices(op, seed, success, expected):
    dear = RewardSettings(
        gamma=0.995,
        max_epochs=25,
        host_parameters=10_000,
        param_budget=500_000,
        cost_germinate=0.02,
        cost_cull=0.005,
        cost_fossilize=0.01,
        fossilize_base=0.5,
        fossilize_scale=0.1,
        cull_good_base=0.3,
        cull_good_scale=0.05,
    )
    result = make_result(make_records(seed), op=op, slot=0, success=success)
    assert component("action", result, dear) == pytest.approx(expected, abs=1e-6)


def test_objective_prices_growth_against_the_budget():
    assert float(objective(torch.tensor(70.0), torch.tensor(250_000), 500_000, 0.1)) == pytest.approx(65.0)


@pytest.mark.parametrize(
    ("parameters", "scale", "terminal", "expected"),
    [(0, 1.0, True, 0.7), (250_000, 1.0, True, 0.65), (0, 1.0, False, 0.0), (0, 2.5, True, 1.75)],
)
def test_sparse(parameters, scale, terminal, expected):
    settings = RewardSettings(0.995, 25, 10_000, 500_000, mode="sparse", sparse_reward_scale=scale)
    result = make_result(make_records({**FOSSIL, "parameters": parameters}), val_accuracy=70.0)
    assert component("total", result, settings, terminal) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("shaped", 0.1 * (5 - 3)), ("sparse", 0.75 - 0.68), ("minimal", 0.07)])
def test_a_twin_is_subtracted_from_the_objective(mode, expected):
    settings = RewardSettings(0.995, 25, 10_000, 500_000, mode=mode)
    result = make_result(make_records(None), val_accuracy=75.0, previous_val_accuracy=70.0)
    result["twin"] = torch.tensor([[65.0, 68.0]])
    assert component("objective", result, settings, terminal=True) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("age", "expected"), [(3, -0.1), (5, 0.0)])
def test_minimal_charges_early_culls(age, expected):
    settings = RewardSettings(0.995, 25, 10_000, 500_000, mode="minimal")
    result = make_result(make_records({**TRAINING, "age": age}), make_records(None), op=Op.CULL, slot=0)
    assert component("total", result, settings) == pytest.approx(expected)


@pytest.mark.parametrize(("improvement", "expected"), [(0.05, 5.0), (-0.05, -2.5), (1.0, 25.0), (-1.0, -12.5)])
def test_loss_family_pays_improvement(improvement, expected):
    assert component("total", make_result(make_records(None), loss_delta=improvement), LOSS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param({**FOSSIL, "parameters": 5000}, None, -0.020273 + 0.1 * (0.995 * 6 - 6), id="rent of a fossil"),
        pytest.param(
            {"stage": Stage.GERMINATED},
            {"stage": Stage.TRAINING, "age": 2, "parameters": 5000},
            0.099,
            id="into training, in grace",
        ),
        pytest.param(
            {"stage": Stage.TRAINING},
            {"stage": Stage.BLENDING, "age": 5, "parameters": 5000},
            0.127977,
            id="into blending",
        ),
    ],
)
def test_loss_family_stages_and_rent(before, after, expected):
    result = make_result(make_records(before), after and make_records(after))
    assert component("total", result, LOSS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("val_loss", "expected"), [(1.3, 0.5), (0.1, 1.0), (9.0, 0.0)])
def test_loss_family_at_the_end(val_loss, expected):
    result = make_result(make_records(None), val_loss=val_loss)
    assert component("total", result, LOSS, terminal=True) == pytest.approx(expected)


def test_indecision_is_linear_and_capped():
    charges = []
    for epochs in range(6):
        result = make_result(make_records({**PROBATION, "epochs_in_stage": epochs}))
        charges.append(component("indecision", result))
    assert charges == pytest.approx([0.0, 0.0, -0.1, -0.1, -0.1, 0.0])
    elsewhere = make_result(make_records({**PROBATION, "epochs_in_stage": 3}, {}), op=Op.GERMINATE, slot=1)
    assert component("indecision", elsewhere) == pytest.approx(-0.1), "doing something else is no decision"
    undecided = make_records({**PROBATION, "contribution": 0.5})
    assert component("indecision", make_result(undecided)) == 0.0
    assert component("indecision", make_result(make_records(PROBATION), op=Op.FOSSILIZE, slot=0)) == 0.0


def test_only_measured_contributions_count():
    gaining = {**TRAINING, "accuracy_initial": 20.0, "accuracy_current": 60.0, "accuracy_at_germination": 20.0}
    parts = reward(make_result(make_records(gaining), accuracy_delta=5.0), BASE, terminal=False)
    assert float(parts["attribution"]) == 0.0
    old = make_records({**PROBATION, "contribution": -4.0, "contribution_age": 2})
    new = make_records({**PROBATION, "contribution": -4.0, "contribution_age": 0})
    assert component("harm", make_result(old)) == 0.0
    assert component("harm", make_result(new)) == pytest.approx(-0.01 * 4 / 25)


def test_fossils_are_paid_by_contribution_at_the_end():
    result = make_result(make_records(FOSSIL, {**FOSSIL, "contribution": 0.5}, {**FOSSIL, "contribution": 30.0}))
    assert component("fossils", result, terminal=True) == pytest.approx(0.01 * 1.3)
    assert component("fossils", result) == 0.0


@pytest.mark.parametrize(
    ("name", "seed", "expected"),
    [
        pytest.param("rent", {**TRAINING, "parameters": 2000}, -0.091161, id="row 2"),
        pytest.param("rent", {**FOSSIL, "parameters": 5000}, -0.123533 - 0.0792, id="row 22"),
        pytest.param(
            "blending_warning",
            {"stage": Stage.BLENDING, "epochs_in_stage": 3, "accuracy_initial": 60.3, "accuracy_current": 60.0},
            -0.25,
            id="rows 8 and 10",
        ),
    ],
)
def test_rent_and_warning_with_the_weights_of_the_rows(name, seed, expected):
    """The rows pay every epoch what is a price per episode here."""
    settings = RewardSettings(0.995, 25, 10_000, 500_000, rent_weight=25 * 0.5, max_rent=25 * 8.0, warning=25 * 0.1)
    assert component(name, make_result(make_records(seed)), settings) == pytest.approx(expected, abs=1e-5)


def test_rent_and_warning_are_per_episode():
    falling = {"stage": Stage.BLENDING, "epochs_in_stage": 3, "accuracy_initial": 50.0, "accuracy_current": 49.0}
    result = make_result(make_records({**falling, "parameters": 10_000}))
    for epochs in (25, 50):
        settings = RewardSettings(0.995, epochs, 10_000, 500_000)
        assert component("rent", result, settings) == pytest.approx(-0.05 * 0.693147 / epochs, rel=1e-5)
        assert component("blending_warning", result, settings) == pytest.approx(-0.01 * 2.5 / epochs, rel=1e-5)


def test_panic_costs_ten_and_ends_the_potentials():
    result = make_result(make_records(PROBATION))
    result["panic"] = torch.tensor([True])
    parts = reward(result, BASE, terminal=False)
    assert float(parts["panic"]) == -10.0
    assert float(parts["shaping"]) < -0.05


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"family": "profit"}, "family: 'profit'"),
        ({"mode": "dense"}, "mode: 'dense'"),
        ({"family": "loss", "mode": "sparse", "loss": CIFAR}, "mode: 'sparse'"),
        ({"family": "loss"}, "loss: None"),
    ],
)
def test_settings_that_do_not_exist(fields, named):
    with pytest.raises(ValueError, match=named):
        RewardSettings(0.995, 25, 10_000, 500_000, **fields)


TOY = RewardSettings(gamma=0.995, max_epochs=25, host_parameters=400, param_budget=1600)


class Entry:
    """A step of a schedule."""

    def __init__(self, epoch: int, op: str, slot: str, blueprint: str | None = None) -> None:
        self.epoch, self.op, self.slot, self.blueprint, self.blend = epoch, op, slot, blueprint, None


def script(*steps: tuple) -> Controller:
    return patient_schedule([Entry(*step) for step in steps], tuple("abcde"), 25)


def controllers() -> dict[str, Controller]:
    keep = {f"keep {kind}": script((2, "germinate", "mid", kind), (3, "fossilize", "mid")) for kind in "abcde"}
    return {
        "never": never_grow(),
        **keep,
        "grow and cull": script((2, "germinate", "mid", "b"), (12, "cull", "mid")),
        "loop": script(
            *[(e + o, op, "mid", "e") for e in range(0, 24, 2) for o, op in enumerate(("germinate", "cull"))]
        ),
        "everything": script(
            *[(2, "germinate", slot, "b") for slot in ("early", "mid", "late")],
            *[(3, "fossilize", slot) for slot in ("early", "mid", "late")],
        ),
        "random": random_legal(),
        "heuristic": heuristic(HeuristicSettings(max_epochs=25)),
    }


def side_by_side(group: list[Controller], each: int) -> Controller:
    """The first `each` hosts follow the first controller, and so on."""

    def init(n_hosts: int) -> TensorDict:
        return TensorDict({str(i): c.init(each) for i, c in enumerate(group)}, batch_size=[])

    def act(td: TensorDict, carry: TensorDict) -> tuple[torch.Tensor, TensorDict]:
        done = [c.act(part, carry[str(i)]) for i, (c, part) in enumerate(zip(group, td.split(each), strict=True))]
        return torch.cat([a for a, _ in done]), TensorDict(
            {str(i): new for i, (_, new) in enumerate(done)}, batch_size=[]
        )

    return Controller(init, act)


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, with the mean rank for ties."""

    def ranks(v: torch.Tensor) -> torch.Tensor:
        below, same = v[None] < v[:, None] - 1e-4, (v[None] - v[:, None]).abs() <= 1e-4
        return below.sum(1).double() + 0.5 * same.sum(1)

    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


@pytest.mark.parametrize(
    ("value", "removal"),
    [
        pytest.param([0.5, 4.0, -1.0, 1.5, 6.0], [1.0, 5.0, 2.0, 2.0, 7.0], id="growing pays"),
        pytest.param([-3.0, -6.0, -4.0, -9.0, -5.0], [10.0, 20.0, 15.0, 30.0, 18.0], id="leaned on but harmful"),
        pytest.param([0.2, 0.1, 0.3, 0.0, 0.4], [3.0, 9.0, 1.0, 12.0, 25.0], id="hardly worth anything"),
    ],
)
def test_mean_return_ranks_controllers_as_the_objective_does(value, removal):
    group, each = list(controllers().values()), 16
    world = {"value": torch.tensor(value), "removal": torch.tensor(removal), "n_hosts": each * len(group)}
    _, returns, reached = play(side_by_side(group, each), TOY, **world)
    assert rank_correlation(returns.view(-1, each).mean(1), reached.view(-1, each).mean(1)) >= 0.9


def test_components_are_complete_for_every_family():
    for settings in (BASE, LOSS, RewardSettings(0.995, 25, 10_000, 500_000, mode="minimal")):
        parts = reward(make_result(make_records(PROBATION), val_loss=1.0), settings, terminal=True)
        assert set(parts.keys()) == {*COMPONENTS, "total"}
