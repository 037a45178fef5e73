"""Triton attention over an FP8 scratch: E4M3 products, float32 softmax, a log-sum-exp for every row and split.

Keys lie ``[problem, key, channel]`` and values ``[problem, channel, position]``: Hopper's FP8 products want the summed
dimension contiguous on both sides. Keys are numbered in the order in which the threads of a warpgroup hold a tile of
scores (`key_of_position`), so that weights enter the second product without crossing a
lane.
"""

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._fp8_bounds_triton import read_unit
from qvg_paged.kernels.launch import launch

if TYPE_CHECKING:
    from qvg_paged.kernels.fp8_attention import Fp8Shape

__all__ = ["attend", "quantise_queries"]

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))
QUERY_PEAK = tl.constexpr(256.0)
"""Largest magnitude in a quantised row of queries."""
ANY = ["rows", "num_keys", "num_splits"]


@triton.jit
def _swapped(weights, M: tl.constexpr, N: tl.constexpr):
    """Columns of a tile from the order of keys to that of positions: 8j + 2t + e within 16 becomes 4t + 2j + e."""
    grouped = tl.reshape(weights, (M, N // 16, 2, 4, 2))
    return tl.reshape(tl.permute(grouped, (0, 1, 3, 2, 4)), (M, N))


@triton.jit
def _scores(queries, key_ptr, tile, num_keys, D: tl.constexpr, N: tl.constexpr, LAST: tl.constexpr):
    """Products ``[M, N]`` with a tile of keys; -inf beyond `num_keys` in the `LAST` one."""
    scores = tl.dot(queries, tl.trans(tl.load(key_ptr + tile * N * D)), input_precision="ieee")
    if LAST:
        key = tile * N + tl.arange(0, N)
        position = (key & -16) | ((key & 6) << 1) | ((key & 8) >> 2) | (key & 1)
        scores = tl.where((position < num_keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _weighted(weights, value_ptr, tile, num_keys, M: tl.constexpr, N: tl.constexpr, LAST: tl.constexpr):
    """Sum ``[M, D]`` over a tile of values, apart from the sum of all tiles: Hopper adds FP8 products to 13 bits."""
    if LAST:  # what lies beyond the last position may be no number, which a weight of zero does not help
        values = tl.load(value_ptr + tile * N, mask=(tile * N + tl.arange(0, N) < num_keys)[None, :], other=0.0)
    else:
        values = tl.load(value_ptr + tile * N)  # [D, N]
    return tl.dot(_swapped(weights.to(values.dtype), M, N), tl.trans(values), input_precision="ieee")


@triton.jit
def _tile(
    state, queries, unit, key_ptr, value_ptr, tile, num_keys,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    acc, total, top = state
    scores = _scores(queries, key_ptr, tile, num_keys, D, N, LAST)
    raised = tl.maximum(top, tl.max(scores, 1) * unit - 8.0)  # the largest weight is 2 ** 8
    keep = tl.exp2(top - raised)
    weights = tl.exp2(scores * unit[:, None] - raised[:, None])
    total = total * keep + tl.sum(weights, 1)
    acc = acc * keep[:, None] + _weighted(weights, value_ptr, tile, num_keys, M, N, LAST)
    return acc, total, raised


@triton.jit(do_not_specialize=ANY)
def _attention_kernel(
    out, lse, queries, query_scales, keys, values, bounds, scale_log2, rows, num_keys, pitch, num_splits, heads, group,
    HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    split, problem = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)  # [M]
    channel = tl.arange(0, HEAD_DIM)
    live = row < rows
    at = problem * rows + row
    queries_tile = tl.load(
        queries + at[:, None] * HEAD_DIM + channel[None, :], mask=live[:, None], other=0.0
    )  # [M, HEAD_DIM]
    unit = tl.load(query_scales + at, mask=live, other=0.0) * (read_unit(bounds, problem, 0) * scale_log2)
    unit = tl.maximum(unit, 1e-37)  # times -inf a number, even where queries and keys are all zero

    whole = num_keys // N
    begin, end = whole * split // num_splits, whole * (split + 1) // num_splits
    key_ptr = keys + problem * pitch * HEAD_DIM + tl.arange(0, N)[:, None] * HEAD_DIM + channel[None, :]
    value_ptr = values + problem * pitch * HEAD_DIM + channel[:, None] * pitch + tl.arange(0, N)[None, :]
    state = (tl.zeros([M, HEAD_DIM], tl.float32), tl.zeros([M], tl.float32), tl.full([M], float("-inf"), tl.float32))
    for tile in range(begin, end):
        state = _tile(state, queries_tile, unit, key_ptr, value_ptr, tile, num_keys, HEAD_DIM, M, N, False)
    if (split == num_splits - 1) & (whole * N < num_keys):
        state = _tile(state, queries_tile, unit, key_ptr, value_ptr, end, num_keys, HEAD_DIM, M, N, True)
    acc, total, top = state

    tokens = rows // group
    sequences = tl.num_programs(2) // heads
    query = (split * sequences + problem // heads) * tokens + row // group
    target = query * (heads * group) + problem % heads * group + row % group
    acc *= (read_unit(bounds, problem, 1) / total)[:, None]
    tl.store(out + target[:, None] * HEAD_DIM + channel[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + target, (top + tl.log2(total)) * LN_2, mask=live)


@triton.jit(do_not_specialize=["rows"])
def _quantise_queries_kernel(
    out, scales, q, rows, heads, group, sequence_stride, token_stride, head_stride,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < rows
    channel = tl.arange(0, HEAD_DIM)
    source = problem // heads * sequence_stride + (problem % heads * group + row % group) * head_stride
    source += (row // group).to(tl.int64) * token_stride
    tile = tl.load(q + source[:, None] + channel[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(tile), 1), 1e-30)
    tl.store(scales + problem * rows + row, largest / QUERY_PEAK, mask=live)
    tile = (tile * (1.0 / largest * QUERY_PEAK)[:, None]).to(out.dtype.element_ty)
    target = out + (problem * rows + row)[:, None] * HEAD_DIM
    if SPLIT:
        even, odd = tl.split(tl.reshape(tile, (M, HEAD_DIM // 2, 2)))
        half = tl.arange(0, HEAD_DIM // 2)[None, :]
        tl.store(target + half, even, mask=live[:, None])
        tl.store(target + HEAD_DIM // 2 + half, odd, mask=live[:, None])
    else:
        tl.store(target + channel[None, :], tile, mask=live[:, None])


def quantise_queries(q: torch.Tensor, heads: int, split: bool, out: torch.Tensor, scales: torch.Tensor) -> None:
    """Launch; arguments as in `qvg_paged.kernels.fp8_attention.quantise_queries`."""
    rows, dim = out.shape[1:]
    launch(
        _quantise_queries_kernel, (triton.cdiv(rows, 32), len(out)),
        out, scales, q, rows, heads, q.shape[2] // heads, *q.stride()[:3], HEAD_DIM=dim, SPLIT=split, M=32, num_warps=4
    )


def attend(
    queries: torch.Tensor,
    query_scales: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_keys: int,
    scale: float,
    heads: int,
    shape: "Fp8Shape",
) -> None:
    """Launch; arguments as in `qvg_paged.kernels.fp8_attention.attend`."""
    problems, rows, dim = queries.shape
    registers = {} if shape.registers is None else {"maxnreg": shape.registers}
    launch(
        _attention_kernel, (triton.cdiv(rows, shape.rows), len(out), problems),
        out, lse, queries, query_scales, keys, values, bounds, scale * LOG2_E, rows, num_keys, keys.shape[1], len(out),
        heads, out.shape[2] // heads, HEAD_DIM=dim, M=shape.rows, N=shape.keys,
        num_warps=shape.num_warps, num_stages=shape.num_stages, **registers,
    )  # fmt: skip
