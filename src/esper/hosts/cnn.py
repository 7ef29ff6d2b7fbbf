"""The CNN host: blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max-pooling, then an average and a linear head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.hosts import init, ops
from esper.hosts.base import Site, Tree

_SITE_NAMES = ("early", "mid", "late")


@dataclass(frozen=True)
class CNNHost:
    """Convolutional classifier of any depth from three blocks on (plan step 2).

    Block `i` has `base_channels * 2**i` channels and is followed by pooling when `i < pool_layers` (default: every
    block). Slots early, mid and late lie after blocks 1, 2 and 3, behind the pooling. Inputs are `[B, in_channels, H,
    W]`.
    """

    in_channels: int
    num_classes: int
    base_channels: int
    n_blocks: int = 3
    pool_layers: int | None = None

    def __post_init__(self) -> None:
        if self.n_blocks < len(_SITE_NAMES):
            raise ValueError(f"n_blocks: {self.n_blocks}; a CNN host needs at least {len(_SITE_NAMES)} blocks")
        if self.pool_layers is not None and not 0 <= self.pool_layers <= self.n_blocks:
            raise ValueError(f"pool_layers: {self.pool_layers}; legal is 0 to n_blocks = {self.n_blocks}")

    @property
    def topology(self) -> str:
        return "cnn"

    @property
    def depth(self) -> int:
        return self.n_blocks

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(name, i + 1, self.channels(i)) for i, name in enumerate(_SITE_NAMES))

    def channels(self, block: int) -> int:
        """Output channels of a block."""
        return self.base_channels << block

    def init(self, keys: Tensor, dtype: torch.dtype = torch.float32) -> tuple[TensorDict, TensorDict]:
        n = list(keys.shape)
        blocks, statistics = {}, {}
        in_channels = self.in_channels
        for i in range(self.n_blocks):
            c = self.channels(i)
            blocks[str(i)] = {
                "conv": {"weight": init.conv_weight(k.fold(keys, i), c, in_channels, 3, dtype)},
                "norm": {
                    "weight": init.constant(keys, (c,), 1.0, dtype),
                    "bias": init.constant(keys, (c,), 0.0, dtype),
                },
            }
            statistics[str(i)] = {
                "mean": init.constant(keys, (c,), 0.0, dtype),
                "var": init.constant(keys, (c,), 1.0, dtype),
            }
            in_channels = c
        head_key = k.fold(keys, self.n_blocks)
        head = {
            "weight": init.linear_weight(head_key, self.num_classes, in_channels, dtype),
            "bias": init.linear_bias(k.fold(head_key, 1), self.num_classes, in_channels, dtype),
        }
        return (
            TensorDict({"blocks": blocks, "head": head}, batch_size=n).auto_batch_size_(len(n)),
            TensorDict({"blocks": statistics}, batch_size=n).auto_batch_size_(len(n)),
        )

    def embed(self, params: Tree, x: Tensor, key: Tensor | None = None) -> Tensor:
        return x

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
        updated = dict(statistics["blocks"])
        pooled = self.n_blocks if self.pool_layers is None else self.pool_layers
        for i in range(start, stop):
            block, moving = params["blocks"][str(i)], updated[str(i)]
            h, mean, var = ops.norm_relu_pool(
                ops.conv2d(h, block["conv"]["weight"]),
                moving["mean"],
                moving["var"],
                block["norm"]["weight"],
                block["norm"]["bias"],
                momentum=momentum,
                pool=2 if i < pooled else 1,
            )
            updated[str(i)] = {"mean": mean, "var": var}
        return h, {"blocks": updated}

    def head(self, params: Tree, h: Tensor) -> Tensor:
        return F.linear(ops.spatial_mean(h), params["head"]["weight"], params["head"]["bias"])
