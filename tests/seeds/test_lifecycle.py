"""The life of a seed, epoch by epoch."""

import math
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from esper.seeds import blending, gates, stages
from esper.seeds.actions import Op
from esper.seeds.lifecycle import LifecycleRules, apply_action, record_epoch, seed_parameters, tick
from esper.seeds.slots import empty_records
from esper.seeds.stages import BLENDS, TRANSITIONS, Stage
from tiny import differing

RULES = LifecycleRules(max_epochs=25)
TABLE = seed_parameters((4, 8, 16), lambda c: [c, 10 * c])
LINEAR, SIGMOID, GATED = range(3)


class Life:
    """One host with three slots, driven by hand; every epoch improves by a percentage point and has gradients."""

    def __init__(self, rules=RULES):
        self.rules, self.records, self.accuracy = rules, empty_records(1, 3), 50.0
        self.trained_with = None

    def epoch(self, op=Op.WAIT, slot=0, blueprint=0, blend=LINEAR, contribution=math.nan, ratio=0.5, gain=1.0):
        """One environment step; returns the outcome with what the epoch trained with and what the tick culled."""
        action = torch.tensor([[slot, blueprint, blend, op]])
        before = torch.tensor([self.accuracy])
        self.records, outcome = apply_action(self.records, action, self.rules, TABLE, before)
        self.trained_with = self.records
        self.accuracy += gain
        everywhere = torch.full((1, 3), 1.0)
        gradients = TensorDict(
            {"norm": everywhere, "ratio": ratio * everywhere, "health": everywhere}, batch_size=[1, 3]
        )
        self.records = record_epoch(
            self.records,
            torch.tensor([self.accuracy]),
            contribution * everywhere,
            0.1 * contribution * everywhere,
            gradients,
            torch.ones(1, 3, dtype=torch.bool),
        )
        self.records, outcome["auto_culled"] = tick(self.records, self.rules)
        return outcome

    def run(self, n, **rest):
        for _ in range(n):
            self.epoch(**rest)

    def at(self, slot=0):
        """The slot's record as plain values."""
        return {name: value[0, slot].item() for name, value in self.records.items()}


def probationary(contribution=math.nan, rules=RULES):
    """A life whose seed in slot 0 has just entered probation."""
    life = Life(rules)
    life.epoch(Op.GERMINATE)
    life.run(7, contribution=contribution)
    assert life.at()["stage"] == Stage.PROBATIONARY
    return life


def test_the_transition_table():
    assert TRANSITIONS[Stage.DORMANT] == (Stage.GERMINATED,)
    assert TRANSITIONS[Stage.GERMINATED] == (Stage.TRAINING, Stage.CULLED)
    assert TRANSITIONS[Stage.TRAINING] == (Stage.BLENDING, Stage.CULLED)
    assert TRANSITIONS[Stage.BLENDING] == (Stage.PROBATIONARY, Stage.CULLED)
    assert TRANSITIONS[Stage.PROBATIONARY] == (Stage.FOSSILIZED, Stage.CULLED)
    assert TRANSITIONS[Stage.FOSSILIZED] == ()
    assert [TRANSITIONS[s] for s in stages.FAILED] == [(Stage.EMBARGOED,), (Stage.RESETTING,), (Stage.DORMANT,)]
    assert set(TRANSITIONS) == set(Stage)


@pytest.mark.parametrize(("blend", "middle"), [(LINEAR, [0.2, 0.4, 0.6, 0.8]), (SIGMOID, None), (GATED, None)])
def test_the_timeline_of_a_seed_that_passes_every_gate(blend, middle):
    life, stage, alpha = Life(), [], []
    for epoch in range(13):
        outcome = life.epoch(Op.GERMINATE if epoch == 0 else Op.WAIT, blend=blend)
        stage.append(life.trained_with["stage"][0, 0].item())
        alpha.append(life.trained_with["alpha"][0, 0].item())
        assert outcome["auto_culled"][0, 0].item() == (epoch == 12)
    assert stage == [Stage.TRAINING] * 3 + [Stage.BLENDING] * 5 + [Stage.PROBATIONARY] * 5
    assert alpha[:3] == [0.0] * 3
    assert alpha[7:] == [1.0] * 6, "exactly one at the end of the ramp and ever after"
    curve = blending.ramp(torch.arange(1, 6), 5, torch.full((5,), blend)).tolist()
    assert alpha[3:8] == curve
    if middle is not None:
        assert alpha[3:7] == pytest.approx(middle)
    if blend == SIGMOID:
        raw = [1 / (1 + math.exp(-12 * (n / 5 - 0.5))) for n in range(6)]
        low, high = raw[0], 1 / (1 + math.exp(-6))
        assert alpha[3:8] == pytest.approx([(r - low) / (high - low) for r in raw[1:]])
    assert life.at()["stage"] == Stage.DORMANT, "culled by timeout at the end of the thirteenth epoch"
    assert life.at()["planted"] == 1


def test_books_of_a_life():
    life = Life()
    life.epoch(Op.GERMINATE, slot=1, blueprint=1, blend=GATED)
    record = life.at(1)
    assert record["accuracy_at_germination"] == 50.0
    assert record["accuracy_initial"] == record["accuracy_current"] == record["accuracy_at_stage_start"] == 51.0
    assert record["parameters"] == 80 + blending.gate_parameter_count(8)
    assert (record["age"], record["epochs_in_stage"], record["planted"]) == (1, 1, 1)
    assert (record["blueprint"], record["blend"], record["previous_stage"]) == (1, GATED, Stage.GERMINATED)
    assert math.isnan(record["accuracy_at_blending_start"])
    life.run(2)
    record = life.at(1)
    assert (record["stage"], record["previous_stage"]) == (Stage.BLENDING, Stage.TRAINING)
    assert (record["epochs_in_stage"], record["previous_epochs_in_stage"], record["age"]) == (0, 3, 3)
    assert record["accuracy_at_blending_start"] == record["accuracy_at_stage_start"] == 53.0
    life.epoch(gain=-10.0)
    record = life.at(1)
    assert (record["accuracy_current"], record["accuracy_best"]) == (43.0, 53.0)
    assert [life.at(s)["stage"] for s in (0, 2)] == [Stage.DORMANT] * 2


def test_measurements_age_and_ratios_are_smoothed():
    life = Life()
    life.epoch(Op.GERMINATE, ratio=1.0)
    assert life.at()["contribution_age"] == -1
    life.epoch(contribution=2.0, ratio=2.0)
    assert (life.at()["contribution"], life.at()["contribution_age"]) == (2.0, 0)
    assert life.at()["gradient_ratio"] == pytest.approx(1.1)
    life.run(2)
    assert (life.at()["contribution"], life.at()["contribution_age"]) == (2.0, 2)


def test_a_seed_waits_for_its_dwell_and_for_g2():
    patient = Life(replace(RULES, max_epochs=100))
    assert patient.rules.dwell == 10
    patient.epoch(Op.GERMINATE)
    patient.run(8)
    assert patient.at()["stage"] == Stage.TRAINING
    patient.epoch()
    assert patient.at()["stage"] == Stage.BLENDING
    idle = Life()
    idle.epoch(Op.GERMINATE, ratio=0.04)
    idle.run(20, ratio=0.04)
    assert idle.at()["stage"] == Stage.TRAINING, "nothing but its controller ends a seed in training"


def test_strict_gates_ask_for_improvement_and_permissive_ones_do_not():
    for strict, stage in ((True, Stage.TRAINING), (False, Stage.BLENDING)):
        life = Life(replace(RULES, strict_gates=strict))
        life.epoch(Op.GERMINATE)
        life.run(2, gain=0.2)
        assert life.at()["stage"] == stage


def test_a_blend_that_ends_too_young_for_g3_tries_again_at_full_alpha():
    life = Life(replace(RULES, blending_epochs=2))
    life.epoch(Op.GERMINATE)
    life.run(2)
    seen = []
    for _ in range(4):
        life.epoch()
        seen.append((life.trained_with["stage"][0, 0].item(), life.trained_with["alpha"][0, 0].item()))
    assert seen == [(Stage.BLENDING, 0.5), (Stage.BLENDING, 1.0), (Stage.BLENDING, 1.0), (Stage.PROBATIONARY, 1.0)]


@pytest.mark.parametrize(("contribution", "survives"), [(0.0, False), (-1.0, False), (0.01, True), (math.nan, True)])
def test_probation_ends_a_seed_that_is_measured_to_be_worth_nothing(contribution, survives):
    life = probationary()
    outcome = life.epoch(contribution=contribution)
    assert (life.at()["stage"] == Stage.PROBATIONARY) == survives
    assert outcome["auto_culled"][0, 0].item() == (not survives)


@pytest.mark.parametrize(("max_epochs", "epochs"), [(25, 5), (50, 5), (80, 8)])
def test_probation_times_out_after_exactly_its_length_and_never_fossilises(max_epochs, epochs):
    life = Life(replace(RULES, max_epochs=max_epochs))
    life.epoch(Op.GERMINATE)
    while life.at()["stage"] != Stage.PROBATIONARY:
        life.epoch(contribution=20.0)
    for _ in range(epochs - 1):
        assert not life.epoch(contribution=20.0)["auto_culled"].any()
        assert life.at()["stage"] == Stage.PROBATIONARY
    assert life.epoch(contribution=20.0)["auto_culled"][0].tolist() == [True, False, False]
    assert life.at()["stage"] == Stage.DORMANT


def test_a_fossil_stays():
    life = probationary(contribution=2.0)
    assert life.epoch(Op.FOSSILIZE, contribution=2.0)["fossilized"][0, 0]
    assert (life.at()["stage"], life.at()["alpha"]) == (Stage.FOSSILIZED, 1.0)
    for op in (Op.CULL, Op.GERMINATE, Op.FOSSILIZE):
        after, outcome = apply_action(
            life.records, torch.tensor([[0, 0, 0, op]]), RULES, TABLE, torch.tensor([life.accuracy])
        )
        assert not outcome["success"].item()
        assert not differing(after, life.records)
    life.run(30, contribution=-5.0)
    assert life.at()["stage"] == Stage.FOSSILIZED


def test_g5_decides_whether_a_seed_on_probation_is_fossilised():
    life = probationary(contribution=0.99)
    assert not life.epoch(Op.FOSSILIZE, contribution=1.0)["success"].item()
    assert life.at()["stage"] == Stage.PROBATIONARY
    assert life.epoch(Op.FOSSILIZE)["success"].item()


def test_a_cull_empties_the_slot_within_the_step():
    life = Life()
    assert life.epoch(Op.GERMINATE)["germinated"][0, 0]
    assert life.epoch(Op.CULL)["culled"][0, 0]
    assert life.trained_with["stage"][0, 0] == Stage.CULLED, "the epoch is trained without the seed"
    blank = {name: value[0, 0].item() for name, value in empty_records(1, 1).items()} | {"planted": 1}
    assert {n: v for n, v in life.at().items() if v == v} == {n: v for n, v in blank.items() if v == v}
    assert life.epoch(Op.GERMINATE)["success"].item()
    assert life.at()["planted"] == 2


def test_a_seed_cannot_be_culled_before_it_has_lived_an_epoch():
    records, _ = apply_action(
        empty_records(1, 3), torch.tensor([[0, 0, 0, Op.GERMINATE]]), RULES, TABLE, torch.zeros(1)
    )
    assert not gates.may_cull(records).any()
    _, outcome = apply_action(records, torch.tensor([[0, 0, 0, Op.CULL]]), RULES, TABLE, torch.zeros(1))
    assert not outcome["success"].item()


@pytest.mark.parametrize("embargo", [1, 3])
def test_the_embargo_walks_the_tail(embargo):
    life = Life(replace(RULES, embargo_epochs=embargo))
    life.epoch(Op.GERMINATE)
    life.epoch(Op.CULL)
    for left in range(embargo, 0, -1):
        assert (life.at()["stage"], life.at()["embargo"]) == (Stage.EMBARGOED, left)
        assert not life.epoch(Op.GERMINATE)["success"].item()
    assert life.at()["stage"] == Stage.DORMANT
    assert life.epoch(Op.GERMINATE)["success"].item()


@pytest.mark.parametrize("blend", range(len(BLENDS)))
def test_without_incubation_a_seed_blends_from_its_first_epoch(blend):
    life = Life(replace(RULES, incubation="none"))
    alphas = []
    for epoch in range(6):
        life.epoch(Op.GERMINATE if epoch == 0 else Op.WAIT, blend=blend)
        alphas.append(life.trained_with["alpha"][0, 0].item())
        assert life.trained_with["stage"][0, 0].item() == (Stage.BLENDING if epoch < 5 else Stage.PROBATIONARY)
    expected = blending.ramp(torch.arange(1, 7), 5, torch.full((6,), blend)).tolist()
    assert alphas == expected
    assert life.at()["accuracy_at_blending_start"] == 50.0


def test_a_host_holds_at_most_max_seeds():
    life = Life(replace(RULES, max_seeds=2))
    assert life.epoch(Op.GERMINATE, slot=0)["success"].item()
    assert life.epoch(Op.GERMINATE, slot=1)["success"].item()
    assert not life.epoch(Op.GERMINATE, slot=2)["success"].item()
    assert life.epoch(Op.CULL, slot=0)["success"].item()
    assert life.epoch(Op.GERMINATE, slot=2)["success"].item()


def test_what_no_run_offers_is_refused_and_changes_nothing():
    for slot, blueprint, blend in ((-1, 0, 0), (3, 0, 0), (0, 2, 0), (0, -1, 0), (0, 0, 3)):
        records, outcome = apply_action(
            empty_records(1, 3), torch.tensor([[slot, blueprint, blend, Op.GERMINATE]]), RULES, TABLE, torch.zeros(1)
        )
        assert not outcome["success"].item()
        assert (records["stage"] == Stage.DORMANT).all()
        assert (records["planted"] == 0).all()
