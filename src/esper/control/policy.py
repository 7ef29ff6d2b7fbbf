"""The controller that learns: a recurrent actor-critic over host observations, usable as a TorchRL policy.

Letters: `N` hosts, `T` epochs, `D` observation features, `H` recurrent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.functional import pad
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type

from esper.control.distributions import MAX_WIDTH, WIDTHS, ActionMasks, FactoredActions
from esper.control.normalization import RunningMeanStd, normalize, running_mean_std
from esper.control.recurrence import Recurrence
from esper.keys import uniform
from esper.seeds.actions import HEADS, Op

HEAD_HIDDEN = 64
MASK_KEYS = ("mask_op", "mask_slot", "mask_blueprint", "mask_blend")
HIDDEN_KEYS = ("hidden_h", "hidden_c")
GREEDY = (ExplorationType.DETERMINISTIC, ExplorationType.MODE)


def action_masks(td: TensorDictBase) -> ActionMasks:
    """The four masks of a rollout or of one step."""
    return ActionMasks(**{key.removeprefix("mask_"): td[key] for key in MASK_KEYS})


class RecurrentPolicy(TensorDictModuleBase):
    """Linear, LayerNorm, ReLU, LSTM, LayerNorm, then four action heads and a value head (plan step 11).

    As a TorchRL policy it advances `[N]` hosts by one step. Draws are keyed by the int64 `key` of each host, so they
    depend on nothing else; under TorchRL's exploration types MODE and DETERMINISTIC it takes the likeliest action
    instead. Observations arrive raw and are standardised with statistics kept in buffers, which only
    `load_statistics` changes.
    """

    def __init__(
        self,
        observation_dim: int,
        hidden_dim: int = 128,
        *,
        seed: int = 0,
        floors: Sequence[float] = (0.0,) * 4,
        patience: float = 0.0,
    ) -> None:
        """Weights are drawn from a generator seeded with `seed`; the global generator is left alone.

        Before it has learned anything, WAIT and FOSSILIZE are each `exp(patience)` times as likely as GERMINATE and
        CULL: a seed can only be judged if what was planted is mostly left to grow and kept.

        `floors` is the least probability of every legal entry of each head, in the order of `HEADS`, in the rollout and
        in the update alike. Raises ValueError for one outside 0 <= floor < 1 / (entries of the head).
        """
        super().__init__()
        self.in_keys = ["observation", *MASK_KEYS, "key", "is_init", *HIDDEN_KEYS]
        self.out_keys = ["action", "action_log_prob", "state_value", *(("next", key) for key in HIDDEN_KEYS)]
        self.observation_dim, self.hidden_dim = observation_dim, hidden_dim
        for head, width, floor in zip(HEADS, WIDTHS, floors, strict=True):
            if not 0 <= floor < 1 / width:
                raise ValueError(f"floors: {floor} for {head}; must be at least 0 and below 1/{width}")
        self.register_buffer("floors", torch.tensor(floors) if any(floors) else None, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self.features = nn.Sequential(
            _linear(observation_dim, hidden_dim, math.sqrt(2), generator), nn.LayerNorm(hidden_dim), nn.ReLU()
        )
        self.memory = Recurrence(hidden_dim, hidden_dim, generator)
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.heads = nn.ModuleDict(
            {name: _head(hidden_dim, width, 0.01, generator) for name, width in zip(HEADS, WIDTHS, strict=True)}
        )
        self.value = _head(hidden_dim, 1, 1.0, generator)
        with torch.no_grad():
            self.get_parameter("heads.op.2.bias")[[Op.WAIT, Op.FOSSILIZE]] = patience
        for name, tensor in running_mean_std(observation_dim).items():
            self.register_buffer(f"observation_{name}", tensor)

    @property
    def statistics(self) -> RunningMeanStd:
        """The observation statistics, a copy."""
        names = ("mean", "var", "count")
        return TensorDict({name: self.get_buffer(f"observation_{name}").clone() for name in names})

    def load_statistics(self, state: RunningMeanStd) -> None:
        """Use `state` (features `[D]`) from now on."""
        for name, tensor in state.items():
            self.get_buffer(f"observation_{name}").copy_(tensor)

    def unroll(self, td: TensorDictBase, starts: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits `[N, T, 4, 5]` (padded with zeros), values `[N, T, 1]`, the recurrent state `[N, H]` after all steps.

        `td` is `[N, T]` with `observation`, `is_init` and the stored recurrent state; of that only each row's first is
        used, the rest is run again. `starts` are the `restarts` of `is_init`, None to read them here.
        """
        h, c = (td[key][:, 0] for key in HIDDEN_KEYS)
        return self._run(td["observation"], h, c, td["is_init"].squeeze(-1), starts)

    def evaluate(self, td: TensorDictBase, starts: Sequence[int] | None = None) -> tuple[FactoredActions, Tensor]:
        """The distribution over actions and the values `[N, T, 1]` along stored rows `[N, T]`, with `starts` as in
        `unroll`."""
        logits, value, _, _ = self.unroll(td, starts)
        return FactoredActions(logits, action_masks(td), self.floors), value

    def next_value(self, td: TensorDictBase) -> Tensor:
        """V(s_{t+1}) `[N, T, 1]` from `next.observation` and the recurrent state that step t left behind, not reset."""
        following = td["next"].select("observation", *HIDDEN_KEYS).flatten(0, 1)
        h, c = (following[key] for key in HIDDEN_KEYS)
        never = torch.zeros(following.batch_size[0], 1, dtype=torch.bool, device=h.device)
        _, value, _, _ = self._run(following["observation"].unsqueeze(1), h, c, never)
        return value.reshape(*td.batch_size, 1)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Choose actions for one step of `[N]` hosts; writes the out_keys into `td`."""
        h, c = (td[key] for key in HIDDEN_KEYS)
        logits, value, h, c = self._run(td["observation"].unsqueeze(1), h, c, td["is_init"])
        actions = FactoredActions(logits.squeeze(1), action_masks(td), self.floors)
        uniforms = None if exploration_type() in GREEDY else uniform(td["key"], len(HEADS))
        outputs = (*actions.choose(uniforms), value.squeeze(1), h, c)
        for key, tensor in zip(self.out_keys, outputs, strict=True):
            td.set(key, tensor)
        return td

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that puts the recurrent state into an environment's specs and its reset."""
        return TensorDictPrimer({key: Unbounded(shape=(self.hidden_dim,)) for key in HIDDEN_KEYS}, expand_specs=True)

    def _run(
        self, observation: Tensor, h: Tensor, c: Tensor, is_init: Tensor, starts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.features(normalize(self.statistics, observation))
        y, h, c = self.memory(x, h, c, is_init, starts)
        y = self.memory_norm(y)
        by_head = (self.heads[name](y) for name in HEADS)
        logits = torch.stack([pad(z, (0, MAX_WIDTH - z.shape[-1])) for z in by_head], -2)
        return logits, self.value(y), h, c


def _linear(n_in: int, n_out: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _head(n_in: int, n_out: int, gain: float, generator: torch.Generator) -> nn.Sequential:
    return nn.Sequential(
        _linear(n_in, HEAD_HIDDEN, math.sqrt(2), generator),
        nn.ReLU(),
        _linear(HEAD_HIDDEN, n_out, gain, generator),
    )
