"""One order of slots everywhere, whatever order anything was written in."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from esper.environment.masks import action_masks
from esper.environment.observation import ObservationSettings, observe
from esper.environment.rewards import RewardSettings, reward
from esper.environment.signals import SignalTracker
from esper.seeds.actions import Op
from esper.seeds.reports import get_slot_reports
from esper.seeds.slots import LAYOUT, ordered_slots
from strategies import seeds, to_records

NAMES = st.lists(st.sampled_from([*LAYOUT, "stem", "LATE", ""]), max_size=8)


@given(NAMES, st.randoms(use_true_random=False))
def test_order_is_that_of_the_layout_whatever_the_container(names, random):
    expected = tuple(name for name in LAYOUT if name in names)
    shuffled = list(names)
    random.shuffle(shuffled)
    written = json.loads(json.dumps(dict.fromkeys(shuffled, 0)))
    for container in (names, shuffled, tuple(shuffled), set(names), written, written.keys(), iter(shuffled), names * 2):
        assert ordered_slots(container) == expected


@given(st.lists(seeds(), min_size=3, max_size=3), st.permutations(range(3)))
def test_features_and_masks_follow_the_slot_not_its_place(fields, order):
    """Records in another order, named accordingly, look the same to a policy."""
    tracker = SignalTracker().init(1)
    shuffled = tuple(LAYOUT[j] for j in order)
    seen, masks = [], []
    for slots, rows in ((LAYOUT, fields), (shuffled, [fields[j] for j in order])):
        settings = ObservationSettings(slots, 5, 25, 1000)
        seen.append(observe(to_records(rows), tracker, settings))
        masks.append(action_masks(to_records(rows), settings)["mask_slot"])
    assert torch.equal(*seen)
    assert torch.equal(*masks)


@given(st.lists(seeds(), min_size=3, max_size=3), st.permutations(range(3)))
def test_reports_are_keyed_by_slot(fields, order):
    arguments = {"host": 0, "host_parameters": 1000, "progress": 0.5}
    straight = get_slot_reports(to_records(fields), LAYOUT, **arguments)
    names = tuple(LAYOUT[j] for j in order)
    shuffled = get_slot_reports(to_records([fields[j] for j in order]), names, **arguments)
    assert set(straight.keys()) == set(shuffled.keys())
    for name, report in straight.items():
        same = (report == shuffled[name]) | (report != report)
        assert all(bool(leaf.all()) for leaf in same.values(include_nested=True, leaves_only=True))


@given(st.lists(seeds(), min_size=6, max_size=6), st.permutations(range(3)), st.booleans())
def test_equal_seeds_in_other_slots_earn_equally(fields, order, terminal):
    settings = RewardSettings(gamma=0.995, max_epochs=25, host_parameters=1000, param_budget=4000)
    totals = []
    for places in (range(3), order):
        before, after = (to_records([fields[start + j] for j in places]) for start in (0, 3))
        none = torch.zeros(1, 3, dtype=torch.bool)
        outcome = {"op": torch.tensor([int(Op.WAIT)]), "slot": torch.tensor([-1]), "success": torch.tensor([True])}
        outcome |= {"germinated": none, "culled": none, "fossilized": none}
        result = {"before": before, "lived": after, "after": after, "tracker": SignalTracker().init(1)}
        result |= {"outcome": TensorDict(outcome, batch_size=[1]), "panic": torch.tensor([False])}
        result["restarted"] = result["panic"]
        totals.append(float(reward(TensorDict(result, batch_size=[1]), settings, terminal=terminal)["total"]))
    assert abs(totals[0] - totals[1]) <= 1e-6 * max(1.0, abs(totals[0]))
