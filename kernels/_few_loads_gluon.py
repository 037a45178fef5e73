"""What a group of 64 tokens of a 2-bit page consists of, loaded as words for Gluon kernels of one warp.

A group is 16 code rows of a page. All loads of a group are independent of each other, so that they can be asked for
long before they are needed. Where a page is not whole, rows past its end are those of other tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qvg_paged.kernels._few_operands_gluon import BLOCK, KEYS, PAIRS, WORDS

__all__ = ["TILE", "load_keys", "load_values"]

TILE = gl.constexpr(256)


@gluon.jit
def _load_places(base, first, stride, inside, WHOLE: gl.constexpr):
    """A byte of each of 64 tokens, by place, four consecutive ones in a word."""
    if WHOLE:
        at = (base + first).to(gl.pointer_type(gl.int32)) + gl.arange(0, 4, WORDS)
        words = (gl.load(at), gl.load(at + 16), gl.load(at + 32), gl.load(at + 48))
    else:
        words = (
            _gather_words(base, first, stride, inside, 0), _gather_words(base, first, stride, inside, 1),
            _gather_words(base, first, stride, inside, 2), _gather_words(base, first, stride, inside, 3),
        )  # fmt: skip
    return words


@gluon.jit
def _gather_words(base, first, stride, inside, PLACE: gl.constexpr):
    words = gl.zeros([4], gl.int32, WORDS)
    row = gl.arange(0, 4, WORDS) * 4 + first
    for byte in gl.static_range(4):
        token = gl.minimum(gl.minimum(row + byte, stride - 1) + PLACE * stride, inside - 1)
        words |= gl.load(base + token).to(gl.int32) << (8 * byte)
    return words


@gluon.jit
def _load_tokens(buffer, page, part, head, tokens, tile, first, stride, inside, WHOLE: gl.constexpr,
                 BLOCKS: gl.constexpr):  # fmt: skip
    """Ids, and scales of the first and of the last block."""
    ids = buffer + (page + part.ids + head * tokens + tile * TILE)
    scales = buffer + (page + part.scales + head * BLOCKS * tokens + tile * TILE)
    known = _load_places(ids, first, stride, inside, WHOLE)
    scales_a = _load_places(scales, first, stride, inside, WHOLE)
    scales_b = scales_a
    if BLOCKS == 2:
        scales_b = _load_places(scales + tokens, first, stride, inside, WHOLE)
    return known, scales_a, scales_b


@gluon.jit
def _load_rows(codes, row, first, stride, WHOLE: gl.constexpr, BLOCKS: gl.constexpr, LAYOUT: gl.constexpr):
    """Words of the codes of the first and of the last block; read once by one program, so past the L1 cache."""
    LINE: gl.constexpr = BLOCKS * BLOCK // 4
    word = gl.arange(0, BLOCK // 4, gl.SliceLayout(0, LAYOUT))[None, :]
    if WHOLE:
        at = codes + first * LINE + (row[:, None] * LINE + word)
    else:
        at = codes + (gl.minimum(first + row, stride - 1)[:, None] * LINE + word)
    block_a = gl.load(at, cache_modifier=".cg")
    block_b = block_a
    if BLOCKS == 2:
        block_b = gl.load(at + BLOCK // 4, cache_modifier=".cg")
    return block_a, block_b


@gluon.jit
def _code_rows(buffer, page, part, head, tile, BLOCKS: gl.constexpr):
    codes = buffer + (page + part.codes + (head * part.rows + tile * 64) * (BLOCKS * BLOCK))
    return codes.to(gl.pointer_type(gl.int32))


@gluon.jit
def _load_keys(buffer, page, part, head, tokens, tile, first, inside, WHOLE: gl.constexpr, BLOCKS: gl.constexpr):
    stride = (inside + 3) // 4
    place = gl.arange(0, 16, gl.SliceLayout(1, KEYS))
    codes = _code_rows(buffer, page, part, head, tile, BLOCKS)
    row = place // 2 % 4 * 4 + place // 8 * 2 + place % 2
    codes_a, codes_b = _load_rows(codes, row, first, stride, WHOLE, BLOCKS, KEYS)
    ids, scales_a, scales_b = _load_tokens(
        buffer, page, part, head, tokens, tile, first, stride, inside, WHOLE, BLOCKS
    )  # fmt: skip
    return codes_a, codes_b, ids, scales_a, scales_b


@gluon.jit
def _load_values(buffer, page, part, head, tokens, tile, first, inside, WHOLE: gl.constexpr, BLOCKS: gl.constexpr):
    stride = (inside + 3) // 4
    pair = gl.arange(0, 8, gl.SliceLayout(1, PAIRS))
    codes = _code_rows(buffer, page, part, head, tile, BLOCKS)
    row = pair % 4 * 4 + pair // 4 * 2
    even_a, even_b = _load_rows(codes, row, first, stride, WHOLE, BLOCKS, PAIRS)
    odd_a, odd_b = _load_rows(codes, row + 1, first, stride, WHOLE, BLOCKS, PAIRS)
    ids, scales_a, scales_b = _load_tokens(
        buffer, page, part, head, tokens, tile, first, stride, inside, WHOLE, BLOCKS
    )  # fmt: skip
    return even_a, even_b, odd_a, odd_b, ids, scales_a, scales_b


@gluon.jit
def load_keys(buffer, page, part, head, tokens, group, ALIGNED: gl.constexpr, BLOCKS: gl.constexpr):
    """Codes of the keys of a group by block, their ids and their scales by block."""
    tile, first = group // 4, group % 4 * 16
    inside = gl.minimum(tokens - tile * TILE, TILE)
    if ALIGNED and inside == TILE:
        codes_a, codes_b, ids, scales_a, scales_b = _load_keys(
            buffer, page, part, head, tokens, tile, first, inside, True, BLOCKS
        )
    else:
        codes_a, codes_b, ids, scales_a, scales_b = _load_keys(
            buffer, page, part, head, tokens, tile, first, inside, False, BLOCKS
        )
    return codes_a, codes_b, ids, scales_a, scales_b


@gluon.jit
def load_values(buffer, page, part, head, tokens, group, ALIGNED: gl.constexpr, BLOCKS: gl.constexpr):
    """Codes of the values of a group, even and odd rows by block, their ids and their scales by block."""
    tile, first = group // 4, group % 4 * 16
    inside = gl.minimum(tokens - tile * TILE, TILE)
    if ALIGNED and inside == TILE:
        even_a, even_b, odd_a, odd_b, ids, scales_a, scales_b = _load_values(
            buffer, page, part, head, tokens, tile, first, inside, True, BLOCKS
        )
    else:
        even_a, even_b, odd_a, odd_b, ids, scales_a, scales_b = _load_values(
            buffer, page, part, head, tokens, tile, first, inside, False, BLOCKS
        )
    return even_a, even_b, odd_a, odd_b, ids, scales_a, scales_b
