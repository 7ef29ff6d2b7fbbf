"""What the hosts of a family draw, and what they are taught."""

import pytest
import torch

from esper import keys as k
from esper.config_fields import Family
from esper.data.batches import SharedBatchIterator
from esper.data.family import class_names, draws, lessons
from esper.data.splits import Split, Splits

N, M, CLASSES = 40, 60, 10
HOSTS = k.host_keys(k.root(1), N)
EVERYTHING = Family(train_fraction=(0.05, 1.0), label_noise=(0.0, 0.5), host_lr_factor=(0.1, 4.0), classes=(3, 7))


def split(size: int = M) -> Split:
    number = torch.arange(size)
    return Split(number.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous(), number % CLASSES)


def splits() -> Splits:
    return Splits(split(), split(7), split(5), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def epoch(family: Family | None, keys=HOSTS, number=0, augment=False):
    """Inputs `[n, M, 8, 8]` and labels `[n, M]` of an epoch."""
    batches = SharedBatchIterator([splits()], [keys], 10, number, augment=augment, family=family)
    parts = [batch for (batch,) in batches]
    return torch.cat([x[:, :, 0] for x, _ in parts], 1), torch.cat([y for _, y in parts], 1)


def samples(x: torch.Tensor) -> torch.Tensor:
    """Which samples they are, `[n, M]`."""
    return x[:, :, 0, 0].long()


def test_draws_stay_in_their_ranges_and_fill_them() -> None:
    drawn = draws(EVERYTHING, k.host_keys(k.root(2), 4000))
    assert drawn["classes"].unique().tolist() == [3, 4, 5, 6, 7]
    for name, (least, greatest) in EVERYTHING.model_dump(exclude={"classes", "width"}).items():
        values = drawn[name]
        assert least <= float(values.min()) <= float(values.max()) <= greatest
        middle = (least * greatest) ** 0.5 if name == "host_lr_factor" else (least + greatest) / 2
        assert float((values < middle).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack(list(drawn.values())))[0, 1:].abs().max())) < 0.05


def test_what_is_not_drawn_is_as_without_a_family() -> None:
    drawn = draws(Family(label_noise=(0.2, 0.2)), HOSTS)
    assert drawn["train_fraction"].eq(1.0).all()
    assert drawn["label_noise"].eq(0.2).all()
    assert drawn["host_lr_factor"].eq(1.0).all()
    assert drawn["classes"].isnan().all()
    assert class_names(Family(label_noise=(0.2, 0.2)), split(), HOSTS) is None


def test_a_host_draws_the_same_whatever_runs_beside_it() -> None:
    everyone, some = lessons(EVERYTHING, split(), HOSTS), lessons(EVERYTHING, split(), HOSTS[7:9])
    for name in ("members", "counts", "labels"):
        assert torch.equal(getattr(everyone, name)[7:9], getattr(some, name))
    for whole, part in zip(epoch(EVERYTHING), epoch(EVERYTHING, HOSTS[7:9]), strict=True):
        assert torch.equal(whole[7:9], part)


def test_a_host_meets_its_own_samples_equally_often_in_new_orders() -> None:
    drawn = draws(EVERYTHING, HOSTS)["train_fraction"]
    first, second = samples(epoch(EVERYTHING)[0]), samples(epoch(EVERYTHING, number=1)[0])
    for host in range(N):
        own, met = first[host].unique(return_counts=True)
        assert len(own) == max(1, round(float(drawn[host]) * M))
        assert int(met.max() - met.min()) <= 1
        assert torch.equal(own, second[host].unique())
        passes = first[host].split(len(own))
        assert all(len(part.unique()) == len(part) for part in passes)
        if 5 < len(own) <= M // 2:
            assert not torch.equal(passes[0], passes[1])
            assert not torch.equal(first[host], second[host])


def test_what_an_epoch_cuts_off_is_random() -> None:
    """A host with two thirds of the samples meets some of them twice: not always the same ones."""
    met = torch.stack(
        [samples(epoch(Family(train_fraction=(2 / 3, 2 / 3)), HOSTS[:1], e)[0])[0].bincount() for e in range(40)]
    )
    twice = (met == 2).double().mean(0)
    assert int((twice > 0).sum()) == 2 * M // 3
    assert float(twice.max()) < 0.9


def test_exactly_the_drawn_part_of_its_samples_is_mislabelled_all_episode() -> None:
    taught = lessons(EVERYTHING, split(), HOSTS)
    noise = draws(EVERYTHING, HOSTS)["label_noise"]
    names = class_names(EVERYTHING, split(), HOSTS)
    assert taught.labels is not None
    assert names is not None
    for host, count in enumerate(taught.counts.tolist()):
        own = taught.members[host, :count]
        wrong = taught.labels[host] != names[host][split().targets]
        assert int(wrong[own].sum()) == int(wrong.sum()) == round(float(noise[host]) * count)
        assert set(taught.labels[host].tolist()) <= set(names[host].tolist())
    for number in range(2):
        x, y = epoch(EVERYTHING, number=number)
        assert torch.equal(y, taught.labels.gather(1, samples(x)))


def test_a_host_keeps_its_classes_and_calls_the_rest_by_one_name() -> None:
    keys = k.host_keys(k.root(4), 500)
    drawn, names = draws(EVERYTHING, keys)["classes"].long().tolist(), class_names(EVERYTHING, split(), keys)
    assert names is not None
    for classes, row in zip(drawn, names.tolist(), strict=True):
        kept = [c for c in range(CLASSES) if row[c] == c]
        assert len(kept) == len(set(row)) == classes
        assert len({row[c] for c in range(CLASSES) if row[c] != c}) == 1
        assert set(row) == set(kept)
    often = torch.tensor([[name == c for c, name in enumerate(row)] for row in names.tolist()]).double().mean(0)
    assert float(often.max() - often.min()) < 0.15
    every = class_names(Family(classes=(CLASSES, CLASSES)), split(), keys)
    assert every is not None
    assert torch.equal(every, torch.arange(CLASSES).expand(500, -1))


def test_wrong_labels_are_any_other_class() -> None:
    taught = lessons(Family(label_noise=(1.0, 1.0)), split(), k.host_keys(k.root(3), 200))
    assert taught.labels is not None
    off = ((taught.labels - split().targets) % CLASSES).flatten().bincount(minlength=CLASSES)
    assert int(off[0]) == 0
    assert float(off[1:].max() / off[1:].min()) < 1.3


@pytest.mark.parametrize("augment", [False, True])
def test_a_host_that_draws_nothing_unusual_trains_as_without_a_family(augment: bool) -> None:
    neutral = Family(train_fraction=(1.0, 1.0), label_noise=(0.0, 0.0), host_lr_factor=(1.0, 1.0), classes=(10, 10))
    for plain, drawn in zip(epoch(None, augment=augment), epoch(neutral, augment=augment), strict=True):
        assert torch.equal(plain, drawn)


def test_a_sample_met_again_is_augmented_anew() -> None:
    bright = Splits(*[Split(torch.randint(256, (M, 1, 8, 8)).byte(), split().targets)] * 3, *[torch.ones(1, 1, 1)] * 2)
    alone = Family(train_fraction=(1 / M, 1 / M))
    batches = SharedBatchIterator([bright], [HOSTS[:1]], 10, 0, augment=True, family=alone)
    images = torch.cat([x[0] for ((x, _),) in batches]).flatten(1)
    assert len(images.unique(dim=0)) > M // 2


def test_tokens_have_no_classes_to_mistake() -> None:
    tokens = Split(torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"targets: \[4, 3\]; classes need one target"):
        lessons(Family(label_noise=(0.1, 0.2)), tokens, HOSTS)
    assert lessons(Family(train_fraction=(0.5, 0.5)), tokens, HOSTS).counts.eq(2).all()
