"""The generated images: reproducible, independent of the sizes, learnable."""

import pytest
import torch
import torch.nn.functional as F

from esper import keys as k
from esper.data.synthetic import load_synthetic

KEY = k.root(11)


def test_shapes_and_types():
    splits = load_synthetic(KEY, 50, 20, 10)
    assert splits.train.inputs.shape == (50, 3, 32, 32)
    assert splits.train.inputs.dtype == torch.uint8
    assert (len(splits.validation), len(splits.test)) == (20, 10)
    assert set(load_synthetic(KEY, 200, 1, 1).train.targets.tolist()) == set(range(10))


def test_a_sample_depends_on_key_split_and_number_only():
    large, small = load_synthetic(KEY, 1100, 5, 5), load_synthetic(KEY, 30, 9, 5)
    assert torch.equal(large.train.inputs[:30], small.train.inputs)
    assert torch.equal(large.train.targets[:30], small.train.targets)
    assert torch.equal(large.validation.inputs, small.validation.inputs[:5])
    assert not torch.equal(large.train.inputs[:5], large.validation.inputs)
    assert not torch.equal(large.train.inputs[:30], load_synthetic(k.root(12), 30, 1, 1).train.inputs)


def test_classes_differ_by_their_texture():
    """Averaged cells of a sample correlate, at the best offset, more with its own class than with the others."""
    splits = load_synthetic(KEY, 600, 100, 1)

    def spectrum(x):
        x = F.avg_pool2d(splits.prepare(x, torch.float32), 2)
        return torch.fft.fft2(x).abs().flatten(1)

    train, validation = spectrum(splits.train.inputs), spectrum(splits.validation.inputs)
    centres = torch.stack([train[splits.train.targets == label].mean(0) for label in range(10)])
    guess = torch.cdist(validation, centres).argmin(1)
    assert (guess == splits.validation.targets).float().mean() > 0.25


@pytest.mark.parametrize("field", ["n_train", "n_validation", "n_test"])
def test_an_empty_split_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}: 0 samples; at least 1 is needed"):
        load_synthetic(KEY, **{field: 0})
