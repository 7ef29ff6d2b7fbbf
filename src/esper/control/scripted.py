"""Any controller as a TorchRL policy, so that everyone decides through the same collector and the same environment."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer

from esper.control.simple import Controller

_PREFIX = "carry_"
_SEEN = ["observation", "mask_op", "mask_slot", "mask_blueprint", "mask_blend", "key", "is_init"]


class ScriptedPolicy(TensorDictModuleBase):
    """Runs a `Controller` on `[N]` hosts. What it remembers travels in the TensorDict under `carry_<name>`, as a
    recurrent state does, and starts afresh where `is_init`."""

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self.controller = controller
        self.carried = {name: _PREFIX + name for name in sorted(controller.init(1).keys())}
        self.in_keys = [*_SEEN, *self.carried.values()]
        self.out_keys = ["action", *(("next", key) for key in self.carried.values())]

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Write `action` int64 `[N, 4]` and the carry of the next step."""
        begins = td["is_init"].squeeze(-1)
        # TorchRL's collectors hand over TensorDicts without a device of their own.
        fresh = self.controller.init(td.batch_size[0]).to(begins.device)
        carry = TensorDict(
            {name: _where(begins, fresh[name], td[key]) for name, key in self.carried.items()}, batch_size=td.batch_size
        )
        action, carry = self.controller.act(td, carry)
        td.set("action", action)
        for name, key in self.carried.items():
            td.set(("next", key), carry[name])
        return td

    def make_tensordict_primer(self) -> TensorDictPrimer | None:
        """The transform that puts the carry into an environment's specs and its reset; None without a carry."""
        if not self.carried:
            return None
        one = self.controller.init(1)
        specs = {key: Unbounded(shape=one[n].shape[1:], dtype=one[n].dtype) for n, key in self.carried.items()}
        return TensorDictPrimer(specs, expand_specs=True)


def _where(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.reshape(-1, *[1] * (a.dim() - 1)), a, b)
