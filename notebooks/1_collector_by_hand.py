# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Compose a collector by hand
#
# `python -m esper.train` is a loop over five parts. Here they are one by one, each a plain value or a TorchRL object
# that can be swapped for another.

# %%
from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.environment.observation import FEATURES, feature
from esper.learn.collector import BatchFirstCollector
from esper.run import build_learner
from esper.seeds.actions import OP, Op

# %% [markdown]
# The configuration says everything; small numbers keep this quick.

# %%
config = TrainingConfig(
    task="digits",
    slots=["early", "mid", "late"],
    n_envs=3,
    max_epochs=6,
    train_samples=256,
    gates="permissive",
    lstm_hidden_dim=32,
)
env = build_env(config)  # a torchrl EnvBase with batch size [hosts]
policy = build_controller(config, env)  # a TensorDictModule
learner = build_learner(config, policy)
print(env.batch_size, env.action_spec)

# %% [markdown]
# A rollout is a TensorDict `[hosts, epochs]`: one episode of every host.

# %%
collector = BatchFirstCollector(env, policy, rollouts=2)
for rollout in collector:
    metrics = learner.learn(rollout)
    ops = [Op(int(op)).name for op in rollout["action"][0, :, OP]]
    accuracy = 100 * feature(rollout["next", "observation"], "val_accuracy")[:, -1]
    print(f"accuracy {accuracy.mean():.1f} %, first host did {' '.join(ops)}")
    print(f"  explained variance {metrics['explained_variance']:.2f}, kl {metrics['kl_joint']:.1e}")
collector.shutdown()

# %% [markdown]
# Everything a host shows the controller has a name.

# %%
assert rollout.shape == (config.n_envs, config.max_epochs)
assert rollout["observation"].shape[-1] == len(FEATURES)
for row in FEATURES[:6]:
    print(row.index, row.name, "-", row.description)
