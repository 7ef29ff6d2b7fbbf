# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Add a blueprint
#
# A blueprint is two pure functions: `init(keys, channels, dtype)` makes the parameters of one seed per key, every
# leaf `[N, ...]`; `apply(params, x)` maps features to features of the same shape for one host. Registered, it can be
# planted like the built-in ones.

# %%
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.hosts import init
from esper.hosts.base import Tree
from esper.learn.collector import BatchFirstCollector
from esper.seeds.blueprints.registry import Blueprint, parameter_count, register

# %% [markdown]
# A residual bottleneck of 1x1 convolutions. Its way out starts at zero, so the seed is the identity when it is
# planted.


# %%
def bottleneck_init(keys: Tensor, channels: int, dtype: torch.dtype) -> TensorDict:
    hidden = max(1, channels // 2)
    return TensorDict(
        {
            "down": init.conv_weight(k.fold(keys, 0), hidden, channels, 1, dtype),
            "up": init.constant(keys, (channels, hidden, 1, 1), 0.0, dtype),
        },
        batch_size=keys.shape,
    )


def bottleneck(params: Tree, x: Tensor) -> Tensor:
    return x + F.conv2d(F.relu(F.conv2d(x, params["down"])), params["up"])


seed = register(Blueprint("bottleneck", "cnn", bottleneck_init, bottleneck, "residual 1x1 bottleneck"))
print({channels: parameter_count(seed, channels) for channels in (4, 8, 16)})

# %% [markdown]
# The name can now be used in a configuration, next to others. A fixed schedule plants it in every host before the
# first epoch.

# %%
config = TrainingConfig(
    task="digits",
    slots=["mid"],
    blueprints=["bottleneck", "norm"],
    controller="schedule",
    schedule=[{"epoch": 0, "op": "germinate", "slot": "mid", "blueprint": "bottleneck", "blend": "linear"}],
    n_envs=2,
    max_epochs=10,
    train_samples=256,
    gates="permissive",
)
env = build_env(config)
collector = BatchFirstCollector(env, build_controller(config, env), rollouts=1)
rollout = next(iter(collector))
collector.shutdown()

# %% [markdown]
# What became of the seeds: stage, alpha and the points of accuracy that each is worth.

# %%
records = env.finished_growth()[0]["slots"]
for host in range(config.n_envs):
    record = records[host, 0]
    print(host, int(record["stage"]), f"alpha {record['alpha']:.2f}, contribution {record['contribution']:+.2f} points")
assert (records["planted"] == 1).all()
