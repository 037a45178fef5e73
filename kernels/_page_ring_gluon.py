"""2-bit pages decoded into a ring of tiles in shared memory, by warps that do nothing else; for Gluon kernels (sm_90).

A tile is 16 code rows of a page, whose bytes hold four tokens each: token ``16 * place + row`` of a tile is in bits
``2 * place`` of a row. Everything that the next tile of keys and values takes is asked for before this one is decoded,
because a warp waits for all of its loads at once. A head's codebooks lie in shared memory, too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

__all__ = [
    "CENTROIDS", "MARK", "TILE_TOKENS", "UNIT", "advance", "decode_pages_into", "fetch_codebooks", "page_tiles",
    "tile_tokens", "turn", "wait_for_codebooks",
]  # fmt: skip

UNIT = gl.constexpr(256)
STRIPE = gl.constexpr(256)
"""Tokens of whole code rows that follow one another: those of a byte are a quarter of this apart."""
ROWS = gl.constexpr(16)
TILE_TOKENS = gl.constexpr(64)
CENTROIDS = gl.constexpr(256)
"""Rows that a codebook has at most: ids are bytes."""
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since

TWICE = gl.constexpr("""{
.reg .b32 t, power;
mov.b32 power, 0x7B807B80;
mul.lo.u32 t, $1, 0x00100010;
mul.rn.bf16x2 $0, t, power;
}""")
"""A float8 that is not negative as two equal bfloat16: its bits, moved into place, times 2^120."""
MARK = gl.constexpr(0x51564751)
MARKED = gl.constexpr("""{
.reg .pred elsewhere;
.reg .b32 word;
mov.u32 $0, global_smem;
ld.shared.b32 word, [$0];
setp.ne.b32 elsewhere, word, $1;
@elsewhere trap;
}""")
"""Where shared memory starts, if the mark lies there; otherwise the launch fails."""
START = gl.constexpr("mov.u32 $0, global_smem;\nadd.u32 $0, $0, $1;")
COPY = gl.constexpr("cp.async.cg.shared.global [$1], [$2], 16;\nmov.u32 $0, $1;")
COPIED = gl.constexpr("cp.async.wait_all;\nmov.u32 $0, $1;")


@gluon.jit
def _decode(codes, scale, at, turned, STEP: gl.constexpr, OFFSET: gl.constexpr, BYTES: gl.constexpr):
    """Eight channels each, rounded once ``[4, ROWS, 8, 8]``.

    A level is ``128 + step * code``, a bfloat16 by its bits, less 128 - offset.
    """
    BITS: gl.constexpr = 0xC300 | -OFFSET
    MASK: gl.constexpr = 0x03030303 * STEP
    LEVELS: gl.constexpr = f"""{{
.reg .b32 t, u, x, base, low, high, a, b, c, d;
mov.b32 base, {BITS << 16 | BITS};
mov.b64 {{low, high}}, $8;
ld.shared.v4.b32 {{a, b, c, d}}, [$10+{BYTES}];
shf.r.wrap.b32 t, low, low, $11;
shf.r.wrap.b32 u, high, high, $11;
and.b32 t, t, {MASK};
and.b32 u, u, {MASK};
prmt.b32 x, t, 0x43434343, 0x4140;
add.rn.bf16x2 x, x, base;
fma.rn.bf16x2 x, x, $9, a;
mov.b32 {{$0, $1}}, x;
prmt.b32 x, t, 0x43434343, 0x4342;
add.rn.bf16x2 x, x, base;
fma.rn.bf16x2 x, x, $9, b;
mov.b32 {{$2, $3}}, x;
prmt.b32 x, u, 0x43434343, 0x4140;
add.rn.bf16x2 x, x, base;
fma.rn.bf16x2 x, x, $9, c;
mov.b32 {{$4, $5}}, x;
prmt.b32 x, u, 0x43434343, 0x4342;
add.rn.bf16x2 x, x, base;
fma.rn.bf16x2 x, x, $9, d;
mov.b32 {{$6, $7}}, x;
}}"""
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        LEVELS, "=h,=h,=h,=h,=h,=h,=h,=h,l,r,r,r", [codes, scale, at, turned],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=False, pack=1,
    )  # fmt: skip
    even = gl.join(gl.join(a, e), gl.join(c, g))
    odd = gl.join(gl.join(b, f), gl.join(d, h))
    return gl.reshape(gl.join(even, odd), [4, ROWS, 8, 8])


@gluon.jit
def page_tiles(tokens):
    """Tiles of a page."""
    return tokens // STRIPE * 4 + ((tokens % STRIPE + 3) // 4 + ROWS - 1) // ROWS


@gluon.jit
def advance(entry, tile, more, per_page):
    """Entry and tile of its page after this one; this one if there are no `more`."""
    over = tile + 1 == per_page
    step = (more & over).to(gl.int32)
    return entry + step, gl.where(more, gl.where(over, 0, tile + 1), tile)


@gluon.jit
def turn(slot, phase, by: gl.constexpr, STAGES: gl.constexpr):
    """The slot `by` after this one, and the phase of its barriers."""
    for _ in gl.static_range(by):
        last = slot == STAGES - 1
        slot, phase = gl.where(last, 0, slot + 1), phase ^ last.to(gl.int32)
    return slot, phase


@gluon.jit
def tile_tokens(tile, tokens, place, row):
    """Where the codes of a tile's tokens are: row of the page and token; row of the stripe, and that of all it has."""
    before = tile // 4 * STRIPE
    left = gl.minimum(tokens - before, STRIPE)
    stride = (left + 3) // 4
    inside = tile % 4 * ROWS + row
    return before // 4 + inside, before + place * stride + inside, inside, stride


@gluon.jit
def _fetch(to, source, count):
    """Copy `count` times 16 bytes to shared memory."""
    EACH: gl.constexpr = 32 * gl.num_warps()
    line = gl.arange(0, EACH, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for first in range(0, count, EACH):
        place = gl.minimum(first + line, count - 1)
        given = [to + place * 16, (source + place * 2).to(gl.int64)]
        gl.inline_asm_elementwise(COPY, "=r,r,l", given, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch_codebooks(key_book, value_book, key_part, value_part, HEAD_DIM: gl.constexpr):
    """Copy a head's centroids to where shared memory starts, ``[2, CENTROIDS, HEAD_DIM]`` bfloat16.

    The first word there is `MARK`: rows are read by address, and Gluon does not tell that of a buffer.
    """
    thread_barrier()
    start = gl.inline_asm_elementwise(MARKED, "=r,r", [MARK], dtype=gl.int32, is_pure=False, pack=1)
    thread_barrier()
    _fetch(start, key_book, key_part.num_centroids * (HEAD_DIM // 8))
    _fetch(start + CENTROIDS * HEAD_DIM * 2, value_book, value_part.num_centroids * (HEAD_DIM // 8))


@gluon.jit
def wait_for_codebooks():
    nothing = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0])) * 0
    gl.inline_asm_elementwise(COPIED, "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1)
    thread_barrier()


@gluon.jit
def _load(buffer, page, tile, head, tokens, part, HEAD_DIM: gl.constexpr, LIKE: gl.constexpr):
    """Codes of both halves of the channels, eight a word ``[rows, 8]``; ids and both scales ``[places, rows]``.

    Past the end of the page, those of the last row or token.
    """
    FLAT: gl.constexpr = gl.SliceLayout(0, LIKE)
    PLACED: gl.constexpr = gl.SliceLayout(2, LIKE)
    start = buffer + page.to(gl.int64) * UNIT
    place = gl.arange(0, 4, gl.SliceLayout(1, PLACED))[:, None]
    row, _, inside, stride = tile_tokens(tile, tokens, 0, gl.arange(0, ROWS, gl.SliceLayout(1, FLAT)))
    row -= gl.maximum(inside - stride + 1, 0)
    plane = (start + part.codes).to(gl.pointer_type(gl.int64)) + head * part.rows * (HEAD_DIM // 8)
    chunk = gl.arange(0, 8, gl.SliceLayout(0, FLAT))
    codes = plane + ((row * (HEAD_DIM // 8))[:, None] + chunk[None, :])
    row = gl.arange(0, ROWS, gl.SliceLayout(0, PLACED))[None, :]
    _, token, _, _ = tile_tokens(tile, tokens, place, row)
    token = gl.minimum(token, tokens - 1)
    scales = start + (part.scales + head * 2 * tokens) + token
    ids = gl.load(start + (part.ids + head * tokens) + token)
    return gl.load(codes), gl.load(codes + 8), ids, gl.load(scales), gl.load(scales + tokens)


@gluon.jit
def _half(codes, scale, at, STEP: gl.constexpr, OFFSET: gl.constexpr, BYTES: gl.constexpr, LIKE: gl.constexpr):
    """Half of the channels of a tile ``[places, rows, 8, 8]``."""
    nothing = at * 0
    bits = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, LIKE))) * 2 - (STEP - 1)
    twice = gl.inline_asm_elementwise(TWICE, "=r,r", [scale.to(gl.int32)], dtype=gl.int32, is_pure=True, pack=1)
    return _decode(
        codes[None, :, :] + nothing.to(gl.int64), twice[:, :, None] + nothing, at, bits[:, None, None] + nothing,
        STEP, OFFSET, BYTES,
    )  # fmt: skip


@gluon.jit
def _store(tile, loaded, book, STEP: gl.constexpr, OFFSET: gl.constexpr, HEAD_DIM: gl.constexpr, LIKE: gl.constexpr):
    """Decode a tile into shared memory, without balance; `book` is the codebook's address there."""
    codes, codes_2, ids, scale, scale_2 = loaded
    chunk = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LIKE)))
    at = (ids.to(gl.int32) * (HEAD_DIM * 2))[:, :, None] + (book + chunk * 16)[None, None, :]
    low = _half(codes, scale, at, STEP, OFFSET, 0, LIKE)
    high = _half(codes_2, scale_2, at, STEP, OFFSET, HEAD_DIM, LIKE)
    tile.store(gl.reshape(gl.permute(gl.join(low, high), (0, 1, 4, 2, 3)), [TILE_TOKENS, HEAD_DIM]))


@gluon.jit
def decode_pages_into(
    ring, history, FIRST: gl.constexpr, EACH: gl.constexpr, KEY: gl.constexpr, VALUE: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Decode tile `FIRST` of keys and of values, and every `EACH`-th after it.

    Args:
        ring: ``[STAGES, TILE_TOKENS, HEAD_DIM]`` bfloat16 in shared memory, written without balance: keys, values, keys
            and so on; barriers ``[STAGES]`` at which this arrives when a tile is ready; those that it waits for before.
        history: the pool, ids of pages that share a codebook, first tile of the first of them, tiles (at least one),
            KV head, tokens of a page, bytes of the planes of keys and of values.
    """
    tiles, ready, free = ring
    buffer, pages, begin, count, head, tokens, key_part, value_part = history
    LIKE: gl.constexpr = gl.BlockedLayout([4, 1, 1], [1, 4, 8], [1, 4, 1], [2, 1, 0])
    keys_at = gl.inline_asm_elementwise(START, "=r,r", [0], dtype=gl.int32, is_pure=True, pack=1)
    values_at = keys_at + CENTROIDS * HEAD_DIM * 2
    per_page = page_tiles(tokens)
    entry, tile, slot, phase = 0, begin, 0, 1
    for _ in gl.static_range(FIRST):
        entry, tile = advance(entry, tile, count > FIRST, per_page)
        slot, phase = turn(slot, phase, 2, STAGES)
    page = gl.load(pages + entry)
    keys = _load(buffer, page, tile, head, tokens, key_part, HEAD_DIM, LIKE)
    values = _load(buffer, page, tile, head, tokens, value_part, HEAD_DIM, LIKE)
    for _ in gl.static_range(EACH):
        entry, tile = advance(entry, tile, count > FIRST + EACH, per_page)
    page = gl.load(pages + entry)
    for i in range(FIRST, count, EACH):
        next_keys = _load(buffer, page, tile, head, tokens, key_part, HEAD_DIM, LIKE)
        next_values = _load(buffer, page, tile, head, tokens, value_part, HEAD_DIM, LIKE)
        for _ in gl.static_range(EACH):
            entry, tile = advance(entry, tile, i + 2 * EACH < count, per_page)
        page = gl.load(pages + entry)
        mbarrier.wait(free.index(slot), phase)
        _store(tiles.index(slot), keys, keys_at, KEY.step, KEY.offset, HEAD_DIM, LIKE)
        fence_async_shared()
        mbarrier.arrive(ready.index(slot), count=1)
        slot, phase = turn(slot, phase, 1, STAGES)
        mbarrier.wait(free.index(slot), phase)
        _store(tiles.index(slot), values, values_at, VALUE.step, VALUE.offset, HEAD_DIM, LIKE)
        fence_async_shared()
        mbarrier.arrive(ready.index(slot), count=1)
        slot, phase = turn(slot, phase, 2 * EACH - 1, STAGES)
        keys, values = next_keys, next_values
