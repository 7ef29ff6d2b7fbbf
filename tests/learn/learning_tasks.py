"""Two small environments with a known optimum, made of the keys a `GrowthEnv` offers, and a loop that learns them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper.control.policy import RecurrentPolicy
from esper.keys import Purpose, fold, host_keys, integers, root
from esper.learn.update import PPOSettings, ppo_update
from esper.seeds.actions import BLEND, BLUEPRINT, OP, SLOT, Op

MASKS = {"mask_op": (4,), "mask_slot": (4, 3), "mask_blueprint": (5,), "mask_blend": (3,)}


class SmallEnv(EnvBase):
    """Episodes of `T` steps for `N` hosts; everything is legal."""

    def __init__(self, n_hosts: int, steps: int, features: int, seed: int) -> None:
        super().__init__(batch_size=[n_hosts])
        self.steps, self.features, self.seed, self.episode, self.t = steps, features, seed, 0, 0
        n = n_hosts
        masks = {key: Binary(shape=(n, *shape), dtype=torch.bool) for key, shape in MASKS.items()}
        self.observation_spec = Composite(
            observation=Unbounded((n, features)),
            key=Unbounded((n,), dtype=torch.int64),
            is_init=Binary(shape=(n, 1), dtype=torch.bool),
            **masks,
            shape=(n,),
        )
        self.action_spec = Categorical(5, shape=(n, 4))
        self.reward_spec = Unbounded((n, 1))
        self.done_spec = Composite(
            {key: Binary(shape=(n, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")}, shape=(n,)
        )

    @abstractmethod
    def observe(self) -> Tensor:
        """What every host sees now."""

    @abstractmethod
    def pay(self, action: Tensor) -> Tensor:
        """What each action is worth now."""

    def _state(self) -> dict[str, Tensor]:
        n = self.batch_size[0]
        self.hosts = host_keys(fold(root(self.seed), self.episode), n)
        masks = {key: torch.ones(n, *shape, dtype=torch.bool) for key, shape in MASKS.items()}
        is_init = torch.full((n, 1), self.t == 0)
        key = fold(self.hosts, Purpose.POLICY, self.t)
        return {"observation": self.observe(), "key": key, "is_init": is_init, **masks}

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDictBase:
        self.episode, self.t = self.episode + 1, 0
        return TensorDict(self._state(), batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward = self.pay(tensordict["action"])
        self.t += 1
        end = torch.full((*self.batch_size, 1), self.t == self.steps)
        ends = {"done": end, "terminated": end, "truncated": torch.zeros_like(end)}
        return TensorDict({**self._state(), **ends, "reward": reward.unsqueeze(-1)}, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self.seed = seed


class Bandit(SmallEnv):
    """One step, nothing to see: GERMINATE pays 0.4 and each right other head 0.2 more. The optimum is 1."""

    def __init__(self, seed: int) -> None:
        super().__init__(n_hosts=64, steps=1, features=4, seed=seed)

    def observe(self) -> Tensor:
        return torch.ones(*self.batch_size, self.features)

    def pay(self, action: Tensor) -> Tensor:
        right = (action[:, SLOT] == 2).float() + (action[:, BLUEPRINT] == 3).float() + (action[:, BLEND] == 1).float()
        return (action[:, OP] == Op.GERMINATE) * (0.4 + 0.2 * right)


class Memory(SmallEnv):
    """A cue shown once says which op pays 1 at the last of four steps. The optimum is 1, a quarter without memory."""

    def __init__(self, seed: int) -> None:
        super().__init__(n_hosts=64, steps=4, features=5, seed=seed)

    @property
    def cue(self) -> Tensor:
        return integers(fold(self.hosts, Purpose.EPISODE), 4)

    def observe(self) -> Tensor:
        shown = torch.nn.functional.one_hot(self.cue, 4).float() * (self.t == 0)
        return torch.cat([shown, torch.full((*self.batch_size, 1), self.t / self.steps)], -1)

    def pay(self, action: Tensor) -> Tensor:
        return (action[:, OP] == self.cue).float() * (self.t == self.steps - 1)


def collect(env: SmallEnv, policy: RecurrentPolicy, *, greedy: bool = False) -> TensorDictBase:
    """One episode of every host, `[N, T]`."""
    mode = ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM
    primed = TransformedEnv(env, policy.make_tensordict_primer())
    with torch.no_grad(), set_exploration_type(mode):
        return primed.rollout(env.steps, policy, break_when_any_done=False)


def mean_return(rollout: TensorDictBase) -> float:
    """Undiscounted return of an episode."""
    return rollout["next", "reward"].sum(1).mean().item()


def learn(env: SmallEnv, seed: int, rollouts: int) -> float:
    """Mean return of the greedy policy after learning from `rollouts` rollouts, from scratch."""
    policy = RecurrentPolicy(env.features, 32, seed=seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3, eps=1e-5)
    settings = PPOSettings(target_kl=0.05, gamma=0.99)
    for index in range(rollouts):
        rollout = collect(env, policy)
        ppo_update(policy, optimizer, rollout, settings, entropy_coef=0.01, key=fold(root(seed), index))
    return mean_return(collect(env, policy, greedy=True))
