"""Slot reports: only what exists, under any names, as copies; and who deserves what."""

import pytest
import torch

from esper.seeds.attribution import interactions, shapley
from esper.seeds.reports import get_slot_reports
from esper.seeds.stages import Stage
from records import make_records

SEED = {
    "stage": Stage.BLENDING,
    "age": 6,
    "epochs_in_stage": 2,
    "contribution": 2.0,
    "contribution_se": 0.5,
    "contribution_age": 0,
    "gradient_ratio": 0.2,
    "parameters": 90,
    "alpha": 0.5,
    "ramp_step": 3,
    "gradient_norm": 0.75,
    "accuracy_current": 60.0,
    "accuracy_initial": 50.0,
    "accuracy_at_stage_start": 58.0,
}
ARGUMENTS = {"host": 0, "host_parameters": 1000, "progress": 0.5}


def test_reports_hold_occupied_slots_only_under_any_names():
    records = make_records(SEED, None, {"stage": Stage.FOSSILIZED}, {"stage": Stage.CULLED})
    reports = get_slot_reports(records, ("stem", "a", "b", "late2"), **ARGUMENTS)
    assert list(reports.keys()) == ["stem", "b"]


def test_report_fields():
    report = get_slot_reports(make_records(SEED), ("mid",), **ARGUMENTS)["mid"]
    metrics = {name: float(x) for name, x in report["metrics"].items()}
    expected = {
        "epochs_total": 6,
        "epochs_in_current_stage": 2,
        "total_improvement": 10.0,
        "improvement_since_stage_start": 2.0,
        "counterfactual_contribution": 2.0,
        "counterfactual_contribution_se": 0.5,
        "counterfactual_contribution_age": 0,
        "seed_gradient_norm_ratio": 0.2,
        "seed_param_count": 90,
        "host_param_count": 1000,
        "blending_delta": 0.0,
        "current_alpha": 0.5,
        "alpha_ramp_step": 3,
        "gradient_norm": 0.75,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert int(report["stage_entered_at"]) == 4
    assert bool(report["is_improving"])
    assert not bool(report["needs_attention"])
    assert report["telemetry"].shape == (10,)


def test_reports_are_copies():
    records = make_records(SEED)
    report = get_slot_reports(records, ("mid",), **ARGUMENTS)["mid"]
    records["alpha"][0, 0] = 0.9
    assert float(report["metrics", "current_alpha"]) == 0.5


def test_reports_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="slots must name the 1 records"):
        get_slot_reports(make_records(SEED), ("mid", "late"), **ARGUMENTS)
    with pytest.raises(ValueError, match=r"host must be 0\.\.0, got 1"):
        get_slot_reports(make_records(SEED), ("mid",), **{**ARGUMENTS, "host": 1})


# index = bits: none, a, b, ab, c, ac, bc, abc
GOLDEN = torch.tensor([40.0, 42.0, 41.0, 45.0, 40.0, 42.0, 41.0, 45.0])


def test_shapley_and_interaction_of_a_worked_example():
    assert shapley(GOLDEN).tolist() == pytest.approx([3.0, 2.0, 0.0])
    pairs = interactions(GOLDEN)
    assert float(pairs[0, 1]) == float(pairs[1, 0]) == 2.0
    assert pairs.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert float(pairs[0, 2]) == 0.0


def test_shapley_values_share_out_the_whole_gain():
    accuracies = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(shapley(accuracies).sum(-1), accuracies[:, -1] - accuracies[:, 0], atol=1e-6)


def test_a_coalition_that_was_not_measured_is_not_imputed():
    holed = GOLDEN.clone()
    holed[5] = float("nan")
    assert shapley(holed).isnan().all()
    assert not interactions(holed)[0, 1].isnan()


@pytest.mark.parametrize("size", [1, 3, 6])
def test_attribution_needs_every_coalition(size):
    for function in (shapley, interactions):
        with pytest.raises(ValueError, match=f"got {size}"):
            function(torch.zeros(size))
