"""Hosts to devices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.devices import check_devices, describe_groups, host_groups
from esper.errors import InputError


@given(st.integers(1, 64), st.integers(1, 64))
def test_groups_are_contiguous_complete_and_even(n_hosts: int, n_devices: int) -> None:
    if n_devices > n_hosts:
        with pytest.raises(ValueError, match="each gets a host"):
            host_groups(n_hosts, n_devices)
        return
    groups = host_groups(n_hosts, n_devices)
    assert len(groups) == n_devices
    assert [host for group in groups for host in group] == list(range(n_hosts))
    sizes = [len(group) for group in groups]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_the_map_names_hosts_and_devices() -> None:
    assert describe_groups(5, ("cuda:0", "cuda:1")) == "hosts 0-2 on cuda:0, hosts 3-4 on cuda:1"
    assert describe_groups(1, ("cpu",)) == "host 0 on cpu"


def test_missing_devices_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        check_devices(("cpu", "cuda:0"), "cuda")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["devices[1]", "device"]
    assert "not available" in str(caught.value)


def test_an_index_beyond_the_machine_is_named_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_devices(("cuda:0", "cuda:1"), "cuda")[1].type == "cuda"
    with pytest.raises(InputError, match=r'devices\[0\]: "cuda:2": this machine has 2 CUDA devices'):
        check_devices(("cuda:2",), "cpu")


def test_a_device_number_beyond_what_torch_can_count_is_missing_too() -> None:
    """Torch keeps an index in eight bits, so that of cuda:999 is negative."""
    with pytest.raises(InputError, match=r'devices\[0\]: "cuda:999": (.*)') as caught:
        check_devices(["cuda:999"], "cuda:200")
    assert len(caught.value.problems) == 2
