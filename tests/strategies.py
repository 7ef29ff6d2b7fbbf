"""Slot records as hypothesis draws them: every stage, with measurements that may be missing, extreme or not finite."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tensordict import TensorDict

from esper.seeds.slots import empty_records
from esper.seeds.stages import BLENDED, OCCUPIED, Stage

STAGES = (Stage.DORMANT, *OCCUPIED, Stage.CULLED, Stage.EMBARGOED)
accuracy = st.floats(0.0, 100.0, width=32)
contribution = st.one_of(st.just(float("nan")), st.floats(-50.0, 50.0, width=32), st.sampled_from([0.0, 1.0, -0.5]))


@st.composite
def seeds(draw: st.DrawFn, stages: tuple[Stage, ...] = STAGES, wild: bool = False) -> dict[str, Any]:
    """The fields of one slot."""
    stage = draw(st.sampled_from(stages))
    if stage not in OCCUPIED:
        return {"stage": stage}
    blended = stage in BLENDED
    sizes = st.floats(0.0, 200.0, width=32)
    numbers = st.one_of(sizes, st.sampled_from([float("nan"), float("inf"), 1e-9])) if wild else sizes
    share = st.floats(0.0, 1.0, width=32)
    health = st.one_of(share, st.just(float("nan"))) if wild else share
    measured = draw(st.floats(width=32) if wild else contribution) if blended else float("nan")
    return {
        "stage": stage,
        "alpha": draw(st.floats(0.0, 1.0, width=32)) if blended else 0.0,
        "age": draw(st.integers(0, 40)),
        "epochs_in_stage": draw(st.integers(0, 80)),
        "blueprint": draw(st.integers(0, 4)),
        "blend": draw(st.integers(0, 2)),
        "accuracy_at_germination": draw(accuracy),
        "accuracy_initial": draw(accuracy),
        "accuracy_current": draw(accuracy),
        "accuracy_at_stage_start": draw(accuracy),
        "contribution": measured,
        "contribution_age": -1 if measured != measured else draw(st.integers(0, 3)),
        "gradient_norm": draw(numbers),
        "gradient_ratio": draw(numbers),
        "gradient_health": draw(health),
        "parameters": draw(st.integers(1, 10**6)),
        "healthy": draw(st.booleans()),
        "planted": draw(st.integers(1, 9)),
    }


def to_records(slots: list[dict[str, Any]], n_hosts: int = 1) -> TensorDict:
    """Records `[N, S]` from the fields of every slot of every host, one host after another."""
    n_slots = len(slots) // n_hosts
    records = empty_records(n_hosts, n_slots)
    for i, fields in enumerate(slots):
        for name, value in fields.items():
            records[name][i // n_slots, i % n_slots] = value
    return records
