"""What the controller was about to do, by measured contribution: against a plain loop, and where there is nothing."""

import itertools

import pytest
import torch
from tensordict import TensorDict

from esper.control.policy import RecurrentPolicy
from esper.environment.observation import FEATURES, INDEX
from esper.learn.responses import BINS, aimed, responses
from esper.seeds.actions import SLOT, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage

N, T, H = 5, 7, 8


def rollout(seed: int = 0) -> TensorDict:
    """Random rows in which slots are in all stages and CULL and FOSSILIZE are often impossible somewhere."""
    g = torch.Generator().manual_seed(seed)
    observation = torch.randn(N, T, len(FEATURES), generator=g)
    codes = torch.randint(1, 8, (N, T, len(LAYOUT)), generator=g)
    points = torch.randint(-6, 7, (N, T, len(LAYOUT)), generator=g).float()
    for place, slot in enumerate(LAYOUT):
        observation[..., INDEX[f"{slot}.stage"]] = (codes[..., place] - 1) / 6
        observation[..., INDEX[f"{slot}.contribution"]] = points[..., place] / 10
    mask_slot = torch.rand(N, T, 4, 3, generator=g) < 0.5
    mask_op = mask_slot.any(-1)
    mask_op[..., Op.WAIT] = True
    return TensorDict(
        {
            "observation": observation,
            "mask_op": mask_op,
            "mask_slot": mask_slot,
            "mask_blueprint": torch.ones(N, T, 5, dtype=torch.bool),
            "mask_blend": torch.ones(N, T, 3, dtype=torch.bool),
            "is_init": torch.zeros(N, T, 1, dtype=torch.bool),
            "hidden_h": torch.zeros(N, T, H),
            "hidden_c": torch.zeros(N, T, H),
            "codes": codes,
            "points": points,
        },
        batch_size=[N, T],
    )


def bin_of(points: float) -> str:
    return BINS[sum(points >= edge for edge in (-3, -1, 0, 1, 3))]


def test_means_are_those_of_a_plain_loop() -> None:
    policy = RecurrentPolicy(len(FEATURES), H, seed=0)
    rows = rollout()
    with torch.no_grad():
        actions, _ = policy.evaluate(rows)
    table: dict[str, dict[str, list[float]]] = {b: {op.name: [] for op in Op} for b in BINS}
    for i in range(N):
        for t in range(T):
            for place in range(3):
                stage, points = int(rows["codes"][i, t, place]), float(rows["points"][i, t, place])
                if stage == Stage.PROBATIONARY or (stage == Stage.BLENDING and points != 0):
                    for op in Op:
                        p = float(actions.op.probs[i, t, op])
                        if op in (Op.CULL, Op.FOSSILIZE):
                            legal = rows["mask_slot"][i, t, op]
                            z = torch.where(legal, actions.logits[i, t, SLOT, :3], -torch.inf)
                            p *= float(z.softmax(-1)[place]) if bool(legal.any()) else 0.0
                        table[bin_of(points)][op.name].append(p)
    expected = {}
    for b, by_op in table.items():
        if by_op["WAIT"]:
            expected[f"response/slots/{b}"] = float(len(by_op["WAIT"]))
            expected |= {f"response/{op}/{b}": sum(values) / len(values) for op, values in by_op.items()}
    assert len(expected) > 20
    assert responses(policy, rows, 10.0) == pytest.approx(expected, abs=1e-6)


def test_what_an_op_was_aimed_at_is_counted_where_it_is_legal() -> None:
    policy, rows = RecurrentPolicy(len(FEATURES), H, seed=0), rollout()
    with torch.no_grad():
        actions, _ = policy.evaluate(rows)
    found = aimed(policy, rows, 10.0)
    assert list(found) == ["CULL", "FOSSILIZE"]
    for op in (Op.CULL, Op.FOSSILIZE):
        expected = []
        for i, t, place in itertools.product(range(N), range(T), range(3)):
            stage, points = int(rows["codes"][i, t, place]), float(rows["points"][i, t, place])
            measured = stage == Stage.PROBATIONARY or (stage == Stage.BLENDING and points != 0)
            if measured and bool(rows["mask_slot"][i, t, op, place]):
                z = torch.where(rows["mask_slot"][i, t, op], actions.logits[i, t, SLOT, :3], -torch.inf)
                chance = float(actions.op.probs[i, t, op]) * float(z.softmax(-1)[place])
                expected.append((points, chance, stage == Stage.PROBATIONARY))
        assert len(expected) > 5
        points, chances, due = (torch.tensor(column) for column in zip(*expected, strict=True))
        assert bool(due.any())
        assert not bool(due.all())
        assert torch.equal(found[op.name].probation, due)
        assert torch.allclose(found[op.name][0], points, atol=1e-4)
        assert torch.allclose(found[op.name][1], chances, atol=1e-6)


def test_culling_is_counted_where_it_is_aimed() -> None:
    """A policy whose slot head is fixed on the middle slot never aims at the others."""
    policy = RecurrentPolicy(len(FEATURES), H, seed=0)
    with torch.no_grad():
        policy.heads["slot"][-1].bias[1] = 60.0
    rows = rollout()
    rows["mask_slot"], rows["mask_op"] = torch.ones_like(rows["mask_slot"]), torch.ones_like(rows["mask_op"])
    for place, slot in enumerate(LAYOUT):
        rows["observation"][..., INDEX[f"{slot}.stage"]] = (Stage.PROBATIONARY - 1) / 6
        rows["observation"][..., INDEX[f"{slot}.contribution"]] = (-0.5, 0.5, -0.5)[place]
    seen = responses(policy, rows, 10.0)
    assert seen["response/slots/below -3"] == 2 * N * T
    assert seen["response/slots/3 and more"] == N * T
    assert seen["response/CULL/below -3"] == pytest.approx(0, abs=1e-6)
    assert seen["response/CULL/3 and more"] > 0.1


def test_contributions_are_told_in_points_whatever_the_scale() -> None:
    policy, rows = RecurrentPolicy(len(FEATURES), H, seed=0), rollout()
    near, far = aimed(policy, rows, 10.0), aimed(policy, rows, 50.0)
    for op, aim in near.items():
        assert torch.allclose(far[op].contribution, 5.0 * aim.contribution)
        assert torch.equal(far[op].probability, aim.probability)
    assert responses(policy, rows, 10.0) != responses(policy, rows, 50.0)


def test_without_seeds_there_is_nothing_to_report() -> None:
    rows = rollout()
    for slot in LAYOUT:
        rows["observation"][..., INDEX[f"{slot}.stage"]] = 0.0
    assert responses(RecurrentPolicy(len(FEATURES), H, seed=0), rows, 10.0) == {}
