"""A policy and what it learns with (plan steps 9 and 10)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from tensordict import TensorDict, TensorDictBase
from torch.optim import Optimizer

from esper import keys as k
from esper.checkpoint.tensors import like
from esper.control.policy import RecurrentPolicy
from esper.environment.observation import feature_mask
from esper.keys import Purpose
from esper.learn.normalizers import RunningMeanStd, scale_reward, update, update_reward_scale
from esper.learn.recorded import RecordedGradients
from esper.learn.responses import responses
from esper.learn.update import PPOSettings, UpdateObserver, entropy_coefficient, ppo_update


@dataclass
class Learner:
    """`contribution_scale` is that of the observations, in percentage points; the first `imitation` rollouts are those
    of a teacher; `rollouts` counts updates and keys their draws; `refused` counts the latest in a row that were not
    finite; `gradients` keeps what was recorded of them."""

    policy: RecurrentPolicy
    optimizer: Optimizer
    rewards: RunningMeanStd
    settings: PPOSettings
    key: torch.Tensor
    contribution_scale: float
    imitation: int = 0
    rollouts: int = 0
    refused: int = 0
    gradients: RecordedGradients = field(default_factory=RecordedGradients, repr=False)

    @property
    def imitates(self) -> bool:
        """Whether the next rollout to learn from is a teacher's."""
        return self.rollouts < self.imitation

    @property
    def imitated(self) -> bool:
        """Whether the last rollout learned from was a teacher's."""
        return 0 < self.rollouts <= self.imitation

    def learn(self, rollout: TensorDictBase, observer: UpdateObserver | None = None) -> dict[str, float]:
        """Update from one rollout `[N, T]`: rewards scaled and observations standardised by the statistics that held
        while it was collected; both statistics then learn from it, once. Of a teacher's rollout the policy learns the
        actions, and what they were worth.

        An update in which anything is not finite is refused as a whole: weights, moments and statistics stay as they
        were, `non_finite/<source>` in the metrics says why, and the next rollout tries again. `observer` looks on.
        """
        before = self.state()
        responded = responses(self.policy, rollout, self.contribution_scale)
        raw = rollout["next", "reward"].squeeze(-1)
        scaled = rollout.copy()
        scaled["next", "reward"] = scale_reward(self.rewards, raw).unsqueeze(-1)
        # However far a teacher's actions are from what the policy would have done, it has to come to them.
        settings = replace(self.settings, imitate=True, target_kl=None) if self.imitates else self.settings
        metrics = ppo_update(
            self.policy,
            self.optimizer,
            scaled,
            settings,
            entropy_coef=entropy_coefficient(self.rollouts * self.settings.ppo_updates_per_batch, self.settings),
            key=k.fold(self.key, Purpose.MINIBATCH, self.rollouts),
            observer=observer,
            gradients=self.gradients,
        )
        self.rollouts += 1
        if not torch.cat([p.detach().flatten() for p in self.policy.parameters()]).isfinite().all():
            metrics["non_finite/weights"] = 1.0
        if any(name.startswith("non_finite/") for name in metrics):
            self.load_state(before)
            self.refused += 1
            return {**metrics, "updates": 0.0}
        self.refused = 0
        observation = rollout["observation"]
        mask = feature_mask(observation.flatten(0, 1)).unflatten(0, observation.shape[:2])
        self.policy.load_statistics(update(self.policy.statistics, observation, mask))
        done = rollout["next", "done"].squeeze(-1)
        self.rewards = update_reward_scale(self.rewards, raw, done, self.settings.gamma)
        return {**metrics, **responded}

    def state(self) -> TensorDict:
        """Copies of `weights` (with the observation statistics), `moments` by parameter, and `rewards`."""
        moments = self.optimizer.state_dict()["state"]
        return TensorDict(
            {
                "weights": TensorDict(self.policy.state_dict()).clone(),
                "moments": TensorDict({str(index): TensorDict(moment).clone() for index, moment in moments.items()}),
                "rewards": self.rewards.clone(),
            }
        )

    def load_state(self, state: TensorDict) -> None:
        """Go on from what `state` gave. Raises ValueError for tensors that do not fit the policy."""
        model = self.state()
        if state.keys() != model.keys():
            raise ValueError(f"learner: {', '.join(state.keys())}; must be {', '.join(model.keys())}")
        weights, rewards = (like(state[name], model[name]) for name in ("weights", "rewards"))
        moments = {}
        for index, parameter in enumerate(self.policy.parameters() if not state["moments"].is_empty() else ()):
            fitting = {"step": torch.zeros(()), "exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach()}
            moments[index] = dict(like(state["moments", str(index)], TensorDict(fitting)).clone().items())
        if len(state["moments"].keys()) != len(moments):
            raise ValueError(f"moments: {', '.join(state['moments'].keys())}; must be of {len(moments)} parameters")
        self.policy.load_state_dict(dict(weights.items()))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.rewards = rewards.clone()
