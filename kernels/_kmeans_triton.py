"""Triton launchers of k-means: nearest centroids, and means of the tokens of every centroid.

Residuals are ``[heads, tokens, head_dim]``, centroids ``[heads, num_centroids, head_dim]`` bfloat16. Both products run
on tensor cores with float32 accumulation where the residual is bfloat16 (every factor is then exact), in IEEE float32
otherwise. Sums are taken over fixed runs of tokens and added in order: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels.errors import ArgumentError

__all__ = ["assign_centroids", "centroid_means", "check_power_of_two"]

SUM_TOKENS = 2048


def check_power_of_two(head_dim: int) -> None:
    """Raise `ArgumentError` for head dims whose tiles Triton cannot hold."""
    if head_dim & (head_dim - 1) or head_dim < 16:
        raise ArgumentError(f"head_dim: expected a power of two >= 16 for Triton, got {head_dim}; use Backend.TORCH")


@triton.jit
def _assign_kernel(
    ids_ptr,
    residual_ptr,
    centroids_ptr,
    tokens,
    num_centroids,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.arange(0, D)
    inside = token < tokens
    base = residual_ptr + head * tokens * D
    x = tl.load(base + token[:, None].to(tl.int64) * D + channel, mask=inside[:, None], other=0.0).to(DOT)  # [T, D]
    best = tl.full((BLOCK_T,), float("inf"), tl.float32)
    nearest = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, num_centroids, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        known = row < num_centroids
        c = tl.load(  # [K, D]
            centroids_ptr + (head * num_centroids + row[:, None]) * D + channel, mask=known[:, None], other=0.0
        )
        norm = tl.sum(c.to(tl.float32) * c.to(tl.float32), 1)  # [K]
        score = norm - 2.0 * tl.dot(x, tl.trans(c.to(DOT)), input_precision="ieee")  # [T, K]
        score = tl.where(known, score, float("inf"))
        low = tl.min(score, 1)
        nearest = tl.where(low < best, start + tl.argmin(score, 1), nearest)
        best = tl.minimum(low, best)
    tl.store(ids_ptr + head * tokens + token, nearest.to(tl.uint8), mask=inside)


@triton.jit
def _sum_kernel(
    sums_ptr,
    counts_ptr,
    residual_ptr,
    ids_ptr,
    tokens,
    num_centroids,
    D: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, D)
    sums = tl.zeros((BLOCK_K, D), tl.float32)
    counts = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, RUN, BLOCK_T):
        token = run * RUN + start + tl.arange(0, BLOCK_T)
        inside = token < tokens
        chosen = tl.load(ids_ptr + head * tokens + token, mask=inside, other=0).to(tl.int32)  # [T]
        x = tl.load(  # [T, D]
            residual_ptr + (head * tokens + token[:, None]) * D + channel, mask=inside[:, None], other=0.0
        )
        member = (row[:, None] == chosen[None, :]) & inside[None, :]  # [K, T]
        sums = tl.dot(member.to(DOT), x.to(DOT), sums, input_precision="ieee")
        counts += tl.sum(member.to(tl.float32), 1)
    place = (head * tl.num_programs(0) + run) * num_centroids + row
    tl.store(sums_ptr + place[:, None] * D + channel, sums, mask=row[:, None] < num_centroids)
    tl.store(counts_ptr + place, counts, mask=row < num_centroids)


@triton.jit
def _mean_kernel(
    means_ptr, sums_ptr, counts_ptr, centroids_ptr, runs, num_centroids, D: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, D)
    known = row < num_centroids
    total = tl.zeros((BLOCK_K, D), tl.float32)
    count = tl.zeros((BLOCK_K,), tl.float32)
    for run in range(runs):
        place = (head * runs + run) * num_centroids + row
        total += tl.load(sums_ptr + place[:, None] * D + channel, mask=known[:, None], other=0.0)  # [K, D]
        count += tl.load(counts_ptr + place, mask=known, other=0.0)  # [K]
    at = (head * num_centroids + row[:, None]) * D + channel
    kept = tl.load(centroids_ptr + at, mask=known[:, None], other=0.0).to(tl.float32)  # [K, D]
    mean = tl.div_rn(total, tl.maximum(count, 1.0)[:, None] + tl.zeros((BLOCK_K, D), tl.float32))
    tl.store(means_ptr + at, tl.where((count == 0.0)[:, None], kept, mean), mask=known[:, None])


def _dot_dtype(residual: torch.Tensor) -> tl.dtype:
    return tl.bfloat16 if residual.dtype is torch.bfloat16 else tl.float32


def assign_centroids(residual: torch.Tensor, centroids: torch.Tensor, ids: torch.Tensor) -> None:
    """Write the nearest centroid of every token; arguments as in the twin."""
    heads, tokens, dim = residual.shape
    check_power_of_two(dim)
    _assign_kernel[(triton.cdiv(tokens, 64), heads)](
        ids, residual, centroids, tokens, centroids.shape[1],
        D=dim, BLOCK_T=64, BLOCK_K=64 if dim <= 128 else 32, DOT=_dot_dtype(residual), num_warps=4,
    )  # fmt: skip


def centroid_means(residual: torch.Tensor, ids: torch.Tensor, centroids: torch.Tensor, means: torch.Tensor) -> None:
    """Write the mean of the tokens of every centroid; arguments as in the twin."""
    heads, tokens, dim = residual.shape
    count = means.shape[1]
    check_power_of_two(dim)
    runs = triton.cdiv(tokens, SUM_TOKENS)
    partial = torch.empty((heads, runs, count, dim), dtype=torch.float32, device=residual.device)
    members = torch.empty((heads, runs, count), dtype=torch.float32, device=residual.device)
    block = 64 if dim <= 128 else 32
    _sum_kernel[(runs, heads, triton.cdiv(count, block))](
        partial, members, residual, ids, tokens, count,
        D=dim, RUN=min(SUM_TOKENS, triton.next_power_of_2(max(tokens, 32))), BLOCK_T=32, BLOCK_K=block,
        DOT=_dot_dtype(residual), num_warps=4 if dim <= 128 else 8,
    )  # fmt: skip
    _mean_kernel[(triton.cdiv(count, 16), heads)](
        means, partial, members, centroids, runs, count, D=dim, BLOCK_K=16, num_warps=4
    )
