"""The observation: its table, its scales, what empty slots look like, and what is finite."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict

from esper.environment.observation import (
    FEATURES,
    INDEX,
    ObservationSettings,
    feature,
    feature_mask,
    observe,
)
from esper.environment.signals import SignalTracker
from esper.seeds.reports import telemetry_features
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage
from records import make_records

SETTINGS = ObservationSettings(LAYOUT, 4, 25, 1000, max_seeds=4)
NARROW = dataclasses.replace(SETTINGS, use_telemetry=False)
BLENDING = {"stage": Stage.BLENDING, "alpha": 0.4, "blueprint": 1, "contribution": 3.0, "parameters": 500}


def tracker(epoch: int = 10, **changes: float) -> TensorDict:
    state = SignalTracker().init(1)
    state["epoch"] = torch.tensor([epoch])
    return state.update({name: torch.tensor([value]) for name, value in changes.items()})


def value(name: str, *slots, settings=SETTINGS, **signals: float) -> float:
    return float(feature(observe(make_records(*slots), tracker(**signals), settings), name))


def test_the_table_has_the_documented_indices():
    assert [f.index for f in FEATURES] == list(range(80))
    assert len(INDEX) == 80
    places = {"val_loss": 3, "val_accuracy": 6, "plateau_epochs": 8, "val_loss_4_ago": 11, "val_accuracy_4_ago": 16}
    places |= {"growth": 21, "utilisation": 22, "early.active": 23, "mid.active": 32, "late.active": 41}
    places |= {"early.contribution": 26, "early.blueprint_0": 27, "late.blueprint_4": 49}
    places |= {f"{slot}.telemetry.gradient_norm": 50 + 10 * i for i, slot in enumerate(LAYOUT)}
    assert {name: INDEX[name] for name in places} == places


def test_widths():
    records = make_records(BLENDING, None, None)
    assert (SETTINGS.width, NARROW.width) == (80, 50)
    wide, narrow = (observe(records, tracker(), s) for s in (SETTINGS, NARROW))
    assert wide.shape == (1, 80)
    assert torch.equal(wide[:, :50], narrow)


def test_scales():
    row = (BLENDING, None, None)
    assert value("epoch", *row) == pytest.approx(0.4)
    assert value("val_accuracy", *row, val_accuracy=62.0) == pytest.approx(0.62)
    assert value("accuracy_delta", *row, accuracy_delta=-30.0) == -1.0
    assert value("loss_delta", *row, loss_delta=0.05) > 0 > value("loss_delta", *row, loss_delta=-0.05)
    assert value("growth", *row) == pytest.approx(0.5)
    assert value("utilisation", *row) == pytest.approx(0.25)
    assert value("utilisation", *row, settings=dataclasses.replace(SETTINGS, max_seeds=None)) == 0.0
    assert value("early.stage", *row) == pytest.approx(0.5)
    assert value("early.alpha", *row) == pytest.approx(0.4)
    assert [value(f"early.blueprint_{b}", *row) for b in range(5)] == [0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("contribution", "expected"), [(3.0, 0.3), (-40.0, -1.0), (99.0, 1.0), (0.0, 0.0), (float("nan"), 0.0)]
)
def test_contributions_are_clamped_and_scaled(contribution, expected):
    seed = {**BLENDING, "contribution": contribution}
    assert value("early.contribution", seed, None, None) == pytest.approx(expected)


def test_contributions_are_seen_as_far_as_the_run_says():
    wide = dataclasses.replace(SETTINGS, contribution_scale=50.0)
    for contribution, expected in ((3.0, 0.06), (-40.0, -0.8), (99.0, 1.0), (float("nan"), 0.0)):
        seed = {**BLENDING, "contribution": contribution}
        assert value("early.contribution", seed, None, None, settings=wide) == pytest.approx(expected)


def test_telemetry_of_a_seed():
    seed = {
        "gradient_norm": 5.0,
        "gradient_ratio": 0.1,
        "gradient_health": 0.9,
        "epochs_in_stage": 25,
        "accuracy_current": 60.0,
        "accuracy_at_stage_start": 57.0,
        "stage": Stage.BLENDING,
        "alpha": 0.5,
    }
    vector = telemetry_features(make_records(seed), torch.tensor([0.4]))[0, 0]
    assert vector.tolist() == pytest.approx([0.5, 0.9, 0, 0, 0.5, 0.6, 0.3, 0.5, 0.5, 0.4])
    loud = telemetry_features(make_records({**seed, "gradient_norm": 101.0}), torch.tensor([0.4]))[0, 0]
    assert loud[[0, 2, 3]].tolist() == [1.0, 0.0, 1.0]
    silent = telemetry_features(make_records({**seed, "gradient_norm": 0.0}), torch.tensor([0.4]))[0, 0]
    assert silent[[0, 2, 3]].tolist() == [0.0, 1.0, 0.0]


def test_a_seed_that_was_never_measured_is_not_vanishing():
    vector = telemetry_features(make_records({"stage": Stage.DORMANT, "gradient_health": 1.0}), torch.tensor([0.0]))
    assert vector[0, 0].tolist() == [0.0, 1.0, *[0.0] * 8]


def test_slots_of_the_run_are_put_in_the_layout():
    settings = dataclasses.replace(SETTINGS, slots=("mid",))
    observation = observe(make_records(BLENDING), tracker(), settings)
    assert feature(observation, "mid.active") == 1.0
    empty = [f.index for f in FEATURES if f.name.startswith(("early", "late"))]
    assert not observation[:, empty].any()


def test_feature_mask_hides_what_empty_slots_do_not_measure():
    fossil = {**BLENDING, "stage": Stage.FOSSILIZED}
    for settings in (SETTINGS, NARROW):
        observation = observe(make_records(None, fossil, None), tracker(), settings)
        mask = feature_mask(observation.expand(2, 3, -1))
        assert mask.shape == (2, 3, settings.width)
        hidden = {FEATURES[i].name for i in (~mask[1, 2]).nonzero().flatten().tolist()}
        expected = {f.name for f in FEATURES[: settings.width] if f.name.startswith(("early.", "late."))}
        assert hidden == expected - {"early.active", "late.active"}


def test_an_unmeasured_contribution_is_told_by_alpha():
    """Everything is measured from the second step of a ramp on, whatever its shape; so the two never look alike."""
    first = {**BLENDING, "ramp_step": 1, "alpha": 0.2, "contribution": float("nan")}
    later = {**BLENDING, "ramp_step": 2, "alpha": 0.4, "contribution": 0.0}
    seen = [observe(make_records(s, None, None), tracker(), NARROW) for s in (first, later)]
    assert feature(seen[0], "early.contribution") == feature(seen[1], "early.contribution") == 0.0
    assert feature(seen[0], "early.alpha") < feature(seen[1], "early.alpha")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"slots": ()}, "slots"),
        ({"slots": ("mid", "mid")}, "slots"),
        ({"n_blueprints": 6}, "n_blueprints: 6"),
        ({"max_epochs": 0}, "max_epochs: 0"),
        ({"host_parameters": 0}, "host_parameters: 0"),
    ],
)
def test_settings_out_of_range(fields, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(SETTINGS, **fields)
