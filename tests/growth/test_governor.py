"""The governor: what counts as a panic, and that a rollback touches one host and all of it."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from esper.growth.executors.loop import LoopExecutor
from esper.growth.governor import (
    GovernorSettings,
    Reason,
    check,
    expect,
    fresh_governor,
    history_epochs,
    take_snapshot,
)
from esper.seeds.actions import Op
from esper.seeds.lifecycle import LifecycleRules
from esper.seeds.stages import Stage
from tiny import Run, differing, germinate, same, tiny_spec

TEN = GovernorSettings(absolute=12.0, random_guess_loss=math.log(10.0))
VOCABULARY = GovernorSettings(absolute=15.0, random_guess_loss=math.log(50257.0))


def watched(losses, settings=TEN):
    """A governor of one host that has seen `losses`, and the panics on the way."""
    governor, panics = fresh_governor(1, settings), []
    for loss in losses:
        governor, panic = check(governor, torch.tensor([float(loss)]), settings, expect(governor, settings))
        panics.append(bool(panic))
    return governor, panics


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_panic_at_once_and_is_not_recorded(loss):
    governor, panics = watched([1.0, loss])
    assert panics == [False, True]
    assert governor["seen"].item() == 1
    assert governor["reason"].item() == Reason.NOT_FINITE


@pytest.mark.parametrize(("settings", "learned"), [(TEN, 0.5), (VOCABULARY, 3.0)])
def test_a_trained_host_that_guesses_is_a_panic_at_once(settings, learned):
    guess = settings.random_guess_loss
    history = [learned] * 10
    assert watched([*history, guess], settings)[1][-1]
    assert watched([*history, guess * 1.064], settings)[1][-1]
    assert not watched([*history, guess * 1.066], settings)[1][-1]
    assert not watched([*history, guess * 0.934], settings)[1][-1]
    assert not watched([*history[:9], guess], settings)[1][-1], "nine losses are not enough history"
    assert not watched([guess * 0.61] * 10 + [guess], settings)[1][-1], "it had not learned yet"
    assert watched([*history, guess], settings)[0]["reason"].item() == Reason.GUESSING


def test_an_absurd_loss_is_above_all_three_thresholds():
    calm = [1.0] * 20
    assert watched([*calm, 12.1])[0]["consecutive"].item() == 1
    assert watched([*calm, 11.9])[0]["consecutive"].item() == 0, "not above the absolute threshold"
    high = [5.0] * 20
    assert watched([*high, 14.9])[0]["consecutive"].item() == 0, "not above three times the mean"
    assert watched([*high, 15.1])[0]["consecutive"].item() == 1
    wild = [1.0, 7.0] * 10
    assert watched([*wild, 21.9])[0]["consecutive"].item() == 0, "not above six standard deviations (4 + 6 x 3)"
    assert watched([*wild, 22.1])[0]["consecutive"].item() == 1


def test_three_absurd_losses_in_a_row_are_a_panic_and_a_normal_one_starts_over():
    calm = [1.0] * 10
    governor, panics = watched([*calm, 20.0, 20.0, 20.0])
    assert panics[-3:] == [False, False, True]
    assert governor["seen"].item() == 10, "absurd losses never enter the window"
    assert governor["consecutive"].item() == 3, "the report keeps the count that led to the panic"
    assert not any(watched([*calm, 20.0, 20.0, 1.0, 20.0, 20.0])[1])


def test_without_history_a_uniform_guess_stands_in_for_the_mean():
    assert not any(watched([11.0, 11.0, 11.0])[1])
    assert watched([13.0, 13.0, 13.0])[1] == [False, False, True]
    assert not any(watched([3.1 * 2.3, 3.1 * 2.3, 3.1 * 2.3])[1]), "above three guesses but not above the absolute"
    assert not any(watched([30.0] * 3, VOCABULARY)[1]), "below three guesses of a vocabulary"
    assert watched([33.0] * 3, VOCABULARY)[1][-1]
    assert [history_epochs(n) for n in (1, 25, 40, 50, 200)] == [3, 5, 8, 10, 10]


def test_the_window_holds_the_last_twenty_losses():
    governor, _ = watched(range(25))
    assert governor["losses"][0].tolist() == list(range(5, 25))


def test_hosts_are_judged_one_by_one():
    governor = fresh_governor(3, TEN)
    for losses in ([1.0, 1.0, 1.0], [math.nan, 1.0, 20.0], [1.0, math.inf, 20.0], [1.0, 1.0, 20.0]):
        governor, panic = check(governor, torch.tensor(losses), TEN, expect(governor, TEN))
    assert panic.tolist() == [False, False, True]
    assert governor["reason"].tolist() == [Reason.NORMAL, Reason.NORMAL, Reason.ABSURD_LOSS]


@dataclass
class Faulty:
    """A loop executor that injects a fault into one host in the epochs for which it is armed."""

    inner: LoopExecutor
    place: str = ""
    host: int = 1
    value: float = math.nan
    armed: bool = False
    calls: int = field(default=0)

    def _hit(self, place):
        return self.armed and self.place == place

    def _poison(self, growth, part, leaf):
        poisoned = growth.clone()
        poisoned["host", part, "blocks", "1", *leaf][self.host, 0] = self.value
        return poisoned

    def begin(self, growth, plan):
        if self._hit("weights"):
            growth = self._poison(growth, "params", ("conv", "weight"))
        self.calls = 0
        return self.inner.begin(growth, plan)

    def train_step(self, carry, x, y, *rest):
        if self._hit("activations") and self.calls == 0:
            x = x.clone()
            x[self.host, 0, 0, 3, 3] = self.value
        self.calls += 1
        return self.inner.train_step(carry, x, y, *rest)

    def finish(self, carry, growth):
        growth = self.inner.finish(carry, growth)
        if self._hit("statistics"):
            growth = self._poison(growth, "statistics", ("var",))
        if self._hit("moments"):
            growth = self._poison(growth, "moments", ("norm", "bias"))
        return growth

    def measured(self, carry):
        measured = self.inner.measured(carry)
        if self._hit("training loss"):
            measured["loss"][self.host] = self.value
        return measured

    def begin_evaluation(self, growth, plan, calibration):
        return self.inner.begin_evaluation(growth, plan, calibration)

    def evaluate_step(self, carry, x, y):
        return self.inner.evaluate_step(carry, x, y)

    def finish_evaluation(self, carry):
        scores = self.inner.finish_evaluation(carry)
        if self._hit("validation loss"):
            scores["loss"][self.host] = self.value
        return scores


PLACES = ("weights", "activations", "statistics", "moments", "training loss", "validation loss")


def faulty_run(place="", value=math.nan, spec=None, n=3):
    spec = spec or tiny_spec(blueprints=("conv_light", "norm"))
    return Run(spec, n=n, executor=Faulty(LoopExecutor(spec), place, value=value))


def script(epoch):
    """Every host has a seed in early from the first epoch on and one in mid from the fourth on."""
    if epoch in (0, 3):
        return {i: germinate(0 if epoch == 0 else 1, blueprint=epoch // 3) for i in range(3)}
    return None


def play(run, epochs, faults=()):
    history = []
    for epoch in range(epochs):
        run.shards[0].executor.armed = epoch in faults
        before = run.growth
        history.append((before, run.step(script(epoch)), run.growth))
    return history


@pytest.fixture(scope="module")
def clean():
    return play(faulty_run(), 8)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("epoch", range(8))
def test_a_fault_in_one_host_leaves_all_others_as_without_it(clean, place, epoch):
    history = play(faulty_run(place), 8, {epoch})
    others = torch.tensor([0, 2])
    for t, ((_, result, _), (_, expected, _)) in enumerate(zip(history, clean, strict=True)):
        assert result["panic"].tolist() == [False, t == epoch, False]
        assert result["restarted"].tolist() == [False, t == epoch + 1, False]
        assert not differing(result[others], expected[others])
    assert not differing(history[-1][2][others], clean[-1][2][others])
    before, result, after = history[epoch]
    snapshot = before["snapshot"][1]
    assert not differing(after["host"][1], snapshot["host"])
    assert not differing(after["seeds"][1], snapshot["seeds"])
    assert result["governor", "reason"].tolist() == [Reason.NORMAL, Reason.NOT_FINITE, Reason.NORMAL]
    assert result["governor", "restored_epoch"].tolist() == [-1, 5 if epoch >= 5 else 0, -1]
    assert all(torch.isfinite(leaf).all() for leaf in history[-1][2]["host"].values(True, True))
    assert all(torch.isfinite(leaf).all() for leaf in result["metrics"].values())


def test_an_infinite_weight_is_as_bad():
    assert play(faulty_run("weights", math.inf), 2, {1})[1][1]["panic"].tolist() == [False, True, False]


def test_two_panics_in_a_row_go_back_to_the_same_place_twice():
    history = play(faulty_run("activations"), 9, {6, 7})
    good = history[6][0]["snapshot"]
    for epoch in (6, 7):
        assert history[epoch][1]["panic"].tolist() == [False, True, False]
        restored = history[epoch][2]
        assert not differing(restored["host"][1], good["host"][1])
        assert not differing(restored["snapshot"][1], good[1])
    assert history[7][2]["governor", "panics"].tolist() == [0, 2, 0]
    assert not history[8][1]["panic"].any()
    assert differing(history[8][2]["host"][1], good["host"][1]), "it trains again"


def test_a_fossil_of_the_snapshot_returns_with_its_moments_and_a_newer_one_is_dropped():
    run = faulty_run("weights")
    run.step({1: germinate(0), 0: germinate(0)})
    for host in (0, 1):
        run.ripen(host, 0)
    run.step({0: (Op.FOSSILIZE, 0), 1: (Op.FOSSILIZE, 0)})
    run.step({1: germinate(1, blueprint=1)})
    run.step()
    run.step()
    good = run.growth
    assert good["snapshot", "epoch"].tolist() == [5, 5, 5]
    assert good["snapshot", "slots", "stage"][1].tolist() == [Stage.FOSSILIZED, Stage.DORMANT, Stage.DORMANT]
    run.ripen(1, 1)
    assert run.step({1: (Op.FOSSILIZE, 1)})["outcome", "fossilized"][1, 1]
    assert run.growth["slots", "stage"][1].tolist() == [Stage.FOSSILIZED, Stage.FOSSILIZED, Stage.DORMANT]
    run.shards[0].executor.armed = True
    result = run.step()
    after = run.growth
    assert result["governor", "dropped"].tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert after["slots", "stage"][1].tolist() == [Stage.FOSSILIZED, Stage.DORMANT, Stage.DORMANT]
    assert not differing(after["host"][1], good["host"][1])
    columns = run.spec.bank.kinds["early", "conv_light"].columns
    for name in ("params", "moments"):
        fossil = after["seeds", name][1, columns]
        assert fossil.any()
        assert torch.equal(fossil, good["seeds", name][1, columns])
        assert not after["seeds", name][1, run.spec.bank.columns("mid")].any()
    run.shards[0].executor.armed = False
    run.step({1: germinate(1, blueprint=1)})
    assert run.growth["slots", "stage"][1].tolist() == [Stage.FOSSILIZED, Stage.TRAINING, Stage.DORMANT]


def test_a_seed_that_lived_when_the_snapshot_was_taken_never_becomes_a_ghost():
    run = faulty_run("weights")
    for epoch in range(5):
        run.step({1: germinate(2, blueprint=1)} if epoch == 3 else None)
    first = run.growth["seeds", "params"][1, run.spec.bank.kinds["late", "norm"].columns]
    assert run.growth["slots", "stage"][1, 2] == Stage.TRAINING
    assert run.growth["snapshot", "slots", "stage"][1, 2] == Stage.DORMANT
    run.shards[0].executor.armed = True
    run.step()
    assert not any(leaf.any() for leaf in run.growth["seeds"][1].values(True, True))
    record = run.growth["slots"][1, 2]
    assert (record["stage"], record["blueprint"], record["alpha"], record["planted"]) == (Stage.DORMANT, -1, 0.0, 1)
    run.shards[0].executor.armed = False
    run.step({1: germinate(2, blueprint=0)})
    assert run.growth["slots", "planted"][1, 2] == 2
    assert first.any()


def test_a_slot_under_embargo_stays_closed_through_a_rollback():
    run = faulty_run("weights", spec=tiny_spec(rules=LifecycleRules(25, strict_gates=False, embargo_epochs=4)))
    run.step({1: germinate(0)})
    run.step({1: (Op.CULL, 0)})
    left = run.growth["slots", "embargo"][1, 0].item()
    assert run.growth["slots", "stage"][1, 0] == Stage.EMBARGOED
    run.shards[0].executor.armed = True
    run.step()
    assert run.growth["slots", "stage"][1, 0] == Stage.EMBARGOED
    assert run.growth["slots", "embargo"][1, 0] == left - 1


def test_a_snapshot_is_taken_every_fifth_epoch_and_only_of_hosts_that_passed():
    run = faulty_run("validation loss", value=13.0 * 40)
    taken = []
    for epoch in range(11):
        run.shards[0].executor.armed = epoch in (4, 5)
        run.step()
        taken.append(run.growth["snapshot", "epoch"].tolist())
    assert taken[3] == [0, 0, 0]
    assert taken[4] == [5, 0, 5]
    assert taken[5] == [5, 0, 5]
    assert taken[6] == [5, 7, 5], "a host that could not be taken is taken as soon as it passes"
    assert taken[10] == [10, 7, 10]
    assert not same(run.growth["snapshot", "host", "moments", "head", "bias"], torch.zeros(3, 10))


def test_the_metrics_of_a_restored_host_are_those_of_host_and_fossils_in_the_snapshot():
    run = faulty_run("activations")
    run.step({1: germinate(0), 2: germinate(0)})
    run.ripen(1, 0)
    run.step({1: (Op.FOSSILIZE, 0)})
    run.step({1: germinate(1)})
    run.ripen(1, 1)
    run.step()
    measured = run.step()["metrics"]
    run.shards[0].executor.armed = True
    result = run.step()
    restored = result["metrics"][1]
    coalitions = measured["coalitions"][1]
    assert restored["val_accuracy"] == coalitions[0b001]
    assert restored["coalitions"].tolist() == [coalitions[m & 0b001].item() for m in range(8)]
    assert restored["val_loss"] == measured["val_loss"][1]
    assert result["governor", "loss"][1].isnan()


def test_the_first_snapshot_is_of_every_host():
    run = faulty_run()
    bare = run.growth.exclude("snapshot")
    with pytest.raises(ValueError, match="first snapshot is of every host"):
        take_snapshot(bare, run.spec.bank, run.metrics, torch.tensor([True, False, True]))
