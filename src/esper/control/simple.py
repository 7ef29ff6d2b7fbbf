"""Controllers that do not learn. All share one form with the learning policy's step:

    action, carry = controller.act(td, carry)

`td` `[N]` has the keys a policy sees: `observation`, the four masks, `key`. `action` is int64 `[N, 4]` in the order
of `HEADS`, its slot a place in the fixed layout (early, mid, late); heads that an op does not use are 0. `carry`
`[N]` is whatever the controller remembers, a value; `controller.init(n)` makes the one an episode starts with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from esper import keys as k
from esper.environment.observation import feature
from esper.keys import Purpose
from esper.seeds.actions import BLEND, BLUEPRINT, HEADS, OP, RELEVANT, SLOT, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS


class Controller(NamedTuple):
    """A pair of pure functions: what to remember at the start of an episode, and what to do at each step."""

    init: Callable[[int], TensorDict]
    act: Callable[[TensorDictBase, TensorDict], tuple[Tensor, TensorDict]]


class Step(Protocol):
    """One entry of a schedule, by names: at `epoch` (epochs trained before it), do `op` to `slot`."""

    @property
    def epoch(self) -> int: ...
    @property
    def op(self) -> str: ...
    @property
    def slot(self) -> str: ...
    @property
    def blueprint(self) -> str | None: ...
    @property
    def blend(self) -> str | None: ...


def _nothing(n_hosts: int) -> TensorDict:
    return TensorDict({}, batch_size=[n_hosts])


def never_grow() -> Controller:
    """Always WAIT: the control that any growth has to beat."""

    def act(td: TensorDictBase, carry: TensorDict) -> tuple[Tensor, TensorDict]:
        return td["mask_op"].new_zeros(td.batch_size[0], len(HEADS), dtype=torch.int64), carry

    return Controller(_nothing, act)


def random_legal() -> Controller:
    """A legal op uniformly, then a slot that allows it, a blueprint and a blend, each uniformly; keyed by `key`."""

    def act(td: TensorDictBase, carry: TensorDict) -> tuple[Tensor, TensorDict]:
        u = k.uniform(k.fold(td["key"], Purpose.CONTROLLER), len(HEADS))
        op = _pick(td["mask_op"], u[:, OP])
        slot = _pick(_row(td["mask_slot"], op), u[:, SLOT])
        blueprint = _pick(td["mask_blueprint"], u[:, BLUEPRINT])
        blend = _pick(td["mask_blend"], u[:, BLEND])
        return assemble(slot, blueprint, blend, op), carry

    return Controller(_nothing, act)


def fixed_schedule(steps: Sequence[Step], blueprints: Sequence[str], max_epochs: int) -> Controller:
    """Do what is written, in the epoch it is written for, to every host; WAIT in every other epoch.

    What cannot be done then is asked for all the same, and refused by the environment. Raises ValueError for names
    that do not exist, for epochs outside an episode and for two steps in one epoch.
    """
    table = torch.zeros(max_epochs, len(HEADS), dtype=torch.int64)
    for step in steps:
        if not 0 <= step.epoch < max_epochs or int(table[step.epoch, OP]) != Op.WAIT:
            raise ValueError(f"schedule: epoch {step.epoch}; must be within 0..{max_epochs - 1} and occur once")
        table[step.epoch] = encode(step, blueprints)

    def act(td: TensorDictBase, carry: TensorDict) -> tuple[Tensor, TensorDict]:
        epoch = (feature(td["observation"], "epoch") * max_epochs).round().to(torch.int64)
        return table.to(epoch.device)[epoch.clamp(max=max_epochs - 1)], carry

    return Controller(_nothing, act)


def patient_schedule(steps: Sequence[Step], blueprints: Sequence[str], max_epochs: int) -> Controller:
    """One of `patient_schedules` for every host."""
    return patient_schedules([steps], blueprints, max_epochs)


def patient_schedules(schedules: Sequence[Sequence[Step]], blueprints: Sequence[str], max_epochs: int) -> Controller:
    """Do what is written, each step in the first epoch from its own on in which the masks allow it and those before it
    at its slot are done; of several, the first that is written.

    So "germinate, then fossilise" fossilises as soon as the gate opens, and a gate that never opens holds up nothing at
    other slots. Of P schedules and N hosts, host i follows schedule i P // N. Raises ValueError for names that do not
    exist.
    """
    shape = (len(schedules), max(len(steps) for steps in schedules))
    table = torch.zeros(*shape, len(HEADS), dtype=torch.int64)
    epochs = torch.full(shape, max_epochs)
    waits = torch.zeros(*shape, shape[1], dtype=torch.bool)
    for p, steps in enumerate(schedules):
        for i, step in enumerate(steps):
            table[p, i], epochs[p, i] = encode(step, blueprints), step.epoch
            waits[p, i, :i] = torch.tensor([before.slot == step.slot for before in steps[:i]], dtype=torch.bool)

    def init(n_hosts: int) -> TensorDict:
        followed = torch.arange(n_hosts) * shape[0] // n_hosts
        done = torch.zeros(n_hosts, shape[1], dtype=torch.bool)
        return TensorDict({"followed": followed, "done": done}, batch_size=[n_hosts])

    def act(td: TensorDictBase, carry: TensorDict) -> tuple[Tensor, TensorDict]:
        followed, done = carry["followed"], carry["done"]
        device, row = done.device, torch.arange(done.shape[0], device=done.device)
        wanted = table.to(device)[followed]
        epoch = (feature(td["observation"], "epoch") * max_epochs).round()
        allowed = td["mask_slot"][row[:, None], wanted[..., OP], wanted[..., SLOT]]
        due = epoch[:, None] >= epochs.to(device)[followed]
        held = (waits.to(device)[followed] & ~done[:, None]).any(dim=2)
        ready = allowed & due & ~held & ~done
        first = ready & (ready.cumsum(dim=1) == 1)
        action = torch.where(first[..., None], wanted, 0).sum(dim=1)
        return action, TensorDict({"followed": followed, "done": done | first}, batch_size=carry.batch_size)

    return Controller(init, act)


def encode(step: Step, blueprints: Sequence[str]) -> Tensor:
    """The action `[4]` of a named step. Raises ValueError naming the field, its value and what is legal."""
    blueprint = blend = 0
    op = Op[_member("op", step.op.upper(), [op.name for op in Op])]
    if op == Op.GERMINATE:
        blueprint = list(blueprints).index(_member("blueprint", step.blueprint, blueprints))
        blend = BLENDS.index(_member("blend", BLENDS[0] if step.blend is None else step.blend, BLENDS))
    return torch.tensor([LAYOUT.index(_member("slot", step.slot, LAYOUT)), blueprint, blend, op])


def assemble(slot: Tensor, blueprint: Tensor, blend: Tensor, op: Tensor) -> Tensor:
    """Actions `[N, 4]` from the heads `[N]`, with 0 wherever the op does not use a head."""
    action = torch.stack([slot, blueprint, blend, op], dim=1)
    return torch.where(RELEVANT.to(op.device)[op], action, 0)


def _member(field: str, value: str | None, legal: Sequence[str]) -> str:
    if value is None or value not in legal:
        raise ValueError(f"{field}: {value!r}; must be one of {', '.join(legal)}")
    return value


def _row(mask_slot: Tensor, op: Tensor) -> Tensor:
    """The slot mask `[N, 3]` of each host's op."""
    return mask_slot[torch.arange(op.shape[0], device=op.device), op]


def _pick(mask: Tensor, u: Tensor) -> Tensor:
    """The index of one True entry of each row `[N, n]`, uniformly by `u` `[N]` in [0, 1)."""
    count = mask.sum(dim=1)
    wanted = torch.minimum((u * count).floor().to(torch.int64) + 1, count)
    return (mask.cumsum(dim=1) >= wanted[:, None]).to(torch.int64).argmax(dim=1)
