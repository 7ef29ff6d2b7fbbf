"""The fields of a training configuration: types, ranges, defaults and what each one does.

Nothing here imports torch. Units are in the descriptions: accuracies are percentage points, lengths are epochs, and one
epoch is one step of the controller. Null means "the task's own value" unless the description says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_list_to_tuple)
SlotName = Literal["early", "mid", "late"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]

_SETTINGS = ConfigDict(
    frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=False
)


class ScheduleStep(BaseModel):
    """One entry of a fixed schedule: what every host does in one epoch."""

    model_config = _SETTINGS

    epoch: Annotated[int, Field(ge=0)]
    """Epochs trained when the action is taken; 0 acts before the first epoch."""
    op: Literal["germinate", "cull", "fossilize"]
    """What to do; epochs that no step names wait."""
    slot: SlotName
    """The slot it is done to."""
    blueprint: str | None = None
    """The seed to plant; given for germinate only."""
    blend: Literal["linear", "sigmoid", "gated"] | None = None
    """How the seed is blended in; given for germinate only."""


class HeadWeights(BaseModel):
    """A weight per head of the controller's action."""

    model_config = _SETTINGS

    slot: NotNegative = 1.0
    """Where."""
    blueprint: NotNegative = 1.0
    """What is planted."""
    blend: NotNegative = 1.0
    """How it is blended in."""
    op: NotNegative = 1.0
    """What is done."""


class CollectorSettings(BaseModel):
    """Where the processes run in which hosts grow."""

    model_config = _SETTINGS

    backend: Literal["local", "ray"] = "local"
    """In the learner's process, or on Ray workers, one per entry of devices; the numbers are the same."""
    address: Annotated[str, Field(min_length=1)] = "local"
    """Ray's workers: "local" starts some on this machine, "auto" or host:port uses a running cluster."""
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU cores of each Ray worker."""


Floor = Annotated[float, Field(ge=0, lt=0.2)]


class HeadFloors(BaseModel):
    """A least probability per head of the controller's action; below 1/5, as there are up to five choices."""

    model_config = _SETTINGS

    slot: Floor = 0.0
    """Where."""
    blueprint: Floor = 0.0
    """What is planted."""
    blend: Floor = 0.0
    """How it is blended in."""
    op: Floor = 0.0
    """What is done."""


_ENDS = Field(min_length=2, max_length=2)


class Family(BaseModel):
    """In what the hosts of an episode differ: each range is drawn from anew for every host of every episode."""

    model_config = _SETTINGS

    train_fraction: Annotated[tuple[Share, ...], _ENDS, AsTuple] | None = None
    """Part of the training split that a host trains on; drawn evenly. Its epochs are as long as everybody's."""
    label_noise: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], _ENDS, AsTuple] | None = None
    """Part of a host's training samples that carry a wrong label all episode; drawn evenly."""
    host_lr_factor: Annotated[tuple[Positive, ...], _ENDS, AsTuple] | None = None
    """Factor on the host's learning rate; its logarithm is drawn evenly."""
    classes: Annotated[tuple[Annotated[int, Field(ge=2)], ...], _ENDS, AsTuple] | None = None
    """How many classes a host tells apart; drawn evenly. All that are left over count as one of them."""
    width: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1), AsTuple] | None = None
    """Channels of the host's first block, a list to draw from; a width that is named twice is twice as likely."""


class Fields(BaseModel):
    """Every field with its own check. `esper.config.TrainingConfig` adds the checks between fields."""

    model_config = _SETTINGS

    # what is grown
    task: str = "digits"
    """What is trained on what: host, data and constants, by name."""
    slots: Annotated[tuple[SlotName, ...], Field(min_length=1), AsTuple] = ("mid",)
    """Slots of the host in which seeds can grow."""
    blueprints: Annotated[tuple[str, ...], Field(min_length=1, max_length=5), AsTuple] | None = None
    """Seeds that can be planted, in the order of the blueprint head; they have to fit the task's hosts."""
    start_from: Annotated[str, Field(min_length=1)] | None = None
    """Folder of an exported network that every host starts as, instead of the task's own host."""
    max_seeds: Annotated[int, Field(ge=1)] | None = None
    """Most seeds a host may hold at a time, fossils included; null for no limit."""
    family: Family | None = None
    """In what the hosts of an episode differ besides their keys; null for nothing."""
    data_dir: Annotated[str, Field(min_length=1)] = "data"
    """Folder with the files of tasks that are not built in."""

    # how long, how many
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Every random draw of the run derives from this number."""
    n_episodes: Annotated[int, Field(ge=1, le=10**9)] = 100
    """Episodes in all. A rollout is n_envs episodes side by side, so the count is rounded up to whole rollouts."""
    n_envs: Annotated[int, Field(ge=1, le=65536)] = 4
    """Hosts that train side by side."""
    max_epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Epochs in an episode."""
    batch_size: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Samples per host in a training step."""
    train_samples: Annotated[int, Field(ge=1)] | None = None
    """Train on the first so many samples of the training split only; null for all of them."""

    # how hosts and seeds train
    host_lr: Positive | None = None
    """Learning rate of hosts at the start of an episode."""
    seed_lr: Positive | None = None
    """Learning rate of seeds at the start of an episode."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Course of both learning rates over an episode; cosine ends at zero."""
    incubation: Literal["straight_through", "shadow", "none"] = "straight_through"
    """How a seed trains before it is blended in."""
    gates: Literal["strict", "permissive"] = "strict"
    """Strict also asks a seed for an improvement of 0.5 points before it is blended in."""
    freeze_fossils: bool = False
    """Stop training a seed once it is fossilised."""
    embargo_epochs: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Epochs a slot stays closed after a cull."""
    coalition_statistics: Literal["recalibrated", "running"] = "recalibrated"
    """Normalisation statistics with which each set of live seeds is scored."""

    # where it runs
    devices: Annotated[tuple[str, ...], Field(min_length=1), AsTuple] = ("cpu",)
    """Devices of the hosts, in contiguous groups; "cpu" or "cuda:0", "cuda:1", ...; a Ray worker gets any GPU."""
    device: str = "cpu"
    """Device of the policy: "cpu", "cuda" or "cuda:0", ..."""
    collector: CollectorSettings = CollectorSettings()
    """Whether hosts grow in the learner's process or on Ray workers (`docs/cluster.md`)."""
    executor: Literal["auto", "loop", "stacked", "captured"] = "auto"
    """How the hosts of a device advance: one after another, stacked into one program, or as a recorded CUDA program."""
    amp: Literal["off", "tf32", "bf16", "fp16"] = "off"
    """Precision of the hosts' forward pass; everything the policy computes stays in float32. "tf32" shortens the
    products of recorded programs' convolutions, as PyTorch's own do on a GPU unless told otherwise."""

    # who decides
    controller: Literal["ppo", "heuristic", "random", "never", "schedule"] = "ppo"
    """Who decides what grows."""
    schedule: Annotated[tuple[ScheduleStep, ...], AsTuple] = ()
    """What the schedule controller does, at most one step per epoch; or what ppo imitates at first, each step as soon
    as it is possible."""
    use_telemetry: bool = True
    """Let the controller see ten measurements per slot: 80 features instead of 50."""
    contribution_scale: Annotated[float, Field(gt=0, le=100)] = 10.0
    """Percentage points of contribution beyond which the controller sees no difference."""
    lstm_hidden_dim: Annotated[int, Field(ge=1, le=16384)] = 128
    """Width of the policy's recurrent layer."""

    # reward and objective
    reward_family: Literal["contribution", "loss"] = "contribution"
    """Pay for what seeds contribute to accuracy, or for the course of the loss."""
    reward_mode: Literal["shaped", "sparse", "minimal"] = "shaped"
    """Pay every epoch, only at the end, or at the end minus a price for early culls."""
    reward_baseline: Literal["none", "twin"] = "none"
    """Pay for the objective, or for what it is above that of a twin without seeds, at the cost of training the twin."""
    param_budget: Annotated[int, Field(ge=1)] | None = None
    """Parameters that cost one full param_penalty_weight; null for four times the host's own."""
    param_penalty_weight: NotNegative = 0.1
    """Price of growth in the objective: 100 times this in points for one param_budget of extra parameters."""
    sparse_reward_scale: Positive = 1.0
    """Factor on the sparse and minimal rewards."""

    # how the controller learns
    imitation_rollouts: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Rollouts at the start in which the schedule acts and the policy learns to act like it."""
    lr: Positive = 3e-4
    """Learning rate of the policy."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Probability ratios beyond 1 plus or minus this earn nothing more."""
    episode_end: Literal["truncated", "terminal"] = "truncated"
    """What follows the last epoch: a state of some value that the policy estimates, or nothing. A truncated end can
    teach a policy not to grow (`docs/learning.md`)."""
    gamma: Share = 0.995
    """Discount per epoch, for returns and for reward shaping alike."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.97
    """Weight of longer returns in the advantage."""
    ppo_updates_per_batch: Annotated[int, Field(ge=1, le=1000)] = 4
    """Updates on one rollout."""
    minibatches: Annotated[int, Field(ge=1, le=65536)] = 1
    """Groups of hosts into which each of these updates is divided, with a step for each."""
    target_kl: Positive | None = 0.015
    """Updates on a rollout stop at 1.5 times this divergence; null never stops them."""
    value_coef: NotNegative = 0.5
    """Weight of the value loss."""
    value_clip: Positive | None = 10.0
    """A value that moved further than this from what it was in the rollout earns nothing more; null for no limit."""
    max_grad_norm: Positive = 0.5
    """The policy's gradient is clipped to this norm."""
    entropy_coef: NotNegative = 0.05
    """Weight of the entropy bonus."""
    entropy_coef_start: NotNegative | None = None
    """Weight at the start of annealing; null for entropy_coef."""
    entropy_coef_end: NotNegative | None = None
    """Weight at the end of annealing; null for entropy_coef."""
    entropy_coef_min: NotNegative = 0.01
    """The weight never falls below this."""
    entropy_anneal_episodes: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Episodes over which the weight moves from start to end; 0 keeps it at entropy_coef."""
    entropy_weights: HeadWeights = HeadWeights()
    """Weights of the heads within the entropy bonus."""
    initial_patience: NotNegative = 0.0
    """An untrained policy waits, or keeps a seed that may be kept, exp(this) times as often as it plants or culls."""
    probability_floor: HeadFloors = HeadFloors()
    """Least probability of every legal choice of a head, while collecting and while learning."""

    # what the run leaves behind
    telemetry_level: Literal["off", "minimal", "normal", "debug"] = "normal"
    """How much of the event log is written; never what is computed."""
    plateau_threshold: NotNegative | None = None
    """A change of mean accuracy between rollouts below this many points is reported as a plateau."""
    improvement_threshold: NotNegative | None = None
    """A change above this many points is reported as an improvement or a degradation."""
    escalation_rollouts: Annotated[int, Field(ge=0, le=10**9)] = 5
    """Rollouts for which telemetry_level is debug after an anomaly; 0 leaves it alone."""
    tracker: Literal["none", "csv", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Where rollouts and updates are reported besides the event log; wandb stays offline."""
    checkpoint_every: Annotated[int, Field(ge=1, le=10**9)] = 1
    """Rollouts between checkpoints; the last rollout is always saved."""

    @property
    def rollouts(self) -> int:
        """Rollouts of the run, whole ones."""
        return -(-self.n_episodes // self.n_envs)
