"""The Triton kernel of `fan_in_uniform`: what `esper.keys` draws in thirty operations, in one."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * tl.full([], _MIX_1, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], _MIX_2, tl.uint64)
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["count"])
def _draw_kernel(keys, out, count, bound, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _mix(tl.load(keys + row).to(tl.uint64, bitcast=True))
    bits = _mix(key + (i + 1).to(tl.uint64) * tl.full([], _GOLDEN, tl.uint64))
    # 24 bits, exact in float64, so only the product is rounded, as it is by PyTorch.
    centred = (bits >> 40).to(tl.float64) * tl.full([], 2.0**-23, tl.float64) - 1.0
    tl.store(out + row * count + i, (centred * tl.load(bound)).to(out.dtype.element_ty), mask=i < count)


@lru_cache(maxsize=256)
def _in_memory(bound: float, device: torch.device, stream: int) -> Tensor:
    """A bound where a kernel on this stream reads it: as an argument it would arrive in float32. There are few, and
    they recur."""
    return torch.full((), bound, dtype=torch.float64, device=device)


def centred_uniform(keys: Tensor, count: int, bound: float, dtype: torch.dtype) -> Tensor:
    """`(2 esper.keys.uniform(keys, count) - 1) * bound` in float64, `[N, count]` in `dtype`, for `keys` `[N]`."""
    out = torch.empty(keys.shape[0], count, dtype=dtype, device=keys.device)
    limit = _in_memory(bound, keys.device, torch.cuda.current_stream(keys.device).cuda_stream)
    # A kernel starts on the present device, wherever its tensors lie.
    with torch.cuda.device(keys.device):
        _draw_kernel[(triton.cdiv(count, _BLOCK), keys.shape[0])](keys.contiguous(), out, count, limit, _BLOCK)
    return out
