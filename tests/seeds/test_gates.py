"""Every gate at its thresholds, just below and just above."""

import math

import pytest
import torch

from esper.seeds import gates, stages
from esper.seeds.lifecycle import put
from esper.seeds.slots import empty_records
from esper.seeds.stages import Gate, Stage

EPSILON = 1e-4


def record(**values):
    """One slot with the given fields."""
    records = empty_records(1, 1)
    return put(records, torch.ones(1, 1, dtype=torch.bool), **values)


def test_codes_and_vacancies():
    assert [(s.name, int(s)) for s in Stage] == [
        ("UNKNOWN", 0),
        ("DORMANT", 1),
        ("GERMINATED", 2),
        ("TRAINING", 3),
        ("BLENDING", 4),
        ("PROBATIONARY", 6),
        ("FOSSILIZED", 7),
        ("CULLED", 8),
        ("EMBARGOED", 9),
        ("RESETTING", 10),
    ]
    assert 5 not in list(Stage)
    assert [int(g) for g in Gate] == [0, 1, 2, 3, 5]
    assert stages.GATE_OF == {
        Stage.GERMINATED: Gate.G0,
        Stage.TRAINING: Gate.G1,
        Stage.BLENDING: Gate.G2,
        Stage.PROBATIONARY: Gate.G3,
        Stage.FOSSILIZED: Gate.G5,
    }


@pytest.mark.parametrize("stage", list(Stage))
def test_g1_asks_for_a_germinated_seed(stage):
    assert gates.g1(record(stage=stage)).item() == (stage == Stage.GERMINATED)


G2 = {
    "healthy": True,
    "epochs_in_stage": 3,
    "gradient_ratio": 0.05,
    "accuracy_at_stage_start": 40.0,
    "accuracy_current": 40.5,
}


@pytest.mark.parametrize(
    ("change", "strict", "permissive"),
    [
        ({}, True, True),
        ({"epochs_in_stage": 2}, False, False),
        ({"epochs_in_stage": 4}, True, True),
        ({"gradient_ratio": 0.05 - EPSILON}, False, False),
        ({"gradient_ratio": 0.05 + EPSILON}, True, True),
        ({"gradient_ratio": math.nan}, False, False),
        ({"healthy": False}, False, False),
        ({"accuracy_current": 40.5 - EPSILON}, False, True),
        ({"accuracy_current": 40.5 + EPSILON}, True, True),
        ({"accuracy_current": 30.0}, False, True),
    ],
)
def test_g2_asks_for_age_activity_and_if_strict_for_improvement(change, strict, permissive):
    records = record(**{**G2, **change})
    assert gates.g2(records, strict=True).item() == strict
    assert gates.g2(records, strict=False).item() == permissive


@pytest.mark.parametrize(
    ("epochs", "alpha", "passes"),
    [
        (3, 0.95, True),
        (3, 0.95 - EPSILON, False),
        (3, 0.95 + EPSILON, True),
        (2, 1.0, False),
        (4, 1.0, True),
    ],
)
def test_g3_asks_for_age_and_a_finished_blend(epochs, alpha, passes):
    assert gates.g3(record(epochs_in_stage=epochs, alpha=alpha)).item() == passes


@pytest.mark.parametrize(
    ("contribution", "healthy", "passes"),
    [
        (math.nan, True, False),
        (-1.0, True, False),
        (0.0, True, False),
        (0.99, True, False),
        (1.0 - EPSILON, True, False),
        (1.0, True, True),
        (1.0 + EPSILON, True, True),
        (5.0, False, False),
    ],
)
def test_g5_asks_for_a_measured_contribution_and_health(contribution, healthy, passes):
    assert gates.g5(record(contribution=contribution, healthy=healthy)).item() == passes


@pytest.mark.parametrize("stage", list(Stage))
def test_only_a_seed_on_probation_can_be_fossilised(stage):
    records = record(stage=stage, contribution=5.0, healthy=True)
    assert gates.may_fossilize(records).item() == (stage == Stage.PROBATIONARY)


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("age", [0, 1])
def test_a_removable_seed_can_be_culled_after_one_epoch(stage, age):
    removable = stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY)
    assert gates.may_cull(record(stage=stage, age=age)).item() == (removable and age == 1)


@pytest.mark.parametrize("stage", list(Stage))
def test_only_an_empty_slot_can_be_planted(stage):
    assert gates.may_germinate(record(stage=stage), None).item() == (stage == Stage.DORMANT)


def test_fossils_count_towards_the_limit_of_seeds_and_the_cull_tail_does_not():
    records = empty_records(4, 3)
    held = [(), (Stage.FOSSILIZED,), (Stage.EMBARGOED, Stage.TRAINING), (Stage.FOSSILIZED, Stage.BLENDING)]
    for host, row in enumerate(held):
        for slot, stage in enumerate(row):
            records["stage"][host, slot] = stage
    assert gates.may_germinate(records, 2)[:, 2].tolist() == [True, True, True, False]
    assert gates.may_germinate(records, 1)[:, 2].tolist() == [True, False, False, False]
    assert gates.may_germinate(records, None)[:, 2].tolist() == [True] * 4
