"""`BatchFirstCollector`: rollouts of all hosts as TensorDicts `[N, T]` (plan step 8).

The environment is batch-first inside: every device is issued its hosts' training step for batch `t` before batch `t +
1`. The collector adds what a TorchRL collector adds: the policy, its recurrent state, resets, and a stream of rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType

from esper.environment.env import GrowthEnv


class BatchFirstCollector(Collector):
    """Collects whole episodes of a `GrowthEnv` with any TorchRL policy; iterate to get rollouts `[N, T]`.

    One rollout is one episode of every host: `T` is the run's `max_epochs`. A policy that carries state offers
    `make_tensordict_primer()`, whose keys then start at zero at every reset. Raises ValueError for fewer than one
    rollout.
    """

    def __init__(
        self,
        env: GrowthEnv,
        policy: Callable[[TensorDictBase], TensorDictBase],
        *,
        rollouts: int,
        exploration: ExplorationType = ExplorationType.RANDOM,
        **options: Any,
    ) -> None:
        if rollouts < 1:
            raise ValueError(f"rollouts: {rollouts}; must be at least 1")
        primer = getattr(policy, "make_tensordict_primer", None)
        frames = env.batch_size.numel() * env.spec.rules.max_epochs
        whole: EnvBase = env if primer is None else TransformedEnv(env, primer())
        super().__init__(
            whole,
            policy,
            frames_per_batch=frames,
            total_frames=rollouts * frames,
            track_traj_ids=False,
            split_trajs=False,
            exploration_type=exploration,
            **options,
        )
        self.growth_env = env

    def __iter__(self) -> Iterator[TensorDictBase]:
        yield from super().__iter__()
