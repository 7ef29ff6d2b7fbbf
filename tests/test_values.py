"""Changes of state values leave the value alone and find its device."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch._subclasses.fake_tensor import FakeTensorMode

from esper.values import constant, finite_rows, put_rows, upload


def test_rows_are_replaced_in_a_copy() -> None:
    value = TensorDict({"a": torch.arange(6.0).view(3, 2), "b": TensorDict({"c": torch.ones(3)}, [3])}, [3])
    new = TensorDict({"a": -torch.ones(2, 2), "b": TensorDict({"c": torch.zeros(2)}, [2])}, [2])
    changed = put_rows(value, torch.tensor([2, 0]), new)
    assert changed["a"].tolist() == [[-1, -1], [2, 3], [-1, -1]]
    assert changed["b", "c"].tolist() == [0, 1, 0]
    assert value["a"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_rows_that_were_found_on_the_cpu_are_changed_on_a_gpu() -> None:
    with FakeTensorMode():
        value = TensorDict({"a": torch.zeros(3, 2, device="cuda:0")}, [3])
        rows, new = torch.tensor([2]), TensorDict({"a": torch.ones(1, 2, device="cuda:0")}, [1])
        assert put_rows(value, rows, new)["a"].device == torch.device("cuda:0")


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_row_is_finite_if_all_its_numbers_are(broken: float) -> None:
    single, wide = torch.full((3,), 3e38), torch.full((3, 2, 4), 3e38)
    assert finite_rows([single, wide]).all()
    single[0] = broken
    wide[2, 1, 3] = broken
    assert finite_rows([single, wide]).tolist() == [[False, True], [True, True], [True, False]]


def test_a_constant_is_a_number_of_the_type_asked_for_and_made_once() -> None:
    cpu, nan = torch.device("cpu"), math.nan
    found = [constant(value, dtype, cpu) for value, dtype in ((1, torch.int64), (1, torch.bool), (1, torch.float32))]
    assert [(one.item(), one.dtype) for one in found] == [(1, torch.int64), (True, torch.bool), (1.0, torch.float32)]
    assert constant(1, torch.int64, cpu) is found[0]
    assert constant(nan, torch.float32, cpu) is constant(nan, torch.float32, cpu)
    assert constant(nan, torch.float32, cpu).isnan()


@pytest.mark.cuda
@pytest.mark.parametrize("numbers", [10, 100_000])
def test_an_upload_does_not_wait_and_is_what_was_given_then(numbers: int) -> None:
    device, given = torch.device("cuda"), torch.randn(numbers)
    # Memory and kernels are made ready when they are first needed, which waits.
    upload(given, device)
    torch.cuda._sleep(1_000_000_000)
    busy = torch.cuda.current_stream().record_event()
    expected, there = given.clone(), upload(given, device)
    given.zero_()
    assert not busy.query()
    assert torch.equal(there.cpu(), expected)
