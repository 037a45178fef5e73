"""Triton merges of partial attention results: one program per 16 rows, float32 throughout."""

import torch
import triton
import triton.language as tl

__all__ = ["merge_into", "merge_partials"]

BLOCK_ROWS = 16


@triton.jit(do_not_specialize=["num_partials", "rows"])
def _merge_kernel(
    out, lse, partials, partial_lse, num_partials, rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    channel = tl.arange(0, HEAD_DIM)
    inside = row < rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    merged = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for i in range(num_partials):
        at = row + i * rows.to(tl.int64)
        part_lse = tl.load(partial_lse + at, mask=inside, other=float("-inf"))
        filled = part_lse != float("-inf")
        part = tl.load(partials + at[:, None] * HEAD_DIM + channel, mask=filled[:, None], other=0.0)  # [BLOCK, dim]
        raised = tl.maximum(top, part_lse)
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        keep, weight = tl.exp(top - reference), tl.exp(part_lse - reference)
        merged = merged * keep[:, None] + part * weight[:, None]
        total = total * keep + weight
        top = raised
    empty = total == 0.0
    merged = merged / tl.where(empty, 1.0, total)[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + channel, merged.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=inside)


@triton.jit(do_not_specialize=["rows", "queries"])
def _merge_into_kernel(
    out, lse, part, part_lse, rows, heads, queries, batch_stride, head_stride, query_stride,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    channel = tl.arange(0, HEAD_DIM)
    inside = row < rows
    mine = tl.load(lse + row, mask=inside, other=float("-inf"))
    theirs = tl.load(part_lse + row, mask=inside, other=float("-inf"))
    filled, kept = theirs != float("-inf"), mine != float("-inf")
    top = tl.maximum(mine, theirs)
    reference = tl.where(top == float("-inf"), 0.0, top)
    keep, weight = tl.exp(mine - reference), tl.exp(theirs - reference)
    total = tl.where(filled | kept, keep + weight, 1.0)
    at = row.to(tl.int64)[:, None] * HEAD_DIM + channel
    outer = row // queries
    source = (outer // heads).to(tl.int64) * batch_stride + (outer % heads).to(tl.int64) * head_stride
    source = (source + (row % queries).to(tl.int64) * query_stride)[:, None] + channel
    merged = tl.load(out + at, mask=kept[:, None], other=0.0) * (keep / total)[:, None]  # [BLOCK, HEAD_DIM]
    merged += tl.load(part + source, mask=filled[:, None], other=0.0).to(tl.float32) * (weight / total)[:, None]
    tl.store(out + at, merged, mask=inside[:, None])
    tl.store(lse + row, tl.where(filled | kept, reference + tl.log(total), float("-inf")), mask=inside)


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Launch; arguments as in `qvg_paged.kernels.merge.merge_into`."""
    rows, (_, heads, queries, dim) = lse.numel(), part.shape
    _merge_into_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        out, lse, part, part_lse.contiguous(), rows, heads, queries, *part.stride()[:3], HEAD_DIM=dim, BLOCK=BLOCK_ROWS
    )


def merge_partials(partials: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch; arguments as in `qvg_paged.kernels.merge.merge_partials`."""
    rows = lse.numel()
    grid = (triton.cdiv(rows, BLOCK_ROWS),)
    _merge_kernel[grid](out, lse, partials, partial_lse, len(partials), rows, HEAD_DIM=out.shape[-1], BLOCK=BLOCK_ROWS)
