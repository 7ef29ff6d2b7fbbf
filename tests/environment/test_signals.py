"""Signals: signs, the first epoch, plateaus, the latch, histories and the summary seed."""

import math

import pytest
import torch
from tensordict import TensorDict

from esper.environment.signals import SignalTracker, summary_seed
from esper.seeds.stages import Stage
from records import make_records

NAN = float("nan")


def metrics(loss: float, accuracy: float) -> TensorDict:
    values = {"train_loss": loss, "val_loss": loss, "train_accuracy": accuracy, "val_accuracy": accuracy}
    return TensorDict({name: torch.tensor([value]) for name, value in values.items()}, batch_size=[1])


def run(tracker: SignalTracker, *epochs: tuple[float, float]) -> TensorDict:
    state = tracker.start(metrics(2.5, 10.0))
    for loss, accuracy in epochs:
        state = tracker.update(state, metrics(loss, accuracy))
    return state


def test_deltas_are_positive_for_improvement_and_zero_in_the_first_epoch():
    first = run(SignalTracker(), (2.0, 30.0))
    assert float(first["loss_delta"]) == float(first["accuracy_delta"]) == 0.0
    assert float(first["previous_val_accuracy"]) == 10.0
    second = run(SignalTracker(), (2.0, 30.0), (1.5, 42.0))
    assert float(second["loss_delta"]) == pytest.approx(0.5)
    assert float(second["accuracy_delta"]) == pytest.approx(12.0)
    assert int(second["epoch"]) == 2


def test_update_leaves_its_input_alone():
    state = run(SignalTracker(), (2.0, 30.0))
    copy = state.clone()
    SignalTracker().update(state, metrics(1.0, 50.0))
    assert bool((state == copy).all())


def test_a_loss_that_is_not_finite_gives_no_delta_and_no_best():
    state = run(SignalTracker(), (2.0, 30.0), (NAN, 10.0))
    assert float(state["loss_delta"]) == 0.0
    assert float(state["best_val_loss"]) == 2.0
    after = SignalTracker().update(state, metrics(1.9, 31.0))
    assert float(after["loss_delta"]) == 0.0
    assert int(after["stable_count"]) == 0
    assert float(after["best_val_accuracy"]) == 31.0


def test_best_values_never_forget():
    state = run(SignalTracker(), (0.5, 80.0), *[(1.0, 70.0)] * 20)
    assert float(state["best_val_loss"]) == 0.5
    assert float(state["best_val_accuracy"]) == 80.0


def test_regressions_count_as_plateau_and_gains_reset_it():
    assert int(run(SignalTracker(), (2.0, 30.0), (2.0, 30.4), (2.0, 20.0))["plateau_epochs"]) == 2
    assert int(run(SignalTracker(), (2.0, 30.0), (2.0, 30.4), (2.0, 31.0))["plateau_epochs"]) == 0


def test_latch_needs_consecutive_stable_epochs_and_never_clears():
    almost = [(2.0, 30.0), (1.99, 30.0), (1.98, 30.0)]
    assert not bool(run(SignalTracker(), *almost)["stabilized"])
    assert bool(run(SignalTracker(), *almost, (1.97, 30.0))["stabilized"])
    assert not bool(run(SignalTracker(), *almost, (1.5, 30.0), (1.49, 30.0))["stabilized"])
    assert not bool(run(SignalTracker(), *almost, (4.0, 30.0))["stabilized"]), "a loss that doubles is not stable"
    assert bool(run(SignalTracker(), *almost, (1.97, 30.0), (0.5, 60.0))["stabilized"])


def test_no_stabilization_epochs_means_stabilized_from_the_start():
    assert bool(SignalTracker(stabilization_epochs=0).init(2)["stabilized"].all())
    assert not bool(SignalTracker().init(2)["stabilized"].any())


def test_histories_hold_five_oldest_first_padded_with_zero():
    state = run(SignalTracker(), (2.0, 30.0))
    assert state["loss_history"].tolist() == [[0.0, 0.0, 0.0, 2.5, 2.0]]
    state = run(SignalTracker(), *[(float(i), 10.0 * i) for i in range(1, 8)])
    assert state["accuracy_history"].tolist() == [[30.0, 40.0, 50.0, 60.0, 70.0]]


def seed(stage: Stage, alpha: float = 0.0, contribution: float = NAN) -> dict:
    return {"stage": stage, "alpha": alpha, "contribution": contribution, "accuracy_current": 7.0}


@pytest.mark.parametrize(
    ("seeds", "chosen"),
    [
        ([None, None, None], -1),
        ([seed(Stage.TRAINING), seed(Stage.BLENDING, 0.2), None], 1),
        ([seed(Stage.BLENDING, 0.4), seed(Stage.BLENDING, 0.2), None], 0),
        ([seed(Stage.PROBATIONARY, 1.0, 2.0), seed(Stage.PROBATIONARY, 1.0, -3.0), None], 1),
        ([seed(Stage.PROBATIONARY, 1.0, 2.0), seed(Stage.PROBATIONARY, 1.0), None], 0),
        ([seed(Stage.TRAINING), seed(Stage.TRAINING), seed(Stage.TRAINING)], 2),
        ([seed(Stage.PROBATIONARY, 1.0), seed(Stage.FOSSILIZED, 1.0), None], 1),
    ],
)
def test_summary_seed(seeds, chosen):
    summary = summary_seed(make_records(*seeds), ("early", "mid", "late"))
    assert int(summary["slot"]) == chosen
    expected = (seeds[chosen]["stage"], 7.0) if chosen >= 0 else (0, 0.0)
    assert (int(summary["stage"]), float(summary["improvement"])) == expected


@pytest.mark.parametrize("slots", [("mid", "mid", "late"), ("mid",)])
def test_summary_seed_refuses_names_that_do_not_fit(slots):
    with pytest.raises(ValueError, match="slots must name the 3 records"):
        summary_seed(make_records(None, None, None), slots)


def test_unknown_losses_stay_unknown():
    assert math.isnan(float(SignalTracker().init(1)["val_loss"]))
