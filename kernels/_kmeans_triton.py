"""Triton launchers of k-means over the rows of a group: seeds, nearest centroids, sums, means.

Both products run on tensor cores with float32 accumulation where the model's dtype is bfloat16 (every factor is then
exact), in IEEE float32 otherwise. Sums are taken over fixed runs of tokens and added in order: no atomics, the same
bits every time, whatever else is encoded beside.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._span_plan import SUM_TILE, SUM_TOKENS, cdiv, padded, sum_runs
from qvg_paged.kernels._tokens_triton import COUNTS, SpanTokens, load_tile, read_tokens, rounded_to_bf16, tile_tokens

__all__ = ["RowGroup", "assign", "seed", "update"]


@dataclass(frozen=True)
class RowGroup:
    """Rows that are encoded together, and their workspace.

    Attributes:
        tokens: the span.
        rows: rows of the group, counted from the first head of the first tensor.
        inverse: ``[rows, head_dim]`` float32, reciprocals of the balancing factors; None if the codec keeps none.
        ids: ``[stages, rows, span_tokens]`` uint8.
        centroids: ``[stages, rows, num_centroids, head_dim]`` bfloat16, as decoded, natural channel order.
        norms: ``[rows, num_centroids]`` float32, squared lengths of the centroids of the stage at work.
    """

    tokens: SpanTokens
    rows: range
    inverse: torch.Tensor | None
    ids: torch.Tensor
    centroids: torch.Tensor
    norms: torch.Tensor

    @property
    def num_centroids(self) -> int:
        """Centroids per stage and row."""
        return self.centroids.shape[2]

    @property
    def arguments(self) -> tuple[object, ...]:
        """What `read_tokens` takes, in the order of the kernels' parameters."""
        tokens, base = self.tokens, self.tokens.base
        return (
            base, tokens.starts, base if self.inverse is None else self.inverse, self.ids, self.centroids,
            self.rows.start, len(self.rows), tokens.heads, tokens.frames, tokens.frame_tokens, tokens.span_tokens,
            self.num_centroids, tokens.token_stride, tokens.head_stride,
        )  # fmt: skip


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


@triton.jit
def _load_centroids(
    c_ptr, norms_ptr, inverse_ptr, row, start, num_centroids, D: tl.constexpr, K: tl.constexpr, FOLD: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Centroids ``[D, K]``, divided by the balance once more if `FOLD`, and their squared lengths."""
    k = start + tl.arange(0, K)
    known = k < num_centroids
    at = c_ptr + (row * num_centroids + k[:, None]) * D + tl.arange(0, D)
    c = tl.load(at, mask=known[:, None], other=0.0).to(tl.float32)  # [K, D]
    if FOLD:
        c *= tl.load(inverse_ptr + row * D + tl.arange(0, D))
    return tl.trans(c.to(DOT)), tl.load(norms_ptr + row * num_centroids + k, mask=known, other=3e38)


@triton.jit
def _tagged(x, c, norm, start, K: tl.constexpr):
    """How near each centroid is, ``2 x c - c c`` ``[T, K]`` float32, with 255 minus its number in the low byte."""
    score = 2.0 * tl.dot(x, c, input_precision="ieee") - norm[None, :]
    bits = (score.to(tl.int32, bitcast=True) & -256) | (255 - start - tl.arange(0, K))[None, :]
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=[*COUNTS, "tiles"])
def _assign_kernel(
    c_ptr, norms_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, first_row, rows, heads, frames,
    frame_tokens, span_tokens, num_centroids, token_stride, head_stride, tiles, D: tl.constexpr, T: tl.constexpr,
    BLOCK_K: tl.constexpr, PADDED_K: tl.constexpr, STAGES: tl.constexpr, BALANCED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    # Instead of balancing every token, its product with a centroid is balanced: tokens go to the product as stored.
    fold: tl.constexpr = BALANCED and STAGES == 0
    c, norm = _load_centroids(c_ptr, norms_ptr, inverse_ptr, row, 0, num_centroids, D, BLOCK_K, fold, DOT)
    if PADDED_K > BLOCK_K:
        c_second, norm_second = _load_centroids(
            c_ptr, norms_ptr, inverse_ptr, row, BLOCK_K, num_centroids, D, BLOCK_K, fold, DOT
        )  # fmt: skip
    first = tl.program_id(0) * tiles
    for tile in tl.range(first, tl.minimum(first + tiles, frames * tl.cdiv(frame_tokens, T))):
        if STAGES == 0:
            x, token, inside = load_tile(
                x_ptr, starts_ptr, first_row + row, tile, heads, frames, frame_tokens, token_stride, head_stride, D, T
            )  # fmt: skip
        else:
            token, inside = tile_tokens(tile, frame_tokens, T)
            x = read_tokens(
                x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, row, token, inside, first_row, rows, heads,
                frames, frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D, STAGES, BALANCED,
            )  # fmt: skip
        x = x.to(DOT)
        near = _tagged(x, c, norm, 0, BLOCK_K)
        if PADDED_K > BLOCK_K:
            near = tl.maximum(near, _tagged(x, c_second, norm_second, BLOCK_K, BLOCK_K))
        for more in tl.static_range(2 * BLOCK_K, PADDED_K, BLOCK_K):
            c_more, norm_more = _load_centroids(
                c_ptr, norms_ptr, inverse_ptr, row, more, num_centroids, D, BLOCK_K, fold, DOT
            )  # fmt: skip
            near = tl.maximum(near, _tagged(x, c_more, norm_more, more, BLOCK_K))
        chosen = 255 - (tl.max(near, 1).to(tl.int32, bitcast=True) & 255)
        out = ids_ptr + (STAGES * rows + row).to(tl.int64) * span_tokens + token
        tl.store(out, tl.minimum(chosen, num_centroids - 1).to(tl.uint8), mask=inside)


@triton.jit
def _load_ids(ids_ptr, tile, frame_tokens, T: tl.constexpr):
    token, inside = tile_tokens(tile, frame_tokens, T)
    return tl.load(ids_ptr + token, mask=inside, other=0)  # [T]


@triton.jit(do_not_specialize=COUNTS)
def _sum_kernel(
    sums_ptr, counts_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, first_row, rows, heads, frames,
    frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D: tl.constexpr, RUN: tl.constexpr,
    T: tl.constexpr, BLOCK_K: tl.constexpr, ALL_K: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    BALANCED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sums of the tokens of every centroid over a run of tiles, as stored in the first stage; numbers of tokens."""
    run, row = tl.program_id(0), tl.program_id(1)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = ids_ptr + (STAGES * rows + row).to(tl.int64) * span_tokens
    place = (row * tl.num_programs(0) + run) * num_centroids
    sums = tl.zeros((BLOCK_K, D), tl.float32)
    first = run * (RUN // T)
    last = tl.minimum(first + RUN // T, frames * tl.cdiv(frame_tokens, T))
    following = _load_ids(ids, first, frame_tokens, T)
    for tile in tl.range(first, last):
        chosen = following.to(tl.int32)
        following = _load_ids(ids, tl.minimum(tile + 1, last - 1), frame_tokens, T)
        if STAGES == 0:
            x, _, _ = load_tile(
                x_ptr, starts_ptr, first_row + row, tile, heads, frames, frame_tokens, token_stride, head_stride, D, T
            )  # fmt: skip
        else:
            token, inside = tile_tokens(tile, frame_tokens, T)
            x = read_tokens(
                x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, row, token, inside, first_row, rows, heads,
                frames, frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D, STAGES, BALANCED,
            )  # fmt: skip
        # Tokens behind the end of a frame are zero, whichever centroid they count for here.
        member = (k[:, None] == chosen[None, :]).to(DOT)  # [K, T]
        sums = tl.dot(member, x.to(DOT), sums, input_precision="ieee")
    out = sums_ptr + (place + k)[:, None].to(tl.int64) * D + tl.arange(0, D)
    tl.store(out, sums, mask=(k < num_centroids)[:, None])
    if tl.program_id(2) == 0:
        token = run * RUN + tl.arange(0, LANES)
        mine = (tl.arange(0, LANES) < RUN) & (token < span_tokens)
        number = tl.arange(0, ALL_K)
        chosen = tl.load(ids + token, mask=mine, other=0).to(tl.int32)
        count = tl.histogram(chosen, ALL_K) - tl.where(number == 0, LANES - tl.sum(mine.to(tl.int32), 0), 0)
        tl.store(counts_ptr + place + number, count, mask=number < num_centroids)


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


def _dot_dtype(group: RowGroup) -> tl.dtype:
    return tl.bfloat16 if group.tokens.base.dtype is torch.bfloat16 else tl.float32


ASSIGN = {"T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
SUM = {"T": SUM_TILE, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}


def _assign_shape(group: RowGroup) -> dict[str, int]:
    """Tile sizes: centroids of a row stay in shared memory while a program's tokens pass by."""
    dim, width = group.tokens.head_dim, padded(group.num_centroids)
    if _dot_dtype(group) is tl.float32:
        return {"T": 64, "BLOCK_K": min(width, 8192 // dim), "num_warps": 4, "num_stages": 1}
    if dim > 128:
        return {"T": 64, "BLOCK_K": min(width, 128), "num_warps": 4, "num_stages": 1}
    return ASSIGN | {"BLOCK_K": min(width, ASSIGN["BLOCK_K"])}


def _sum_shape(group: RowGroup) -> dict[str, int]:
    dim, width = group.tokens.head_dim, padded(group.num_centroids)
    if _dot_dtype(group) is tl.float32:
        return {"T": SUM_TILE, "BLOCK_K": min(width, 64), "num_warps": 8, "num_stages": 1}
    if dim > 128:
        return {"T": SUM_TILE, "BLOCK_K": min(width, 64), "num_warps": 8, "num_stages": 1}
    return SUM | {"BLOCK_K": min(width, SUM["BLOCK_K"])}


def seed(group: RowGroup, stage: int, seeds: torch.Tensor, out: torch.Tensor) -> None:
    """Write the residual of the tokens `seeds` ``[num_centroids]`` (int32) of every row to `out`.

    `out` is ``[rows, num_centroids, head_dim]``: bfloat16, with the squared lengths into ``group.norms``, or float32.
    """
    _seed_kernel[(cdiv(group.num_centroids, 16), len(group.rows))](
        out, group.norms, seeds, *group.arguments, D=group.tokens.head_dim, K=16, STAGES=stage,
        BALANCED=group.inverse is not None, num_warps=4,
    )  # fmt: skip


def assign(group: RowGroup, stage: int) -> None:
    """Write into ``group.ids[stage]`` the nearest centroid of every token, one of them where several are as near.

    As near: to 2**-16 of what the squared lengths of centroid and token amount to.
    """
    shape, tokens, count = _assign_shape(group), group.tokens, group.num_centroids
    tiles = tokens.frames * cdiv(tokens.frame_tokens, shape["T"])
    per_program = max(1, round(tiles * len(group.rows) / (2 * _processors(group.ids.device))))
    _assign_kernel[(cdiv(tiles, per_program), len(group.rows))](
        group.centroids[stage], group.norms, *group.arguments, per_program, D=tokens.head_dim,
        PADDED_K=padded(count), STAGES=stage, BALANCED=group.inverse is not None, DOT=_dot_dtype(group), **shape,
    )  # fmt: skip


def update(group: RowGroup, stage: int, out: torch.Tensor) -> None:
    """Write the mean of every centroid's tokens to `out`, as `seed` does; one without tokens keeps its place."""
    dim, count, rows = group.tokens.head_dim, group.num_centroids, len(group.rows)
    shape = _sum_shape(group)
    runs = sum_runs(group.tokens.frames, group.tokens.frame_tokens)
    sums = torch.empty((rows, runs, count, dim), dtype=torch.float32, device=group.ids.device)
    counts = torch.empty((rows, runs, count), dtype=torch.int32, device=group.ids.device)
    _sum_kernel[(runs, rows, cdiv(count, shape["BLOCK_K"]))](
        sums, counts, *group.arguments, D=dim, RUN=SUM_TOKENS, ALL_K=padded(count),
        LANES=padded(SUM_TOKENS), STAGES=stage, BALANCED=group.inverse is not None,
        DOT=_dot_dtype(group), **shape,
    )  # fmt: skip
    _mean_kernel[(cdiv(count, 16), rows)](
        out, group.norms, group.centroids[stage], sums, counts, group.arguments[2], runs, count, D=dim, K=16,
        FOLD=group.inverse is not None and stage == 0, num_warps=4,
    )  # fmt: skip


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
