"""Triton launchers that write a span into its pages and codebook.

The pack kernel computes the residual of its tokens, quantises it and packs it straight into the pages. One program
owns some rows of the `codes` plane of one head of one frame. A row holds the same channels of ``8 / bits`` tokens,
`stride` apart: the program quantises them one after the other and ORs their codes into place. The arithmetic is that
of `_blocks`, bit for bit (launched without contraction of products into sums).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._block_pieces_triton import read_blocks, store_blocks
from qvg_paged.kernels._quantise_triton import quantise, quantise_constants
from qvg_paged.kernels._span_plan import cdiv
from qvg_paged.kernels._tokens_triton import COUNTS, RowGroup, SpanTokens, check_power_of_two
from qvg_paged.kernels.formats import Codec, ScaleRule
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import TILE_TOKENS, PartLayout, code_rows

__all__ = ["SpanPlaces", "pack", "quantise_pack", "write_centroids"]

PACK_COUNTS = [*COUNTS, "parts_ptr", "code_rows", "split"]
BOOK_COUNTS = ["books_ptr", "first_row", "rows", "heads", "num_centroids", "plane_offset", "scales_offset", "split"]
PACK = {"R": 8, "W": 1, "num_warps": 2}
"""Rows of the `codes` plane per program, pieces of a block per thread; for head dims up to 128."""
SEARCH_PACK = {"R": 16, "W": 4, "num_warps": 2}
"""The same where scales are searched for."""
WIDE_PACK = {"R": 8, "W": 1, "num_warps": 4}


@dataclass(frozen=True)
class SpanPlaces:
    """Where a span goes.

    Attributes:
        buffer: 1-D uint8 pool.
        layouts: of each tensor; they differ in channel order and pairing at most.
        parts: ``[tensors, frames]`` int64 on the device: byte of the pool at which the part of a frame's page starts.
        books: ``[tensors]`` int64 on the device: likewise of the codebooks.
    """

    buffer: torch.Tensor
    layouts: tuple[PartLayout, ...]
    parts: torch.Tensor
    books: torch.Tensor

    @property
    def split(self) -> int:
        """A bit for each tensor whose channels are stored even ones first."""
        return sum(int(layout.split_pairs) << number for number, layout in enumerate(self.layouts))


@triton.jit(do_not_specialize=PACK_COUNTS)
def _pack_kernel(
    buffer_ptr, parts_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, first_row, rows, heads, frames,
    frame_tokens, span_tokens, num_centroids, token_stride, head_stride, inverse_top, code_rows, split, scales_offset,
    ids_offset, codes_end, scales_end, ids_end, part_end, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr, BALANCED: tl.constexpr,
    B: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr, RULE: tl.constexpr, MIDS: tl.constexpr,
    FIRST: tl.constexpr, LOWEST: tl.constexpr, WEIGHT: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr,
    SEARCH: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    frame, row = tl.program_id(1), tl.program_id(2)
    tensor, head = (first_row + row) // heads, (first_row + row) % heads
    first_code_row = tl.program_id(0) * R
    part = buffer_ptr + tl.multiple_of(tl.load(parts_ptr + tensor * frames + frame), 16)
    start = tl.multiple_of(tl.load(starts_ptr + tensor * frames + frame), 16)
    x_ptr += start + head.to(tl.int64) * head_stride
    frame_ids = ids_ptr + frame * frame_tokens
    tile = first_code_row // (TILE * BITS // 8)
    size = tl.minimum(frame_tokens - tile * TILE, TILE)
    stride = tl.cdiv(size * BITS, 8)
    place_row = first_code_row % (TILE * BITS // 8) + tl.arange(0, R)
    block = tl.arange(0, D // B)
    packed = tl.zeros((R, D // B, B), tl.int32)
    for place in range(8 // BITS):
        inside = (place_row < stride) & (place_row + place * stride < size)
        token = tile * TILE + place_row + place * stride
        x = read_blocks(
            x_ptr, inverse_ptr, frame_ids, centroids_ptr, token, inside, row, rows, span_tokens, num_centroids,
            token_stride, D, B, W, LEFT, BALANCED,
        )  # fmt: skip
        codes, byte = quantise(
            x, inverse_top, TOP, STEP, RULE, MIDS, FIRST, LOWEST, WEIGHT, STEPS, STRIDE, SEARCH, PRODUCT
        )  # fmt: skip
        packed += codes * tl.where(inside, 1 << (BITS * place), 0)[:, None, None]
        scale_ptr = part + scales_offset + (head * (D // B) + block) * frame_tokens + token[:, None]
        tl.store(scale_ptr, tl.reshape(byte, (R, D // B)).to(tl.uint8), mask=inside[:, None])
        for stage in tl.static_range(STAGES):
            chosen = tl.load(
                frame_ids + (stage * rows + row).to(tl.int64) * span_tokens + token, mask=inside, other=0
            )  # fmt: skip
            tl.store(part + ids_offset + (head * STAGES + stage) * frame_tokens + token, chosen, mask=inside)
    out_ptr = part + (head * code_rows + first_code_row + tl.arange(0, R)).to(tl.int64)[:, None, None] * D
    known = (place_row < stride)[:, None, None]
    store_blocks(out_ptr, packed.to(tl.uint8), known, (split >> tensor) & 1, R, D, B, W)
    if (first_code_row == 0) & (head == 0):
        gap = tl.arange(0, 16)
        zero = tl.zeros((16,), tl.uint8)
        tl.store(part + codes_end + gap, zero, mask=codes_end + gap < scales_offset)
        tl.store(part + scales_end + gap, zero, mask=scales_end + gap < ids_offset)
        tl.store(part + ids_end + gap, zero, mask=ids_end + gap < part_end)


@triton.jit(do_not_specialize=BOOK_COUNTS)
def _book_kernel(
    buffer_ptr, books_ptr, stored_ptr, scales_ptr, first_row, rows, heads, num_centroids, plane_offset, scales_offset,
    split, D: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row, stage = tl.program_id(1), tl.program_id(2)
    tensor, head = (first_row + row) // heads, (first_row + row) % heads
    k = tl.program_id(0) * K + tl.arange(0, K)
    known = (k < num_centroids)[:, None]
    stored = tl.arange(0, D)
    natural = tl.where(((split >> tensor) & 1) == 1, 2 * (stored % (D // 2)) + stored // (D // 2), stored)
    source = ((stage * rows + row) * num_centroids + k[:, None]) * D + natural
    target = ((stage * heads + head) * num_centroids + k[:, None]) * D + stored
    book = buffer_ptr + tl.load(books_ptr + tensor)
    out = (book + plane_offset).to(tl.pointer_type(stored_ptr.dtype.element_ty))
    tl.store(out + target, tl.load(stored_ptr + source, mask=known), mask=known)
    if SCALED:
        scale = tl.load(scales_ptr + stage * rows + row)
        tl.store((book + scales_offset).to(tl.pointer_type(tl.float32)) + stage * heads + head, scale)


def pack(group: RowGroup, places: SpanPlaces) -> None:
    """Quantise the residual of the rows of a group into the pages: codes, scales, ids, zero padding."""
    codec = places.layouts[0].codec
    _launch(group, places, stages_left=codec.stages, balanced=codec.balanced)


def quantise_pack(
    residual: torch.Tensor,
    ids: torch.Tensor | None,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    first_head: int,
) -> None:
    """Quantise the residual of some heads into the pages; arguments as in the twin."""
    heads, span_tokens, dim = residual.shape
    check_power_of_two(dim)
    head_stride, frames = span_tokens * dim, torch.arange(len(part_offsets))
    table = torch.stack([frames * layout.tokens * dim - first_head * head_stride, torch.tensor(part_offsets)])
    table = table.to(buffer.device, non_blocking=True)
    tokens = SpanTokens(residual, table[:1], dim, head_stride, layout.tokens, layout.heads, dim)
    none = residual if ids is None else ids.contiguous()
    group = RowGroup(tokens, range(first_head, first_head + heads), None, none, residual[None], residual, residual)
    places = SpanPlaces(buffer, (layout,), table[1:], table[1])
    _launch(group, places, stages_left=0, balanced=False)


def _launch(group: RowGroup, places: SpanPlaces, *, stages_left: int, balanced: bool) -> None:
    """Of the codec's stages, `stages_left` are still to be subtracted from the tokens."""
    layout, tokens = places.layouts[0], group.tokens
    codec, dim = layout.codec, layout.head_dim
    planes = {plane.name: plane for plane in layout.planes}
    ends = {name: plane.offset + plane.nbytes for name, plane in planes.items()}
    rows = code_rows(layout.tokens, codec.grid.bits)
    shape = _pack_shape(codec, dim)
    launch(
        _pack_kernel, (cdiv(rows, shape["R"]), tokens.frames, len(group.rows)),
        places.buffer, places.parts, *group.arguments, _reciprocal(codec.grid.max_level), rows, places.split,
        planes["scales"].offset, planes["ids"].offset if "ids" in planes else layout.nbytes, ends["codes"],
        ends["scales"], ends.get("ids", layout.nbytes), layout.nbytes, D=dim, BITS=codec.grid.bits,
        TILE=TILE_TOKENS, STAGES=codec.stages, LEFT=stages_left, BALANCED=balanced, **quantise_constants(codec),
        **shape, enable_fp_fusion=False,
    )  # fmt: skip


def _pack_shape(codec: Codec, dim: int) -> dict[str, int]:
    shape = WIDE_PACK if dim > 128 else SEARCH_PACK if codec.scale_rule is ScaleRule.SEARCH else PACK
    return shape | {"W": max(1, min(shape["W"], codec.block_size // 16))}


@lru_cache
def _reciprocal(value: int) -> float:
    return float((1.0 / torch.tensor(float(value))).item())


def write_centroids(group: RowGroup, places: SpanPlaces, stored: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Write the centroids of the rows of a group into their codebooks.

    Args:
        group: the rows.
        places: where they go.
        stored: ``[stages, rows, num_centroids, head_dim]`` as stored, natural channel order.
        scales: ``[stages, rows]`` float32 for FP8 centroids, else None.
    """
    layout, raw = places.layouts[0], torch.uint8 if scales is not None else torch.int16
    stages, rows, count, dim = stored.shape
    launch(
        _book_kernel, (cdiv(count, 16), rows, stages),
        places.buffer, places.books, stored.view(raw), stored.view(raw) if scales is None else scales,
        group.rows.start, rows, group.tokens.heads, count, layout.plane("centroids").offset,
        0 if scales is None else layout.plane("centroid_scales").offset, places.split, D=dim, K=16,
        SCALED=scales is not None, num_warps=4,
    )  # fmt: skip
