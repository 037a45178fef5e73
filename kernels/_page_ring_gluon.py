"""2-bit pages decoded into rings of tiles in shared memory, by warps that do nothing else; for Gluon kernels (sm_90).

A tile is decoded in halves: what follows the next half is asked for when one is decoded, and ids another one before, so
that no warp waits for a centroid row. A reader frees a tile when its products are done.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

__all__ = ["UNIT", "advance", "decode_pages_into"]

UNIT = gl.constexpr(256)
TILE = gl.constexpr(256)

TWICE = gl.constexpr("""{
.reg .b32 t, power;
mov.b32 power, 0x7B807B80;
mul.lo.u32 t, $1, 0x00100010;
mul.rn.bf16x2 $0, t, power;
}""")
"""A float8 that is not negative as two equal bfloat16: its bits, moved into place, times 2^120."""


@gluon.jit
def _decode(codes, scale, centroid, turn, STEP: gl.constexpr, OFFSET: gl.constexpr):
    """Four channels each, rounded once: a level is ``128 + step * code``, a bfloat16 by its bits, less 128 - offset."""
    BITS: gl.constexpr = 0xC300 | -OFFSET
    MASK: gl.constexpr = 0x03030303 * STEP
    LEVELS: gl.constexpr = f"""{{
.reg .b32 t, low, high, base, a, b;
mov.b32 base, {BITS << 16 | BITS};
mov.b64 {{a, b}}, $6;
shf.r.wrap.b32 t, $4, $4, $7;
and.b32 t, t, {MASK};
prmt.b32 low, t, 0x43434343, 0x4140;
prmt.b32 high, t, 0x43434343, 0x4342;
add.rn.bf16x2 low, low, base;
add.rn.bf16x2 high, high, base;
fma.rn.bf16x2 low, low, $5, a;
fma.rn.bf16x2 high, high, $5, b;
mov.b32 {{$0, $1}}, low;
mov.b32 {{$2, $3}}, high;
}}"""
    return gl.inline_asm_elementwise(
        LEVELS, "=h,=h,=h,=h,r,r,l,r", [codes, scale, centroid, turn],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _panel(codes, scale, centroid, turn, STEP: gl.constexpr, OFFSET: gl.constexpr, S: gl.constexpr, LIKE: gl.constexpr):
    """Decoded 64 channels of `S` tokens ``[S, 64]`` bfloat16, without balance."""
    zeros = gl.zeros([S, 16], gl.int32, LIKE)
    twice = gl.inline_asm_elementwise(TWICE, "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1)
    a, b, c, d = _decode(codes, twice[:, None] + zeros, centroid, turn[:, None] + zeros, STEP, OFFSET)
    pairs = gl.join(gl.join(a, c), gl.join(b, d))  # [S, words, 2 (high), 2 (odd)]
    return gl.reshape(pairs, [S, 64])


@gluon.jit
def advance(entry, first, more, tokens, N: gl.constexpr):
    """Entry and first token of the next tile; of this one if there are no `more`."""
    over = first + N >= tokens
    step = (more & over).to(gl.int32)
    return entry + step, gl.where(more, gl.where(over, 0, first + N), first)


@gluon.jit
def _tokens(first, tokens, S: gl.constexpr, LIKE: gl.constexpr):
    """`S` tokens; past the end of the page, its last one."""
    return gl.minimum(first + gl.arange(0, S, gl.SliceLayout(1, LIKE)), tokens - 1)


@gluon.jit
def _place(first, tokens, S: gl.constexpr, LIKE: gl.constexpr):
    """Tokens, their code rows and places in bytes."""
    token = _tokens(first, tokens, S, LIKE)
    tile = first // TILE
    inside = token - tile * TILE
    stride = (gl.minimum(tokens - tile * TILE, TILE) + 3) // 4
    place = (inside >= stride).to(gl.int32) + (inside >= 2 * stride).to(gl.int32) + (inside >= 3 * stride).to(gl.int32)
    return token, tile * 64 + inside - place * stride, place


@gluon.jit
def _load_ids(buffer, page, first, head, tokens, part, S: gl.constexpr, LIKE: gl.constexpr):
    start = buffer + (page.to(gl.int64) * UNIT + part.ids + head * tokens)
    return gl.load(start + _tokens(first, tokens, S, LIKE)).to(gl.int32)


@gluon.jit
def _load_half(
    buffer, page, token, row, ids, centroids, head, tokens, part,
    CB: gl.constexpr, HEAD_DIM: gl.constexpr, LIKE: gl.constexpr,
):  # fmt: skip
    """Codes, four channels a word, scales, and centroid rows, four channels a word, of 64 channels; of the others."""
    WORDS: gl.constexpr = HEAD_DIM // 4
    word = gl.arange(0, 16, gl.SliceLayout(0, LIKE))
    start = buffer + page.to(gl.int64) * UNIT
    plane = (start + part.codes).to(gl.pointer_type(gl.int32)) + head * part.rows * WORDS
    at = (row * WORDS)[:, None] + word[None, :]
    codes = gl.load(plane + at)
    scales = start + (part.scales + head * (HEAD_DIM // CB) * tokens) + token
    scale = gl.load(scales).to(gl.int32)
    books = (ids * WORDS)[:, None] + word[None, :]
    rows = gl.load(centroids + books)
    return (
        codes, scale, rows,
        gl.load(plane + at + 16), gl.load(scales + tokens).to(gl.int32), gl.load(centroids + books + 16),
    )  # fmt: skip


@gluon.jit
def _store_half(tile, half, place, STEP: gl.constexpr, OFFSET: gl.constexpr, S: gl.constexpr, LIKE: gl.constexpr):
    codes, scale, rows, codes_2, scale_2, rows_2 = half
    turn = place * 2 - (STEP - 1)
    tile.slice(0, 64, dim=1).store(_panel(codes, scale, rows, turn, STEP, OFFSET, S, LIKE))
    tile.slice(64, 64, dim=1).store(_panel(codes_2, scale_2, rows_2, turn, STEP, OFFSET, S, LIKE))


@gluon.jit
def decode_pages_into(
    key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
    buffer, pages, key_book, value_book, begin, count, head, tokens, key_part, value_part,
    KEY_STEP: gl.constexpr, KEY_OFFSET: gl.constexpr, VALUE_STEP: gl.constexpr, VALUE_OFFSET: gl.constexpr,
    HEAD_DIM: gl.constexpr, CB: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Decode `count` tiles of `N` tokens of keys and of values, from tile `begin` of the first of `pages` on.

    Args:
        key_tiles: ``[STAGES, N, HEAD_DIM]`` bfloat16 in shared memory, without balance; `value_tiles` likewise.
        key_ready: barriers ``[STAGES]`` at which this arrives once per tile; `value_ready` likewise.
        key_free: barriers ``[STAGES]`` that this waits for before it writes a tile again; `value_free` likewise.
        buffer: the pool.
        pages: ids of pages that share a codebook.
        key_book: the head's centroids of keys, four channels a word; `value_book` those of values.
        begin: first tile.
        count: tiles, at least one.
        head: KV head.
        tokens: tokens of a page.
        key_part: bytes of the keys' planes; `value_part` those of the values.
    """
    S: gl.constexpr = N // 2
    LIKE: gl.constexpr = gl.BlockedLayout([S // (4 * WARPS), 2], [4, 8], [WARPS, 1], [1, 0])
    entry, first = 0, begin * N
    page = gl.load(pages)
    token, row, place_a = _place(first, tokens, S, LIKE)
    token_b, row_b, place_b = _place(first + S, tokens, S, LIKE)
    ids = _load_ids(buffer, page, first, head, tokens, key_part, S, LIKE)
    a = _load_half(buffer, page, token, row, ids, key_book, head, tokens, key_part, CB, HEAD_DIM, LIKE)
    ids = _load_ids(buffer, page, first + S, head, tokens, key_part, S, LIKE)
    b = _load_half(buffer, page, token_b, row_b, ids, key_book, head, tokens, key_part, CB, HEAD_DIM, LIKE)
    ids_a = _load_ids(buffer, page, first, head, tokens, value_part, S, LIKE)
    ids_b = _load_ids(buffer, page, first + S, head, tokens, value_part, S, LIKE)
    for i in range(count):
        stage = i % STAGES
        free = (i // STAGES + 1) & 1
        next_entry, next_first = advance(entry, first, i + 1 < count, tokens, N)
        next_page = gl.load(pages + next_entry)
        mbarrier.wait(key_free.index(stage), free)
        tile = key_tiles.index(stage)
        _store_half(tile.slice(0, S), a, place_a, KEY_STEP, KEY_OFFSET, S, LIKE)
        token, row, place_a = _place(first, tokens, S, LIKE)
        a = _load_half(buffer, page, token, row, ids_a, value_book, head, tokens, value_part, CB, HEAD_DIM, LIKE)
        ids_a = _load_ids(buffer, next_page, next_first, head, tokens, key_part, S, LIKE)
        _store_half(tile.slice(S, S), b, place_b, KEY_STEP, KEY_OFFSET, S, LIKE)
        fence_async_shared()
        mbarrier.arrive(key_ready.index(stage), count=1)
        token, row, place_b = _place(first + S, tokens, S, LIKE)
        b = _load_half(buffer, page, token, row, ids_b, value_book, head, tokens, value_part, CB, HEAD_DIM, LIKE)
        ids_b = _load_ids(buffer, next_page, next_first + S, head, tokens, key_part, S, LIKE)
        mbarrier.wait(value_free.index(stage), free)
        tile = value_tiles.index(stage)
        _store_half(tile.slice(0, S), a, place_a, VALUE_STEP, VALUE_OFFSET, S, LIKE)
        token, row, place_a = _place(next_first, tokens, S, LIKE)
        a = _load_half(buffer, next_page, token, row, ids_a, key_book, head, tokens, key_part, CB, HEAD_DIM, LIKE)
        ids_a = _load_ids(buffer, next_page, next_first, head, tokens, value_part, S, LIKE)
        _store_half(tile.slice(S, S), b, place_b, VALUE_STEP, VALUE_OFFSET, S, LIKE)
        fence_async_shared()
        mbarrier.arrive(value_ready.index(stage), count=1)
        token, row, place_b = _place(next_first + S, tokens, S, LIKE)
        b = _load_half(buffer, next_page, token, row, ids_b, key_book, head, tokens, key_part, CB, HEAD_DIM, LIKE)
        ids_b = _load_ids(buffer, next_page, next_first + S, head, tokens, value_part, S, LIKE)
        entry, first, page = next_entry, next_first, next_page
