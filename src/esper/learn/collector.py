"""`BatchFirstCollector`: rollouts of all hosts as TensorDicts `[N, T]` (plan step 8).

The environment is batch-first inside: every device is issued its hosts' training step for batch `t` before batch `t +
1`. The collector adds what a TorchRL collector adds: the policy, its recurrent state, resets, and a stream of rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from esper.checkpoint.tensors import like
from esper.environment.env import GrowthEnv


class BatchFirstCollector(Collector):
    """Collects whole episodes of a `GrowthEnv` with any TorchRL policy; iterate to get rollouts `[N, T]`.

    One rollout is one episode of every host: `T` is the run's `max_epochs`. A policy that carries state offers
    `make_tensordict_primer()`, whose keys then start at zero at every reset; from step to step it is given those, as it
    returned them (in `next`, or unchanged), and what the environment tells, nothing else.

    A rollout can be left and taken up again between any two of its steps: `between` is called there, `position` is the
    value to keep and `go_on` takes it up. Raises ValueError for fewer than one rollout.
    """

    _carrier: TensorDictBase

    def __init__(
        self,
        env: GrowthEnv,
        policy: Callable[[TensorDictBase], TensorDictBase],
        *,
        rollouts: int,
        exploration: ExplorationType = ExplorationType.RANDOM,
        between: Callable[[], None] | None = None,
    ) -> None:
        if rollouts < 1:
            raise ValueError(f"rollouts: {rollouts}; must be at least 1")
        primer = getattr(policy, "make_tensordict_primer", None)
        n_hosts = env.batch_size.numel()
        whole: EnvBase = env if primer is None else TransformedEnv(env, primer())
        super().__init__(
            whole,
            policy,
            frames_per_batch=n_hosts * env.spec.rules.max_epochs,
            total_frames=rollouts * n_hosts * env.spec.rules.max_epochs,
            track_traj_ids=False,
            split_trajs=False,
            # Rollouts are TensorDicts of their own: nothing is copied into a buffer and out of it again, and nothing
            # is on its way between devices.
            use_buffers=False,
            return_same_td=True,
            no_cuda_sync=True,
            exploration_type=exploration,
        )
        self.growth_env = env
        self.between = between
        self._steps: list[TensorDictBase] = []
        self._given = tuple(self._carrier.keys(include_nested=True, leaves_only=True))

    def __iter__(self) -> Iterator[TensorDictBase]:
        for rollout in super().__iter__():
            yield rollout.to(self.growth_env.device)

    def rollout(self) -> TensorDictBase:
        """Collect what is left of the present episode; returns the whole of it, `[N, T]`."""
        self.advance()
        while len(self._steps) < self.growth_env.spec.rules.max_epochs:
            if self.between is not None:
                self.between()
            self.advance()
        steps, self._steps = self._steps, []
        return torch.stack(steps, 1)

    @torch.no_grad()
    def advance(self) -> None:
        """Collect one step of all hosts; while GPUs work, what it was worth is filled in before its episode ends."""
        with set_exploration_type(self.exploration_type), self.growth_env.paid_later():
            chosen = self.policy(self._carrier)
            if chosen is not self._carrier:
                self._carrier.update(chosen)
            following = self.growth_env.advance(self._carrier)
            for name, value in self._carrier.pop("next", {}).items():
                following.setdefault(name, value)
            for name in self._given:
                following.setdefault(name, self._carrier[name])
            self._steps.append(self._carrier.set("next", following))
            self._carrier = following.select(*self._given)
            if self.growth_env.ended:
                self._carrier = self.env.maybe_reset(self._carrier)

    def position(self) -> Callable[[], TensorDict]:
        """Where collecting stands between two steps; call the result for a TensorDict of `carrier` `[N]`, what the
        policy sees next, and `rollout` `[N, t]`, the steps of the present episode (empty at its start)."""
        carrier, steps = self._carrier.select(*self._given), list(self._steps)
        return lambda: TensorDict({"carrier": carrier, "rollout": torch.stack(steps, 1) if steps else TensorDict()})

    def go_on(self, position: TensorDict, rollouts: int) -> None:
        """Take up collecting at `position`, after `rollouts` whole ones.

        Raises ValueError if it does not fit: another number of hosts, other keys, shapes or types.
        """
        if position.keys() != {"carrier", "rollout"}:
            raise ValueError(f"collector: {', '.join(position.keys())}; must be carrier, rollout")
        carrier, rollout = like(position["carrier"], self._carrier.select(*self._given)), position["rollout"]
        if not rollout.is_empty():
            shape = (*self.growth_env.batch_size, self.growth_env.epoch)
            if rollout.batch_size != shape:
                raise ValueError(f"rollout: {list(rollout.batch_size)}; must be {list(shape)}")
            like(rollout[:, -1], self._step_template(carrier))
        self._carrier = carrier
        self._steps = [] if rollout.is_empty() else list(rollout.to(self.growth_env.device).unbind(1))
        frames = rollouts * carrier.batch_size.numel() * self.growth_env.spec.rules.max_epochs
        self.load_state_dict({"frames": frames, "iter": rollouts - 1}, strict=False)

    def _step_template(self, carrier: TensorDict) -> TensorDictBase:
        """What a step of a rollout looks like, `[N]`."""
        with torch.no_grad():
            step = self.policy(carrier.clone())
        following = carrier.clone().update({"reward": self.growth_env.reward_spec.zero()})
        return step.update({"next": following})
