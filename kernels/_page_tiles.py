"""Reading a tile of tokens out of a page, quantised or dense, for Triton kernels.

Storage is that of `qvg_paged.kernels.layout`; the value of a channel without its balancing factor is

    scale * (step * code + offset) + sum over stages of centroid[id]
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.layout import GRANULE, TILE_TOKENS, PartLayout, code_rows

__all__ = ["PartBytes", "PartCode", "key_channels", "part_bytes", "part_code", "read_balance", "read_tile"]

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TILE = tl.constexpr(TILE_TOKENS)
UNIT = tl.constexpr(GRANULE)


class PartCode(NamedTuple):
    """What a kernel is compiled for: the coding of one tensor. `bits` is 0 for dense values of type `dtype`."""

    bits: int
    step: int
    offset: int
    block: int
    stages: int
    fp8_centroids: bool
    balanced: bool
    split: bool
    dtype: tl.dtype


class PartBytes(NamedTuple):
    """Where one tensor of one layer lies: bytes from the start of a page, and of a codebook; sizes of its planes."""

    codes: int
    scales: int
    ids: int
    centroids: int
    centroid_scales: int
    balance: int
    rows: int
    num_centroids: int


def part_code(layout: PartLayout) -> PartCode:
    """Compile-time description of `layout`."""
    codec = layout.codec
    grid = codec.grid
    return PartCode(
        bits=grid.bits, step=grid.step, offset=grid.offset, block=codec.block_size, stages=codec.stages,
        fp8_centroids=codec.centroid_type is CentroidType.FP8, balanced=codec.balanced and not codec.is_dense,
        split=layout.split_pairs, dtype=TL_DTYPES[layout.dtype],
    )  # fmt: skip


def part_bytes(layout: PartLayout, part_offset: int, codebook_part_offset: int) -> PartBytes:
    """Byte offsets of the planes of `layout` for a part that starts at the given bytes of page and codebook."""
    page = {plane.name: part_offset + plane.offset for plane in layout.planes}
    book = {plane.name: codebook_part_offset + plane.offset for plane in layout.codebook_planes}
    return PartBytes(
        codes=page.get("codes", page.get("values", 0)),
        scales=page.get("scales", 0),
        ids=page.get("ids", 0),
        centroids=book.get("centroids", 0),
        centroid_scales=book.get("centroid_scales", 0),
        balance=book.get("balance", 0),
        rows=0 if layout.codec.is_dense else code_rows(layout.tokens, layout.codec.grid.bits),
        num_centroids=layout.num_centroids,
    )


@triton.jit
def key_channels(HALF: tl.constexpr, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr):
    """Stored and natural channels: of all pairs' first (`HALF` 1) or second (2) members, or of the whole head (0)."""
    middle: tl.constexpr = HEAD_DIM // 2
    if HALF == 0:
        stored = tl.arange(0, HEAD_DIM)
        natural = 2 * (stored % middle) + stored // middle if SPLIT else stored
    else:
        pair = tl.arange(0, middle)
        apart = pair + (HALF - 1) * middle
        natural = 2 * pair + (HALF - 1) if INTERLEAVED else apart
        if SPLIT:  # noqa: SIM108 - nested conditional expressions are harder to read
            stored = apart if INTERLEAVED else natural // 2 + natural % 2 * middle
        else:
            stored = natural
    return stored, natural


@triton.jit
def read_balance(
    buffer, book, head, stored, part, CODE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Balancing factors of `stored` channels, float32; ones if the codec keeps none."""
    if CODE.balanced:
        base = (buffer + (book.to(tl.int64) * UNIT + part.balance)).to(tl.pointer_type(tl.bfloat16))
        factors = tl.load(base + head * HEAD_DIM + stored).to(tl.float32)
    else:
        factors = tl.full(stored.shape, 1.0, tl.float32)
    return factors


@triton.jit
def _read_scales(
    buffer, start, head, token, valid, natural, tokens, CODE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    blocks: tl.constexpr = HEAD_DIM // CODE.block
    base = (buffer + start).to(tl.pointer_type(tl.float8e4nv))
    if blocks <= 2:
        # Loading once per token and selecting is cheaper than one load per channel.
        at = base + head * blocks * tokens + token
        scale = tl.load(at, mask=valid, other=0.0).to(tl.float32)[:, None]
        if blocks == 2:
            second = tl.load(at + tokens, mask=valid, other=0.0).to(tl.float32)[:, None]
            scale = tl.where((natural < CODE.block)[None, :], scale, second)
    else:
        at = (head * blocks + natural // CODE.block)[None, :] * tokens + token[:, None]
        scale = tl.load(base + at, mask=valid[:, None], other=0.0).to(tl.float32)
    return scale


@triton.jit
def _read_centroids(
    buffer, page, book, head, token, valid, stored, tokens, heads, part,
    STAGE: tl.constexpr, CODE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    at = (head * CODE.stages + STAGE) * tokens + token
    row = tl.load(buffer + (page + part.ids) + at, mask=valid, other=0).to(tl.int32)  # [N]
    row += (STAGE * heads + head) * part.num_centroids
    if CODE.fp8_centroids:
        table = (buffer + (book + part.centroids)).to(tl.pointer_type(tl.float8e4nv))
        unit = tl.load((buffer + (book + part.centroid_scales)).to(tl.pointer_type(tl.float32)) + STAGE * heads + head)
        centroid = tl.load(table + row[:, None] * HEAD_DIM + stored[None, :], mask=valid[:, None], other=0.0)
        centroid = centroid.to(tl.float32) * unit
    else:
        table = (buffer + (book + part.centroids)).to(tl.pointer_type(tl.bfloat16))
        centroid = tl.load(table + row[:, None] * HEAD_DIM + stored[None, :], mask=valid[:, None], other=0.0)
        centroid = centroid.to(tl.float32)
    return centroid


@triton.jit
def read_tile(
    buffer, page_id, book_id, head, first, valid, stored, natural, tokens, heads, part,
    CODE: tl.constexpr, HEAD_DIM: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Tokens ``first ... first + N - 1`` of a page, `stored` channels: ``[N, channels]`` float32, unbalanced.

    `first` is a multiple of N and N divides 256, so that the tile lies inside one tile of the `codes` plane. Tokens
    that are not `valid` read as zero.
    """
    page = page_id.to(tl.int64) * UNIT
    token = first + tl.arange(0, N)  # [N]
    if CODE.bits == 0:
        base = (buffer + (page + part.codes)).to(tl.pointer_type(CODE.dtype))
        at = ((token * heads + head) * HEAD_DIM)[:, None] + natural[None, :]
        tile = tl.load(base + at, mask=valid[:, None], other=0.0).to(tl.float32)
    else:
        book = book_id.to(tl.int64) * UNIT
        stages: tl.constexpr = CODE.stages
        per_byte: tl.constexpr = 8 // CODE.bits
        before = first // TILE
        stride = (tl.minimum(tokens - before * TILE, TILE) + per_byte - 1) // per_byte
        inside = token - before * TILE
        row = head * part.rows + before * (TILE // per_byte) + inside % stride
        at = (row * HEAD_DIM)[:, None] + stored[None, :]
        packed = tl.load(buffer + (page + part.codes) + at, mask=valid[:, None], other=0).to(tl.int32)
        code = (packed >> (CODE.bits * (inside // stride))[:, None]) & ((1 << CODE.bits) - 1)
        scale = _read_scales(buffer, page + part.scales, head, token, valid, natural, tokens, CODE, HEAD_DIM)
        tile = (code * CODE.step + CODE.offset).to(tl.float32) * scale
        for stage in tl.static_range(stages):
            tile += _read_centroids(
                buffer, page, book, head, token, valid, stored, tokens, heads, part, stage, CODE, HEAD_DIM
            )
    return tile
