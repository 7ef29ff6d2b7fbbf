# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Write a controller
#
# A controller is a pair of pure functions: `init(n)` makes what it remembers at the start of an episode, `act(td,
# carry)` decides for all hosts at once. `td` has what a learning policy sees: `observation`, the masks, `key`.

# %%
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import Controller
from esper.environment.observation import feature
from esper.learn.collector import BatchFirstCollector
from esper.seeds.actions import HEADS, OP, SLOT, Op
from esper.seeds.slots import LAYOUT

# %% [markdown]
# This one fossilises whatever may be fossilised; otherwise it waits until accuracy has stood still for `patience`
# epochs, then plants the run's first blueprint in the first empty slot. It remembers how often it has planted.


# %%
def patient(patience: int) -> Controller:
    def init(n_hosts: int) -> TensorDict:
        return TensorDict({"planted": torch.zeros(n_hosts, dtype=torch.int64)}, batch_size=[n_hosts])

    def act(td: TensorDictBase, carry: TensorDict) -> tuple[Tensor, TensorDict]:
        action = torch.zeros(td.batch_size[0], len(HEADS), dtype=torch.int64)
        still = feature(td["observation"], "plateau_epochs") * 10 >= patience  # the feature is in tenths
        plant = td["mask_op"][:, Op.GERMINATE] & still
        keep = td["mask_op"][:, Op.FOSSILIZE]
        op = torch.where(keep, int(Op.FOSSILIZE), torch.where(plant, int(Op.GERMINATE), int(Op.WAIT)))
        allowed = td["mask_slot"][torch.arange(len(op)), op]
        action[:, OP] = op
        action[:, SLOT] = allowed.to(torch.int64).argmax(dim=1)
        return action, TensorDict({"planted": carry["planted"] + (op == Op.GERMINATE)}, batch_size=carry.batch_size)

    return Controller(init, act)


# %% [markdown]
# It runs through the same environment and collector as every other controller; compare it with one that never grows
# anything.

# %%
config = TrainingConfig(
    task="digits",
    slots=list(LAYOUT),
    n_envs=3,
    max_epochs=12,
    train_samples=256,
    gates="permissive",
    controller="never",
)


def final_accuracy(policy: ScriptedPolicy) -> Tensor:
    env = build_env(config)
    collector = BatchFirstCollector(env, policy, rollouts=1)
    rollout = next(iter(collector))
    collector.shutdown()
    counts = {op.name: int((rollout["action"][..., OP] == op).sum()) for op in Op}
    print(counts, "seeds planted:", env.finished_growth()[0]["slots", "planted"].sum().item())
    return 100 * feature(rollout["next", "observation"], "val_accuracy")[:, -1]


ours = final_accuracy(ScriptedPolicy(patient(patience=1)))
never = final_accuracy(build_controller(config, build_env(config)))
print(f"patient {ours.mean():.2f} %, never {never.mean():.2f} %; host by host {(ours - never).tolist()}")

# %% [markdown]
# Hosts of one run seed start equal and see the same batches, so differences host by host are differences of
# controllers. Three hosts say little all the same: `config.replace(n_envs=32, seed=...)` says more.
