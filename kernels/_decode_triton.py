"""Triton launcher that reads pages into dense keys or values, or into both at once.

One program reads some rows of the `codes` plane of some heads of one page, see `_decode_tile`.
"""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._decode_tile import angles, at_place, decode_head
from qvg_paged.kernels._dense_pages_triton import read_dense
from qvg_paged.kernels._span_plan import cdiv
from qvg_paged.kernels._tokens_triton import check_power_of_two
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE, TILE_TOKENS, PartLayout, code_rows
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["decode_both", "decode_pages"]

ANYWHERE = ["pages_ptr", "codebooks_ptr"]
"""Rows of a table that start at any sequence: their alignment must not decide what is compiled."""
DECODE = {"R": 16, "H": 4, "num_warps": 4}
PAIRED = {"R": 8, "H": 6, "num_warps": 4, "maxnreg": 96}
"""Rows of the `codes` plane and heads per program, with 128 channels a head; where both members of an interleaved pair
are written together, rows are fewer, and heads share cosines and sines."""
NARROW_WARPS = 16
"""Of a program that shares its multiprocessor with no other."""
BIAS = 0x4B000000
"""2**23 as the bits of a float32."""


@triton.jit(do_not_specialize=[*ANYWHERE, "bias", "columns"])
def _decode_kernel(
    out_ptr, other_ptr, buffer_ptr, pages_ptr, codebooks_ptr, cos_frame_ptr, sin_frame_ptr, cos_space_ptr,
    sin_space_ptr, part_offset, book_offset, other_part_offset, other_book_offset, scales_offset, ids_offset,
    book_scales_offset, balance_offset, tokens, heads, num_centroids, rows, row_blocks, stride_token, stride_head,
    other_stride_token, other_stride_head, bias, columns, D: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    H: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr, BALANCED: tl.constexpr, SPLIT: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, BOTH: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Blocks of `columns` by heads, of both parts if `BOTH`: a program each, or if `NARROW` all by a few programs."""
    if NARROW:
        groups = tl.cdiv(heads, H)
        for item in range(tl.program_id(0), columns * groups * (1 + BOTH), tl.num_programs(0)):
            _decode_block(
                item % columns, item // columns % groups, item // columns // groups, out_ptr, other_ptr, buffer_ptr,
                pages_ptr, codebooks_ptr, cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, part_offset,
                book_offset, other_part_offset, other_book_offset, scales_offset, ids_offset, book_scales_offset,
                balance_offset, tokens, heads, num_centroids, rows, row_blocks, stride_token, stride_head,
                other_stride_token, other_stride_head, bias, D, B, R, H, BITS, TILE, TOP, STEP, STAGES, FP8, BALANCED,
                SPLIT, ROPE, INTERLEAVED, BOTH, UNIT,
            )  # fmt: skip
    else:
        _decode_block(
            tl.program_id(0), tl.program_id(1), tl.program_id(2), out_ptr, other_ptr, buffer_ptr, pages_ptr,
            codebooks_ptr, cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, part_offset, book_offset,
            other_part_offset, other_book_offset, scales_offset, ids_offset, book_scales_offset, balance_offset, tokens,
            heads, num_centroids, rows, row_blocks, stride_token, stride_head, other_stride_token, other_stride_head,
            bias, D, B, R, H, BITS, TILE, TOP, STEP, STAGES, FP8, BALANCED, SPLIT, ROPE, INTERLEAVED, BOTH, UNIT,
        )  # fmt: skip


@triton.jit
def _decode_block(
    column, group, which, out_ptr, other_ptr, buffer_ptr, pages_ptr, codebooks_ptr, cos_frame_ptr, sin_frame_ptr,
    cos_space_ptr, sin_space_ptr, part_offset, book_offset, other_part_offset, other_book_offset, scales_offset,
    ids_offset, book_scales_offset, balance_offset, tokens, heads, num_centroids, rows, row_blocks, stride_token,
    stride_head, other_stride_token, other_stride_head, bias, D: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    H: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr, BALANCED: tl.constexpr, SPLIT: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, BOTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The part at `part_offset`; if `BOTH` and `which` is 1 the other one, as it is stored."""
    page, first_head = column // row_blocks, group * H
    first_row = (column % row_blocks) * R
    unit, book_unit = tl.load(pages_ptr + page).to(tl.int64) * UNIT, 0
    if (STAGES > 0) | BALANCED:
        book_unit = tl.load(codebooks_ptr + page).to(tl.int64) * UNIT
    if BOTH and which == 1:
        _decode_rows(
            other_ptr, buffer_ptr, unit + other_part_offset, book_unit + other_book_offset,
            cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, page, first_row, first_head, scales_offset,
            ids_offset, book_scales_offset, balance_offset, tokens, heads, num_centroids, rows, other_stride_token,
            other_stride_head, bias, D, B, R, H, BITS, TILE, TOP, STEP, STAGES, FP8, BALANCED, False, False, False,
        )  # fmt: skip
    else:
        _decode_rows(
            out_ptr, buffer_ptr, unit + part_offset, book_unit + book_offset, cos_frame_ptr,
            sin_frame_ptr, cos_space_ptr, sin_space_ptr, page, first_row, first_head, scales_offset, ids_offset,
            book_scales_offset, balance_offset, tokens, heads, num_centroids, rows, stride_token, stride_head, bias,
            D, B, R, H, BITS, TILE, TOP, STEP, STAGES, FP8, BALANCED, SPLIT, ROPE, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _decode_rows(
    out_ptr, buffer_ptr, part, book, cos_frame_ptr, sin_frame_ptr, cos_space_ptr,
    sin_space_ptr, page, first_row, first_head, scales_offset, ids_offset, book_scales_offset, balance_offset, tokens,
    heads, num_centroids, rows, stride_token, stride_head, bias, D: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    H: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr, BALANCED: tl.constexpr, SPLIT: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    TILE_ROWS: tl.constexpr = TILE * BITS // 8
    tile = first_row // TILE_ROWS
    first_token, row = tile * TILE, first_row % TILE_ROWS + tl.arange(0, R)
    size = tl.minimum(tokens - first_token, TILE)
    out_ptr += (page.to(tl.int64) * tokens + first_token) * stride_token
    book_ptr = buffer_ptr + book
    centroids_ptr = book_ptr.to(tl.pointer_type(tl.float8e4nv if FP8 else tl.bfloat16))
    book_scales_ptr = (book_ptr + book_scales_offset).to(tl.pointer_type(tl.float32))
    balance_ptr = (book_ptr + balance_offset).to(tl.pointer_type(tl.bfloat16))
    frame = page * (D // 2)
    if size == TILE:  # most tiles: places of a byte are a constant distance apart, and nothing is masked
        _decode_tile(
            out_ptr, buffer_ptr + part, centroids_ptr, book_scales_ptr, balance_ptr, cos_frame_ptr + frame,
            sin_frame_ptr + frame, cos_space_ptr, sin_space_ptr, scales_offset, ids_offset, first_head,
            tile * TILE_ROWS, row, first_token, TILE, TILE_ROWS, tokens, heads, num_centroids, rows, stride_token,
            stride_head, bias, D, B, H, BITS, TOP, STEP, STAGES, FP8, BALANCED, SPLIT, ROPE, INTERLEAVED, True,
        )  # fmt: skip
    else:
        _decode_tile(
            out_ptr, buffer_ptr + part, centroids_ptr, book_scales_ptr, balance_ptr, cos_frame_ptr + frame,
            sin_frame_ptr + frame, cos_space_ptr, sin_space_ptr, scales_offset, ids_offset, first_head,
            tile * TILE_ROWS, row, first_token, size, tl.cdiv(size * BITS, 8), tokens, heads, num_centroids, rows,
            stride_token, stride_head, bias, D, B, H, BITS, TOP, STEP, STAGES, FP8, BALANCED, SPLIT, ROPE, INTERLEAVED,
            False,
        )  # fmt: skip


@triton.jit
def _decode_tile(
    out_ptr, part_ptr, centroids_ptr, book_scales_ptr, balance_ptr, cos_frame_ptr, sin_frame_ptr, cos_space_ptr,
    sin_space_ptr, scales_offset, ids_offset, first_head, tile_row, row, first_token, size, stride, tokens, heads,
    num_centroids, rows, stride_token, stride_head, bias, D: tl.constexpr, B: tl.constexpr, H: tl.constexpr,
    BITS: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr,
    BALANCED: tl.constexpr, SPLIT: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    turns = ()
    for place in tl.static_range(8 // BITS):
        token = at_place(first_token, row, size, stride, place, WHOLE)
        turn = angles(cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, token, D, ROPE)
        turns += (turn,)  # type: ignore[assignment]
    last = first_head + 1 if H == 1 else tl.minimum(first_head + H, heads)
    for head in tl.range(first_head, last):
        decode_head(
            turns, bias, out_ptr + tl.cast(head, tl.int64) * stride_head, part_ptr + (head * rows + tile_row) * D,
            part_ptr + (scales_offset + head * (D // B) * tokens + first_token),
            part_ptr + (ids_offset + head * STAGES * tokens + first_token), centroids_ptr + head * num_centroids * D,
            book_scales_ptr + head, balance_ptr + head * D, row, size, stride, tokens, heads, num_centroids,
            stride_token, D, B, BITS, TOP, STEP, STAGES, FP8, BALANCED, SPLIT, ROPE, INTERLEAVED, WHOLE,
        )  # fmt: skip


def decode_pages(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    part_offset: int,
    codebook_part_offset: int,
    out: torch.Tensor,
    rope: RoPETables | None,
    rope_layout: RoPELayout,
) -> None:
    """Read the tokens of `pages`; arguments as in `qvg_paged.kernels.decode.decode_pages`."""
    interleaved = _interleaved(layout, rope, rope_layout)
    tables = (out,) * 4 if rope is None else rope.wide
    check_power_of_two(layout.head_dim)
    if not layout.codec.is_dense:
        _launch(
            buffer, pages, codebooks, layout, (part_offset, codebook_part_offset) * 2, (out, out), rope is not None,
            interleaved, tables, both=False,
        )  # fmt: skip
        return
    read_dense(buffer, pages, layout, part_offset, out, tables, rope is not None, interleaved)


def decode_both(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    offsets: tuple[int, int, int, int],
    outs: tuple[torch.Tensor, torch.Tensor],
    rope: RoPETables | None,
    rope_layout: RoPELayout,
    narrow: int = 0,
) -> None:
    """Read K and V in one launch.

    Args:
        buffer, pages, codebooks, rope, rope_layout: as of `qvg_paged.kernels.decode.decode_layer`.
        layout: K's part, quantised; V's differs in nothing but its channels, which are in order.
        offsets: of K's part in a page and in a codebook, then V's.
        outs: K and V, of one dtype.
        narrow: so many programs of `NARROW_WARPS` warps, each filling a multiprocessor, do it; 0 for one a block.
    """
    check_power_of_two(layout.head_dim)
    interleaved = _interleaved(layout, rope, rope_layout)
    tables = (outs[0],) * 4 if rope is None else rope.wide
    _launch(
        buffer, pages, codebooks, layout, offsets, outs, rope is not None, interleaved, tables, both=True, narrow=narrow
    )  # fmt: skip


def _interleaved(layout: PartLayout, rope: RoPETables | None, rope_layout: RoPELayout) -> bool:
    # Without a rotation any pairing will do; the one the part is stored in reads and writes contiguous halves.
    return layout.split_pairs if rope is None else rope_layout is RoPELayout.INTERLEAVED


def _launch(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    offsets: tuple[int, ...],
    outs: tuple[torch.Tensor, torch.Tensor],
    turned: bool,
    interleaved: bool,
    tables: tuple[torch.Tensor, ...],
    *,
    both: bool,
    narrow: int = 0,
) -> None:
    codec, dim = layout.codec, layout.head_dim
    planes = {plane.name: plane.offset for plane in layout.planes + layout.codebook_planes}
    shape = dict(PAIRED if interleaved else DECODE)
    if narrow:
        shape["R"] *= NARROW_WARPS // shape["num_warps"]
        shape["num_warps"] = NARROW_WARPS
    block, together = min(64, max(1, shape.pop("R") * 128 // dim)), min(shape.pop("H"), layout.heads)
    rows = code_rows(layout.tokens, codec.grid.bits)
    blocks, groups = cdiv(rows, block), cdiv(layout.heads, together)
    grid = (narrow,) if narrow else (blocks * len(pages), groups, 1 + both)
    launch(
        _decode_kernel, grid, *outs, buffer, pages.contiguous(),
        codebooks.contiguous(), *tables, *offsets, planes["scales"],
        planes.get("ids", 0), planes.get("centroid_scales", 0), planes.get("balance", 0), layout.tokens, layout.heads,
        layout.num_centroids, rows, blocks, *outs[0].stride()[:2], *outs[1].stride()[:2], BIAS,
        blocks * len(pages), D=dim,
        B=codec.block_size, R=block, H=together, BITS=codec.grid.bits, TILE=TILE_TOKENS, TOP=codec.grid.max_level,
        STEP=codec.grid.step, STAGES=codec.stages, FP8=codec.centroid_type is CentroidType.FP8 and codec.stages > 0,
        BALANCED=codec.balanced, SPLIT=layout.split_pairs, ROPE=turned, INTERLEAVED=interleaved, BOTH=both,
        UNIT=GRANULE, NARROW=narrow > 0, **shape, enable_fp_fusion=False,
    )  # fmt: skip
