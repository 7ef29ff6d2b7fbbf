"""Grown networks as ordinary modules. This file needs torch and safetensors and nothing else: copy it where you like.

    network = load_exported("grown/")

A folder written by `python -m esper.export` holds `architecture.json` (see `build`) and `weights.safetensors`, the
module's state dict. Inputs are what the network was trained on: images normalised with the `input` of the architecture
(`(pixels - mean) / std`), or tokens as int64.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ARCHITECTURE, WEIGHTS = "architecture.json", "weights.safetensors"
FORMAT = 1


class ConvUnit(nn.Module):
    """3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = _group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ConvLight(ConvUnit):
    """Residual 3x3 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvHeavy(nn.Module):
    """Two residual 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = ConvUnit(channels), ConvUnit(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ConvExpand(nn.Module):
    """Residual expansion C -> 4C -> C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(channels, 4 * channels, 3, padding=1, bias=False)
        self.up_norm = _group_norm(4 * channels)
        self.down = nn.Conv2d(4 * channels, channels, 3, padding=1, bias=False)
        self.down_norm = _group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_norm(self.down(F.relu(self.up_norm(self.up(x)))))


class Depthwise(nn.Module):
    """Residual depthwise-separable convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = _group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.pointwise(self.depthwise(x))))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation: a gate per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.down, self.up = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(-2, -1))))))
        return x * gates[..., None, None]


class NormShare(nn.Module):
    """A learned share of a normalisation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(())), norm

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.scale) * (self.norm(x) - x)


class Lora(nn.Module):
    """Residual low-rank linear map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 8, bias=False), nn.Linear(8, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, channels: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).transpose(1, 3).unbind(2)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class Mlp(nn.Module):
    """Two-layer perceptron D -> 4D -> D."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class ResidualAttention(Attention):
    """Residual causal self-attention with four heads."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualMlp(Mlp):
    """Residual two-layer perceptron."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)
    return nn.GroupNorm(groups, channels)


BODIES: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "cnn": {
        "norm": lambda c: NormShare(_group_norm(c)),
        "attention": ChannelAttention,
        "depthwise": Depthwise,
        "conv_light": ConvLight,
        "conv_heavy": ConvHeavy,
        "conv_expand": ConvExpand,
    },
    "transformer": {
        "norm": lambda c: NormShare(nn.LayerNorm(c)),
        "lora": Lora,
        "attention": ResidualAttention,
        "mlp": ResidualMlp,
    },
}
"""The blueprints that come with the package."""


class Foreign(nn.Module):
    """A seed of someone's own blueprint: its parameters, run by its own `apply(params, x)`, imported by name."""

    def __init__(self, shapes: Mapping[str, Any], apply: Callable[[Mapping[str, Any], Tensor], Tensor]) -> None:
        super().__init__()
        self.apply_body = apply
        self.leaves = _Leaves(shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_body(self.leaves.tree(), x)


class _Leaves(nn.Module):
    def __init__(self, shapes: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            if isinstance(shape, Mapping):
                self.add_module(name, _Leaves(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def tree(self) -> dict[str, Any]:
        """The parameters as the nested mapping that `apply` expects."""
        parts = {name: getattr(self, name) for name in self.names}
        return {name: part.tree() if isinstance(part, _Leaves) else part for name, part in parts.items()}


class Gate(nn.Module):
    """Learned share of a seed: one per image, or one per position of a sequence."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(channels, max(1, channels // 4)), nn.Linear(max(1, channels // 4), 1)

    def forward(self, h: Tensor) -> Tensor:
        pooled = h.mean(dim=(-2, -1)) if h.dim() == 4 else h
        share = torch.sigmoid(self.out(F.relu(self.hidden(pooled))))
        return share[..., None, None] if h.dim() == 4 else share


class Graft(nn.Module):
    """A fossil: `h + (s - h)`, times its gate if it has one; written as it was trained, so that it rounds the same."""

    def __init__(self, topology: str, spec: Mapping[str, Any]) -> None:
        super().__init__()
        channels, foreign = spec["channels"], spec["foreign"]
        if foreign is None:
            self.body = BODIES[topology][spec["blueprint"]](channels)
        else:
            self.body = Foreign(foreign["shapes"], resolve(foreign["apply"]))
        self.gate = Gate(channels) if spec["gated"] else None

    def forward(self, h: Tensor) -> Tensor:
        change = self.body(h) - h
        return h + (change if self.gate is None else self.gate(h) * change)


def resolve(name: str) -> Callable[[Mapping[str, Any], Tensor], Tensor]:
    """The function called `"module:name"`. Raises ImportError or AttributeError if it is not there."""
    module, _, qualified = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    function: Callable[[Mapping[str, Any], Tensor], Tensor] = found
    return function


class Grown(nn.Module):
    """A host with its fossils. `grafts[i]` follows block `after[i]` (1 is behind the first)."""

    def __init__(self, topology: str, depth: int, grafts: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.grafts = nn.ModuleList(Graft(topology, spec) for spec in grafts)
        after = [spec["after"] for spec in grafts]
        self._behind = [[i for i, place in enumerate(after) if place == block + 1] for block in range(depth)]
        self.blocks: nn.ModuleList

    def run_blocks(self, h: Tensor) -> Tensor:
        """All blocks, each with the fossils behind it."""
        for block, behind in zip(self.blocks, self._behind, strict=True):
            h = block(h)
            for i in behind:
                h = self.grafts[i](h)
        return h


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU and, if `pool`, 2x2 max-pooling."""

    def __init__(self, in_channels: int, channels: int, pool: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        pooled: Tensor = self.pool(F.relu(self.norm(self.conv(h))))
        return pooled


class GrownCNN(Grown):
    """Images `[B, in_channels, H, W]` to logits `[B, num_classes]`."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        base_channels: int,
        n_blocks: int,
        pool_layers: int | None,
        grafts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__("cnn", n_blocks, grafts)
        widths = [in_channels] + [base_channels * 2**i for i in range(n_blocks)]
        pooled = n_blocks if pool_layers is None else pool_layers
        self.blocks = nn.ModuleList(ConvBlock(widths[i], widths[i + 1], i < pooled) for i in range(n_blocks))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.run_blocks(x).mean(dim=(2, 3)))
        return logits


class DecoderLayer(nn.Module):
    """Pre-norm attention and perceptron."""

    def __init__(self, width: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, n_head, dropout)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), Mlp(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.drop(self.attention(self.attention_norm(h)))
        return h + self.drop(self.mlp(self.mlp_norm(h)))


class Embedding(nn.Module):
    """Token plus learned position."""

    def __init__(self, vocab_size: int, width: int, block_size: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.token(x) + self.position.weight[: x.shape[-1]]
        return embedded


class GrownTransformer(Grown):
    """Tokens `[B, L]` to logits `[B, L, vocab_size]`; the output projection is the token embedding."""

    def __init__(
        self,
        vocab_size: int,
        n_embd: int,
        n_head: int,
        n_layer: int,
        block_size: int,
        dropout: float,
        grafts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__("transformer", n_layer, grafts)
        self.embedding = Embedding(vocab_size, n_embd, block_size)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(DecoderLayer(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.run_blocks(self.drop(self.embedding(x)))
        return F.linear(self.norm(h), self.embedding.token.weight)


HOSTS: dict[str, Callable[..., Grown]] = {"cnn": GrownCNN, "transformer": GrownTransformer}


def build(architecture: Mapping[str, Any]) -> Grown:
    """The module an architecture describes, with fresh weights, in evaluation mode.

    An architecture is `{"format": 1, "topology", "host": {the host's own sizes}, "grafts": [{"after", "slot",
    "blueprint", "channels", "gated", "foreign"}], "dtype", "input", "about"}`. `foreign` is null for the blueprints
    that come with the package, and `{"apply": "module:name", "shapes"}` for others. Raises ValueError for another
    format or topology, and ImportError where a foreign `apply` cannot be imported.
    """
    if architecture.get("format") != FORMAT or architecture.get("topology") not in HOSTS:
        found = {name: architecture.get(name) for name in ("format", "topology")}
        raise ValueError(f"architecture: {found}; must be of format {FORMAT} and topology {' or '.join(HOSTS)}")
    network = HOSTS[architecture["topology"]](**architecture["host"], grafts=architecture["grafts"])
    return network.to(getattr(torch, architecture["dtype"])).eval()


def load_exported(path: str | Path) -> Grown:
    """The network in an exported folder, on the CPU, in evaluation mode. Raises OSError where a file is missing."""
    folder = Path(path)
    network = build(json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8")))
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network
