"""Triton launcher that quantises a residual and packs it straight into the pages.

One program owns some rows of the `codes` plane of one head of one frame. A row holds the same channels of
``8 / bits`` tokens, `stride` apart: the program quantises them one after the other and ORs their codes into place.
The arithmetic is that of `_blocks`, bit for bit (launched without contraction of products into sums).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._blocks import ERROR_BITS, PRODUCT_BITS, SEARCH_STEPS
from qvg_paged.kernels._kmeans_triton import check_power_of_two
from qvg_paged.kernels.formats import ScaleRule
from qvg_paged.kernels.layout import TILE_TOKENS, PartLayout, code_rows

__all__ = ["quantise_pack"]

RULES = {ScaleRule.ABSMAX: 0, ScaleRule.LEAST_SQUARES: 1, ScaleRule.SEARCH: 2}


@triton.jit
def fp8_value(byte):
    """Float32 value of a non-negative E4M3 byte (int32)."""
    normal = ((byte + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(byte < 8, byte.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _fp8_byte(x):
    """Nearest E4M3 byte (int32) of non-negative float32, ties to even, saturating: as the hardware, and portable."""
    x = tl.minimum(x, 448.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Adding 2**14 leaves multiples of 2**-9, the spacing of subnormals, in the last places of the significand.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def _codes(x, scale, TOP: tl.constexpr, STEP: tl.constexpr):
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0))
    inverse = tl.where(scale > 0, inverse, 0.0)
    if STEP == 2:
        return tl.minimum(tl.maximum(tl.floor(x * inverse * 0.5 + 2.0), 0.0), 3.0)
    size = tl.minimum(tl.where(scale > 0, tl.abs(x) * inverse, TOP), TOP)
    whole = tl.floor(size)
    whole += tl.where(size - whole >= 0.5, 1.0, 0.0)
    return tl.where(x < 0, -whole, whole) + TOP


@triton.jit
def _search(x, byte, unit, TOP: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr):
    best = byte
    best_error = tl.full(byte.shape, 2147483647, tl.int32)
    for step in range(STEPS):
        tried = tl.where(byte > step, byte - step, tl.minimum(byte, 1))
        scale = fp8_value(tried)
        error = (x - scale * (_codes(x, scale, TOP, STEP) * STEP - TOP)) * unit
        total = tl.sum((error * error * (1 << BITS)).to(tl.int32), 2, keep_dims=True)
        better = total < best_error
        best = tl.where(better, tried, best)
        best_error = tl.where(better, total, best_error)
    return best


@triton.jit
def _least_squares(x, byte, unit, absmax, TOP: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    level = (_codes(x, fp8_value(byte), TOP, STEP) * STEP - TOP).to(tl.int32)
    share = (x * unit * (1 << BITS)).to(tl.int32)
    product = tl.sum(share * level, 2, keep_dims=True).to(tl.float32)
    energy = tl.maximum(tl.sum(level * level, 2, keep_dims=True).to(tl.float32), 1.0)
    fitted = _fp8_byte(tl.div_rn(product * (absmax * (1.0 / (1 << BITS))), energy))
    return tl.where((byte > 0) & (fitted > 0), fitted, byte)


@triton.jit
def _quantise(x, inverse_top, TOP: tl.constexpr, STEP: tl.constexpr, RULE: tl.constexpr, STEPS: tl.constexpr,
              ERROR: tl.constexpr, PRODUCT: tl.constexpr):  # fmt: skip
    """Codes like `x` ``[rows, blocks, block_size]`` (float32) and scale bytes ``[rows, blocks, 1]`` (int32)."""
    absmax = tl.max(tl.abs(x), 2, keep_dims=True)
    byte = _fp8_byte(absmax * inverse_top)
    if RULE != 0:
        unit = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.where(byte > 0, absmax, 1.0))
        unit = tl.where(byte > 0, unit, 0.0)
        if RULE == 1:
            byte = _least_squares(x, byte, unit, absmax, TOP, STEP, PRODUCT)
        else:
            byte = _search(x, byte, unit, TOP, STEP, STEPS, ERROR)
    return _codes(x, fp8_value(byte), TOP, STEP), byte


@triton.jit(do_not_specialize=["heads", "first_head"])
def _pack_kernel(
    buffer_ptr,
    offsets_ptr,
    residual_ptr,
    ids_ptr,
    inverse_top,
    tokens,
    span_tokens,
    heads,
    first_head,
    rows,
    scales_offset,
    ids_offset,
    codes_end,
    scales_end,
    ids_end,
    part_end,
    D: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    TOP: tl.constexpr,
    STEP: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    ERROR: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    frame, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * R
    part = buffer_ptr + tl.load(offsets_ptr + frame)
    tile = first_row // (TILE * BITS // 8)
    size = tl.minimum(tokens - tile * TILE, TILE)
    stride = tl.cdiv(size * BITS, 8)
    row = first_row % (TILE * BITS // 8) + tl.arange(0, R)
    channel = tl.arange(0, D)
    block = tl.arange(0, D // B)
    plane_head = head + first_head
    packed = tl.zeros((R, D), tl.int32)
    for place in range(8 // BITS):
        inside = (row < stride) & (row + place * stride < size)
        token = tile * TILE + row + place * stride
        source = (head * span_tokens + frame * tokens + token).to(tl.int64)
        x = tl.load(residual_ptr + source[:, None] * D + channel, mask=inside[:, None], other=0.0)  # [R, D]
        blocks = tl.reshape(x.to(tl.float32), (R, D // B, B))
        codes, byte = _quantise(blocks, inverse_top, TOP, STEP, RULE, STEPS, ERROR, PRODUCT)
        codes = tl.where(inside[:, None], tl.reshape(codes, (R, D)).to(tl.int32), 0)
        packed |= codes << (BITS * place)
        scale_ptr = part + scales_offset + (plane_head * (D // B) + block) * tokens + token[:, None]
        tl.store(scale_ptr, tl.reshape(byte, (R, D // B)).to(tl.uint8), mask=inside[:, None])
        for stage in tl.static_range(STAGES):
            chosen = tl.load(ids_ptr + stage * heads * span_tokens + source, mask=inside, other=0)
            tl.store(part + ids_offset + (plane_head * STAGES + stage) * tokens + token, chosen, mask=inside)
    stored = (channel // 2) + (channel % 2) * (D // 2) if SPLIT else channel
    code_ptr = part + (plane_head * rows + first_row + tl.arange(0, R)[:, None]) * D + stored
    tl.store(code_ptr, packed.to(tl.uint8), mask=(row < stride)[:, None])
    if (first_row == 0) & (head == 0):
        gap = tl.arange(0, 16)
        zero = tl.zeros((16,), tl.uint8)
        tl.store(part + codes_end + gap, zero, mask=codes_end + gap < scales_offset)
        tl.store(part + scales_end + gap, zero, mask=scales_end + gap < ids_offset)
        tl.store(part + ids_end + gap, zero, mask=ids_end + gap < part_end)


def quantise_pack(
    residual: torch.Tensor,
    ids: torch.Tensor | None,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    first_head: int,
) -> None:
    """Quantise the residual of some heads into the pages; arguments as in the twin."""
    codec, dim, grid = layout.codec, layout.head_dim, layout.codec.grid
    check_power_of_two(dim)
    heads, span_tokens, _ = residual.shape
    planes = {plane.name: plane for plane in layout.planes}
    ends = {name: plane.offset + plane.nbytes for name, plane in planes.items()}
    ids_offset = planes["ids"].offset if "ids" in planes else layout.nbytes
    rows = code_rows(layout.tokens, grid.bits)
    block = 16 if dim <= 128 else 8
    offsets = torch.tensor(part_offsets, dtype=torch.int64).to(buffer.device, non_blocking=True)
    _pack_kernel[(triton.cdiv(rows, block), len(part_offsets), heads)](
        buffer, offsets, residual, residual if ids is None else ids.contiguous(),
        float((1.0 / torch.tensor(float(grid.max_level))).item()),
        layout.tokens, span_tokens, heads, first_head, rows,
        planes["scales"].offset, ids_offset, ends["codes"], ends["scales"], ends.get("ids", layout.nbytes),
        layout.nbytes, D=dim, B=codec.block_size, R=block, BITS=grid.bits, TILE=TILE_TOKENS, TOP=grid.max_level,
        STEP=grid.step, RULE=RULES[codec.scale_rule], STAGES=codec.stages, SPLIT=layout.split_pairs,
        STEPS=SEARCH_STEPS, ERROR=ERROR_BITS, PRODUCT=PRODUCT_BITS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
