"""Controllers that do not learn: what they do, that it is legal, and what they refuse."""

from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict

from esper import keys as k
from esper.control.heuristic import HeuristicSettings, heuristic
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import fixed_schedule, never_grow, patient_schedule, patient_schedules, random_legal
from esper.environment.masks import action_masks
from esper.environment.observation import ObservationSettings, observe
from esper.environment.rewards import RewardSettings
from esper.environment.signals import SignalTracker
from esper.seeds.actions import BLEND, BLUEPRINT, OP, SLOT, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage
from records import make_records, play

KINDS = tuple("abcde")
TOY = RewardSettings(gamma=0.995, max_epochs=25, host_parameters=400, param_budget=1600)
WORLD = {"value": torch.tensor([0.5, 4.0, -6.0, 1.5, 6.0]), "removal": torch.tensor([1.5, 5.0, -6.0, 2.0, 7.0])}


@dataclass
class Entry:
    epoch: int
    op: str
    slot: str
    blueprint: str | None = None
    blend: str | None = None


def step_input(records: TensorDict, epoch: int = 10, settings: ObservationSettings | None = None) -> TensorDict:
    n = records.batch_size[0]
    settings = settings or ObservationSettings(LAYOUT, 5, 25, 400)
    tracker = SignalTracker().init(n)
    tracker["epoch"] = torch.full((n,), epoch)
    td = TensorDict({"observation": observe(records, tracker, settings), "key": k.host_keys(k.root(3), n)}, [n])
    return td.update(action_masks(records, settings))


PROBATION = {"stage": Stage.PROBATIONARY, "alpha": 1.0, "age": 9, "contribution": 4.0, "blueprint": 1}
MIXED = make_records(None, PROBATION, {"stage": Stage.TRAINING, "age": 2, "blueprint": 0})


def test_never_grow_waits():
    action, _ = never_grow().act(step_input(MIXED), TensorDict({}, [1]))
    assert not action.any()


def test_random_legal_is_legal_and_uniform():
    controller = random_legal()
    td = step_input(MIXED.expand(20_000, 3).clone())
    action, _ = controller.act(td, controller.init(20_000))
    op, slot = action[:, OP], action[:, SLOT]
    assert td["mask_slot"][torch.arange(20_000), op, slot][op != Op.WAIT].all()
    assert (op.bincount(minlength=4) / 20_000 - 0.25).abs().max() < 0.02
    culled = slot[op == Op.CULL].bincount(minlength=3)
    assert culled[0] == 0
    assert abs(culled[1] / culled.sum() - 0.5) < 0.03
    planted = action[op == Op.GERMINATE]
    assert (planted[:, BLUEPRINT].bincount(minlength=5) / len(planted) - 0.2).abs().max() < 0.03
    assert not action[op == Op.WAIT].any()


def test_random_legal_is_a_function_of_the_key():
    td = step_input(MIXED.expand(50, 3).clone())
    whole, _ = random_legal().act(td, TensorDict({}, [50]))
    part, _ = random_legal().act(td[20:30], TensorDict({}, [10]))
    assert torch.equal(whole[20:30], part)


def test_fixed_schedule_acts_in_its_epochs_and_only_then():
    steps = [Entry(4, "germinate", "late", "c", "gated"), Entry(9, "cull", "late")]
    controller = fixed_schedule(steps, KINDS, 25)
    for epoch in range(25):
        action, _ = controller.act(step_input(MIXED, epoch), TensorDict({}, [1]))
        expected = {4: [2, 2, 2, Op.GERMINATE], 9: [2, 0, 0, Op.CULL]}.get(epoch, [0, 0, 0, 0])
        assert action.tolist() == [expected]


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ([Entry(25, "cull", "mid")], "epoch 25"),
        ([Entry(3, "cull", "mid"), Entry(3, "cull", "late")], "epoch 3"),
        ([Entry(3, "explode", "mid")], "op: 'EXPLODE'"),
        ([Entry(3, "cull", "top")], "slot: 'top'"),
        ([Entry(3, "germinate", "mid", "z")], "blueprint: 'z'"),
        ([Entry(3, "germinate", "mid")], "blueprint: None"),
        ([Entry(3, "germinate", "mid", "a", "cubic")], "blend: 'cubic'"),
    ],
)
def test_schedules_refuse_what_does_not_exist(steps, named):
    with pytest.raises(ValueError, match=named):
        fixed_schedule(steps, KINDS, 25)


def test_patient_schedule_waits_until_each_step_is_possible():
    steps = [Entry(2, "germinate", "mid", "b"), Entry(3, "fossilize", "mid"), Entry(0, "germinate", "mid", "a")]
    results, _, _ = play(patient_schedule(steps, KINDS, 25), TOY, **WORLD)
    acted = done(results, host=0)
    assert acted[0] == (2, Op.GERMINATE, 1, 1)
    assert acted[1][1:3] == (Op.FOSSILIZE, 1)
    assert len(acted) == 2, "nothing can be planted where a fossil is"
    assert results[acted[1][0] - 1]["after", "stage"][0, 1] == Stage.PROBATIONARY


def done(results, host):
    """What was done to a host: epoch, op, slot, blueprint planted or -1."""
    found = []
    for epoch, result in enumerate(results):
        op, slot = int(result["outcome", "op"][host]), int(result["outcome", "slot"][host])
        if op != Op.WAIT:
            found.append((epoch, op, slot, int(result["lived", "blueprint"][host, slot]) if op == Op.GERMINATE else -1))
    return found


def test_slots_of_a_patient_schedule_do_not_wait_for_each_other():
    """A seed that never earns its place takes nothing from the others; of two that are due the first comes first."""
    removal = torch.tensor([-3.0, 4.0, 4.0, 4.0, 4.0])
    planted = [Entry(2, "germinate", "early", "a"), Entry(2, "germinate", "late", "b")]
    steps = [*planted, Entry(2, "fossilize", "early"), Entry(2, "fossilize", "late")]
    results, _, _ = play(patient_schedule(steps, KINDS, 25), TOY, value=WORLD["value"], removal=removal)
    acted = done(results, host=0)
    assert acted[:2] == [(2, Op.GERMINATE, 0, 0), (3, Op.GERMINATE, 2, 1)]
    assert [entry[1:3] for entry in acted[2:]] == [(Op.FOSSILIZE, 2)]


def test_schedules_side_by_side_are_what_they_are_alone():
    schedules = [
        [Entry(1, "germinate", "mid", "b"), Entry(1, "fossilize", "mid")],
        [Entry(4, "germinate", "early", "a")],
        [Entry(0, "germinate", "late", "b"), Entry(0, "germinate", "mid", "b"), Entry(9, "cull", "mid")],
    ]
    together, _, _ = play(patient_schedules(schedules, KINDS, 25), TOY, **WORLD, n_hosts=6)
    for i, steps in enumerate(schedules):
        alone, _, _ = play(patient_schedule(steps, KINDS, 25), TOY, **WORLD, n_hosts=1)
        assert [entry[:3] for entry in done(alone, 0)] != []
        planted = [entry for entry in done(alone, 0) if entry[1] == Op.GERMINATE]
        for host in (2 * i, 2 * i + 1):
            assert [entry for entry in done(together, host) if entry[1] == Op.GERMINATE] == planted


@pytest.mark.parametrize("wide", [True, False])
def test_heuristic_grows_in_every_slot_and_keeps_what_pays(wide):
    eager = HeuristicSettings(25, min_epoch=3, plateau_epochs=0, settled_epochs=0)
    results, _, _ = play(heuristic(eager), TOY, **WORLD, wide=wide)
    assert all(bool(result["outcome", "success"].all()) for result in results)
    planted = torch.stack([result["outcome", "germinated"] for result in results]).any(0)
    assert planted.all(), "every slot was planted in every host"
    kept = [result["before"]["blueprint"][result["outcome", "fossilized"]] for result in results]
    assert set(torch.cat(kept).tolist()) <= {0, 1, 3, 4}
    assert torch.cat(kept).numel() > 0


def test_heuristic_is_the_same_at_both_widths():
    actions = [
        torch.stack([r["outcome", "op"] for r in play(heuristic(HeuristicSettings(25)), TOY, **WORLD, wide=wide)[0]])
        for wide in (True, False)
    ]
    assert torch.equal(*actions)
    assert actions[0].any()


def decide(*slots: dict | None, scale: float = 10.0, **carried: object) -> list[int]:
    controller = heuristic(HeuristicSettings(25, contribution_scale=scale))
    td = step_input(make_records(*slots), settings=ObservationSettings(LAYOUT, 5, 25, 400, contribution_scale=scale))
    carry = controller.init(1)
    _, carry = controller.act(td, carry)
    for name, value in carried.items():
        carry[name] = torch.as_tensor(value).reshape(carry[name].shape)
    return controller.act(td, carry)[0][0].tolist()


def test_heuristic_considers_every_seed_and_takes_the_most_pressing():
    better = {**PROBATION, "contribution": 6.0}
    useless = {**PROBATION, "contribution": -1.0}
    young = {"stage": Stage.TRAINING, "age": 1}
    assert decide(young, PROBATION, better) == [2, 0, 0, Op.FOSSILIZE]
    assert decide(young, useless, young) == [1, 0, 0, Op.CULL]
    assert decide(useless, young, better) == [2, 0, 0, Op.FOSSILIZE]
    worse = {**PROBATION, "contribution": -3.0}
    assert decide(useless, young, worse) == [2, 0, 0, Op.CULL]
    assert decide(young, {**PROBATION, "contribution": 0.5}, young) == [0, 0, 0, Op.WAIT]


def test_heuristic_drops_a_seed_under_which_accuracy_fell():
    old = {"stage": Stage.TRAINING, "age": 9}
    assert decide(old, old, None, epochs_in_stage=[5, 5, 0], accuracy_at_stage_start=[1.0, 3.0, 0.0])[OP] == Op.CULL
    assert decide(old, old, None, epochs_in_stage=[5, 2, 0], accuracy_at_stage_start=[1.0, 3.0, 0.0])[OP] == Op.WAIT


@pytest.mark.parametrize("scale", [10.0, 50.0])
def test_heuristic_weighs_harm_in_points(scale: float) -> None:
    """A seed under which accuracy fell by 2.5 points against one that costs 8 or 2 by measurement."""
    fell = {"stage": Stage.TRAINING, "age": 9}
    carried = {"epochs_in_stage": [5, 1, 0], "accuracy_at_stage_start": [2.5, 0.0, 0.0]}
    for contribution, slot in ((-8.0, 1), (-2.0, 0)):
        harmful = {**PROBATION, "contribution": contribution}
        assert decide(fell, harmful, None, scale=scale, **carried) == [slot, 0, 0, Op.CULL]


def test_heuristic_passes_over_a_blueprint_that_just_failed():
    controller = heuristic(HeuristicSettings(25))
    settings = ObservationSettings(LAYOUT, 2, 25, 400)
    alive = step_input(make_records({"stage": Stage.TRAINING, "age": 3, "blueprint": 0}, None, None), settings=settings)
    gone = step_input(make_records(None, None, None), settings=settings)
    _, carry = controller.act(alive, controller.init(1))
    chosen = []
    for epoch in range(10):
        _, carry = controller.act(gone, carry)
        ready = carry.clone()
        ready["settled"], ready["since_loss"] = torch.tensor([9]), torch.tensor([9])
        plateau = gone.clone()
        plateau["observation"][:, 8] = 1.0
        action, _ = controller.act(plateau, ready)
        assert action[0, OP] == Op.GERMINATE, epoch
        chosen.append(int(action[0, BLUEPRINT]))
    assert chosen[:5] == [1] * 5, "longer than the embargo"
    assert chosen[-1] == 0, "forgiven in time"


def test_heuristic_waits_out_the_embargo():
    flat = step_input(make_records(None, None, None))
    flat["observation"][:, 8] = 1.0
    controller = heuristic(HeuristicSettings(25))
    carry = controller.init(1).update({"settled": torch.tensor([3]), "since_loss": torch.tensor([0])})
    ops = []
    for _ in range(6):
        action, carry = controller.act(flat, carry)
        ops.append(int(action[0, OP]))
    assert ops == [Op.WAIT] * 4 + [Op.GERMINATE] * 2
    assert action[0, BLEND] == 0


def test_a_controller_decides_where_its_hosts_are():
    policy = ScriptedPolicy(patient_schedule([Entry(1, "germinate", "early", "a")], KINDS, 4))
    td = step_input(MIXED).update({"is_init": torch.ones(1, 1, dtype=torch.bool)})
    td.update({policy.carried[name]: value for name, value in policy.controller.init(1).items()})
    there = td.to("meta").clear_device_()  # as collectors hand them over
    assert policy(there)["action"].is_meta
