"""Laws of the shared batches: what a host sees is a function of its key and the epoch, of nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from esper import keys as k
from esper.data.batches import PADDING, SharedBatchIterator, augment
from esper.data.splits import Split, Splits


def numbered_splits(n_train: int) -> Splits:
    """Images whose first pixel and whose target are the number of the sample."""
    number = torch.arange(n_train)
    pixels = torch.randint(1, 256, (n_train, 2, 4, 5), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = number.to(torch.uint8)
    split = Split(pixels, number)
    return Splits(split, split, split, torch.zeros(2, 1, 1), torch.ones(2, 1, 1))


def epoch_of(keys: list[torch.Tensor], n_train: int, batch_size: int, epoch: int, augmented: bool = False):
    """All batches of an epoch, hosts concatenated over groups: x `[N, batches * B, ...]` and y `[N, batches * B]`."""
    splits = numbered_splits(n_train)
    batches = list(SharedBatchIterator([splits] * len(keys), keys, batch_size, epoch, augmented))
    x = torch.cat([torch.cat([x for x, _ in batch]) for batch in batches], dim=1)
    y = torch.cat([torch.cat([y for _, y in batch]) for batch in batches], dim=1)
    return x, y


seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


@given(seeds, epochs, st.integers(1, 6), st.data(), st.booleans())
def test_a_host_sees_the_same_alone_in_a_stack_and_in_any_group(seed, epoch, n_hosts, data, augmented):
    n_train = data.draw(st.integers(1, 60))
    batch_size = data.draw(st.integers(1, n_train))
    host_keys = k.host_keys(k.root(seed), n_hosts)
    cut = data.draw(st.integers(1, n_hosts))
    stack = epoch_of([host_keys], n_train, batch_size, epoch, augmented)
    groups = epoch_of(
        [part for part in (host_keys[:cut], host_keys[cut:]) if len(part)], n_train, batch_size, epoch, augmented
    )
    host = data.draw(st.integers(0, n_hosts - 1))
    alone = epoch_of([host_keys[host : host + 1]], n_train, batch_size, epoch, augmented)
    for whole, grouped, single in zip(stack, groups, alone, strict=True):
        assert torch.equal(whole, grouped)
        assert torch.equal(whole[host], single[0])


@given(seeds, epochs, st.integers(1, 60), st.data())
def test_every_sample_comes_exactly_once_up_to_the_dropped_tail(seed, epoch, n_train, data):
    batch_size = data.draw(st.integers(1, n_train))
    x, y = epoch_of([k.host_keys(k.root(seed), 3)], n_train, batch_size, epoch)
    assert y.shape == (3, n_train // batch_size * batch_size)
    for host in range(3):
        assert len(set(y[host].tolist())) == y.shape[1]
    assert torch.equal(x[:, :, 0, 0, 0].long(), y), "inputs and targets belong together"


@given(seeds, epochs, st.data())
def test_the_order_does_not_depend_on_the_batch_size(seed, epoch, data):
    sizes = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    (x_a, y_a), (x_b, y_b) = (epoch_of([k.host_keys(k.root(seed), 2)], 60, size, epoch, True) for size in sizes)
    common = min(y_a.shape[1], y_b.shape[1])
    assert torch.equal(y_a[:, :common], y_b[:, :common])
    assert torch.equal(x_a[:, :common], x_b[:, :common]), "augmentation belongs to the sample, not to the batch"


@given(seeds, epochs)
def test_hosts_and_epochs_have_their_own_orders(seed, epoch):
    keys = [k.host_keys(k.root(seed), 2)]
    _, now = epoch_of(keys, 60, 60, epoch)
    _, then = epoch_of(keys, 60, 60, epoch + 1)
    assert not torch.equal(now[0], now[1])
    assert not torch.equal(now, then)


def crop_and_flip(image: torch.Tensor, draw: int) -> torch.Tensor:
    """The augmentation of one image, spelled out."""
    flip, top, left = draw % 2, draw // 2 % 9, draw // 18
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * PADDING, width + 2 * PADDING, dtype=image.dtype)
    padded[:, PADDING:-PADDING, PADDING:-PADDING] = image
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(-1) if flip else crop


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
def test_augmentation_is_a_keyed_crop_and_flip(seed, n, b, channels, height, width):
    x = k.bits(k.root(seed), n, b, channels, height, width).to(torch.uint8)
    key = k.fold(k.root(seed), torch.arange(n * b).view(n, b))
    augmented = augment(x, key)
    draws = k.integers(key, 162)
    for i in range(n):
        for j in range(b):
            assert torch.equal(augmented[i, j], crop_and_flip(x[i, j], int(draws[i, j])))


@given(seeds, epochs)
def test_augmentation_differs_between_hosts_and_epochs(seed, epoch):
    """Every sample is the same image, so sorted by sample the batches differ by augmentation alone."""
    image = (torch.arange(2 * 16 * 16) % 251 + 1).to(torch.uint8).view(1, 2, 16, 16).repeat(40, 1, 1, 1)
    split = Split(image, torch.arange(40))
    splits = Splits(split, split, split, torch.zeros(2, 1, 1), torch.ones(2, 1, 1))

    def by_sample(epoch):
        ((x, y),) = next(iter(SharedBatchIterator([splits], [k.host_keys(k.root(seed), 2)], 40, epoch, augment=True)))
        return torch.stack([x[host, y[host].argsort()] for host in range(2)])

    now, then = by_sample(epoch), by_sample(epoch + 1)
    assert not torch.equal(now[0], now[1])
    assert not torch.equal(now[0], then[0])
    assert len(now[0].unique(dim=0)) > 10, "samples draw for themselves"


@given(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=5))
def test_rows_are_ordered_as_one_by_one(rows: list[list[int]]) -> None:
    values = torch.tensor(rows)
    assert torch.equal(k.by_two_sorts(values), values.argsort(dim=-1, stable=True))
