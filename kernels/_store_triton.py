"""Triton kernel that stores K and V of a layer in unquantised pages: one launch, whatever the pages' places."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE

__all__ = ["store"]

WIDE = 8
"""Neighbouring channels that a thread copies at once."""
GROUPS = 512
COUNTS = ["tokens", "first", "step", "key_at", "value_at"]


@triton.jit
def _copy(x_ptr, stride, pages_ptr, at, tokens, ROW: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    inside = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)) * WIDE
    token = inside // ROW
    row = tl.program_id(1).to(tl.int64) * tokens + token
    wide = tl.arange(0, WIDE)[None, :]
    mask = (token < tokens)[:, None]
    values = tl.load(x_ptr + (row * stride + inside % ROW)[:, None] + wide, mask=mask)
    tl.store(pages_ptr + at + inside[:, None] + wide, values, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _store_kernel(
    key_ptr, value_ptr, pages_ptr, key_stride, value_stride, tokens, first, step, key_at, value_at,
    ROW: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    page = first.to(tl.int64) + tl.program_id(1) * step.to(tl.int64)
    if tl.program_id(2) == 0:
        _copy(key_ptr, key_stride, pages_ptr, (page + key_at) * UNIT, tokens, ROW, WIDE, GROUPS)
    else:
        _copy(value_ptr, value_stride, pages_ptr, (page + value_at) * UNIT, tokens, ROW, WIDE, GROUPS)


def store(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, tokens: int, page: int, step: int, key_at: int, value_at: int
) -> None:
    """Copy `k` and `v` ``[frames * tokens, heads, head_dim]``, whose rows are contiguous, into the pool.

    Args:
        pages: the pool in their dtype; it starts at an address that is a multiple of 16.
        tokens: of a frame.
        page, step: place of the first frame's page and distance to the next one's, in granules.
        key_at, value_at: where K and V lie in a page, in half granules.
    """
    row = k.shape[1] * k.shape[2]
    launch(
        _store_kernel, (triton.cdiv(tokens * row, WIDE * GROUPS), k.shape[0] // tokens, 2),
        k, v, pages, k.stride(0), v.stride(0), tokens, 2 * page, 2 * step, key_at, value_at,
        ROW=row, UNIT=GRANULE // 2 // k.element_size(), WIDE=WIDE, GROUPS=GROUPS,
    )  # fmt: skip
