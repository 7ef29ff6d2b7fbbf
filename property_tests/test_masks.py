"""The masks allow an op in a slot exactly when the lifecycle then carries it out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.environment.masks import action_masks
from esper.environment.observation import ObservationSettings
from esper.seeds.actions import Op
from esper.seeds.lifecycle import LifecycleRules, apply_action
from esper.seeds.slots import LAYOUT, ordered_slots
from esper.seeds.stages import Stage
from strategies import STAGES, seeds, to_records

SEEN = tuple(stage for stage in STAGES if stage != Stage.GERMINATED)  # lasts no longer than the action that makes it
ENABLED = st.sets(st.sampled_from(LAYOUT), min_size=1).map(ordered_slots)


@given(st.data(), ENABLED, st.one_of(st.none(), st.integers(1, 3)), st.integers(1, 5))
def test_allowed_exactly_when_the_step_succeeds(data, slots, max_seeds, n_blueprints):
    records = to_records(data.draw(st.lists(seeds(SEEN), min_size=len(slots), max_size=len(slots))))
    settings = ObservationSettings(slots, n_blueprints, 25, 1000, max_seeds=max_seeds)
    masks = action_masks(records, settings)
    rules = LifecycleRules(max_epochs=25, max_seeds=max_seeds)
    table = torch.ones(len(slots), n_blueprints, 3, dtype=torch.int64)
    for op in Op:
        for place, name in enumerate(LAYOUT):
            index = slots.index(name) if name in slots else -1
            action = torch.tensor([[index, n_blueprints - 1, 2, int(op)]])
            after, outcome = apply_action(records, action, rules, table, torch.zeros(1))
            allowed = bool(masks["mask_slot"][0, op, place])
            assert allowed == (bool(outcome["success"]) and (op != Op.WAIT or index >= 0))
            if not allowed or op == Op.WAIT:
                assert torch.equal(after["stage"], records["stage"])
        assert bool(masks["mask_op"][0, op]) == bool(masks["mask_slot"][0, op].any())
    assert bool(masks["mask_op"][0, Op.WAIT])
    assert int(masks["mask_blueprint"].sum()) == n_blueprints
    assert bool(masks["mask_blueprint"][0, :n_blueprints].all())
    assert bool(masks["mask_blend"].all())
