"""The bank's layout, and planting and uprooting in it."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from esper import keys as k
from esper.hosts.base import Host
from esper.hosts.cnn import CNNHost
from esper.hosts.padded import PaddedHost, shape_of
from esper.hosts.transformer import TransformerHost
from esper.seeds import blueprints  # noqa: F401  (registers them)
from esper.seeds.bank import BankLayout, empty_bank, fresh_seed, plant, seed_keys, uproot
from esper.seeds.slots import LAYOUT, empty_records
from tiny import differing, flat

CNN = CNNHost(1, 10, 4, pool_layers=2)
LAYOUTS = {
    "cnn": BankLayout(CNN, LAYOUT, ("noop", "norm", "conv_light", "conv_heavy")),
    "transformer": BankLayout(TransformerHost(11, 8, 4, 3, 6), ("early", "late"), ("norm", "lora", "mlp")),
    "padded": BankLayout(PaddedHost(CNN, (1, 2, 4)), LAYOUT, ("attention", "depthwise")),
}
N = 7


def planted(layout: BankLayout) -> tuple[TensorDict, torch.Tensor, TensorDict, torch.Tensor]:
    """A bank with seeds of every kind in most places, where they are, their records, and the hosts' keys."""
    keys, records = k.host_keys(k.root(9), N), empty_records(N, len(layout.slots))
    host, slot = torch.meshgrid(torch.arange(N), torch.arange(len(layout.slots)), indexing="ij")
    records["blueprint"], records["planted"] = (host + slot) % len(layout.blueprints), 1 + host % 2
    where = (host + 2 * slot) % 5 != 0
    return plant(empty_bank(layout, N, torch.float64), layout, where, records, keys), where, records, keys


@pytest.mark.parametrize("name", LAYOUTS)
def test_kinds_fill_the_rows_one_after_the_other(name: str) -> None:
    layout = LAYOUTS[name]
    row = torch.arange(layout.width)
    assert torch.equal(torch.cat([row[kind.columns] for kind in layout.kinds.values()]), row)
    assert torch.equal(torch.cat([row[layout.columns(slot)] for slot in layout.slots]), row)
    opened = layout.open(row.repeat(N, 1))
    assert torch.equal(torch.cat([leaf[0].flatten() for leaf in flat(opened).values()]), row)
    for slot in layout.slots:
        for kind in layout.blueprints:
            fresh = fresh_seed(layout.host, slot, kind, torch.zeros(N, dtype=torch.int64), torch.float32)
            assert list(opened[slot, kind].keys()) == ["body", "gate"]
            assert {path: leaf.shape for path, leaf in flat(opened[slot, kind]).items()} == {
                path: leaf.shape for path, leaf in flat(fresh).items()
            }


def test_what_is_opened_is_the_bank_itself() -> None:
    layout, matrix = LAYOUTS["cnn"], torch.zeros(N, LAYOUTS["cnn"].width)
    layout.kinds["mid", "conv_light"].open(matrix)["body"]["conv"][2] = 1.0
    layout.kinds["mid", "norm"].open(matrix[3])["body"]["scale"].fill_(1.0)
    assert matrix[2].sum() == 8 * 8 * 9
    assert matrix[3].nonzero().flatten().tolist() == [layout.kinds["mid", "norm"].columns.start]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_seed_is_drawn_from_its_own_key(name: str) -> None:
    layout = LAYOUTS[name]
    bank, where, records, keys = planted(layout)
    opened = layout.open(bank["params"])
    shapes = getattr(layout.host, "shapes", (layout.host,))
    for i in range(N):
        own = shapes[int(shape_of(layout.host, keys)[i])]
        for j, slot in enumerate(layout.slots):
            for b, kind in enumerate(layout.blueprints):
                found = flat(opened[slot, kind][i])
                if not where[i, j] or records["blueprint"][i, j] != b:
                    assert not any(leaf.any() for leaf in found.values())
                    continue
                key = seed_keys(keys[i : i + 1], j, records["planted"][i : i + 1, j])
                for path, leaf in flat(fresh_seed(own, slot, kind, key, torch.float64)[0]).items():
                    assert torch.equal(found[path][tuple(map(slice, leaf.shape))], leaf), path
                    assert found[path].count_nonzero() == leaf.count_nonzero()
    assert not bank["moments"].any()


def test_planting_and_uprooting_change_nothing_else() -> None:
    layout = LAYOUTS["cnn"]
    bank, where, records, keys = planted(layout)
    bank["moments"] = torch.rand(bank["moments"].shape, dtype=torch.float64)
    before = bank.clone()
    here = torch.zeros_like(where)
    here[2, 1] = here[4, 0] = True
    again = plant(bank, layout, here, records, keys + 1)
    gone = uproot(bank, layout, here)
    assert not differing(bank, before)
    outside = torch.ones(N, layout.width, dtype=torch.bool)
    for i, slot in ((2, "mid"), (4, "early")):
        outside[i, layout.columns(slot)] = False
    for name in ("params", "moments"):
        assert not gone[name][~outside].any()
        assert torch.equal(gone[name][outside], before[name][outside])
        assert torch.equal(again[name][outside], before[name][outside])
        assert not torch.equal(again[name], before[name])


def test_a_broken_seed_is_gone_when_it_is_uprooted() -> None:
    layout = LAYOUTS["cnn"]
    bank, where, _, _ = planted(layout)
    bank["params"][2] = float("nan")
    gone = uproot(bank, layout, where)
    assert gone["params"].isfinite().tolist() == [
        [i != 2 or bool(where[2, j]) for j in slots(layout)] for i in range(N)
    ]


def slots(layout: BankLayout) -> list[int]:
    """The number of the slot of each column."""
    return [j for j, slot in enumerate(layout.slots) for _ in range(layout.width)[layout.columns(slot)]]


def test_a_bank_in_which_nothing_happens_is_the_same_bank() -> None:
    layout = LAYOUTS["cnn"]
    bank, where, records, keys = planted(layout)
    nowhere = torch.zeros_like(where)
    assert plant(bank, layout, nowhere, records, keys) is bank
    assert uproot(bank, layout, nowhere) is bank


def test_a_layout_is_a_value() -> None:
    def make(host: Host) -> BankLayout:
        return BankLayout(host, ("mid",), ("norm",))

    assert make(CNN) == make(CNNHost(1, 10, 4, pool_layers=2))
    assert hash(make(CNN)) == hash(make(CNNHost(1, 10, 4, pool_layers=2)))
    assert make(CNN) != make(CNNHost(1, 10, 2, pool_layers=2))
