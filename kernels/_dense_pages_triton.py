"""Triton launcher that reads one tensor of unquantised pages."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._decode_tile import angles, natural_channels, turn_and_store
from qvg_paged.kernels._span_plan import cdiv
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE, PartLayout

__all__ = ["read_dense"]


@triton.jit(do_not_specialize=["pages_ptr"])
def _dense_kernel(
    out_ptr, values_ptr, pages_ptr, cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, part_offset, tokens,
    heads, token_blocks, stride_token, stride_head, D: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, UNIT: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    page, head = tl.program_id(0) // token_blocks, tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) % token_blocks) * R + tl.arange(0, R)
    inside = token < tokens
    part = (tl.load(pages_ptr + page).to(tl.int64) * UNIT + part_offset) // ITEM
    natural_a, natural_b = natural_channels(0, D, INTERLEAVED), natural_channels(1, D, INTERLEAVED)
    source = values_ptr + part + (token[:, None] * heads + head) * D
    first = tl.load(source + natural_a, mask=inside[:, None], other=0.0).to(tl.float32)  # [R, D/2]
    second = tl.load(source + natural_b, mask=inside[:, None], other=0.0).to(tl.float32)  # [R, D/2]
    target = (page.to(tl.int64) * tokens + token) * stride_token + head * stride_head
    frame = page * (D // 2)
    cos, sin = angles(
        cos_frame_ptr + frame, sin_frame_ptr + frame, cos_space_ptr, sin_space_ptr, tl.minimum(token, tokens - 1), D,
        ROPE,
    )  # fmt: skip
    turn_and_store(first, second, cos, sin, out_ptr + target[:, None], inside[:, None], D, ROPE, INTERLEAVED)


def read_dense(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    layout: PartLayout,
    part_offset: int,
    out: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    turned: bool,
    interleaved: bool,
) -> None:
    """Read the tokens of unquantised `pages`.

    Args:
        buffer, pages, layout, part_offset, out: as of `qvg_paged.kernels.decode.decode_pages`.
        tables: four of `RoPETables.wide`, or anything if not `turned`.
        turned: channels are turned.
        interleaved: which channels form a pair.
    """
    blocks, values = cdiv(layout.tokens, 32), buffer[: buffer.numel() // 4 * 4].view(layout.dtype)
    launch(
        _dense_kernel, (blocks * len(pages), layout.heads), out, values, pages.contiguous(), *tables, part_offset,
        layout.tokens, layout.heads, blocks, *out.stride()[:2], D=layout.head_dim, R=32, ROPE=turned,
        INTERLEAVED=interleaved, UNIT=GRANULE, ITEM=layout.dtype.itemsize, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
