"""Which device every host lives on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from esper.errors import InputError


def check_devices(devices: Sequence[str], device: str) -> tuple[tuple[torch.device, ...], torch.device]:
    """The hosts' devices and the policy's device.

    Raises InputError naming every device this machine lacks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    legal = f"this machine has {count} CUDA devices" if count else "CUDA is not available on this machine; use cpu"
    places = [(f"devices[{index}]", name) for index, name in enumerate(devices)] + [("device", device)]
    missing = [
        f'{place}: "{name}": {legal}'
        for place, name in places
        if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count
    ]
    if missing:
        raise InputError(missing)
    return tuple(torch.device(name) for name in devices), torch.device(device)


def host_groups(n_hosts: int, n_devices: int) -> tuple[range, ...]:
    """Contiguous groups of hosts, one per device, as equal as possible, the larger ones first.

    Raises ValueError if a device would get no host.
    """
    if not 1 <= n_devices <= n_hosts:
        raise ValueError(f"devices: {n_devices}; must be 1 to {n_hosts}, so that each gets a host")
    share, extra = divmod(n_hosts, n_devices)
    starts = [index * share + min(index, extra) for index in range(n_devices + 1)]
    return tuple(range(first, last) for first, last in pairwise(starts))


def describe_groups(n_hosts: int, devices: Sequence[str]) -> str:
    """The host-to-device map for people: `"hosts 0-3 on cuda:0, hosts 4-7 on cuda:1"`."""
    return ", ".join(
        f"host{'s' if len(group) > 1 else ''} {'-'.join(str(i) for i in sorted({group[0], group[-1]}))} on {name}"
        for group, name in zip(host_groups(n_hosts, len(devices)), devices, strict=True)
    )
