"""Seeds drawn ahead, while a GPU trains, so that planting one is no more than a copy.

Which seed comes next in a slot is known before anybody asks for it: the host's key, the slot and the number of seeds
planted there say it. So the numbers are those that `bank.plant` draws, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds import bank
from esper.seeds.bank import BankLayout
from esper.values import changed, upload


class Nursery:
    """The next seed of every kind for every slot of the hosts it was last shown: rows `[N, W]` of a bank on `device`.

    No more than a cache: what it does not have is drawn when it is planted.
    """

    def __init__(self, layout: BankLayout, device: torch.device | str = "cpu") -> None:
        self._layout, self._device = layout, torch.device(device)
        slots, kinds = zip(*layout.kinds, strict=True)
        widths = torch.tensor([kind.columns.stop - kind.columns.start for kind in layout.kinds.values()])
        slot_of, kind_of = [layout.slots.index(s) for s in slots], [layout.blueprints.index(name) for name in kinds]
        self._slot_of, self._kind_of = (
            torch.tensor(of).repeat_interleave(widths).to(self._device) for of in (slot_of, kind_of)
        )
        self._rows = torch.empty(0, layout.width, device=self._device)
        self._host_key = torch.empty(0, dtype=torch.int64)
        self._number = torch.empty(0, len(layout.slots), dtype=torch.int64)
        self._aside = _Aside(self._device) if self._device.type == "cuda" else None

    def draw(self, seeds: TensorDict, records: TensorDict, host_key: Tensor) -> None:
        """Have the seeds that could be planted next in the hosts with keys `[N]` and records `[N, S]`; `seeds` is their
        bank. Only those that have changed are drawn."""
        like, number = seeds["params"], records["planted"] + 1
        with self._aside.writing() if self._aside else nullcontext():
            missing = ~self._has(host_key, number)
            if self._rows.shape != like.shape or self._rows.dtype != like.dtype:
                self._rows, missing = torch.empty_like(like), torch.ones_like(missing)
            # Whatever happens on the way, no row is taken for what it is not.
            self._host_key = torch.empty(0, dtype=torch.int64)
            for j in range(len(self._layout.slots)):
                hosts = missing[:, j].nonzero().squeeze(1)
                if hosts.numel() == 0:
                    continue
                all_kinds = dict.fromkeys(self._layout.blueprints, torch.arange(len(hosts)))
                places = hosts.to(self._device)
                drawn = bank.fresh_seeds(self._layout, j, all_kinds, host_key[hosts], number[hosts, j], self._rows)
                for columns, _, fresh in drawn:
                    self._rows[:, columns].index_copy_(0, places, fresh)
        self._host_key, self._number = host_key, number

    def plant(self, seeds: TensorDict, germinated: Tensor, records: TensorDict, host_key: Tensor) -> TensorDict:
        """`bank.plant`, with what has been drawn already."""
        there = germinated & self._has(host_key, records["planted"])
        if there.any():
            kind = upload(torch.where(there, records["blueprint"], -1), self._device)
            here = kind.index_select(1, self._slot_of) == self._kind_of
            with self._aside.reading(self._rows) if self._aside else nullcontext():
                params = torch.where(here, self._rows, seeds["params"])
            seeds = changed(seeds, params=params, moments=seeds["moments"].masked_fill(here, 0))
        return bank.plant(seeds, self._layout, germinated & ~there, records, host_key)

    def _has(self, host_key: Tensor, number: Tensor) -> Tensor:
        """Where the `number`-th seeds `[N, S]` of hosts with keys `[N]` have been drawn, bool `[N, S]`."""
        if self._host_key.shape != host_key.shape:
            return torch.zeros_like(number, dtype=torch.bool)
        return (self._host_key == host_key)[:, None] & (self._number == number)


class _Aside:
    """A stream on which a GPU does something beside what it is doing: behind an epoch's work, every number that is sent
    there would be waited for until the epoch is over."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._read = torch.cuda.Event()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Work of this stream, once the last reader is done."""
        self._stream.wait_event(self._read)
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def reading(self, written: Tensor) -> Iterator[None]:
        """Work of the present stream that reads what was written."""
        present = torch.cuda.current_stream(self._device)
        present.wait_stream(self._stream)
        written.record_stream(present)
        yield
        self._read.record(present)
