"""The baseline of the benches: grown hosts as the ordinary modules they are exported as, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from esper.data.batches import evaluation_batches
from esper.data.splits import Splits
from esper.exported import HOSTS, Grown
from esper.growth.precision import autocast
from esper.growth.spec import GrowthSpec

Trained = tuple[Grown, torch.optim.Optimizer]
"""A network and what trains it."""


def networks(spec: GrowthSpec, records: TensorDict, device: torch.device) -> list[Trained]:
    """A fresh network for every row of slot records `[N, S]`, with its seeds."""
    # What one gets without asking; ours are not allowed it.
    torch.backends.cudnn.allow_tf32 = True
    found = []
    for row in records["blueprint"].tolist():
        grafts = [
            {
                "after": site.boundary,
                "blueprint": spec.blueprints[b],
                "channels": site.channels,
                "gated": False,
                "foreign": None,
            }
            for b, site in zip(row, spec.sites, strict=True)
            if b >= 0
        ]
        net = HOSTS[spec.host.topology](**asdict(spec.host), grafts=grafts).to(device)
        found.append((net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)))
    return found


def step(host: Trained, x: Tensor, y: Tensor, amp: str = "off") -> None:
    """One training step on a batch."""
    net, optimiser = host
    optimiser.zero_grad(set_to_none=True)
    with autocast(amp, x.device):
        loss = F.cross_entropy(net(x).float().flatten(0, -2), y.flatten())
    loss.backward()
    optimiser.step()


def train(hosts: Sequence[Trained], splits: Splits, batch: int, amp: str = "off") -> None:
    """Train every host for an epoch, in an order of its own."""
    data = splits.train
    for host in hosts:
        order = torch.randperm(len(data), device=splits.device)
        for part in order[: len(data) // batch * batch].split(batch):
            step(host, splits.prepare(data.inputs[part], torch.float32), data.targets[part].to(torch.int64), amp)


def validate(nets: Sequence[nn.Module], splits: Splits, amp: str = "off") -> list[int]:
    """Right answers of every network on the validation split."""
    batches, right = list(evaluation_batches(splits, splits.validation, 512)), []
    for net in nets:
        net.eval()
        with torch.no_grad(), autocast(amp, splits.device):
            right.append(torch.stack([(net(x).argmax(-1) == y).sum() for x, y in batches]).sum())
        net.train()
    return torch.stack(right).tolist()
