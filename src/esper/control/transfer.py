"""A learned policy at hosts with other blueprints than those it learned with.

Slots have fixed places and every number of an observation is relative (to the episode's length, to the host's
parameters), so hosts of another width, depth or task look alike. Blueprints are places in a list: here they are matched
by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import TensorDictPrimer

from esper.control.distributions import FactoredActions
from esper.control.policy import RecurrentPolicy
from esper.environment.observation import INDEX
from esper.seeds.actions import BLUEPRINT, MAX_BLUEPRINTS, OP, Op
from esper.seeds.slots import LAYOUT


class Transferred(TensorDictModuleBase):
    """`policy`, which learned with the blueprints `learned`, where the blueprints are `here`.

    It sees and plants each blueprint in the place it learned it in. What it has not learned it never plants, and what
    is not here is masked. Raises ValueError if there is nothing it could plant.
    """

    def __init__(self, policy: RecurrentPolicy, learned: Sequence[str], here: Sequence[str]) -> None:
        super().__init__()
        if not set(learned) & set(here):
            raise ValueError(f"blueprints: {', '.join(here)}; it has learned none of them but {', '.join(learned)}")
        self.policy = policy
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys
        place = torch.tensor([here.index(name) if name in here else -1 for name in learned])
        absent = torch.full((MAX_BLUEPRINTS - len(place),), -1)
        self._here = torch.cat([place, absent])  # where each place of the policy's blueprint head is in `here`
        columns = torch.arange(policy.observation_dim)
        for slot in LAYOUT:
            first = INDEX[f"{slot}.blueprint_0"]
            columns[first : first + MAX_BLUEPRINTS] = torch.where(self._here < 0, -1, first + self._here)
        self._columns = columns  # where each feature the policy sees is in an observation, -1 for nowhere

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Choose actions for one step of `[N]` hosts; writes the out_keys into `td`."""
        seen = self.policy(self._seen(td.select(*self.in_keys)))
        action = seen["action"].clone()
        planted = self._here.to(action.device)[action[:, BLUEPRINT]]
        action[:, BLUEPRINT] = torch.where(action[:, OP] == Op.GERMINATE, planted, 0)
        for key in self.out_keys:
            td.set(key, seen[key])
        return td.set("action", action)

    def evaluate(self, td: TensorDictBase) -> tuple[FactoredActions, Tensor]:
        """As the policy's own, along stored rows `[N, T]`; blueprints are in the places it learned them in."""
        return self.policy.evaluate(self._seen(td))

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The policy's own."""
        return self.policy.make_tensordict_primer()

    def _seen(self, td: TensorDictBase) -> TensorDict:
        observation, mask = td["observation"], td["mask_blueprint"]
        seen: TensorDict = td.clone(recurse=False)
        seen["observation"] = _gathered(observation, self._columns)
        seen["mask_blueprint"] = _gathered(mask, self._here)
        return seen


def _gathered(values: Tensor, places: Tensor) -> Tensor:
    """`values` `[..., D]` at `places` `[F]`; zero where a place is -1."""
    places = places.to(values.device)
    return values[..., places.clamp(min=0)].masked_fill(places < 0, 0)
