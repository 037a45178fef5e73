"""Triton launchers that make a stage's centroids: seeds and means."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._kmeans_triton import sum_tokens
from qvg_paged.kernels._span_plan import cdiv, sum_runs
from qvg_paged.kernels._tokens_triton import COUNTS, RowGroup, read_tokens, rounded_to_bf16
from qvg_paged.kernels.launch import launch

__all__ = ["seed", "update"]


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
    runs = sum_runs(group.tokens.frames, group.tokens.frame_tokens)
    sums = torch.empty((rows, runs, count, dim), dtype=torch.float32, device=group.ids.device)
    counts = torch.empty((rows, runs, count), dtype=torch.int32, device=group.ids.device)
    sum_tokens(group, stage, sums, counts)
    launch(
        _mean_kernel, (cdiv(count, 16), rows),
        out, group.norms, group.centroids[stage], sums, counts, group.arguments[2], runs, count, D=dim, K=16,
        FOLD=group.inverse is not None and stage == 0, num_warps=4,
    )  # fmt: skip
