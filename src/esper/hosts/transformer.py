"""The transformer host: a small pre-norm language model with learned positions and a tied output projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts import init, ops
from esper.hosts.base import Site, Tree

_SITE_NAMES = ("early", "mid", "late")
_STD = 0.02
_EXPANSION = 4
_ATTENTION_WEIGHTS, _ATTENTION_OUT, _MLP_OUT = range(3)


def require_heads(channels: int, n_head: int) -> None:
    """Raises ValueError unless `channels` split evenly over `n_head` attention heads."""
    if n_head < 1 or channels % n_head:
        raise ValueError(f"n_head: {n_head} heads cannot share {channels} channels; it must divide them")


def dropout(h: Tensor, rate: float, key: Tensor | None) -> Tensor:
    """Zero a share `rate` of `h` and scale up the rest. `key` (scalar int64) draws the mask; None means evaluation."""
    if key is None or rate == 0.0:
        return h
    kept = k.uniform(key, *h.shape) >= rate
    return torch.where(kept, h / (1.0 - rate), torch.zeros_like(h))


def causal_attention(qkv: Tensor, n_head: int, rate: float = 0.0, key: Tensor | None = None) -> Tensor:
    """Self-attention in which a position sees itself and its past: `[B, L, 3 D]` to `[B, L, D]`.

    Dropout acts on the attention weights. Where there is any, they are spelled out, because torch's fused kernel draws
    from the global generator.
    """
    q, key_features, v = qkv.unflatten(-1, (3, n_head, -1)).transpose(1, 3).unbind(2)
    if key is None or rate == 0.0:
        mixed = ops.causal_attention(q, key_features, v)
    else:
        mixed = dropout(ops.causal_weights(q, key_features), rate, key) @ v
    return mixed.transpose(1, 2).flatten(-2)


def linear(params: Tree, h: Tensor) -> Tensor:
    """A linear layer with leaves `weight` `[out, in]` and `bias` `[out]`."""
    return F.linear(h, params["weight"], params["bias"])


def layer_norm(params: Tree, h: Tensor) -> Tensor:
    """LayerNorm over the features, with leaves `weight` and `bias` `[D]`."""
    return F.layer_norm(h, h.shape[-1:], params["weight"], params["bias"])


def layer_norm_init(keys: Tensor, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The identity affine of a LayerNorm, leaves `[N, D]`."""
    return {
        "weight": init.constant(keys, (channels,), 1.0, dtype),
        "bias": init.constant(keys, (channels,), 0.0, dtype),
    }


def _normal(keys: Tensor, shape: tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
    return k.normal(keys, *shape, dtype=torch.float64).mul(std).to(dtype)


def _linear_init(keys: Tensor, n_out: int, n_in: int, std: float, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": _normal(keys, (n_out, n_in), std, dtype), "bias": init.constant(keys, (n_out,), 0.0, dtype)}


@dataclass(frozen=True)
class TransformerHost:
    """Decoder-only language model (GPT-2's arrangement; Radford et al. 2019).

    Inputs are tokens `[B, L]` (int64) with `L <= block_size`; logits are `[B, L, vocab_size]`. Weights start from
    N(0, 0.02), those that write into the residual stream scaled by `1 / sqrt(2 n_layer)`, so the first loss is close to
    `ln(vocab_size)`. Slots early, mid and late lie after one third, two thirds and all of the layers. There are no
    statistics: `momentum` has nothing to move.

    Raises ValueError for fewer than three layers, for heads that do not divide `n_embd`, for `dropout` outside [0, 1)
    and, when run, for sequences longer than `block_size`.
    """

    vocab_size: int
    n_embd: int
    n_head: int
    n_layer: int
    block_size: int
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.n_layer < len(_SITE_NAMES):
            raise ValueError(f"n_layer: {self.n_layer}; a transformer host needs at least {len(_SITE_NAMES)} layers")
        require_heads(self.n_embd, self.n_head)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: {self.dropout}; legal is 0 up to but not including 1")

    @property
    def topology(self) -> str:
        return "transformer"

    @property
    def depth(self) -> int:
        return self.n_layer

    @property
    def sites(self) -> tuple[Site, ...]:
        third = self.n_layer // 3
        boundaries = (third, 2 * third, self.n_layer)
        return tuple(Site(name, at, self.n_embd) for name, at in zip(_SITE_NAMES, boundaries, strict=True))

    def init(self, keys: Tensor, dtype: torch.dtype = torch.float32) -> tuple[TensorDict, TensorDict]:
        n, d = keys.shape, self.n_embd
        embedding_key = k.fold(keys, self.n_layer)
        params = {
            "embedding": {
                "token": _normal(k.fold(embedding_key, 0), (self.vocab_size, d), _STD, dtype),
                "position": _normal(k.fold(embedding_key, 1), (self.block_size, d), _STD, dtype),
            },
            "blocks": {str(i): self._block_init(k.fold(keys, i), dtype) for i in range(self.n_layer)},
            "norm": layer_norm_init(keys, d, dtype),
        }
        return TensorDict(params, batch_size=n).auto_batch_size_(len(n)), TensorDict({}, batch_size=n)

    def _block_init(self, keys: Tensor, dtype: torch.dtype) -> dict[str, object]:
        d, residual = self.n_embd, _STD / math.sqrt(2 * self.n_layer)
        return {
            "attention_norm": layer_norm_init(keys, d, dtype),
            "attention": {
                "qkv": _linear_init(k.fold(keys, 0), 3 * d, d, _STD, dtype),
                "out": _linear_init(k.fold(keys, 1), d, d, residual, dtype),
            },
            "mlp_norm": layer_norm_init(keys, d, dtype),
            "mlp": {
                "up": _linear_init(k.fold(keys, 2), _EXPANSION * d, d, _STD, dtype),
                "down": _linear_init(k.fold(keys, 3), d, _EXPANSION * d, residual, dtype),
            },
        }

    def embed(self, params: Tree, x: Tensor, key: Tensor | None = None) -> Tensor:
        length = x.shape[-1]
        if length > self.block_size:
            raise ValueError(f"sequence length: {length}; legal is at most block_size = {self.block_size}")
        table = params["embedding"]
        h = F.embedding(x, table["token"]) + table["position"][:length]
        return self._drop(h, key, self.n_layer)

    def run_blocks(
        self,
        params: Tree,
        statistics: Tree,
        h: Tensor,
        start: int,
        stop: int,
        *,
        momentum: float | None,
        key: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:
        for i in range(start, stop):
            block = params["blocks"][str(i)]
            qkv = linear(block["attention"]["qkv"], layer_norm(block["attention_norm"], h))
            mixed = causal_attention(qkv, self.n_head, self.dropout, self._fold(key, i, _ATTENTION_WEIGHTS))
            h = h + self._drop(linear(block["attention"]["out"], mixed), key, i, _ATTENTION_OUT)
            wide = F.gelu(linear(block["mlp"]["up"], layer_norm(block["mlp_norm"], h)))
            h = h + self._drop(linear(block["mlp"]["down"], wide), key, i, _MLP_OUT)
        return h, statistics

    def head(self, params: Tree, h: Tensor) -> Tensor:
        return F.linear(layer_norm(params["norm"], h), params["embedding"]["token"])

    @staticmethod
    def _fold(key: Tensor | None, *where: int) -> Tensor | None:
        return None if key is None else k.fold(key, *where)

    def _drop(self, h: Tensor, key: Tensor | None, *where: int) -> Tensor:
        return dropout(h, self.dropout, self._fold(key, *where))
