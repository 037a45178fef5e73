"""Attention that reads pages through the block table: a Triton kernel per page format, split over keys.

A program owns a block of query rows of one sequence and one KV head (queries that share a KV head are rows of one
block) and walks its share of the sequence's tiles: page after page, N tokens at a time, softmax online in float32.
Balancing factors never touch a tile: with c the key's vector and d the value's, scores are ``(q * c) . y`` and the
accumulator is kept in units of d, rescaled when the codebook changes and multiplied by d at the end. Keys that are
rotated when read come as two half tiles, the first and the second members of all pairs, and so does the query.

Each (format, split) leaves a partial output and its log-sum-exp in float32; `qvg_paged.kernels.merge` joins them.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._page_tiles import key_channels, part_bytes, part_code, read_balance, read_tile
from qvg_paged.kernels.attention_plan import QueryBlocks
from qvg_paged.kernels.block_table import FormatGroup
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["LaunchShape", "direct_attention", "launch_shape"]

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _load_queries(
    q, row_offset, live, stored, natural, buffer, book, head, part, CODE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    tile = tl.load(q + row_offset[:, None] + natural[None, :], mask=live[:, None], other=0.0)  # [M, channels]
    if CODE.balanced:
        factors = read_balance(buffer, book, head, stored, part, CODE, HEAD_DIM)
        tile = (tile.to(tl.float32) * factors[None, :]).to(tile.dtype)
    return tile


@triton.jit
def _load_turns(frame, space, entry, token, valid, pair, frame_pairs, space_pairs):
    of_frame = pair < frame_pairs
    moving = tl.load(frame + entry * frame_pairs + pair, mask=of_frame, other=0.0)
    at = token[:, None] * space_pairs + (pair - frame_pairs)[None, :]
    fixed = tl.load(space + at, mask=valid[:, None] & (pair >= frame_pairs)[None, :], other=0.0)
    return tl.where(of_frame[None, :], moving[None, :], fixed)  # [N, pairs]


@triton.jit(do_not_specialize=["num_splits", "first_partial", "rows", "first_row"])
def _direct_kernel(  # noqa: PLR0915 - one loop whose state stays in registers
    partials, partial_lse,
    q, buffer, pages, codebooks, indptr, cu_queries, block_sequence, block_row,
    cos_frame, sin_frame, cos_space, sin_space,
    scale_log2, num_splits, first_partial, rows, first_row, heads, group, tokens, frame_pairs, space_pairs,
    key_part, value_part,
    q_stride, q_head_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(1), tl.program_id(2)
    sequence = tl.load(block_sequence + tl.program_id(0))
    row = tl.load(block_row + tl.program_id(0)) + tl.arange(0, M)  # [M]
    query = tl.load(cu_queries + sequence) + row // group
    query_head = head * group + row % group
    live = query < tl.load(cu_queries + sequence + 1)
    row_offset = query.to(tl.int64) * q_stride + query_head * q_head_stride

    first_entry = tl.load(indptr + sequence)
    tiles_per_page = (tokens + N - 1) // N
    tiles = (tl.load(indptr + sequence + 1) - first_entry).to(tl.int64) * tiles_per_page
    begin = (tiles * split // num_splits).to(tl.int32)
    end = (tiles * (split + 1) // num_splits).to(tl.int32)

    stored, natural = key_channels(0, HEAD_DIM, INTERLEAVED, VALUE.split)
    key_a, natural_a = key_channels(1 if ROTATE else 0, HEAD_DIM, INTERLEAVED, KEY.split)
    key_b, natural_b = key_channels(2, HEAD_DIM, INTERLEAVED, KEY.split)
    pair = tl.arange(0, HEAD_DIM // 2)

    current = tl.load(codebooks + first_entry + begin // tiles_per_page, mask=begin < end, other=0)
    query_a = _load_queries(q, row_offset, live, key_a, natural_a, buffer, current, head, key_part, KEY, HEAD_DIM)
    query_b = query_a
    if ROTATE:
        query_b = _load_queries(q, row_offset, live, key_b, natural_b, buffer, current, head, key_part, KEY, HEAD_DIM)
    unit = read_balance(buffer, current, head, stored, value_part, VALUE, HEAD_DIM)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HEAD_DIM], tl.float32)
    for i in range(begin, end):
        entry = first_entry + i // tiles_per_page
        first = i % tiles_per_page * N
        token = first + tl.arange(0, N)  # [N]
        valid = token < tokens
        page, book = tl.load(pages + entry), tl.load(codebooks + entry)
        if KEY.balanced or VALUE.balanced:  # noqa: SIM102 - known when compiling, unlike the inner condition
            if book != current:
                query_a = _load_queries(
                    q, row_offset, live, key_a, natural_a, buffer, book, head, key_part, KEY, HEAD_DIM
                )
                if ROTATE:
                    query_b = _load_queries(
                        q, row_offset, live, key_b, natural_b, buffer, book, head, key_part, KEY, HEAD_DIM
                    )
                fresh = read_balance(buffer, book, head, stored, value_part, VALUE, HEAD_DIM)
                acc *= (unit / fresh)[None, :]
                unit = fresh
                current = book

        a = read_tile(
            buffer, page, book, head, first, valid, key_a, natural_a, tokens, heads, key_part, KEY, HEAD_DIM, N
        )
        if ROTATE:
            b = read_tile(
                buffer, page, book, head, first, valid, key_b, natural_b, tokens, heads, key_part, KEY, HEAD_DIM, N
            )
            cos = _load_turns(cos_frame, cos_space, entry, token, valid, pair, frame_pairs, space_pairs)
            sin = _load_turns(sin_frame, sin_space, entry, token, valid, pair, frame_pairs, space_pairs)
            turned_a = (a * cos - b * sin).to(query_a.dtype)  # [N, HEAD_DIM / 2]
            turned_b = (a * sin + b * cos).to(query_a.dtype)
            scores = tl.dot(query_a, tl.trans(turned_a), input_precision="ieee")
            scores = tl.dot(query_b, tl.trans(turned_b), scores, input_precision="ieee")
        else:
            scores = tl.dot(query_a, tl.trans(a.to(query_a.dtype)), input_precision="ieee")  # [M, N]
        scores = tl.where(valid[None, :], scores, float("-inf"))

        raised = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        # Scaling differences, not scores, keeps the rounding of scale * log2(e) away from the largest weights.
        weights = tl.exp2((scores - reference[:, None]) * scale_log2)  # [M, N]
        keep = tl.exp2((top - reference) * scale_log2)
        total = total * keep + tl.sum(weights, 1)
        top = raised
        value = read_tile(
            buffer, page, book, head, first, valid, stored, natural, tokens, heads, value_part, VALUE, HEAD_DIM, N
        ).to(query_a.dtype)  # [N, HEAD_DIM]
        acc = tl.dot(weights.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")

    filled = live & (total != 0.0)
    total = tl.where(total == 0.0, 1.0, total)
    at = (first_partial + split).to(tl.int64) * rows + (query - first_row)
    at = at * (heads * group) + query_head
    lse = tl.where(filled, (top * scale_log2 + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(partial_lse + at, lse, mask=live)
    acc = acc * (unit[None, :] / total[:, None])
    tl.store(partials + at[:, None] * HEAD_DIM + natural[None, :], acc, mask=filled[:, None])


@dataclass(frozen=True)
class LaunchShape:
    """Tile sizes and how a program is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def launch_shape(layout: PageLayout, dtype: torch.dtype, max_rows: int, rotates: bool) -> LaunchShape:
    """Tile sizes for blocks of at most `max_rows` query rows (queries times the heads that share a KV head).

    Keys that are rotated on read need registers for two half tiles, cosines and sines: fewer tokens at a time.
    """
    key, dim = layout.key, layout.key.head_dim
    wide = dtype is torch.float32
    most = 128 if dim <= 128 else 64
    rows = max(16, min(most if not wide else 32, 1 << (max_rows - 1).bit_length()))
    per_page = max(16, 1 << (key.tokens - 1).bit_length())
    tokens = min(per_page, 32 if wide or dim > 128 or (rotates and dim > 64) else 64)
    # Two stages turn the gather of centroid rows into asynchronous copies and cost quantised pages a factor of four.
    stages = 2 if layout.format.is_dense and not wide else 1
    return LaunchShape(rows, tokens, 8 if rows * dim >= 64 * 128 else 4, stages)


def direct_attention(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    buffer: torch.Tensor,
    layout: PageLayout,
    layer: int,
    group: FormatGroup,
    queries: QueryBlocks,
    *,
    softmax_scale: float,
    num_splits: int,
    first_partial: int,
    rope: RoPETables | None,
    rope_layout: RoPELayout,
    shape: LaunchShape,
) -> None:
    """Attend a block of sequences to their pages of one format.

    Args:
        partials: ``[partials, rows, q_heads, head_dim]`` float32; slices `first_partial` and the `num_splits - 1` after
            it are written where there are keys.
        partial_lse: ``[partials, rows, q_heads]`` float32, written likewise; -inf where there are none.
        q: ``[total_q, q_heads, head_dim]``, last dimension contiguous.
        buffer: 1-D uint8 pool.
        layout: planes of the format.
        layer: layer to read.
        group: the table's entries of that format.
        queries: blocks of `shape.rows` query rows of the sequences to attend.
        softmax_scale: factor on the scores.
        num_splits: shares into which each sequence's keys are cut.
        first_partial: slice of the first share.
        rope: tables with one frame row per entry of `group`; None leaves keys as stored.
        rope_layout: pairing of the channels.
        shape: tile sizes.
    """
    heads, group_size = layout.key.heads, q.shape[1] // layout.key.heads
    tables = (None,) * 4 if rope is None else (rope.cos_frame, rope.sin_frame, rope.cos_space, rope.sin_space)
    pairs = (0, 0) if rope is None else (rope.cos_frame.shape[1], rope.cos_space.shape[1])
    launch(
        _direct_kernel, (queries.count, heads, num_splits),
        partials, partial_lse,
        q, buffer, group.pages, group.codebooks, group.indptr, queries.cu_queries, queries.sequence, queries.row,
        *tables,
        softmax_scale * LOG2_E, num_splits, first_partial, partials.shape[1], queries.first_row, heads, group_size,
        layout.key.tokens, *pairs,
        part_bytes(layout.key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
        part_bytes(layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
        q.stride(0), q.stride(1),
        KEY=part_code(layout.key), VALUE=part_code(layout.value), HEAD_DIM=layout.key.head_dim,
        ROTATE=rope is not None, INTERLEAVED=rope_layout is RoPELayout.INTERLEAVED,
        M=shape.rows, N=shape.tokens, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
