"""Seeds drawn ahead are the seeds that would be drawn when they are planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esper import keys as k
from esper.growth.executors.stacked import StackedExecutor
from esper.seeds import bank
from esper.seeds.actions import Op
from esper.seeds.nursery import Nursery
from esper.seeds.slots import empty_records
from esper.values import changed
from seeds.test_bank import LAYOUTS, N, planted
from tiny import Run, differing, germinate, tiny_spec


@pytest.mark.parametrize("name", LAYOUTS)
def test_planting_what_was_drawn_ahead_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[name]
    expected, where, records, keys = planted(layout)
    empty = bank.empty_bank(layout, N, torch.float64)
    left = changed(empty, moments=empty["moments"] + 1.0)
    nursery = Nursery(layout)
    before = records.clone()
    before["planted"] = records["planted"] - 1
    nursery.draw(empty, before, keys)
    monkeypatch.setattr(bank, "fresh_seeds", None)  # nothing is drawn any more
    found = nursery.plant(left, where, records, keys)
    assert torch.equal(found["params"], expected["params"])
    for j, slot in enumerate(layout.slots):
        for b, kind in enumerate(layout.blueprints):
            here = where[:, j] & (records["blueprint"][:, j] == b)
            moments = found["moments"][:, layout.kinds[slot, kind].columns]
            assert bool((moments[here] == 0.0).all())
            assert bool((moments[~here] == 1.0).all())
    assert bool((left["params"] == 0.0).all())


def test_what_was_not_drawn_ahead_is_drawn_when_it_is_planted() -> None:
    """A second seed in one slot, other hosts, and more of them."""
    layout = LAYOUTS["cnn"]
    expected, where, records, keys = planted(layout)
    empty, nursery = bank.empty_bank(layout, N, torch.float64), Nursery(layout)
    for shown in (empty_records(N, 3), empty_records(N, 3)[:2]):
        nursery.draw(empty[: len(shown)], shown, keys[: len(shown)])
        found = nursery.plant(empty, where, records, keys)
        assert differing(found, expected) == []
    others = k.host_keys(k.root(10), N)
    nursery.draw(empty, empty_records(N, 3), others)
    assert differing(nursery.plant(empty, where, records, keys), expected) == []


def test_only_what_has_changed_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, keys = LAYOUTS["cnn"], k.host_keys(k.root(9), N)
    seeds, records, nursery = bank.empty_bank(layout, N, torch.float32), empty_records(N, 3), Nursery(layout)
    drawn, fresh_seeds = [], bank.fresh_seeds

    def counted(layout, j, wanted, host_key, number, like):  # type: ignore[no-untyped-def]
        drawn.append((j, len(host_key)))
        return fresh_seeds(layout, j, wanted, host_key, number, like)

    monkeypatch.setattr(bank, "fresh_seeds", counted)
    nursery.draw(seeds, records, keys)
    nursery.draw(seeds, records, keys)
    assert drawn == [(0, N), (1, N), (2, N)]
    records["planted"][2:4, 1] += 1
    nursery.draw(seeds, records, keys)
    assert drawn[3:] == [(1, 2)]


def test_a_draw_that_fails_leaves_nothing_that_is_taken_for_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["cnn"]
    expected, where, records, keys = planted(layout)
    empty, nursery, fresh_seeds = bank.empty_bank(layout, N, torch.float64), Nursery(layout), bank.fresh_seeds
    nursery.draw(empty, changed(records, planted=records["planted"] - 1), keys)
    others, calls = k.host_keys(k.root(10), N), iter(range(9))

    def failing(*args):  # type: ignore[no-untyped-def]
        if next(calls) == 2:
            raise MemoryError
        return fresh_seeds(*args)

    with monkeypatch.context() as patched:
        patched.setattr(bank, "fresh_seeds", failing)
        with pytest.raises(MemoryError):
            nursery.draw(empty, changed(records, planted=records["planted"] - 1), others)
    assert differing(nursery.plant(empty, where, records, keys), expected) == []


def test_a_run_with_a_nursery_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And from its second epoch on nothing is drawn when it is planted."""
    spec = tiny_spec()
    plain, ahead = (Run(spec, executor=StackedExecutor(spec, torch.device("cpu"))) for _ in range(2))
    ahead.shards = [replace(shard, nursery=Nursery(spec.bank)) for shard in ahead.shards]
    drawn, plant = [], bank.plant

    def counted(seeds, layout, germinated, records, host_key):  # type: ignore[no-untyped-def]
        drawn.append(int(germinated.sum()))
        return plant(seeds, layout, germinated, records, host_key)

    monkeypatch.setattr(bank, "plant", counted)
    actions = [{0: germinate(0)}, {1: germinate(1, 1), 2: germinate(0)}, {0: (Op.CULL, 0)}, {}, {0: germinate(0, 1)}]
    for chosen in actions:
        results = [run.step(chosen) for run in (plain, ahead)]
        assert differing(*results) == []
        assert differing(plain.growth, ahead.growth) == []
    assert drawn[::2] == [1, 2, 0, 0, 1]
    assert drawn[1::2] == [1, 0, 0, 0, 0]
