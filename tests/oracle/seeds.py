"""Seeds of the oracle, as ordinary `nn.Module`s; every body lists its parameters by the package's names in `named`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def affine(prefix: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.weight": layer.weight, f"{prefix}.bias": layer.bias}


def causal_attention(qkv: Tensor, n_head: int) -> Tensor:
    batch, length, width = qkv.shape
    heads = [part.reshape(batch, length, n_head, -1).permute(0, 2, 1, 3) for part in qkv.split(width // 3, dim=2)]
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
    return mixed.permute(0, 2, 1, 3).reshape(batch, length, width // 3)


def groups(channels: int) -> int:
    for candidate in (32, 16, 8, 4, 2, 1):
        if channels % candidate == 0 and channels / candidate >= 16:
            return candidate
    return 1


class _GroupNormShare(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.norm, self.scale = nn.GroupNorm(groups(c), c), nn.Parameter(torch.ones(()))
        self.named = {"scale": self.scale, "weight": self.norm.weight, "bias": self.norm.bias}

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.scale) * (self.norm(x) - x)


class _SqueezeExcite(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        hidden = max(1, c // 4)
        self.down, self.up = nn.Linear(c, hidden, bias=False), nn.Linear(hidden, c, bias=False)
        self.named = {"down": self.down.weight, "up": self.up.weight}

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))
        return x * weight[:, :, None, None]


class _Depthwise(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
        self.pointwise = nn.Conv2d(c, c, 1, bias=False)
        self.norm = nn.GroupNorm(groups(c), c)
        self.named = {
            "depthwise": self.depthwise.weight,
            "pointwise": self.pointwise.weight,
            "weight": self.norm.weight,
            "bias": self.norm.bias,
        }

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.pointwise(self.depthwise(x))))


class _ConvUnit(nn.Sequential):
    def __init__(self, c: int):
        super().__init__(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.GroupNorm(groups(c), c), nn.ReLU())
        self.named = {"conv": self[0].weight, "weight": self[1].weight, "bias": self[1].bias}


class _ConvLight(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.unit = _ConvUnit(c)
        self.named = self.unit.named

    def forward(self, x: Tensor) -> Tensor:
        return x + self.unit(x)


class _ConvHeavy(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.first, self.second = _ConvUnit(c), _ConvUnit(c)
        self.named = {f"first.{name}": leaf for name, leaf in self.first.named.items()}
        self.named |= {f"second.{name}": leaf for name, leaf in self.second.named.items()}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class _ConvExpand(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.up, self.up_norm = nn.Conv2d(c, 4 * c, 3, padding=1, bias=False), nn.GroupNorm(groups(4 * c), 4 * c)
        self.down, self.down_norm = nn.Conv2d(4 * c, c, 3, padding=1, bias=False), nn.GroupNorm(groups(c), c)
        self.named = {
            "up": self.up.weight,
            "up_weight": self.up_norm.weight,
            "up_bias": self.up_norm.bias,
            "down": self.down.weight,
            "down_weight": self.down_norm.weight,
            "down_bias": self.down_norm.bias,
        }

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_norm(self.down(F.relu(self.up_norm(self.up(x)))))


class _LayerNormShare(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(d), nn.Parameter(torch.ones(()))
        self.named = {"scale": self.scale, "weight": self.norm.weight, "bias": self.norm.bias}

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.scale) * (self.norm(x) - x)


class _Lora(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.down, self.up = nn.Linear(d, 8, bias=False), nn.Linear(8, d, bias=False)
        nn.init.zeros_(self.up.weight)
        self.named = {"down": self.down.weight, "up": self.up.weight}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class _SelfAttention(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.named = {**affine("qkv", self.qkv), **affine("out", self.out)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(causal_attention(self.qkv(x), 4))


class _Mlp(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.named = {**affine("up", self.up), **affine("down", self.down)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


KINDS: dict[str, dict[str, type[nn.Module]]] = {
    "cnn": {
        "norm": _GroupNormShare,
        "attention": _SqueezeExcite,
        "depthwise": _Depthwise,
        "conv_light": _ConvLight,
        "conv_heavy": _ConvHeavy,
        "conv_expand": _ConvExpand,
    },
    "transformer": {"norm": _LayerNormShare, "lora": _Lora, "attention": _SelfAttention, "mlp": _Mlp},
}


class _Gate(nn.Module):
    """Learned share in (0, 1): one per image (features averaged over space) or one per position of a sequence."""

    def __init__(self, c: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(c, max(1, c // 4)), nn.Linear(max(1, c // 4), 1)

    def forward(self, h: Tensor) -> Tensor:
        if h.dim() == 4:
            return torch.sigmoid(self.out(F.relu(self.hidden(h.mean(dim=(2, 3))))))[:, :, None, None]
        return torch.sigmoid(self.out(F.relu(self.hidden(h))))


class OracleSeed(nn.Module):
    """A seed's body, and its gate when it blends through one."""

    def __init__(self, topology: str, blueprint: str, channels: int, gated: bool = False):
        super().__init__()
        self.body = KINDS[topology][blueprint](channels)
        self.gate = _Gate(channels) if gated else None

    def forward(self, h: Tensor) -> Tensor:
        return self.body(h)

    def share(self, alpha: float, h: Tensor) -> Tensor | float:
        """Effective alpha."""
        return alpha if self.gate is None else alpha * self.gate(h)

    def leaves(self) -> dict[str, Tensor]:
        named = {f"body.{name}": leaf for name, leaf in self.body.named.items()}
        if self.gate is not None:
            named |= affine("gate.hidden", self.gate.hidden) | affine("gate.out", self.gate.out)
        return named
