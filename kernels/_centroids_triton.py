"""Triton launchers that make a stage's centroids: seeds, means, and their rounding to FP8."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._blocks import FP8_MAX
from qvg_paged.kernels._kmeans_triton import sum_tokens
from qvg_paged.kernels._quantise_triton import fp8_byte, fp8_value
from qvg_paged.kernels._span_plan import cdiv, padded, sum_runs
from qvg_paged.kernels._tokens_triton import COUNTS, RowGroup, read_tokens, rounded_to_bf16
from qvg_paged.kernels.launch import launch

__all__ = ["round_to_fp8", "seed", "update"]


@triton.jit
def _keep(out_ptr, norms_ptr, row, k, known, centroid, num_centroids, D: tl.constexpr):
    """Store float32 centroids ``[K, D]``: as they are, or rounded to bfloat16 with their squared lengths."""
    out = out_ptr + (row * num_centroids + k[:, None]) * D + tl.arange(0, D)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        centroid = rounded_to_bf16(centroid)
        tl.store(norms_ptr + row * num_centroids + k, tl.sum(centroid * centroid, 1), mask=known)
    tl.store(out, centroid.to(out_ptr.dtype.element_ty), mask=known[:, None])


@triton.jit(do_not_specialize=COUNTS)
def _seed_kernel(
    out_ptr, norms_ptr, seeds_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, first_row, rows, heads,
    frames, frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    k = tl.program_id(0) * K + tl.arange(0, K)
    known = k < num_centroids
    token = tl.load(seeds_ptr + k, mask=known, other=0)
    x = read_tokens(
        x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, row, token, known, first_row, rows, heads, frames,
        frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D, STAGES, BALANCED,
    )  # fmt: skip
    _keep(out_ptr, norms_ptr, row, k, known, x.to(tl.float32), num_centroids, D)


@triton.jit(do_not_specialize=["runs", "num_centroids"])
def _mean_kernel(
    out_ptr, norms_ptr, kept_ptr, sums_ptr, counts_ptr, inverse_ptr, runs, num_centroids, D: tl.constexpr,
    K: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    k = tl.program_id(0) * K + tl.arange(0, K)
    channel = tl.arange(0, D)
    known = k < num_centroids
    total = tl.zeros((K, D), tl.float32)
    count = tl.zeros((K,), tl.int32)
    for run in range(runs):
        place = (row * runs + run) * num_centroids + k
        at = sums_ptr + place[:, None].to(tl.int64) * D + channel
        total += tl.load(at, mask=known[:, None], other=0.0)  # [K, D]
        count += tl.load(counts_ptr + place, mask=known, other=0)  # [K]
    at = (row * num_centroids + k[:, None]) * D + channel
    kept = tl.load(kept_ptr + at, mask=known[:, None], other=0.0).to(tl.float32)  # [K, D]
    members = tl.maximum(count, 1).to(tl.float32)[:, None] + tl.zeros((K, D), tl.float32)
    mean = tl.div_rn(total, members)
    if FOLD:
        mean *= tl.load(inverse_ptr + row * D + channel)
    _keep(out_ptr, norms_ptr, row, k, known, tl.where((count == 0)[:, None], kept, mean), num_centroids, D)


@triton.jit(do_not_specialize=["num_centroids"])
def _round_kernel(
    stored_ptr, scales_ptr, values_ptr, norms_ptr, x_ptr, num_centroids, D: tl.constexpr, K: tl.constexpr,
    ALL_K: tl.constexpr, OWN_K: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """`round_centroids` of some centroids of a row, whose scale every program works out."""
    row, channel = tl.program_id(1), tl.arange(0, D)
    largest = tl.zeros((K, D), tl.float32)
    for first in tl.range(0, ALL_K, K):
        k = first + tl.arange(0, K)
        at = (row * num_centroids + k[:, None]) * D + channel
        largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + at, mask=(k < num_centroids)[:, None], other=0.0)))
    top = tl.max(largest, 1, keep_dims=True)
    top = tl.max(top, 0, keep_dims=True)  # [1, 1]
    share = tl.div_rn(top, tl.full(top.shape, FP8_MAX, tl.float32))
    exponent = tl.where(share > 0, (share.to(tl.int32, bitcast=True) >> 23) - 126, 0)
    exponent = tl.minimum(tl.maximum(exponent, -100), 120)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales_ptr + row + tl.zeros(top.shape, tl.int32), scale)
    k = tl.program_id(0) * OWN_K + tl.arange(0, OWN_K)
    known = k < num_centroids
    at = (row * num_centroids + k[:, None]) * D + channel
    x = tl.load(x_ptr + at, mask=known[:, None], other=0.0)
    byte = fp8_byte(tl.abs(x) * inverse)
    negative = x.to(tl.int32, bitcast=True) & -2147483648
    value = ((fp8_value(byte) * scale).to(tl.int32, bitcast=True) | negative).to(tl.float32, bitcast=True)
    tl.store(stored_ptr + at, (byte | ((negative >> 24) & 128)).to(tl.uint8), mask=known[:, None])
    tl.store(values_ptr + at, value.to(tl.bfloat16), mask=known[:, None])
    tl.store(norms_ptr + row * num_centroids + k, tl.sum(value * value, 1), mask=known)


def seed(group: RowGroup, stage: int, seeds: torch.Tensor, out: torch.Tensor) -> None:
    """Write the residual of the tokens `seeds` ``[num_centroids]`` (int32) of every row to `out`.

    `out` is ``[rows, num_centroids, head_dim]``: bfloat16, with the squared lengths into ``group.norms``, or float32.
    """
    launch(
        _seed_kernel, (cdiv(group.num_centroids, 16), len(group.rows)),
        out, group.norms, seeds, *group.arguments, D=group.tokens.head_dim, K=16, STAGES=stage,
        BALANCED=group.inverse is not None, num_warps=4,
    )  # fmt: skip


def update(group: RowGroup, stage: int, out: torch.Tensor) -> None:
    """Write the mean of every centroid's tokens to `out`, as `seed` does; one without tokens keeps its place."""
    dim, count, rows = group.tokens.head_dim, group.num_centroids, len(group.rows)
    runs = sum_runs(group.tokens.frames, group.tokens.frame_tokens, group.run)
    ends = [rows * runs * count * size * 4 for size in (dim, dim + 1)]
    sums = group.scratch[: ends[0]].view(torch.float32).view(rows, runs, count, dim)
    counts = group.scratch[ends[0] : ends[1]].view(torch.int32).view(rows, runs, count)
    sum_tokens(group, stage, sums, counts)
    launch(
        _mean_kernel, (cdiv(count, 16), rows),
        out, group.norms, group.centroids[stage], sums, counts, group.arguments[2], runs, count, D=dim, K=16,
        FOLD=group.inverse is not None and stage == 0, num_warps=4,
    )  # fmt: skip


def round_to_fp8(group: RowGroup, stage: int, means: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor) -> None:
    """Round centroids as `qvg_paged.kernels.kmeans.round_centroids` does, all rows in one launch.

    Args:
        group: the rows; its centroids of `stage` and their squared lengths are written.
        stage: whose centroids they are.
        means: ``[rows, num_centroids, head_dim]`` float32, contiguous.
        stored: like `means`, float8_e4m3fn, written.
        scales: ``[rows]`` float32, written.
    """
    rows, count, dim = means.shape
    launch(
        _round_kernel, (cdiv(count, 16), rows),
        stored.view(torch.uint8), scales, group.centroids[stage], group.norms, means, count, D=dim,
        K=min(padded(count), 4096 // dim), ALL_K=padded(count), OWN_K=16, FP8_MAX=FP8_MAX, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
