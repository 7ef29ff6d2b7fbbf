"""Grown hosts for the benches: mixed seeds in half of all slots, and the same networks as ordinary modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from esper import keys as k
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds import bank, blueprints  # noqa: F401  (registers them)
from esper.seeds.lifecycle import LifecycleRules
from esper.seeds.stages import Stage

SLOTS = ("early", "mid", "late")
CNN_KINDS = ("conv_light", "attention", "norm", "depthwise", "conv_expand")
TRANSFORMER_KINDS = ("norm", "lora", "attention", "mlp")


def make_spec(host: CNNHost | TransformerHost, amp: str = "off") -> GrowthSpec:
    """Three slots and all usual blueprints."""
    kinds = CNN_KINDS if isinstance(host, CNNHost) else TRANSFORMER_KINDS
    return GrowthSpec(host, SLOTS, kinds, LifecycleRules(25), amp=amp)


def make_growth(
    spec: GrowthSpec, n: int, cells: str, turn: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TensorDict:
    """Fresh hosts with blended seeds.

    `cells` says which slots are filled: `"none"`, `"half"` (every other one, kinds in turn) or `"all"`. Another `turn`
    gives another plan with as many seeds of each kind.
    """
    lr = torch.full((n,), 0.05, dtype=torch.float64)
    growth = fresh_growth(spec, k.host_keys(k.root(1), n), lr, lr, dtype)
    records = growth["slots"].clone()
    host, slot = torch.meshgrid(torch.arange(n), torch.arange(len(SLOTS)), indexing="ij")
    number = host * len(SLOTS) + slot + turn
    filled = {"none": number < 0, "half": number % 2 == 0, "all": number >= 0}[cells]
    kinds = (number // 2 + host // 7) % len(spec.blueprints)
    records["stage"] = torch.where(filled, int(Stage.BLENDING), records["stage"])
    records["blueprint"] = torch.where(filled, kinds, records["blueprint"])
    records["blend"] = torch.where(filled, 0, records["blend"])
    records["alpha"] = torch.where(filled, 0.4, records["alpha"])
    growth["slots"] = records
    growth["seeds"] = bank.plant(growth["seeds"], spec.host, SLOTS, spec.blueprints, filled, records, growth["key"])
    return growth.to(device)


class Seed(nn.Module):
    """The five usual seeds of image hosts as one would write them."""

    def __init__(self, kind: str, c: int) -> None:
        super().__init__()
        self.kind = kind
        groups = max(1, c // 16)
        if kind == "norm":
            self.norm, self.scale = nn.GroupNorm(groups, c), nn.Parameter(torch.ones(()))
        elif kind == "attention":
            self.gate = nn.Sequential(
                nn.Linear(c, max(1, c // 4), bias=False), nn.ReLU(), nn.Linear(max(1, c // 4), c, bias=False)
            )
        elif kind == "depthwise":
            depth, point = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.Conv2d(c, c, 1, bias=False)
            self.body = nn.Sequential(depth, point, nn.GroupNorm(groups, c), nn.ReLU())
        elif kind == "conv_light":
            self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.GroupNorm(groups, c), nn.ReLU())
        else:
            wide = 4 * c
            self.body = nn.Sequential(
                nn.Conv2d(c, wide, 3, padding=1, bias=False),
                nn.GroupNorm(max(1, wide // 16), wide),
                nn.ReLU(),
                nn.Conv2d(wide, c, 3, padding=1, bias=False),
                nn.GroupNorm(groups, c),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "norm":
            return x + torch.tanh(self.scale) * (self.norm(x) - x)
        if self.kind == "attention":
            return x * torch.sigmoid(self.gate(x.mean(dim=(2, 3))))[..., None, None]
        return x + self.body(x)


class PlainCNN(nn.Module):
    """One grown host as an ordinary module; `seeds` names a kind per slot, or None."""

    def __init__(self, host: CNNHost, seeds: Sequence[str | None]) -> None:
        super().__init__()
        widths = [host.in_channels] + [host.channels(i) for i in range(host.n_blocks)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.seeds = nn.ModuleList(
            nn.Identity() if kind is None else Seed(kind, c) for kind, c in zip(seeds, widths[1:], strict=False)
        )
        self.live = [j for j, kind in enumerate(seeds) if kind is not None]
        self.head = nn.Linear(widths[-1], host.num_classes)

    def forward(self, x: Tensor, without: Sequence[int] = ()) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
            if i in self.live and i not in without:
                x = x + 0.4 * (self.seeds[i](x) - x)
        return self.head(x.mean(dim=(2, 3)))


class PlainTransformer(nn.Module):
    """An ungrown transformer host as an ordinary module, with torch's own attention kernel."""

    def __init__(self, host: TransformerHost) -> None:
        super().__init__()
        d = host.n_embd
        self.heads = host.n_head
        self.token, self.position = nn.Embedding(host.vocab_size, d), nn.Embedding(host.block_size, d)
        self.layers = nn.ModuleList(self._layer(d) for _ in range(host.n_layer))
        self.norm = nn.LayerNorm(d)

    @staticmethod
    def _layer(d: int) -> nn.ModuleList:
        attention = [nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)]
        return nn.ModuleList([*attention, nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        for first, qkv, out, second, up, down in self.layers:
            q, key, v = qkv(first(h)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
            h = h + out(F.scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).flatten(-2))
            h = h + down(F.gelu(up(second(h))))
        return self.norm(h) @ self.token.weight.T
