"""Splits: keyed, disjoint, checked before anything is built, and prepared exactly."""

import pytest
import torch

from esper import keys as k
from esper.data.splits import Split, Splits, channel_moments, keyed_parts

KEY = k.root(7)
SIZES = {"train": 60, "validation": 25, "test": 15}


def parts(key=KEY, sizes=SIZES):
    number = torch.arange(100)
    return keyed_parts(number.view(-1, 1), number, sizes, key)


def test_parts_are_disjoint_of_the_wanted_sizes_and_keep_pairs_together():
    result = parts()
    assert {name: len(split) for name, split in result.items()} == SIZES
    everything = torch.cat([split.targets for split in result.values()])
    assert torch.equal(everything.sort().values, torch.arange(100))
    for split in result.values():
        assert torch.equal(split.inputs.squeeze(1), split.targets)


def test_parts_are_a_function_of_the_key():
    assert torch.equal(parts()["train"].targets, parts()["train"].targets)
    assert not torch.equal(parts()["train"].targets, parts(k.root(8))["train"].targets)


def test_too_little_data_is_named_with_its_counts():
    with pytest.raises(ValueError, match=r"train 60 \+ validation 41: 101 samples are needed but the data set has 100"):
        parts(sizes={"train": 60, "validation": 41})
    with pytest.raises(ValueError, match="validation: 0 samples; at least 1 is needed"):
        parts(sizes={"train": 60, "validation": 0})


def test_an_empty_or_ragged_split_is_refused():
    full = Split(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="validation: 0 samples"):
        Splits(full, Split(torch.zeros(0, 2), torch.zeros(0)), full)
    with pytest.raises(ValueError, match="test: 3 inputs but 2 targets"):
        Splits(full, full, Split(torch.zeros(3, 2), torch.zeros(2)))
    with pytest.raises(ValueError, match="mean, std"):
        Splits(full, full, full, mean=torch.zeros(1, 1, 1))


def images():
    pixels = k.bits(KEY, 20, 3, 4, 4).to(torch.uint8)
    split = Split(pixels, torch.arange(20))
    return Splits(split, split, split, *channel_moments(pixels))


def test_images_are_normalised_per_channel():
    splits = images()
    x = splits.prepare(splits.train.inputs, torch.float64)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_half_precision_inputs_are_rounded_once():
    splits = images()
    full = splits.prepare(splits.train.inputs, torch.float32)
    assert torch.equal(splits.prepare(splits.train.inputs, torch.bfloat16), full.to(torch.bfloat16))


def test_tokens_become_int64_in_every_precision():
    split = Split(torch.arange(6, dtype=torch.int32).view(2, 3), torch.zeros(2, 3, dtype=torch.int32))
    x = Splits(split, split, split).prepare(split.inputs, torch.bfloat16)
    assert x.dtype == torch.int64
    assert torch.equal(x, torch.arange(6).view(2, 3))


def test_a_copy_on_another_device_moves_every_tensor():
    moved = images().to("meta")
    assert moved.device.type == "meta"
    tensors = [moved.mean, moved.std, *(t for s in (moved.validation, moved.test) for t in (s.inputs, s.targets))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
