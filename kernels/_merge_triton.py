"""Triton merges of partial attention results: a program per row, or per 16 where they are many; float32 throughout."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from qvg_paged.kernels.launch import launch, overlapping

__all__ = ["merge_partials", "merge_pieces"]

BLOCK_ROWS = 16
MOST_PIECES = 5
UNIT = tl.constexpr(16)
"""In a tuple Triton compiles anew for 1 and for multiples of 16, whatever is asked for: all strides are multiples."""
FEW_ROWS = 8192
"""Rows up to which a row is merged by a program of its own, many of its partial results at once."""
IDLE_ROWS = 1024
"""Rows up to which the machine waits for loads, so that more of them are asked for at once."""


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


@triton.jit(do_not_specialize=["num_partials", "rows"])
def _merge_row_kernel(
    out, lse, partials, partial_lse, num_partials, rows, HEAD_DIM: tl.constexpr, TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:  # the kernel that computes what is merged may not have ended
        num_partials = tl.inline_asm_elementwise(
            "griddepcontrol.wait;\nmov.u32 $0, $1;", "=r,r", [num_partials], dtype=tl.int32, is_pure=False, pack=1
        )
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    top = float("-inf")
    total = 0.0
    merged = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, num_partials, TOGETHER):
        i = first + tl.arange(0, TOGETHER)
        at = row + i * rows.to(tl.int64)
        part_lse = tl.load(partial_lse + at, mask=i < num_partials, other=float("-inf"))
        filled = part_lse != float("-inf")
        part = tl.load(partials + at[:, None] * HEAD_DIM + channel, mask=filled[:, None], other=0.0)
        raised = tl.maximum(top, tl.max(part_lse, 0))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        keep, weight = tl.exp(top - reference), tl.exp(part_lse - reference)
        merged = merged * keep + tl.sum(part * weight[:, None], 0)
        total = total * keep + tl.sum(weight, 0)
        top = raised
    empty = total == 0.0
    merged = merged / tl.where(empty, 1.0, total)
    tl.store(out + row * HEAD_DIM + channel, merged.to(out.dtype.element_ty))
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))))


@triton.jit
def _start(sequence, head, member, strides):
    """Where the rows of a head begin."""
    return sequence * strides[0] + head * strides[2] + member * strides[3]


@triton.jit
def _sum(sums, i: tl.constexpr, sequence, head, member, token, strides, inside, count):
    """Log-sum-exp of piece `i`; -inf if it is not one of the first `count`."""
    at = (_start(sequence, head, member, strides[i]) + token * strides[i][1]) // UNIT
    return tl.load(sums[i] + at, mask=inside & (i + tl.zeros_like(token) < count), other=float("-inf"))


@triton.jit(do_not_specialize=["lse", "count", "tokens", "heads", "group"])
def _merge_pieces_kernel(
    out, lse, pieces, sums, strides, sum_strides, count, tokens, heads, group,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Merge the first `count` of `MOST` pieces for some tokens of a head: where rows lie is reckoned once for all."""
    query_head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, member = (query_head // group).to(tl.int64), (query_head % group).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    channel = tl.arange(0, HEAD_DIM)
    inside = token < tokens
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in tl.static_range(MOST):
        top = tl.maximum(top, _sum(sums, i, sequence, head, member, token, sum_strides, inside, count))
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    merged = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for i in tl.static_range(MOST):  # no load waits for another's sum
        if i < count:
            weight = tl.exp(_sum(sums, i, sequence, head, member, token, sum_strides, inside, count) - reference)
            first = pieces[i] + _start(sequence, head, member, strides[i])
            at = (token * strides[i][1])[:, None] + channel[None, :]
            part = tl.load(first + at, mask=(weight > 0.0)[:, None], other=0.0).to(tl.float32)
            merged += part * weight[:, None]
            total += weight
    empty = total == 0.0
    merged = merged / tl.where(empty, 1.0, total)[:, None]
    row = (sequence * tokens + token) * (heads * group) + query_head
    at = row[:, None] * HEAD_DIM + channel[None, :]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=inside)


def merge_pieces(pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch; arguments as in `qvg_paged.kernels.merge.merge_pieces`, at most `MOST_PIECES` pieces."""
    sequences, tokens, heads, group, dim = out.shape
    outs, sums = zip(*pieces, strict=True)
    more = MOST_PIECES - len(pieces)  # one kernel for any number
    launch(
        _merge_pieces_kernel, (triton.cdiv(tokens, BLOCK_ROWS), heads * group, sequences),
        out, lse, (*outs, *[outs[-1]] * more), (*sums, *[sums[-1]] * more), _strides(outs, 1),
        _strides(sums, UNIT.value), len(pieces), tokens, heads, group, HEAD_DIM=dim, BLOCK=BLOCK_ROWS, MOST=MOST_PIECES,
    )  # fmt: skip


def _strides(tensors: Sequence[torch.Tensor], unit: int) -> tuple[tuple[int, ...], ...]:
    """Strides times `unit`, 0 where there is nowhere to step to; the last as often as it takes."""
    return _multiples(tuple((x.shape[:4], x.stride()[:4]) for x in tensors), unit)


@lru_cache(maxsize=1024)
def _multiples(shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], unit: int) -> tuple[tuple[int, ...], ...]:
    made = [
        tuple(step * unit if size > 1 else 0 for size, step in zip(shape, strides, strict=True))
        for shape, strides in shapes
    ]
    return (*made, *made[-1:] * (MOST_PIECES - len(made)))


def merge_partials(partials: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch; arguments as in `qvg_paged.kernels.merge.merge_partials`."""
    rows = lse.numel()
    if rows <= FEW_ROWS:
        together, warps = (64, 8) if rows <= IDLE_ROWS else (16, 4)
        launch(
            _merge_row_kernel, (rows,), out, lse, partials, partial_lse, len(partials), rows,
            HEAD_DIM=out.shape[-1], TOGETHER=together, num_warps=warps, **overlapping(out.device),
        )  # fmt: skip
        return
    launch(
        _merge_kernel, (triton.cdiv(rows, BLOCK_ROWS),), out, lse, partials, partial_lse, len(partials), rows,
        HEAD_DIM=out.shape[-1], BLOCK=BLOCK_ROWS,
    )  # fmt: skip
