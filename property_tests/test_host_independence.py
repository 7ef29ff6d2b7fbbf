"""A host's numbers are its own: neither its neighbours nor how many there are can be felt."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from esper import keys as k
from esper.growth.executors.loop import LoopExecutor
from esper.growth.plan import make_plan
from esper.growth.state import fresh_growth
from esper.growth.step import act
from esper.seeds.actions import Op
from esper.seeds.stages import BLENDS
from tiny import Run, action, differing, flat, germinate, same, tiny_spec

SPEC = tiny_spec(blueprints=("conv_light", "norm"))
RATE = torch.full((3,), 0.1, dtype=torch.float64)
FRESH = fresh_growth(SPEC, k.host_keys(k.root(1), 3), RATE, RATE).exclude("snapshot")

seeds = st.one_of(
    st.none(), st.tuples(st.integers(0, 2), st.integers(0, len(SPEC.blueprints) - 1), st.integers(0, len(BLENDS) - 1))
)


def epoch(growth: TensorDict, key: torch.Tensor) -> tuple[TensorDict, TensorDict, TensorDict]:
    """Two steps of training and an evaluation on data drawn from each host's key."""
    executor, plan, n = LoopExecutor(SPEC), make_plan(growth["slots"], SPEC), growth.batch_size[0]
    keys = k.fold(growth["key"], key)
    carry = executor.begin(growth, plan)
    for t in range(2):
        x, y = k.normal(k.fold(keys, t), 4, 1, 8, 8), k.integers(k.fold(keys, t, 1), 10, 4)
        carry = executor.train_step(carry, x, y, RATE[:n], RATE[:n], k.fold(keys, t, 2), t == 1)
    growth, measured = executor.finish(carry, growth), executor.measured(carry)
    scoring = executor.begin_evaluation(growth, plan, k.normal(key, 6, 1, 8, 8))
    scoring = executor.evaluate_step(scoring, k.normal(key, 6, 1, 8, 8), k.integers(keys, 10, 6))
    return growth, measured, executor.finish_evaluation(scoring)


@given(
    choices=st.tuples(seeds, seeds, seeds),
    other=seeds,
    changed_host=st.integers(0, 2),
    poison=st.sampled_from([None, 0.5, float("nan"), float("inf")]),
    seed=st.integers(0, 2**31),
)
def test_changing_one_host_leaves_the_others_identical(choices, other, changed_host, poison, seed):
    key = k.root(seed)

    def outcome(mine, damage):
        chosen = [mine if i == changed_host else choice for i, choice in enumerate(choices)]
        asked = {i: (Op.GERMINATE, *choice) for i, choice in enumerate(chosen) if choice is not None}
        growth, _ = act(SPEC, FRESH, action(3, asked), torch.full((3,), 10.0))
        if damage is not None:
            growth = growth.clone()
            growth["host", "params", "head", "weight"][changed_host] += damage
            growth["host", "moments", "blocks", "0", "conv", "weight"][changed_host] += damage
        return epoch(growth, key)

    rest = torch.tensor([i for i in range(3) if i != changed_host])
    for a, b in zip(outcome(choices[changed_host], None), outcome(other, poison), strict=True):
        assert not differing(a[rest], b[rest])


@given(chosen=st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True), seed=st.integers(0, 2**31))
def test_a_host_is_the_same_in_a_smaller_stack(chosen, seed):
    key = k.root(seed)
    asked = action(3, {0: germinate(0), 1: germinate(1, blueprint=1), 2: germinate(2, blend=2)})
    growth, _ = act(SPEC, FRESH, asked, torch.full((3,), 10.0))
    rows = torch.tensor(chosen)
    for whole, part in zip(epoch(growth, key), epoch(growth[rows], key), strict=True):
        assert not differing(whole[rows], part)


def test_a_run_in_a_stack_of_four_equals_its_part_of_a_stack_of_eight():
    keys = k.host_keys(k.root(2), 8)
    big, small = Run(SPEC, n=8, host_keys=keys), Run(SPEC, n=4, host_keys=keys[:4])
    script = {
        0: {0: germinate(0), 1: germinate(1, blueprint=1), 5: germinate(0), 6: germinate(2)},
        1: {2: germinate(2, blend=2), 7: germinate(1)},
        4: {0: (Op.CULL, 0), 3: germinate(0), 5: (Op.CULL, 0)},
    }
    for t in range(6):
        asked = action(8, script.get(t, {}))
        whole, part = big.step(asked), small.step(asked[:4])
        assert not differing(whole[:4], part)
    assert not differing(big.growth[:4], small.growth)
    assert not same(*(flat(big.growth)["host", "params", "head", "weight"][i] for i in (3, 7)))
