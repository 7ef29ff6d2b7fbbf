# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Add a task
#
# A task is a host, its data and the constants that fit both. `load(key, folder)` returns three splits of uint8 images
# and labels; every random choice in it is drawn from `key`, so a run can be repeated.

# %%
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from esper import keys as k
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.data.splits import Split, Splits, channel_moments
from esper.environment.observation import feature
from esper.hosts.cnn import CNNHost
from esper.learn.collector import BatchFirstCollector
from esper.tasks import get_task, register_task

# %% [markdown]
# The task: is the bright bar in a noisy image upright, level, or one of two diagonals?

# %%
SIDE, SIZES = 8, (256, 128, 128)


def bars(key: Tensor, n: int) -> Split:
    labels = k.integers(k.fold(key, 0), 4, n)
    noise = k.uniform(k.fold(key, 1), n, SIDE, SIDE)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    patterns = torch.stack([column == 3, row == 3, row == column, row + column == SIDE - 1]).float()
    images = 255 * (0.6 * noise + 0.4 * patterns[labels])
    return Split(images.round().to(torch.uint8).unsqueeze(1), labels)


def load(key: Tensor, folder: Path) -> Splits:
    train, validation, test = (bars(k.fold(key, place), n) for place, n in enumerate(SIZES))
    return Splits(train, validation, test, *channel_moments(train.inputs))


# %% [markdown]
# Constants are best taken from a task that is alike; `Task` says what each of them means.

# %%
task = register_task(
    replace(
        get_task("digits"),
        name="bars",
        host=lambda: CNNHost(in_channels=1, num_classes=4, base_channels=4, pool_layers=2),
        load=load,
        n_outputs=4,
        batch_size=32,
        max_epochs=8,
    )
)

config = TrainingConfig(task="bars", slots=["early", "mid"], controller="random", n_envs=2, gates="permissive")
env = build_env(config)
collector = BatchFirstCollector(env, build_controller(config, env), rollouts=1)
rollout = next(iter(collector))
collector.shutdown()

# %%
accuracy = 100 * feature(rollout["next", "observation"], "val_accuracy")
for host, curve in enumerate(accuracy):
    print(host, " ".join(f"{value:5.1f}" for value in curve))
assert rollout.shape == (2, task.max_epochs)
