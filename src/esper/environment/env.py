"""`GrowthEnv`: N hosts growing side by side as one batched TorchRL environment (plan steps 6 and 8).

All dynamics are in the state, a TensorDict; the environment holds that value and rebinds the result of a pure step,
so saving the state saves the environment exactly. Hosts and seeds never enter the TensorDicts that a collector stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Composite, MultiCategorical, Unbounded
from torchrl.envs import EnvBase

from esper import keys as k
from esper.data.family import draws
from esper.environment.observation import ObservationSettings
from esper.environment.rewards import COMPONENTS, RewardSettings, reward
from esper.environment.signals import SignalTracker
from esper.environment.twin import twin_accuracies
from esper.environment.view import View
from esper.growth.backend import Backend
from esper.growth.spec import GrowthSpec
from esper.keys import Purpose
from esper.seeds.actions import HEADS, MAX_BLUEPRINTS, SLOT, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS
from esper.values import assembled, changed, joined, upload

Observer = Callable[[TensorDict], None]
"""Told what happened in every step, for telemetry; must not change it. See `GrowthEnv.later` for when."""


@dataclass(frozen=True)
class EnvSettings:
    """Everything about an environment that is not the growth itself.

    `host_lr` and `seed_lr` are the hosts' base learning rates; `seed` is the run seed from which every draw derives.
    The hosts are `copies` times the same hosts one after another, each copy with its own of several `host_lr`.
    Episodes are counted from `first_episode`; hosts of different episodes share nothing but the data. With `twins` what
    every host would have reached without seeds is known to the reward. `terminal_end` says that nothing is worth
    anything after the last epoch; otherwise an episode is cut off there (truncated), and a learner looks past it.
    """

    seed: int
    n_hosts: int
    host_lr: float | tuple[float, ...]
    seed_lr: float
    observation: ObservationSettings
    tracker: SignalTracker
    reward: RewardSettings
    first_episode: int = 0
    twins: bool = False
    terminal_end: bool = False
    copies: int = 1


class GrowthEnv(EnvBase):
    """Batched environment with `batch_size [N]`; one step is one epoch of every host.

    `reset` builds fresh hosts and observes them after one validation pass without training. `step` carries out one
    action per host, trains an epoch, validates all coalitions, ticks the lifecycle, and returns the reward of what
    happened. After `max_epochs` steps every host is done: truncated, or terminated if the settings say so. A host that
    the governor rolled back ends its segment (`terminated`); a partial reset lets the restored host go on as a new
    segment of the same episode.
    """

    def __init__(
        self,
        spec: GrowthSpec,
        backend: Backend,
        settings: EnvSettings,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
    ) -> None:
        super().__init__(device=device, batch_size=[settings.n_hosts])
        self.spec, self.backend, self.settings = spec, backend, settings
        self.observer = observer
        self.state: TensorDict | None = None
        self.finished: TensorDict | None = None
        self.ended = False
        """Whether the last step ended the episode, or the segment of any host."""
        self._outstanding: list[Callable[[], None]] = []
        self._paid_later = False
        self._view = View(settings.observation, self.device)
        self._layout = torch.tensor([spec.slots.index(name) if name in spec.slots else -1 for name in LAYOUT])
        self._make_specs()

    def _make_specs(self) -> None:
        n, device = self.settings.n_hosts, self.device

        def flags(*shape: int) -> Binary:
            return Binary(shape[-1], shape=(n, *shape), dtype=torch.bool, device=device)

        def number(*shape: int, dtype: torch.dtype = torch.float32) -> Unbounded:
            return Unbounded(shape=(n, *shape), dtype=dtype, device=device)

        self.observation_spec = Composite(
            observation=number(self.settings.observation.width),
            mask_op=flags(len(Op)),
            mask_slot=flags(len(Op), len(LAYOUT)),
            mask_blueprint=flags(MAX_BLUEPRINTS),
            mask_blend=flags(len(BLENDS)),
            key=number(dtype=torch.int64),
            is_init=flags(1),
            components=number(len(COMPONENTS)),
            shape=(n,),
            device=device,
        )
        sizes = {"slot": len(LAYOUT), "blueprint": MAX_BLUEPRINTS, "blend": len(BLENDS), "op": len(Op)}
        self.action_spec = MultiCategorical(
            [sizes[head] for head in HEADS], shape=(n, len(HEADS)), dtype=torch.int64, device=device
        )
        self.reward_spec = number(1)
        self.done_spec = Composite(
            {name: flags(1) for name in ("done", "terminated", "truncated")}, shape=(n,), device=device
        )

    def _set_seed(self, seed: int | None) -> None:
        """Draws are keyed by the run seed in the settings; TorchRL's seeding has nothing to set."""

    @property
    def episode(self) -> int:
        """The present episode's number; one below the first before the first reset."""
        return self.settings.first_episode - 1 if self.state is None else int(self.state["episode"])

    @property
    def epoch(self) -> int:
        """Epochs trained in the present episode."""
        return 0 if self.state is None else int(self.state["epoch"])

    def growth(self) -> list[TensorDict]:
        """The growth state of every place of the backend."""
        if self.state is None:
            raise RuntimeError("the environment has no state before its first reset")
        return [self.state["growth", str(i)] for i in range(len(self.backend.places))]

    def finished_growth(self) -> list[TensorDict]:
        """The growth state of every place at the end of the last whole episode (collectors reset at once)."""
        if self.finished is None:
            raise RuntimeError("no episode has finished yet")
        return [self.finished["growth", str(i)] for i in range(len(self.backend.places))]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        # What hosts were paid in the step before is copied where some of them begin a new segment.
        self.settle()
        asked = None if tensordict is None else tensordict.get("_reset", None)
        if asked is None or self.state is None or self.epoch >= self.spec.rules.max_epochs:
            self.state = self._fresh(self.episode + 1)
            asked = torch.ones(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        asked = asked.reshape(*self.batch_size, 1)
        earned = {"components": torch.zeros(*self.batch_size, len(COMPONENTS), device=self.device)}
        return self._observe(self.state, asked, _ended(torch.zeros_like(asked), False), earned)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self.advance(tensordict)

    def advance(self, tensordict: TensorDictBase) -> TensorDict:
        """`step` without what TorchRL does around it for environments of every kind: carries out `action` `[N, 4]` and
        returns what follows, the entries of a step's `next`."""
        if self.state is None:
            raise RuntimeError("step before reset")
        action = tensordict["action"].cpu()
        own = action.clone()
        own[:, SLOT] = self._layout[action[:, SLOT]]
        tracker, twin = self.state["tracker"], self._twin(self.state)
        try:
            growth, result = self.backend.run_epoch(
                self.growth(), own, tracker["val_accuracy"], self.epoch, self.settle
            )
        except BaseException:
            # What happened before is told all the same.
            self.settle()
            raise
        epoch = self.epoch + 1
        last = epoch >= self.spec.rules.max_epochs
        unsettled = ~tracker["stabilized"]
        tracker = self.settings.tracker.update(tracker, result["metrics"])
        result = changed(
            result,
            replaced=self.backend.replaced(),
            stabilized=tracker["stabilized"] & unsettled,
            tracker=tracker,
            host_parameters=self.host_parameters(),
            **({} if twin is None else {"twin": twin[:, epoch - 1 : epoch + 1]}),
        )
        self.state = changed(
            self.state,
            growth=_groups(growth),
            tracker=tracker,
            epoch=torch.tensor(epoch),
            **({} if twin is None else {"twin": twin}),
        )
        if last:
            self.finished = self.state
        terminated = (result["panic"] | (last and self.settings.terminal_end)).unsqueeze(-1)
        self.ended = last or bool(terminated.any())
        earned = self._unpaid()
        observed = self._observe(self.state, torch.zeros_like(terminated), _ended(terminated, last), earned)

        def pay() -> None:
            prices = replace(self.settings.reward, host_parameters=result["host_parameters"])
            paid = reward(result, prices, terminal=last)
            result["param_budget"] = torch.as_tensor(prices.budget).expand(self.batch_size)
            result["action"], result["reward"], result["components"] = action, paid["total"], paid
            for name, parts in (("reward", ("total",)), ("components", COMPONENTS)):
                earned[name].copy_(torch.stack([paid[part] for part in parts], dim=1), non_blocking=True)

        if self._paid_later:
            self.later(pay)
        else:
            pay()
        if self.observer is not None:
            self.later(partial(self.observer, result))
        if last:
            self.settle()
        return observed

    @contextmanager
    def paid_later(self) -> Iterator[None]:
        """Within the block what a step was worth need not be known when it returns, and is filled in `later`: for those
        who ask for it when the episode is over. Until then it is nan."""
        before, self._paid_later = self._paid_later, True
        try:
            yield
        finally:
            self._paid_later = before

    def _unpaid(self) -> dict[str, Tensor]:
        """Room for what a step was worth, on the environment's device."""
        shape = self.settings.n_hosts, 1 + len(COMPONENTS)
        reward, components = torch.full(shape, torch.nan, device=self.device).tensor_split([1], dim=1)
        return {"reward": reward, "components": components}

    @property
    def overlaps(self) -> bool:
        """Whether there is something to do while devices work: a GPU is not waited for, a CPU is this very process."""
        return any(place.device == "cuda" for place in self.backend.places)

    def later(self, call: Callable[[], None]) -> None:
        """Have `call` made while GPUs work on the next epoch, or when the episode ends; on a CPU, now. The state of the
        environment is then still that of now."""
        self._outstanding.append(call)
        if not self.overlaps:
            self.settle()

    def settle(self) -> None:
        """Make the calls that are outstanding, in the order in which they came."""
        calls, self._outstanding = self._outstanding, []
        for call in calls:
            call()

    def _fresh(self, episode: int) -> TensorDict:
        n, copies = self.settings.n_hosts, self.settings.copies
        keys = episode_keys(self.settings.seed, episode, n // copies).repeat(copies)
        rates = torch.tensor(self.settings.host_lr, dtype=torch.float64)
        host_lr = rates.expand(copies).repeat_interleave(n // copies)
        if self.backend.settings.family is not None:
            host_lr = host_lr * draws(self.backend.settings.family, keys)["host_lr_factor"]
        seed_lr = torch.full((n,), self.settings.seed_lr, dtype=torch.float64)
        growth, metrics = self.backend.reset(keys, host_lr, seed_lr)
        tracker = self.settings.tracker.start(metrics)
        unknown = torch.full((n, self.spec.rules.max_epochs + 1), torch.nan)
        return TensorDict(
            {
                "growth": _groups(growth),
                "tracker": tracker,
                "episode": torch.tensor(episode),
                "epoch": torch.tensor(0),
                **({"twin": unknown} if self.settings.twins else {}),
            }
        )

    def _twin(self, state: TensorDict) -> Tensor | None:
        """The accuracies `[N, T + 1]` of the twins, who run ahead in the first step of an episode: the collector resets
        once more than it steps, and a run that is taken up again has them in its state."""
        if not self.settings.twins:
            return None
        if self.epoch > 0:
            return state["twin"]
        accuracy, max_epochs = state["tracker", "val_accuracy"], self.spec.rules.max_epochs
        return twin_accuracies(self.backend, self.growth(), accuracy, max_epochs)

    def drawn(self) -> TensorDict | None:
        """What the hosts of the present episode have drawn from their family, `[N]` on the CPU, with `host_lr` and
        `host_parameters`, the rate and the size that came of it; None without a family."""
        if self.backend.settings.family is None:
            return None
        drawn = draws(self.backend.settings.family, self._keys())
        rates = torch.cat([g["rates", "host"] for g in self.growth()])
        return drawn.update({"host_lr": rates, "host_parameters": self.host_parameters()})

    def host_parameters(self) -> Tensor:
        """Trainable parameters of the present episode's hosts without seeds, int64 `[N]` on the CPU."""
        return self.spec.parameters_of(self._keys())

    def records(self) -> TensorDict:
        """Slot records `[N, S]` of all hosts, on the CPU."""
        return joined([g["slots"] for g in self.growth()])

    def _observe(
        self, state: TensorDict, is_init: Tensor, ending: Mapping[str, Tensor], earned: Mapping[str, Tensor]
    ) -> TensorDict:
        """Everything a controller and a learner are told, `[N]`. What has just happened: `ending` are the flags of
        segments that ended, `earned` what the reward was made of and, after a step, the reward."""
        told = self._view(self.records(), state["tracker"], self._keys(), self.host_parameters())
        flags = {"is_init": is_init, **ending}
        there = upload(torch.stack(list(flags.values())), self.device).unbind()
        own = dict(zip(flags, there, strict=True))
        return assembled({**dict(told.items()), **own, **earned}, self.batch_size, self.device)

    def _keys(self) -> Tensor:
        """The keys of all hosts, `[N]`."""
        keys = [g["key"] for g in self.growth()]
        return keys[0] if len(keys) == 1 else torch.cat(keys)


def _ended(terminated: Tensor, last: bool) -> dict[str, Tensor]:
    """The flags `[N, 1]` of hosts whose segment ended, `terminated`, in the `last` epoch of an episode or not."""
    truncated = ~terminated if last else torch.zeros_like(terminated)
    return {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}


def episode_keys(seed: int, episode: int, n_hosts: int) -> Tensor:
    """Keys `[N]` of the hosts of an episode in a run with this seed."""
    return k.host_keys(k.fold(k.root(seed), Purpose.EPISODE, episode), n_hosts)


def _groups(growth: Sequence[TensorDict]) -> TensorDict:
    return assembled({str(i): g for i, g in enumerate(growth)}, [])
