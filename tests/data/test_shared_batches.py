"""The shared iterator's refusals, evaluation batches and the calibration batch."""

import pytest
import torch

from esper import keys as k
from esper.data.batches import SharedBatchIterator, calibration_batch, evaluation_batches
from esper.data.splits import Split, Splits
from waiting import without_waiting

RUN = k.root(1)
HOSTS = k.host_keys(RUN, 3)


def splits(n_train=10, n_validation=7, tokens=False):
    def split(n):
        number = torch.arange(n)
        if tokens:
            blocks = number.view(-1, 1).repeat(1, 4).to(torch.int32)
            return Split(blocks, blocks + 1)
        return Split(number.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4), number)

    moments = (None, None) if tokens else (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    return Splits(split(n_train), split(n_validation), split(5), *moments)


def test_a_batch_has_one_entry_per_group_with_the_hosts_in_front():
    batches = list(SharedBatchIterator([splits(), splits()], [HOSTS[:2], HOSTS[2:]], batch_size=4, epoch=0))
    assert len(batches) == 2
    for batch in batches:
        assert [(tuple(x.shape), tuple(y.shape)) for x, y in batch] == [
            ((2, 4, 3, 4, 4), (2, 4)),
            ((1, 4, 3, 4, 4), (1, 4)),
        ]
        assert {x.dtype for x, _ in batch} == {torch.float32}


def test_iterating_twice_gives_the_same_epoch():
    iterator = SharedBatchIterator([splits()], [HOSTS], batch_size=4, epoch=3)
    for ((x, y),), ((x_again, y_again),) in zip(iterator, iterator, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


def test_language_batches_are_int64_with_a_target_per_position():
    ((x, y),) = next(iter(SharedBatchIterator([splits(tokens=True)], [HOSTS], batch_size=4, epoch=0)))
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert x.shape == (3, 4, 4)


def test_less_than_one_batch_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="batch_size: 11, but the training split has 10 samples"):
        SharedBatchIterator([splits()], [HOSTS], batch_size=11, epoch=0)
    with pytest.raises(ValueError, match="batch_size: 0; it must be at least 1"):
        SharedBatchIterator([splits()], [HOSTS], batch_size=0, epoch=0)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="keys: 2 groups for 1 splits"):
        SharedBatchIterator([splits()], [HOSTS, HOSTS], batch_size=4, epoch=0)
    with pytest.raises(ValueError, match="group 1 has 9 training samples, group 0 has 10"):
        SharedBatchIterator([splits(), splits(9)], [HOSTS, HOSTS], batch_size=4, epoch=0)
    with pytest.raises(ValueError, match=r"keys: group 0 is \[3\] on cpu; .* on meta"):
        SharedBatchIterator([splits().to("meta")], [HOSTS], batch_size=4, epoch=0)
    with pytest.raises(ValueError, match=r"keys: group 0 is \[\] on cpu"):
        SharedBatchIterator([splits()], [RUN], batch_size=4, epoch=0)


def test_tokens_are_never_augmented():
    with pytest.raises(ValueError, match="augment: True, but tokens"):
        SharedBatchIterator([splits(tokens=True)], [HOSTS], batch_size=4, epoch=0, augment=True)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluation_keeps_every_sample_in_stored_order(batch_size):
    data = splits()
    batches = list(evaluation_batches(data, data.validation, batch_size, torch.float64))
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(7))
    assert torch.equal(torch.cat([x[:, 0, 0, 0] for x, _ in batches]), torch.arange(7, dtype=torch.float64))


@pytest.mark.parametrize(("n_train", "batch_size", "expected"), [(10, 4, 10), (400, 64, 256), (400, 300, 300)])
def test_the_calibration_batch_is_a_keyed_draw_of_training_samples(n_train, batch_size, expected):
    number = torch.arange(n_train, dtype=torch.int32).view(-1, 1)
    split = Split(number, number)
    data = Splits(split, split, split)
    x = calibration_batch(data, RUN, batch_size)
    assert x.shape == (expected, 1)
    assert len(x.unique()) == expected
    assert torch.equal(x, calibration_batch(data, RUN, batch_size))
    assert not torch.equal(x, calibration_batch(data, k.root(2), batch_size))


@pytest.mark.cuda
def test_an_epoch_on_a_device_never_waits_and_matches_the_cpu():
    data, keys = splits(100), k.host_keys(RUN, 4)
    expected = list(SharedBatchIterator([data], [keys], 16, 5, augment=True))
    batches = SharedBatchIterator([data.to("cuda")], [keys.to("cuda")], 16, 5, augment=True)
    with without_waiting():
        drawn = list(batches)
    for ((x, y),), ((x_cpu, y_cpu),) in zip(drawn, expected, strict=True):
        assert torch.equal(x.cpu(), x_cpu)
        assert torch.equal(y.cpu(), y_cpu)
