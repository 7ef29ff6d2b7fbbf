"""Empty and disabled slots are zero, everything is finite and of order one, and the mask says which zeros are
structural."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from esper.environment.observation import FEATURES, ObservationSettings, feature_mask, observe
from esper.environment.signals import HISTORY, SignalTracker
from esper.seeds.slots import LAYOUT, ordered_slots
from esper.seeds.stages import OCCUPIED
from strategies import seeds, to_records

WILD = st.floats(width=32)
ENABLED = st.sets(st.sampled_from(LAYOUT), min_size=1).map(ordered_slots)


@st.composite
def trackers(draw: st.DrawFn) -> TensorDict:
    """A tracker that has seen any losses at all."""
    tracker = SignalTracker()
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
    state = tracker.init(1)
    for _ in range(draw(st.integers(0, HISTORY + 1))):
        values = [draw(WILD if "loss" in name else st.floats(0.0, 100.0, width=32)) for name in names]
        metrics = {name: torch.tensor([value]) for name, value in zip(names, values, strict=True)}
        state = tracker.update(state, TensorDict(metrics, batch_size=[1]))
    return state


@given(st.data(), ENABLED, trackers(), st.booleans(), st.integers(1, 30))
def test_zero_where_nothing_is_and_finite_everywhere(data, slots, tracker, use_telemetry, max_epochs):
    fields = data.draw(st.lists(seeds(wild=True), min_size=len(slots), max_size=len(slots)))
    settings = ObservationSettings(slots, 5, max_epochs, 1000, use_telemetry=use_telemetry)
    observation = observe(to_records(fields), tracker, settings)
    assert observation.shape == (1, settings.width)
    assert observation.dtype == torch.float32
    assert bool(observation.isfinite().all())
    assert float(observation.abs().max()) <= 10.0
    mask = feature_mask(observation)
    occupied = {name for name, f in zip(slots, fields, strict=True) if f["stage"] in OCCUPIED}
    for feature in FEATURES[: settings.width]:
        owner = feature.name.split(".")[0]
        if owner in LAYOUT and owner not in occupied:
            assert float(observation[0, feature.index]) == 0.0
            assert bool(mask[0, feature.index]) == feature.name.endswith(".active")
        else:
            assert bool(mask[0, feature.index])
