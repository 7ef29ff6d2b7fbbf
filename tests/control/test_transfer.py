"""A policy at hosts with other blueprints does, by name, what it would have done at those it learned with."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper import keys as k
from esper.control.policy import RecurrentPolicy
from esper.control.transfer import Transferred
from esper.environment.observation import FEATURES, INDEX
from esper.seeds.actions import BLUEPRINT, OP, Op
from esper.seeds.slots import LAYOUT

N, H = 400, 8
LEARNED, HERE = ("a", "b", "c"), ("c", "d", "a", "e")


def policy() -> RecurrentPolicy:
    """Weights large enough to care about every feature."""
    found = RecurrentPolicy(len(FEATURES), H, seed=0)
    with torch.no_grad():
        for head in ("blueprint", "op"):
            found.heads[head][-1].weight.mul_(300)
    return found


def hosts(blueprints: tuple[str, ...], offered: set[str]) -> TensorDict:
    """Random hosts with a seed in every slot, as seen where `blueprints` are; of them `offered` can be planted."""
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(N, len(FEATURES), generator=g)
    kinds = torch.randint(0, 2, (N, len(LAYOUT)), generator=g)
    for i, slot in enumerate(LAYOUT):
        for b in range(5):
            name = blueprints[b] if b < len(blueprints) else None
            here = [name == ("a", "c")[int(kind)] for kind in kinds[:, i]]
            observation[:, INDEX[f"{slot}.blueprint_{b}"]] = torch.tensor(here).float()
    mask = torch.tensor([b < len(blueprints) and blueprints[b] in offered for b in range(5)])
    return TensorDict(
        {
            "observation": observation,
            "mask_op": torch.ones(N, 4, dtype=torch.bool),
            "mask_slot": torch.ones(N, 4, 3, dtype=torch.bool),
            "mask_blueprint": mask.expand(N, 5).clone(),
            "mask_blend": torch.ones(N, 3, dtype=torch.bool),
            "key": k.host_keys(k.root(0), N),
            "is_init": torch.ones(N, 1, dtype=torch.bool),
            "hidden_h": torch.zeros(N, H),
            "hidden_c": torch.zeros(N, H),
        },
        batch_size=[N],
    )


@pytest.mark.parametrize("how", [ExplorationType.RANDOM, ExplorationType.MODE])
def test_blueprints_are_matched_by_name(how: ExplorationType) -> None:
    with torch.no_grad(), set_exploration_type(how):
        at_home = policy()(hosts(LEARNED, {"a", "c"}))
        abroad = Transferred(policy(), LEARNED, HERE)(hosts(HERE, set(HERE)))
    planting = at_home["action"][:, OP] == Op.GERMINATE
    assert 20 < int(planting.sum()) < N
    others = [head for head in range(4) if head != BLUEPRINT]
    assert torch.equal(at_home["action"][:, others], abroad["action"][:, others])
    names = [[LEARNED[b] for b in at_home["action"][planting, BLUEPRINT]]]
    names.append([HERE[b] for b in abroad["action"][planting, BLUEPRINT]])
    assert names[0] == names[1]
    assert set(names[0]) == {"a", "c"}
    assert bool((abroad["action"][~planting, BLUEPRINT] == 0).all())
    for key in ("action_log_prob", "state_value", ("next", "hidden_h")):
        assert torch.equal(at_home[key], abroad[key])


def test_what_it_would_do_is_what_it_does() -> None:
    rows = hosts(HERE, set(HERE))
    moved = Transferred(policy(), LEARNED, HERE)
    with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
        chosen = moved(rows.clone())["action"][:, OP]
        actions, _ = moved.evaluate(rows.unsqueeze(1))
    assert torch.equal(actions.op.mode.squeeze(1), chosen)


def test_without_a_common_blueprint_there_is_nothing_to_plant() -> None:
    with pytest.raises(ValueError, match="it has learned none of them but a, b, c"):
        Transferred(policy(), LEARNED, ("d", "e"))
