# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A TorchRL transform and a TorchRL loss on our rollouts
#
# `GrowthEnv` is an ordinary TorchRL environment. Here a small feed-forward policy decides only *what to do*; where
# and with which blueprint is left to the first legal choice. It is trained with TorchRL's own `ClipPPOLoss` and
# `GAE`, and TorchRL's `RewardSum` keeps the return.

# %%
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from esper.build import build_env
from esper.config import TrainingConfig
from esper.seeds.actions import HEADS, OP, SLOT, Op

torch.manual_seed(0)
config = TrainingConfig(
    task="digits", slots=["early", "mid"], n_envs=3, max_epochs=8, train_samples=256, gates="permissive"
)
env = TransformedEnv(build_env(config), RewardSum())

# %% [markdown]
# The actor's distribution is over `op`; a last module turns `op` into the environment's action `[N, 4]`.


# %%
def mlp(n_out: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(32), nn.Tanh(), nn.Linear(32, n_out))


actor = ProbabilisticActor(
    TensorDictModule(mlp(len(Op)), in_keys=["observation"], out_keys=["logits"]),
    in_keys={"logits": "logits", "mask": "mask_op"},
    out_keys=["op"],
    distribution_class=MaskedCategorical,
    return_log_prob=True,
    log_prob_key="op_log_prob",
)
critic = ValueOperator(mlp(1), in_keys=["observation"])


def spell_out(op: torch.Tensor, mask_slot: torch.Tensor) -> torch.Tensor:
    action = torch.zeros(*op.shape, len(HEADS), dtype=torch.int64)
    allowed = mask_slot.gather(-2, op[..., None, None].expand(*op.shape, 1, mask_slot.shape[-1])).squeeze(-2)
    action[..., OP], action[..., SLOT] = op, allowed.to(torch.int64).argmax(-1)
    return action


policy = TensorDictSequential(actor, TensorDictModule(spell_out, in_keys=["op", "mask_slot"], out_keys=["action"]))
with torch.no_grad():
    critic(policy(env.reset()))  # lazy layers learn their width here

# %%
loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
loss.set_keys(action="op", sample_log_prob="op_log_prob")
advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
frames = config.n_envs * config.max_epochs
collector = Collector(env, policy, frames_per_batch=frames, total_frames=2 * frames)


def update(rollout: TensorDictBase) -> float:
    with torch.no_grad():
        advantage(rollout)
    values = loss(rollout.reshape(-1))
    total = sum(value for name, value in values.items() if name.startswith("loss_"))
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return float(total.detach())


for rollout in collector:
    last = [update(rollout) for _ in range(3)][-1]
    returns = rollout["next", "episode_reward"][:, -1]
    print(f"rollout {tuple(rollout.shape)}: return {returns.mean():.2f}, loss {last:.3f}")
    assert torch.isfinite(returns).all()
collector.shutdown()
