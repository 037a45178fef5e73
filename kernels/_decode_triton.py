"""Triton launcher that reads pages into dense keys or values.

    x = balance * (scale * (step * code + offset) + sum over stages of centroid[id])

One program reads some rows of the `codes` plane of one head of one page. Channels are handled as two tiles, the first
and the second of every RoPE pair, so that turning them is elementwise. Float32 throughout, launched without contraction
of products into sums: the values are those of the PyTorch twin, bit for bit.
"""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._span_plan import cdiv
from qvg_paged.kernels._tokens_triton import check_power_of_two
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.layout import GRANULE, TILE_TOKENS, PartLayout, code_rows
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["decode_pages"]

ANYWHERE = ["pages_ptr", "codebooks_ptr", "cos_frame_ptr", "sin_frame_ptr"]
"""Rows of a table that start at any sequence: their alignment must not decide what is compiled."""
HEADS_TURNED = 4
"""Heads that a program decodes one after the other with the same cosines and sines."""
DECODE = {"R": 16, "num_warps": 4}
"""Rows of the `codes` plane per program, for head dims up to 128."""


@triton.jit
def _angles(
    cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, page, token, inside, frame_pairs, space_pairs,
    D: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of the pairs of some tokens, ``[rows, D / 2]``; without a rotation, nothing of use."""
    pair = tl.arange(0, D // 2)
    if ROPE:
        in_frame = pair < frame_pairs
        frame = page * frame_pairs + pair  # [D/2]
        space = token[:, None] * space_pairs + (pair - frame_pairs)  # [R, D/2]
        in_space = inside[:, None] & (pair >= frame_pairs)
        cos = tl.load(cos_frame_ptr + frame, mask=in_frame, other=0.0)
        sin = tl.load(sin_frame_ptr + frame, mask=in_frame, other=0.0)
        cos = tl.where(in_frame, cos, tl.load(cos_space_ptr + space, mask=in_space, other=0.0))  # [R, D/2]
        sin = tl.where(in_frame, sin, tl.load(sin_space_ptr + space, mask=in_space, other=0.0))
    else:
        cos, sin = 1.0, 0.0
    return cos, sin


@triton.jit
def _turn_and_store(
    first, second, cos, sin, out_ptr, inside, D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Turn pairs ``[rows, D / 2]`` and write them at `out_ptr` ``[rows, 1]`` in natural channel order."""
    pair = tl.arange(0, D // 2)
    if ROPE:
        turned = first * cos - second * sin
        second = first * sin + second * cos
        first = turned
    dtype = out_ptr.dtype.element_ty
    if INTERLEAVED:
        joined = tl.interleave(first.to(dtype), second.to(dtype))  # [R, D]
        tl.store(out_ptr + tl.arange(0, D), joined, mask=inside[:, None])
    else:
        tl.store(out_ptr + pair, first.to(dtype), mask=inside[:, None])
        tl.store(out_ptr + D // 2 + pair, second.to(dtype), mask=inside[:, None])


@triton.jit
def _channels(second: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr):
    """Natural and stored channel of the first or second member of every pair."""
    pair = tl.arange(0, D // 2)
    natural = 2 * pair + second if INTERLEAVED else pair + second * (D // 2)
    if not SPLIT:
        stored = natural
    elif INTERLEAVED:
        stored = pair + second * (D // 2)
    else:
        stored = natural // 2 + (natural % 2) * (D // 2)
    return natural, stored


@triton.jit
def _levels(bytes_, shift: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr):
    """``STEP * code - TOP`` as float32 of the codes at bit `shift`: as the last places of 2**23, without conversion."""
    mask: tl.constexpr = ((1 << BITS) - 1) * STEP
    code = (bytes_ << 1 if shift == 0 else bytes_ >> (shift - 1)) if STEP == 2 else bytes_ >> shift
    return ((code & mask) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + TOP)


@triton.jit
def _scales(scales_ptr, natural, token, inside, head, tokens, D: tl.constexpr, B: tl.constexpr):
    """Scales of some tokens, broadcastable to ``[rows, D / 2]`` float32."""
    at = scales_ptr + head * (D // B) * tokens + token
    if D == B:
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
    elif D == 2 * B:
        # A load per token and a choice cost less than a load per channel.
        low = tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
        high = tl.load(at + tokens, mask=inside, other=0.0).to(tl.float32)[:, None]
        scale = tl.where((natural < B)[None, :], low, high)
    else:
        at = at[:, None] + (natural // B)[None, :] * tokens
        scale = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    return scale


@triton.jit
def _values(
    bytes_, shift: tl.constexpr, natural, stored, token, inside, head, scales_ptr, ids_ptr, centroids_ptr,
    book_scales_ptr, balance_ptr, tokens, heads, num_centroids, D: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr,
    TOP: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Decoded channels `natural` of some tokens, ``[rows, D / 2]`` float32."""
    scale = _scales(scales_ptr, natural, token, inside, head, tokens, D, B)
    value = _levels(bytes_, shift, BITS, TOP, STEP) * scale
    for stage in tl.static_range(STAGES):
        chosen = tl.load(ids_ptr + (head * STAGES + stage) * tokens + token, mask=inside, other=0).to(tl.int32)
        row = ((stage * heads + head) * num_centroids + chosen) * D  # [R]
        centroid = tl.load(centroids_ptr + row[:, None] + stored, mask=inside[:, None], other=0.0).to(tl.float32)
        if FP8:
            centroid *= tl.load(book_scales_ptr + stage * heads + head)
        value += centroid
    if BALANCED:
        value *= tl.load(balance_ptr + head * D + stored).to(tl.float32)
    return value


@triton.jit(do_not_specialize=ANYWHERE)
def _decode_kernel(
    out_ptr, bytes_ptr, fp8_ptr, bf16_ptr, fp32_ptr, pages_ptr, codebooks_ptr, cos_frame_ptr, sin_frame_ptr,
    cos_space_ptr, sin_space_ptr, part_offset, book_offset, scales_offset, ids_offset, book_scales_offset,
    balance_offset, tokens, heads, num_centroids, rows, row_blocks, frame_pairs, space_pairs, stride_token, stride_head,
    D: tl.constexpr, B: tl.constexpr, R: tl.constexpr, H: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
    TOP: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr, BALANCED: tl.constexpr,
    SPLIT: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    page, first_head = tl.program_id(0) // row_blocks, tl.program_id(1) * H
    first_row = (tl.program_id(0) % row_blocks) * R
    part = tl.load(pages_ptr + page).to(tl.int64) * UNIT + part_offset
    book = part
    if (STAGES > 0) | BALANCED:
        book = tl.load(codebooks_ptr + page).to(tl.int64) * UNIT + book_offset
    centroids_ptr = (fp8_ptr + book) if FP8 else (bf16_ptr + book // 2)
    book_scales_ptr = fp32_ptr + (book + book_scales_offset) // 4
    balance_ptr = bf16_ptr + (book + balance_offset) // 2
    scales_ptr, ids_ptr = fp8_ptr + part + scales_offset, bytes_ptr + part + ids_offset
    tile = first_row // (TILE * BITS // 8)
    size = tl.minimum(tokens - tile * TILE, TILE)
    stride = tl.cdiv(size * BITS, 8)
    row = first_row % (TILE * BITS // 8) + tl.arange(0, R)
    natural_a, stored_a = _channels(0, D, INTERLEAVED, SPLIT)
    natural_b, stored_b = _channels(1, D, INTERLEAVED, SPLIT)
    for place in tl.static_range(8 // BITS):
        inside = (row < stride) & (row + place * stride < size)
        token = tile * TILE + row + place * stride
        cos, sin = _angles(
            cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, page, token, inside, frame_pairs, space_pairs,
            D, ROPE,
        )  # fmt: skip
        for head in tl.range(first_head, tl.minimum(first_head + H, heads)):
            row_ptr = bytes_ptr + part + (tl.cast(head * rows + first_row, tl.int64) + tl.arange(0, R)[:, None]) * D
            bytes_a = tl.load(row_ptr + stored_a, mask=(row < stride)[:, None], other=0).to(tl.int32)  # [R, D/2]
            bytes_b = tl.load(row_ptr + stored_b, mask=(row < stride)[:, None], other=0).to(tl.int32)  # [R, D/2]
            first = _values(
                bytes_a, BITS * place, natural_a, stored_a, token, inside, head, scales_ptr, ids_ptr, centroids_ptr,
                book_scales_ptr, balance_ptr, tokens, heads, num_centroids, D, B, BITS, TOP, STEP, STAGES, FP8,
                BALANCED,
            )  # fmt: skip
            second = _values(
                bytes_b, BITS * place, natural_b, stored_b, token, inside, head, scales_ptr, ids_ptr, centroids_ptr,
                book_scales_ptr, balance_ptr, tokens, heads, num_centroids, D, B, BITS, TOP, STEP, STAGES, FP8,
                BALANCED,
            )  # fmt: skip
            target = (page.to(tl.int64) * tokens + token) * stride_token + tl.cast(head, tl.int64) * stride_head
            _turn_and_store(first, second, cos, sin, out_ptr + target[:, None], inside, D, ROPE, INTERLEAVED)


@triton.jit(do_not_specialize=ANYWHERE)
def _dense_kernel(
    out_ptr, values_ptr, pages_ptr, cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, part_offset, tokens,
    heads, token_blocks, frame_pairs, space_pairs, stride_token, stride_head, D: tl.constexpr, R: tl.constexpr,
    ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    page, head = tl.program_id(0) // token_blocks, tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) % token_blocks) * R + tl.arange(0, R)
    inside = token < tokens
    part = (tl.load(pages_ptr + page).to(tl.int64) * UNIT + part_offset) // ITEM
    natural_a, _ = _channels(0, D, INTERLEAVED, False)
    natural_b, _ = _channels(1, D, INTERLEAVED, False)
    source = values_ptr + part + (token[:, None] * heads + head) * D
    first = tl.load(source + natural_a, mask=inside[:, None], other=0.0).to(tl.float32)  # [R, D/2]
    second = tl.load(source + natural_b, mask=inside[:, None], other=0.0).to(tl.float32)  # [R, D/2]
    target = (page.to(tl.int64) * tokens + token) * stride_token + head * stride_head
    cos, sin = _angles(
        cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, page, token, inside, frame_pairs, space_pairs,
        D, ROPE,
    )  # fmt: skip
    _turn_and_store(first, second, cos, sin, out_ptr + target[:, None], inside, D, ROPE, INTERLEAVED)


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
    codec, dim, heads = layout.codec, layout.head_dim, layout.heads
    check_power_of_two(dim)
    pages, codebooks = pages.contiguous(), codebooks.contiguous()
    raw = buffer[: buffer.numel() // 4 * 4]
    # Without a rotation any pairing will do; the one the part is stored in reads and writes contiguous halves.
    interleaved = layout.split_pairs if rope is None else rope_layout is RoPELayout.INTERLEAVED
    given = (out,) * 4 if rope is None else (rope.cos_frame, rope.sin_frame, rope.cos_space, rope.sin_space)
    pairs = (0, 0) if rope is None else (rope.cos_frame.shape[1], rope.cos_space.shape[1])
    tables = [table if rope is None else table.contiguous() for table in given]
    if codec.is_dense:
        blocks = cdiv(layout.tokens, 32)
        _dense_kernel[(blocks * len(pages), heads)](
            out, raw.view(layout.dtype), pages, *tables, part_offset, layout.tokens, heads, blocks, *pairs,
            out.stride(0), out.stride(1), D=dim, R=32, ROPE=rope is not None, INTERLEAVED=interleaved, UNIT=GRANULE,
            ITEM=layout.dtype.itemsize, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return
    offsets = {plane.name: plane.offset for plane in layout.planes + layout.codebook_planes}
    fp8 = codec.centroid_type is CentroidType.FP8
    rows = code_rows(layout.tokens, codec.grid.bits)
    block, warps = (DECODE["R"], DECODE["num_warps"]) if dim <= 128 else (8, 4)
    blocks = cdiv(rows, block)
    together = 1 if rope is None else min(HEADS_TURNED, heads)
    _decode_kernel[(blocks * len(pages), cdiv(heads, together))](
        out, raw, raw.view(torch.float8_e4m3fn), raw.view(torch.bfloat16), raw.view(torch.float32), pages, codebooks,
        *tables, part_offset, codebook_part_offset, offsets["scales"], offsets.get("ids", 0),
        offsets.get("centroid_scales", 0), offsets.get("balance", 0), layout.tokens, heads, layout.num_centroids, rows,
        blocks, *pairs, out.stride(0), out.stride(1), D=dim, B=codec.block_size, R=block, H=together,
        BITS=codec.grid.bits, TILE=TILE_TOKENS, TOP=codec.grid.max_level, STEP=codec.grid.step, STAGES=codec.stages,
        FP8=fp8 and codec.stages > 0, BALANCED=codec.balanced, SPLIT=layout.split_pairs, ROPE=rope is not None,
        INTERLEAVED=interleaved, UNIT=GRANULE, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
