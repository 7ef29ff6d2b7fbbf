"""The oracle: hosts, seeds and their training as ordinary `nn.Module`s, sharing no line with the package.

It is slow and stateful on purpose. Tests load the package's stacked parameters into it, train both, and compare.
`OracleNetwork` puts an `OracleCNN` or `OracleTransformer` together with `OracleSeed`s; `train_step` trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle.seeds import OracleSeed, affine, causal_attention

MODES = ("off", "straight_through", "shadow", "none", "blend")


class OracleCNN(nn.Module):
    """Blocks of conv 3x3, BatchNorm, ReLU and (the first `pool_layers`) max-pooling; average pooling, linear head."""

    def __init__(
        self, in_channels: int, num_classes: int, base_channels: int, n_blocks: int = 3, pool_layers: int | None = None
    ):
        super().__init__()
        pooled = n_blocks if pool_layers is None else pool_layers
        widths = [in_channels] + [base_channels * 2**i for i in range(n_blocks)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.pools = nn.ModuleList(nn.MaxPool2d(2) if i < pooled else nn.Identity() for i in range(n_blocks))
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.depth = n_blocks
        self.boundaries = {"early": 1, "mid": 2, "late": 3}

    def begin(self, x: Tensor) -> Tensor:
        return x

    def block(self, i: int, h: Tensor) -> Tensor:
        return self.pools[i](F.relu(self.norms[i](self.convs[i](h))))

    def finish(self, h: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(h, 1).flatten(1))

    def leaves(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"head.weight": self.classifier.weight, "head.bias": self.classifier.bias}
        for i in range(self.depth):
            named[f"blocks.{i}.conv.weight"] = self.convs[i].weight
            named[f"blocks.{i}.norm.weight"] = self.norms[i].weight
            named[f"blocks.{i}.norm.bias"] = self.norms[i].bias
        return named

    def statistics(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for i in range(self.depth):
            named[f"blocks.{i}.mean"] = self.norms[i].running_mean
            named[f"blocks.{i}.var"] = self.norms[i].running_var
        return named


class _Layer(nn.Module):
    """A pre-norm decoder layer without dropout."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.attention_norm, self.mlp_norm = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.up, self.down = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.out(causal_attention(self.qkv(self.attention_norm(h)), self.n_head))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


class OracleTransformer(nn.Module):
    """Decoder-only language model without dropout; the output projection is the token embedding."""

    def __init__(self, vocab_size: int, n_embd: int, n_head: int, n_layer: int, block_size: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.layers = nn.ModuleList(_Layer(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.depth = n_layer
        self.boundaries = {"early": n_layer // 3, "mid": 2 * (n_layer // 3), "late": n_layer}

    def begin(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))

    def block(self, i: int, h: Tensor) -> Tensor:
        return self.layers[i](h)

    def finish(self, h: Tensor) -> Tensor:
        return self.norm(h) @ self.token.weight.t()

    def leaves(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"embedding.token": self.token.weight, "embedding.position": self.position.weight}
        named |= affine("norm", self.norm)
        for i, layer in enumerate(self.layers):
            named |= affine(f"blocks.{i}.attention_norm", layer.attention_norm)
            named |= affine(f"blocks.{i}.attention.qkv", layer.qkv)
            named |= affine(f"blocks.{i}.attention.out", layer.out)
            named |= affine(f"blocks.{i}.mlp_norm", layer.mlp_norm)
            named |= affine(f"blocks.{i}.mlp.up", layer.up)
            named |= affine(f"blocks.{i}.mlp.down", layer.down)
        return named

    def statistics(self) -> dict[str, Tensor]:
        return {}


class OracleNetwork(nn.Module):
    """A host with seeds.

    `modes[slot]` says how a seed takes part ("off" when left out): "straight_through" adds `s - s.detach()` of a seed
    fed detached features; "blend" is `h + a (s - h)`; "shadow", "none" and "off" leave the seed out of the forward. A
    shadow seed learns in `train_step` from `shadow_loss`, the loss of the network in which all shadow seeds are put in
    with alpha 1 (times the gate of a gated one) and nothing else learns.
    """

    def __init__(
        self,
        host: nn.Module,
        seeds: Mapping[str, OracleSeed] | None = None,
        modes: Mapping[str, str] | None = None,
        alphas: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.host, self.seeds = host, nn.ModuleDict(dict(seeds or {}))
        self.modes = {slot: (modes or {}).get(slot, "off") for slot in self.seeds}
        self.alphas = {slot: float((alphas or {}).get(slot, 0.0)) for slot in self.seeds}
        unknown = set(self.modes.values()) - set(MODES) or set(self.seeds) - set(host.boundaries)
        if unknown:
            raise ValueError(f"unknown modes or slots: {sorted(unknown)}")

    def forward(self, x: Tensor, insert_shadows: bool = False) -> Tensor:
        slot_after = {boundary: slot for slot, boundary in self.host.boundaries.items()}
        h = self.host.begin(x)
        for i in range(self.host.depth):
            h = self.host.block(i, h)
            slot = slot_after.get(i + 1)
            if slot in self.seeds:
                h = self._graft(slot, h, insert_shadows)
        return self.host.finish(h)

    def _graft(self, slot: str, h: Tensor, insert_shadows: bool) -> Tensor:
        seed, mode = self.seeds[slot], self.modes[slot]
        if mode == "straight_through":
            s = seed(h.detach())
            return h + (s - s.detach())
        if mode == "blend":
            return h + seed.share(self.alphas[slot], h) * (seed(h) - h)
        if mode == "shadow" and insert_shadows:
            return h + seed.share(1.0, h) * (seed(h) - h)
        return h

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return _cross_entropy(self(x), y)

    def shadow_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss with shadow seeds inserted; running BatchNorm statistics stay as they are."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            return _cross_entropy(self(x, insert_shadows=True), y)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def make_optimisers(net: OracleNetwork, host_lr: float, seed_lr: float) -> dict[str, torch.optim.SGD]:
    """One optimiser for the host (under "host") and one per seed (under its slot)."""
    optimisers = {"host": torch.optim.SGD(net.host.parameters(), lr=host_lr, momentum=0.9, weight_decay=5e-4)}
    for slot, seed in net.seeds.items():
        optimisers[slot] = torch.optim.SGD(seed.parameters(), lr=seed_lr, momentum=0.9)
    return optimisers


def train_step(net: OracleNetwork, optimisers: Mapping[str, torch.optim.Optimizer], x: Tensor, y: Tensor) -> float:
    """One step of every optimiser; returns the host's loss."""
    net.train()
    net.zero_grad(set_to_none=True)
    loss = net.loss(x, y)
    loss.backward()
    learners = [p for slot, mode in net.modes.items() if mode == "shadow" for p in net.seeds[slot].parameters()]
    if learners:
        for p, grad in zip(learners, torch.autograd.grad(net.shadow_loss(x, y), learners), strict=True):
            p.grad = grad
    for optimiser in optimisers.values():
        optimiser.step()
    return loss.item()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A nested mapping (or TensorDict) of tensors as one dictionary with dotted names."""
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        flat |= {prefix + name: value} if isinstance(value, Tensor) else flatten(value, f"{prefix}{name}.")
    return flat


def _copy(own: dict[str, Tensor], stacked: dict[str, Tensor], i: int) -> None:
    if own.keys() != stacked.keys():
        raise ValueError(f"parameters differ: {sorted(own.keys() ^ stacked.keys())}")
    with torch.no_grad():
        for name, leaf in own.items():
            if stacked[name][i].shape != leaf.shape:
                raise ValueError(f"{name}: {tuple(stacked[name][i].shape)} does not fit {tuple(leaf.shape)}")
            leaf.copy_(stacked[name][i])


def load_host(
    host: nn.Module, params: Mapping[str, Any], statistics: Mapping[str, Any] | None = None, i: int = 0
) -> None:
    """Copy row `i` of every stacked leaf into an oracle host (and its running statistics)."""
    _copy(host.leaves(), flatten(params), i)
    if statistics is not None:
        _copy(host.statistics(), flatten(statistics), i)


def load_seed(seed: OracleSeed, params: Mapping[str, Any], i: int = 0) -> None:
    """Copy row `i` of `{body, gate}` into an oracle seed; the gate is left out when the seed has none."""
    flat = flatten(params)
    if seed.gate is None:
        flat = {name: leaf for name, leaf in flat.items() if not name.startswith("gate.")}
    _copy(seed.leaves(), flat, i)
