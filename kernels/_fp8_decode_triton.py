"""Triton kernels that decode quantised pages into an FP8 scratch: keys ``[problem, key, channel]``, values transposed.

A problem is a KV head of a sequence. The four codes of a byte are neighbouring positions, so that a column of values
is written in words; keys go to the rows that `_fp8_attention_triton` pairs with those positions. Stored = value / unit,
which follows from the bounds of `_fp8_bounds_triton`.
"""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._fp8_bounds_triton import read_unit
from qvg_paged.kernels._page_tiles import part_bytes, part_code
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE, TILE_TOKENS, PartLayout
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["decode_part"]

ROWS = {"keys": (16, 4), "turned": (32, 4), "values": (16, 2)}
"""Rows of codes that a program decodes, for heads of up to 128 channels, and its warps."""
UNIT = tl.constexpr(GRANULE)
TILE = tl.constexpr(TILE_TOKENS)
ANYWHERE = ["pages", "codebooks", "first_token", "pages_each", "tokens"]
"""Whatever changes with the length of a history must not decide what is compiled."""


@triton.jit
def _channels(HALF: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr):
    """Natural and stored channel of the first (`HALF` 0) or second (1) member of every pair, or of all channels (2)."""
    if HALF == 2:
        stored = tl.arange(0, D)
        natural = stored // (D // 2) + 2 * (stored % (D // 2)) if SPLIT else stored
    else:
        pair = tl.arange(0, D // 2)
        natural = 2 * pair + HALF if INTERLEAVED else pair + HALF * (D // 2)
        if SPLIT and INTERLEAVED:
            stored = pair + HALF * (D // 2)
        else:
            stored = natural // 2 + natural % 2 * (D // 2) if SPLIT else natural
    return natural, stored


@triton.jit
def _levels(
    packed, buffer, page, book, head, token, inside, natural, stored, factors, tokens, heads, part,
    CODE: tl.constexpr, D: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """Values of some tokens, ``[rows, channels]`` float32, in stored units."""
    # A code in the mantissa of 2 ** 22, where half levels are numbers: no conversion, and the offset costs nothing.
    shift: tl.constexpr = 0 if PLACE == 0 else CODE.bits * PLACE - 1
    bits = packed.to(tl.int32) << 1 if PLACE == 0 else packed.to(tl.int32) >> shift
    code = ((bits & (((1 << CODE.bits) - 1) << 1)) | 0x4A800000).to(tl.float32, bitcast=True)
    level = code - (4194304.0 - CODE.offset / CODE.step)  # the level in steps
    scales = (buffer + (page + part.scales)).to(tl.pointer_type(tl.float8e4nv))
    blocks: tl.constexpr = D // CODE.block
    if blocks <= 2:
        at = scales + head * blocks * tokens + token
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
        if blocks == 2:
            second = tl.load(at + tokens, mask=inside, other=0.0).to(tl.float32)[:, None]
            scale = tl.where((natural < CODE.block)[None, :], scale, second)
    else:
        at = (head * blocks + natural // CODE.block)[None, :] * tokens + token[:, None]
        scale = tl.load(scales + at, mask=inside[:, None], other=0.0).to(tl.float32)
    value = level * (scale * CODE.step)
    stages: tl.constexpr = CODE.stages
    for stage in tl.static_range(stages):
        chosen = tl.load(
            buffer + (page + part.ids) + (head * CODE.stages + stage) * tokens + token, mask=inside, other=0
        )
        row = (chosen.to(tl.int32) + (stage * heads + head) * part.num_centroids)[:, None] * D + stored[None, :]
        if CODE.fp8_centroids:
            table = (buffer + (book + part.centroids)).to(tl.pointer_type(tl.float8e4nv))
            unit = tl.load(
                (buffer + (book + part.centroid_scales)).to(tl.pointer_type(tl.float32)) + stage * heads + head
            )
            value += tl.load(table + row, mask=inside[:, None], other=0.0).to(tl.float32) * unit
        else:
            table = (buffer + (book + part.centroids)).to(tl.pointer_type(tl.bfloat16))
            value += tl.load(table + row, mask=inside[:, None], other=0.0).to(tl.float32)
    return value * factors[None, :]


@triton.jit
def _factors(
    buffer, book, head, stored, inverse, part, CODE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    factors = tl.full(stored.shape, 1.0, tl.float32) * inverse
    if CODE.balanced:
        start = (buffer + (book + part.balance)).to(tl.pointer_type(tl.bfloat16))
        factors *= tl.load(start + head * D + stored).to(tl.float32)
    return factors


@triton.jit
def _key_row(position):
    """Row of keys that is paired with a position of values: 4t + 2j + e within 16 becomes 8j + 2t + e."""
    return (position & -16) | ((position & 2) << 2) | ((position & 12) >> 1) | (position & 1)


@triton.jit(do_not_specialize=ANYWHERE)
def _decode_kernel(  # noqa: PLR0915 - one pass whose tiles stay in registers
    out, words, bounds, buffer, pages, codebooks, cos_frame, sin_frame, cos_space, sin_space, first_token, pages_each,
    tokens, heads, pitch, row_blocks, part,
    CODE: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Some rows of the codes of one page and head; `PART` 0 writes keys, 1 writes transposed values."""
    index, head = tl.program_id(0) // row_blocks, tl.program_id(1)
    first_row = tl.program_id(0) % row_blocks * R
    page, book = (tl.load(pages + index).to(tl.int64) * UNIT), (tl.load(codebooks + index).to(tl.int64) * UNIT)
    problem = (index // pages_each * heads + head).to(tl.int64)
    inverse = 1.0 / read_unit(bounds, problem, PART)
    per_byte: tl.constexpr = 8 // CODE.bits
    tile = first_row // (TILE // per_byte)
    size = tl.minimum(tokens - tile * TILE, TILE)
    stride = (size + per_byte - 1) // per_byte
    row = first_row % (TILE // per_byte) + tl.arange(0, R)  # [R]
    start = first_token + index % pages_each * tokens + tile * TILE
    codes = buffer + (page + part.codes) + ((head * part.rows + first_row + tl.arange(0, R)) * D)[:, None]
    live = (row < stride)[:, None]

    half: tl.constexpr = 0 if ROPE else 2
    natural, stored = _channels(half, D, INTERLEAVED, CODE.split)
    factors = _factors(buffer, book, head, stored, inverse, part, CODE, D)
    packed = tl.load(codes + stored[None, :], mask=live, other=0)
    if ROPE:
        natural_b, stored_b = _channels(1, D, INTERLEAVED, CODE.split)
        factors_b = _factors(buffer, book, head, stored_b, inverse, part, CODE, D)
        packed_b = tl.load(codes + stored_b[None, :], mask=live, other=0)
        moved = index * (D // 2) + tl.arange(0, D // 2)[None, :]
        moved_cos, moved_sin = tl.load(cos_frame + moved).to(tl.float32), tl.load(sin_frame + moved).to(tl.float32)

    base = out + problem * pitch * D
    element: tl.constexpr = out.dtype.element_ty
    bits: tl.constexpr = element.primitive_bitwidth
    word = tl.zeros(packed.shape, tl.int64 if bits * per_byte > 32 else tl.int32)
    for place in tl.static_range(per_byte):
        inside = (row < stride) & (row + place * stride < size)
        token = tile * TILE + row + place * stride
        position = start + (row * per_byte + place if WORDS else row + place * stride)  # [R]
        value = _levels(
            packed, buffer, page, book, head, token, inside, natural, stored, factors, tokens, heads, part,
            CODE, D, place,
        )  # fmt: skip
        if PART == 0:
            target = base + _key_row(position).to(tl.int64)[:, None] * D
            if ROPE:
                second = _levels(
                    packed_b, buffer, page, book, head, token, inside, natural_b, stored_b, factors_b, tokens,
                    heads, part, CODE, D, place,
                )  # fmt: skip
                pair = tl.arange(0, D // 2)[None, :]
                turn = token[:, None] * (D // 2) + pair
                cos = tl.load(cos_space + turn, mask=inside[:, None], other=0.0).to(tl.float32) * moved_cos
                sin = tl.load(sin_space + turn, mask=inside[:, None], other=0.0).to(tl.float32) + moved_sin
                tl.store(target + pair, (value * cos - second * sin).to(element), mask=inside[:, None])
                tl.store(target + D // 2 + pair, (value * sin + second * cos).to(element), mask=inside[:, None])
            else:
                tl.store(target + tl.arange(0, D)[None, :], value.to(element), mask=inside[:, None])
        elif WORDS:
            byte = value.to(element).to(tl.uint8 if bits == 8 else tl.uint16, bitcast=True).to(word.dtype)
            word |= byte << (bits * place)
        else:
            target = base + tl.arange(0, D)[None, :] * pitch + position[:, None]
            tl.store(target, value.to(element), mask=inside[:, None])
    if WORDS and PART == 1:
        pitch_words = pitch // per_byte
        target = words + problem * pitch_words * D + tl.arange(0, D)[None, :] * pitch_words
        tl.store(target + (start // per_byte + row)[:, None], word.to(words.dtype.element_ty), mask=live)


def decode_part(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    offsets: tuple[int, int],
    bounds: torch.Tensor,
    out: torch.Tensor,
    first_token: int,
    transposed: bool,
    rope: RoPETables | None,
    rope_layout: RoPELayout,
) -> None:
    """Launch; arguments as in `qvg_paged.kernels.reference_fp8.decode_part`."""
    dim, heads = layout.head_dim, layout.heads
    code = part_code(layout)
    part = part_bytes(layout, *offsets)
    tables = (None,) * 4 if rope is None else rope.padded
    per_byte = 8 // code.bits
    rows, num_warps = ROWS["values" if transposed else "keys" if rope is None else "turned"]
    rows //= max(1, dim // 128)
    words = layout.tokens % per_byte == 0
    packed = out
    if transposed and words:
        packed = out.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[per_byte * out.itemsize])
    blocks = triton.cdiv(part.rows, rows)
    launch(
        _decode_kernel, (blocks * len(pages), heads),
        out, packed, bounds, buffer, pages, codebooks, *tables, first_token, len(pages) * heads // len(bounds),
        layout.tokens, heads, out.shape[2] if transposed else out.shape[1], blocks, part,
        CODE=code, PART=int(transposed), D=dim, R=rows, ROPE=rope is not None,
        INTERLEAVED=rope_layout is RoPELayout.INTERLEAVED, WORDS=words, num_warps=num_warps,
    )  # fmt: skip
