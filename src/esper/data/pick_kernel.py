"""The Triton kernel of `Splits.pick`: images fetched and normalised in one go."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 1024


@triton.jit
def _pick_kernel(images, samples, mean, std, out, size, AREA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    pixel = tl.load(images + tl.load(samples + row) * size + i, mask=valid, other=0).to(tl.float32)
    centred = pixel - tl.load(mean + i // AREA, mask=valid, other=0.0)
    # The plain quotient of a GPU is an approximation.
    value = tl.div_rn(centred, tl.load(std + i // AREA, mask=valid, other=1.0))
    tl.store(out + row * size + i, value, mask=valid)


def pick(images: Tensor, samples: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float32 `[*samples.shape, C, H, W]`: `(images[samples] - mean) / std` of stored `images` `[M, C, H, W]`, with
    `mean` and `std` `[C, 1, 1]`."""
    shape, count = images.shape[1:], samples.numel()
    size = shape.numel()
    out = torch.empty(*samples.shape, *shape, dtype=torch.float32, device=images.device)
    block = min(_MOST, triton.next_power_of_2(size))
    # A kernel starts on the present device, wherever its tensors lie.
    with torch.cuda.device(images.device):
        _pick_kernel[(count, triton.cdiv(size, block))](
            images, samples.contiguous(), mean, std, out, size, shape[1] * shape[2], block
        )
    return out
