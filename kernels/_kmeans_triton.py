"""Triton launchers of k-means over the rows of a group: nearest centroids, sums of their tokens.

Both products run on tensor cores with float32 accumulation where the model's dtype is bfloat16 (every factor is then
exact), in IEEE float32 otherwise. Sums are taken over fixed runs of tokens and added in order: no atomics, the same
bits every time, whatever else is encoded beside.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._span_plan import SUM_TILE, cdiv, padded
from qvg_paged.kernels._tokens_triton import COUNTS, RowGroup, load_tile, read_tokens, tile_tokens
from qvg_paged.kernels.gluon import GluonKernel, NotCompiled
from qvg_paged.kernels.launch import launch

__all__ = ["assign", "on_hopper", "sum_tokens"]


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
def _tagged(x, c, norm, start, mask, K: tl.constexpr):
    """How near each centroid is, ``2 x c - c c`` float32, with 255 minus its number in the low byte.

    As ``[T, K / 8, 4, 2]``, and without the two bits of the third axis, which `_nearest` adds: with tensor cores, one
    lane has all that differs in the others, so that what is added here are constants. `mask` is -256: as an argument,
    since an instruction takes one constant.
    """
    score = 2.0 * tl.dot(x, c, input_precision="ieee") - norm[None, :]
    bits = tl.reshape(score.to(tl.int32, bitcast=True), (x.shape[0], K // 8, 4, 2))
    tag = (248 - start - 8 * tl.arange(0, K // 8))[:, None, None] + (1 - tl.arange(0, 2))[None, None, :]
    return ((bits & mask) | tag[None]).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(near):
    """Number of the nearest centroid of every token."""
    found = tl.max(tl.max(near, 3), 1).to(tl.int32, bitcast=True) | (6 - 2 * tl.arange(0, 4))[None, :]  # [T, 4]
    return 255 - (tl.max(found.to(tl.float32, bitcast=True), 1).to(tl.int32, bitcast=True) & 255)


@triton.jit(do_not_specialize=[*COUNTS, "tiles", "mask"])
def _assign_kernel(
    c_ptr, norms_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, first_row, rows, heads, frames,
    frame_tokens, span_tokens, num_centroids, token_stride, head_stride, tiles, mask, D: tl.constexpr, T: tl.constexpr,
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
        near = _tagged(x, c, norm, 0, mask, BLOCK_K)
        if PADDED_K > BLOCK_K:
            near = tl.maximum(near, _tagged(x, c_second, norm_second, BLOCK_K, mask, BLOCK_K))
        for more in tl.static_range(2 * BLOCK_K, PADDED_K, BLOCK_K):
            c_more, norm_more = _load_centroids(
                c_ptr, norms_ptr, inverse_ptr, row, more, num_centroids, D, BLOCK_K, fold, DOT
            )  # fmt: skip
            near = tl.maximum(near, _tagged(x, c_more, norm_more, more, mask, BLOCK_K))
        chosen = _nearest(near)
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


def _dot_dtype(group: RowGroup) -> tl.dtype:
    return tl.bfloat16 if group.tokens.base.dtype is torch.bfloat16 else tl.float32


ASSIGN = {"T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
HOPPER_KERNEL = GluonKernel("_sum_gluon", "tokens of spans are clustered by slower kernels")
HOPPER_ASSIGN = {"AHEAD": 2, "num_warps": 4}
HOPPER_SUM = {"AHEAD": 3, "num_warps": 8}
"""Tiles asked for before they are added up."""
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


def assign(group: RowGroup, stage: int) -> None:
    """Write into ``group.ids[stage]`` the nearest centroid of every token, one of them where several are as near.

    As near: to 2**-16 of what the squared lengths of centroid and token amount to.
    """
    if stage == 0 and _is_usual(group) and on_hopper(group.ids.device):
        try:
            _assign_on_hopper(group)
        except NotCompiled as error:
            error.give_up(group.ids.device)
        else:
            return
    shape, tokens, count = _assign_shape(group), group.tokens, group.num_centroids
    tiles, per_program = _shares(group, shape["T"])
    launch(
        _assign_kernel, (cdiv(tiles, per_program), len(group.rows)),
        group.centroids[stage], group.norms, *group.arguments, per_program, -256, D=tokens.head_dim,
        PADDED_K=padded(count), STAGES=stage, BALANCED=group.inverse is not None, DOT=_dot_dtype(group), **shape,
    )  # fmt: skip


def sum_tokens(group: RowGroup, stage: int, sums: torch.Tensor, counts: torch.Tensor) -> None:
    """Write the sums of every centroid's tokens, and their number, of every run apart.

    Args:
        group: the rows.
        stage: whose ids and residual.
        sums: ``[rows, runs, num_centroids, head_dim]`` float32; in the first stage of tokens as stored, not balanced.
        counts: ``[rows, runs, num_centroids]`` int32.
    """
    tokens, count = group.tokens, group.num_centroids
    rows, runs = sums.shape[:2]
    if stage == 0 and _is_usual(group) and on_hopper(sums.device):
        try:
            _sum_on_hopper(group, sums, counts)
        except NotCompiled as error:
            error.give_up(sums.device)
        else:
            return
    shape = _sum_shape(group)
    launch(
        _sum_kernel, (runs, rows, cdiv(count, shape["BLOCK_K"])),
        sums, counts, *group.arguments, D=tokens.head_dim, RUN=group.run, ALL_K=padded(count),
        LANES=padded(group.run), STAGES=stage, BALANCED=group.inverse is not None, DOT=_dot_dtype(group), **shape,
    )  # fmt: skip


def _is_usual(group: RowGroup) -> bool:
    """Whether the kernels for Hopper were measured for such rows."""
    tokens = group.tokens
    return tokens.head_dim == 128 and group.num_centroids > 128 and tokens.base.dtype is torch.bfloat16


def _shares(group: RowGroup, tile: int) -> tuple[int, int]:
    """Tiles of a row, and how many of them a program takes if two run on a multiprocessor."""
    tiles = group.tokens.frames * cdiv(group.tokens.frame_tokens, tile)
    return tiles, cdiv(tiles, max(1, 2 * _processors(group.ids.device) // len(group.rows)))


def _assign_on_hopper(group: RowGroup) -> None:
    tokens = group.tokens
    tiles, per_program = _shares(group, 16 * HOPPER_ASSIGN["num_warps"])
    with HOPPER_KERNEL.compiling():
        from qvg_paged.kernels import _assign_gluon  # noqa: PLC0415 - only for the GPUs it is for

        launch(
            _assign_gluon.assign_kernel, (cdiv(tiles, per_program), len(group.rows)),
            group.centroids[0], group.norms, tokens.base, tokens.starts,
            tokens.base if group.inverse is None else group.inverse, group.ids, group.rows.start, tokens.heads,
            tokens.frames, tokens.frame_tokens, tokens.span_tokens, group.num_centroids, tokens.token_stride,
            tokens.head_stride, per_program, -256, D=tokens.head_dim, K=padded(group.num_centroids),
            BALANCED=group.inverse is not None, **HOPPER_ASSIGN,
        )  # fmt: skip


def _sum_on_hopper(group: RowGroup, sums: torch.Tensor, counts: torch.Tensor) -> None:
    tokens = group.tokens
    with HOPPER_KERNEL.compiling():
        from qvg_paged.kernels import _sum_gluon  # noqa: PLC0415 - only for the GPUs it is for

        launch(
            _sum_gluon.sum_kernel, (sums.shape[1], sums.shape[0]),
            sums, counts, tokens.base, tokens.starts, group.ids, group.rows.start, tokens.heads, tokens.frames,
            tokens.frame_tokens, tokens.span_tokens, group.num_centroids, tokens.token_stride, tokens.head_stride,
            D=tokens.head_dim, K=padded(group.num_centroids), T=SUM_TILE, RUN=group.run, LANES=padded(group.run),
            **HOPPER_SUM,
        )  # fmt: skip


def on_hopper(device: torch.device) -> bool:
    """Whether `device` has the instructions of sm_90, and the installed Triton the Gluon that they are written in."""
    return HOPPER_KERNEL.runs_on(device, (9, 0), below=(10, 0))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
