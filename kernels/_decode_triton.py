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
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE, TILE_TOKENS, PartLayout, code_rows
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["decode_pages"]

ANYWHERE = ["pages_ptr", "codebooks_ptr", "cos_frame_ptr", "sin_frame_ptr"]
"""Rows of a table that start at any sequence: their alignment must not decide what is compiled."""
DECODE = {"R": 16, "H": 1, "num_warps": 4}
TURNED = {"R": 8, "H": 4, "num_warps": 4}
"""Rows of the `codes` plane per program, for head dims up to 128, and heads that share its cosines and sines."""


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
    """Levels of the codes at bit `shift`, float32, times what `_scales` divides by: bits in place, no conversion.

    The bits become the last places of 2**23. With steps of two, the middle of the lowest codes is not a whole number:
    they alone are shifted.
    """
    halves: tl.constexpr = STEP == 2 and shift == 0
    middle: tl.constexpr = TOP if halves else TOP * (1 << shift) // STEP
    placed = (bytes_ << 1) & (2 * ((1 << BITS) - 1)) if halves else bytes_ & (((1 << BITS) - 1) << shift)
    return (placed | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + middle)


@triton.jit
def _scales(
    scales_ptr, natural_a, natural_b, token, inside, head, tokens, shift: tl.constexpr, D: tl.constexpr,
    B: tl.constexpr, STEP: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Scales of the first and second members of the pairs of some tokens, broadcastable to ``[rows, D / 2]``."""
    unit: tl.constexpr = 1.0 if STEP == 2 and shift == 0 else STEP / (1 << shift)
    at = scales_ptr + head * (D // B) * tokens + token
    if D <= 2 * B:  # a load per token, and at most a choice, cost less than a load per channel
        first = (tl.load(at, mask=inside, other=0.0).to(tl.float32) * unit)[:, None]
        second = first
        if D == 2 * B:
            second = (tl.load(at + tokens, mask=inside, other=0.0).to(tl.float32) * unit)[:, None]
            if INTERLEAVED:
                first = tl.where((natural_a < B)[None, :], first, second)
                second = first
    else:
        at = at[:, None]
        first = tl.load(at + (natural_a // B)[None, :] * tokens, mask=inside[:, None], other=0.0).to(tl.float32) * unit
        second = tl.load(at + (natural_b // B)[None, :] * tokens, mask=inside[:, None], other=0.0).to(tl.float32) * unit
    return first, second


@triton.jit
def _balance(balance_ptr, head, stored, D: tl.constexpr, BALANCED: tl.constexpr):
    if BALANCED:
        factors = tl.load(balance_ptr + head * D + stored).to(tl.float32)  # [D/2]
    else:
        factors = tl.full(stored.shape, 1.0, tl.float32)
    return factors


@triton.jit
def _values(
    bytes_a, bytes_b, balance_a, balance_b, shift: tl.constexpr, natural_a, natural_b, stored_a, stored_b, token,
    inside, head, scales_ptr, ids_ptr, centroids_ptr, book_scales_ptr, tokens, heads, num_centroids, D: tl.constexpr,
    B: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, BALANCED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Decoded first and second members of the pairs of some tokens, each ``[rows, D / 2]`` float32."""
    scale_a, scale_b = _scales(
        scales_ptr, natural_a, natural_b, token, inside, head, tokens, shift, D, B, STEP, INTERLEAVED
    )
    first = _levels(bytes_a, shift, BITS, TOP, STEP) * scale_a
    second = _levels(bytes_b, shift, BITS, TOP, STEP) * scale_b
    for stage in tl.static_range(STAGES):
        chosen = tl.load(ids_ptr + (head * STAGES + stage) * tokens + token, mask=inside, other=0).to(tl.int32)
        row = centroids_ptr + (((stage * heads + head) * num_centroids + chosen) * D)[:, None]  # [R, 1]
        centroid_a = tl.load(row + stored_a, mask=inside[:, None], other=0.0).to(tl.float32)
        centroid_b = tl.load(row + stored_b, mask=inside[:, None], other=0.0).to(tl.float32)
        if FP8:
            unit = tl.load(book_scales_ptr + stage * heads + head)
            centroid_a *= unit
            centroid_b *= unit
        first += centroid_a
        second += centroid_b
    if BALANCED:
        first *= balance_a
        second *= balance_b
    return first, second


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
    present = (row < stride)[:, None]
    codes_ptr = bytes_ptr + part + (first_row + tl.arange(0, R)[:, None]) * D
    # One head: its codes and factors are read once for all places. Several: the angles once for all heads.
    head_codes = codes_ptr + tl.cast(first_head * rows, tl.int64) * D
    if H == 1:
        bytes_a = tl.load(head_codes + stored_a, mask=present, other=0).to(tl.int32)  # [R, D/2]
        bytes_b = tl.load(head_codes + stored_b, mask=present, other=0).to(tl.int32)  # [R, D/2]
        balance_a = _balance(balance_ptr, first_head, stored_a, D, BALANCED)
        balance_b = _balance(balance_ptr, first_head, stored_b, D, BALANCED)
    for place in tl.static_range(8 // BITS):
        inside = (row < stride) & (row + place * stride < size)
        token = tile * TILE + row + place * stride
        cos, sin = _angles(
            cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, page, token, inside, frame_pairs, space_pairs,
            D, ROPE,
        )  # fmt: skip
        target = (page.to(tl.int64) * tokens + token) * stride_token
        if H == 1:
            first, second = _values(
                bytes_a, bytes_b, balance_a, balance_b, BITS * place, natural_a, natural_b, stored_a, stored_b, token,
                inside, first_head, scales_ptr, ids_ptr, centroids_ptr, book_scales_ptr, tokens, heads, num_centroids,
                D, B, BITS, TOP, STEP, STAGES, FP8, BALANCED, INTERLEAVED,
            )  # fmt: skip
            out = out_ptr + (target + tl.cast(first_head, tl.int64) * stride_head)[:, None]
            _turn_and_store(first, second, cos, sin, out, inside, D, ROPE, INTERLEAVED)
        else:
            for head in tl.range(first_head, tl.minimum(first_head + H, heads)):
                row_ptr = codes_ptr + tl.cast(head * rows, tl.int64) * D
                first, second = _values(
                    tl.load(row_ptr + stored_a, mask=present, other=0).to(tl.int32),
                    tl.load(row_ptr + stored_b, mask=present, other=0).to(tl.int32),
                    _balance(balance_ptr, head, stored_a, D, BALANCED),
                    _balance(balance_ptr, head, stored_b, D, BALANCED), BITS * place, natural_a, natural_b, stored_a,
                    stored_b, token, inside, head, scales_ptr, ids_ptr, centroids_ptr, book_scales_ptr, tokens, heads,
                    num_centroids, D, B, BITS, TOP, STEP, STAGES, FP8, BALANCED, INTERLEAVED,
                )  # fmt: skip
                out = out_ptr + (target + tl.cast(head, tl.int64) * stride_head)[:, None]
                _turn_and_store(first, second, cos, sin, out, inside, D, ROPE, INTERLEAVED)


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
        launch(
            _dense_kernel, (blocks * len(pages), heads),
            out, raw.view(layout.dtype), pages, *tables, part_offset, layout.tokens, heads, blocks, *pairs,
            out.stride(0), out.stride(1), D=dim, R=32, ROPE=rope is not None, INTERLEAVED=interleaved, UNIT=GRANULE,
            ITEM=layout.dtype.itemsize, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return
    offsets = {plane.name: plane.offset for plane in layout.planes + layout.codebook_planes}
    fp8 = codec.centroid_type is CentroidType.FP8
    rows = code_rows(layout.tokens, codec.grid.bits)
    shape = DECODE if rope is None else TURNED
    block, warps = (shape["R"], shape["num_warps"]) if dim <= 128 else (8, 4)
    blocks, together = cdiv(rows, block), min(shape["H"], heads)
    launch(
        _decode_kernel, (blocks * len(pages), cdiv(heads, together)),
        out, raw, raw.view(torch.float8_e4m3fn), raw.view(torch.bfloat16), raw.view(torch.float32), pages, codebooks,
        *tables, part_offset, codebook_part_offset, offsets["scales"], offsets.get("ids", 0),
        offsets.get("centroid_scales", 0), offsets.get("balance", 0), layout.tokens, heads, layout.num_centroids, rows,
        blocks, *pairs, out.stride(0), out.stride(1), D=dim, B=codec.block_size, R=block, H=together,
        BITS=codec.grid.bits, TILE=TILE_TOKENS, TOP=codec.grid.max_level, STEP=codec.grid.step, STAGES=codec.stages,
        FP8=fp8 and codec.stages > 0, BALANCED=codec.balanced, SPLIT=layout.split_pairs, ROPE=rope is not None,
        INTERLEAVED=interleaved, UNIT=GRANULE, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
