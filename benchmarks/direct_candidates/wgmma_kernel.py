"""Attention of many query rows to 2-bit pages: a Gluon kernel for Hopper's asynchronous tensor cores (sm_90).

A program owns `M` query rows of one KV head and walks sub-tiles of `N` tokens. Keys and values are decoded into shared
memory, two buffers each, by the warps that also compute: the keys of the next sub-tile while the tensor cores take the
scores of this one, its values while they take the output. What decoding needs was asked for a whole sub-tile earlier,
and ids another one before, so that no warp waits for a centroid row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

__all__ = ["many_queries_kernel"]

UNIT = gl.constexpr(256)
TILE = gl.constexpr(256)
LN_2 = gl.constexpr(0.6931471805599453)


TWICE = gl.constexpr("""{
.reg .b16 x;
.reg .b32 p;
.reg .f32 f;
cvt.u16.u32 x, $1;
cvt.rn.f16x2.e4m3x2 p, x;
mov.b32 {x, _}, p;
cvt.f32.f16 f, x;
cvt.rn.bf16x2.f32 $0, f, f;
}""")
"""A float8 as two equal bfloat16."""


@gluon.jit
def _decode(codes, scale, centroid, shift, STEP: gl.constexpr, OFFSET: gl.constexpr):
    """Four channels each, rounded once: a level is ``128 + step * code``, a bfloat16 by its bits, less 128 - offset."""
    DOUBLE: gl.constexpr = "shl.b32 t, t, 1;" if STEP == 2 else ""
    BITS: gl.constexpr = 0xC300 | -OFFSET
    LEVELS: gl.constexpr = f"""{{
.reg .b32 t, low, high, base, a, b;
mov.b32 base, {BITS << 16 | BITS};
mov.b64 {{a, b}}, $6;
shr.u32 t, $4, $7;
and.b32 t, t, 0x03030303;
{DOUBLE}
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
        LEVELS, "=h,=h,=h,=h,r,r,l,r", [codes, scale, centroid, shift],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _advance(entry, first, more, tokens, N: gl.constexpr):
    """Entry and first token of the next sub-tile; of this one if there are no `more`."""
    over = first + N >= tokens
    step = (more & over).to(gl.int32)
    return entry + step, gl.where(more, gl.where(over, 0, first + N), first)


@gluon.jit
def _place(first, tokens, N: gl.constexpr, LIKE: gl.constexpr):
    """Tokens of a sub-tile (past the end of the page, its last one), their code rows and places in bytes."""
    token = gl.minimum(first + gl.arange(0, N, gl.SliceLayout(1, LIKE)), tokens - 1)
    tile = first // TILE
    inside = token - tile * TILE
    stride = (gl.minimum(tokens - tile * TILE, TILE) + 3) // 4
    place = (inside >= stride).to(gl.int32) + (inside >= 2 * stride).to(gl.int32) + (inside >= 3 * stride).to(gl.int32)
    return token, tile * 64 + inside - place * stride, place


@gluon.jit
def _load_ids(buffer, page, first, head, tokens, part, N: gl.constexpr, LIKE: gl.constexpr):
    token = gl.minimum(first + gl.arange(0, N, gl.SliceLayout(1, LIKE)), tokens - 1)
    return gl.load(buffer + (page.to(gl.int64) * UNIT + part.ids + head * tokens) + token).to(gl.int32)


@gluon.jit
def _load_part(
    buffer, page, first, ids, centroids, head, tokens, part,
    CB: gl.constexpr, HEAD_DIM: gl.constexpr, N: gl.constexpr, LIKE: gl.constexpr,
):  # fmt: skip
    """Codes of a sub-tile, four channels a word; scales; centroid rows, four channels a word."""
    token, row, _ = _place(first, tokens, N, LIKE)
    word = gl.arange(0, HEAD_DIM // 4, gl.SliceLayout(0, LIKE))
    start = page.to(gl.int64) * UNIT
    plane = (buffer + (start + part.codes)).to(gl.pointer_type(gl.int32)) + head * part.rows * (HEAD_DIM // 4)
    codes = gl.load(plane + (row * (HEAD_DIM // 4))[:, None] + word[None, :])
    BLOCKS: gl.constexpr = HEAD_DIM // CB
    scales = buffer + (start + part.scales + head * BLOCKS * tokens) + token
    scale = gl.load(scales).to(gl.int32)
    other = scale
    if BLOCKS == 2:
        other = gl.load(scales + tokens).to(gl.int32)
    rows = gl.load(centroids + (ids * (HEAD_DIM // 4))[:, None] + word[None, :])
    return codes, scale, other, rows


@gluon.jit
def _values(codes, scale, other, rows, first, tokens, CODE: gl.constexpr, CB: gl.constexpr, HEAD_DIM: gl.constexpr,
            N: gl.constexpr, LIKE: gl.constexpr):  # fmt: skip
    """Decoded sub-tile ``[N, head_dim]`` bfloat16, without balance."""
    _, _, place = _place(first, tokens, N, LIKE)
    zeros = gl.zeros([N, HEAD_DIM // 4], gl.int32, LIKE)
    scales = scale[:, None] + zeros
    if CB < HEAD_DIM:
        second = gl.arange(0, HEAD_DIM // 4, gl.SliceLayout(0, LIKE)) >= CB // 4
        scales = gl.where(second[None, :], other[:, None], scales)
    scales = gl.inline_asm_elementwise(TWICE, "=r,r", [scales], dtype=gl.int32, is_pure=True, pack=1)
    a, b, c, d = _decode(codes, scales, rows, (place * 2)[:, None] + zeros, CODE.step, CODE.offset)
    pairs = gl.join(gl.join(a, c), gl.join(b, d))  # [N, words, 2 (high), 2 (odd)]
    return gl.reshape(pairs, [N, HEAD_DIM])


@gluon.jit(
    do_not_specialize=["rows", "heads", "group", "tokens", "count_items", "q_stride", "q_head_stride"],
    do_not_specialize_on_alignment=["partial_lse"],
)
def many_queries_kernel(  # noqa: PLR0915 - one loop whose state stays in registers
    partials, partial_lse, q, buffer, pages, items, scale_log2, rows, heads, group, tokens, count_items,
    q_stride, q_head_stride, key_part, value_part,
    KEY: gl.constexpr, VALUE: gl.constexpr, HEAD_DIM: gl.constexpr, CB: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = M // 16
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    LANES: gl.constexpr = HEAD_DIM // 8
    WIDE_LIKE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    LIKE: gl.constexpr = gl.BlockedLayout([1, 2], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, HEAD_DIM], gl.bfloat16)
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, HEAD_DIM], gl.bfloat16)

    head = gl.program_id(0) // count_items
    item = items + gl.program_id(0) % count_items * 9
    book, first_entry = gl.load(item + 1).to(gl.int64) * UNIT, gl.load(item + 2)
    begin, count, slot = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
    query0, row0, live_rows = gl.load(item + 6), gl.load(item + 7), gl.load(item + 8)

    row = gl.arange(0, M, gl.SliceLayout(1, WIDE_LIKE))
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE_LIKE))
    query = query0 + (row0 + row) // group
    at = query.to(gl.int64) * q_stride + (head * group + (row0 + row) % group) * q_head_stride
    queries = gl.load(q + at[:, None] + channel[None, :], mask=(row < live_rows)[:, None], other=0.0)
    if KEY.balanced:
        balance = (buffer + (book + key_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM
        queries = (queries.to(gl.float32) * gl.load(balance + channel).to(gl.float32)[None, :]).to(gl.bfloat16)
    query_tile = gl.allocate_shared_memory(gl.bfloat16, [M, HEAD_DIM], QUERIES, queries)
    key_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, N, HEAD_DIM], SHARED)
    value_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, N, HEAD_DIM], SHARED)

    key_book = (buffer + (book + key_part.centroids)).to(gl.pointer_type(gl.int64))
    key_book += head * key_part.num_centroids * (HEAD_DIM // 4)
    value_book = (buffer + (book + value_part.centroids)).to(gl.pointer_type(gl.int64))
    value_book += head * value_part.num_centroids * (HEAD_DIM // 4)
    pages += first_entry

    # Sub-tile 0 is decoded, what 1 needs is in registers, and so are ids of 2 and the page of 3.
    entry, first = 0, begin * N
    page = gl.load(pages)
    ids = _load_ids(buffer, page, first, head, tokens, key_part, N, LIKE)
    kc, ks, kt, kr = _load_part(buffer, page, first, ids, key_book, head, tokens, key_part, CB, HEAD_DIM, N, LIKE)
    ids = _load_ids(buffer, page, first, head, tokens, value_part, N, LIKE)
    vc, vs, vt, vr = _load_part(buffer, page, first, ids, value_book, head, tokens, value_part, CB, HEAD_DIM, N, LIKE)
    key_tiles.index(0).store(_values(kc, ks, kt, kr, first, tokens, KEY, CB, HEAD_DIM, N, LIKE))
    value_tiles.index(0).store(_values(vc, vs, vt, vr, first, tokens, VALUE, CB, HEAD_DIM, N, LIKE))
    entry, next_first = _advance(entry, first, count > 1, tokens, N)
    page = gl.load(pages + entry)
    ids = _load_ids(buffer, page, next_first, head, tokens, key_part, N, LIKE)
    kc, ks, kt, kr = _load_part(buffer, page, next_first, ids, key_book, head, tokens, key_part, CB, HEAD_DIM, N, LIKE)
    ids = _load_ids(buffer, page, next_first, head, tokens, value_part, N, LIKE)
    vc, vs, vt, vr = _load_part(
        buffer, page, next_first, ids, value_book, head, tokens, value_part, CB, HEAD_DIM, N, LIKE
    )
    entry, later_first = _advance(entry, next_first, count > 2, tokens, N)
    page = gl.load(pages + entry)
    key_ids = _load_ids(buffer, page, later_first, head, tokens, key_part, N, LIKE)
    value_ids = _load_ids(buffer, page, later_first, head, tokens, value_part, N, LIKE)
    entry, last_first = _advance(entry, later_first, count > 3, tokens, N)
    next_page = gl.load(pages + entry)
    fence_async_shared()

    column = gl.arange(0, N, gl.SliceLayout(0, SCORES))
    top = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([M, HEAD_DIM], gl.float32, OUTPUT)
    for i in range(count):
        scores = warpgroup_mma(
            query_tile, key_tiles.index(i % 2).permute((1, 0)), gl.zeros([M, N], gl.float32, SCORES), use_acc=False,
            is_async=True,
        )  # fmt: skip
        key_tiles.index((i + 1) % 2).store(_values(kc, ks, kt, kr, next_first, tokens, KEY, CB, HEAD_DIM, N, LIKE))
        fence_async_shared()
        kc, ks, kt, kr = _load_part(
            buffer, page, later_first, key_ids, key_book, head, tokens, key_part, CB, HEAD_DIM, N, LIKE
        )
        key_ids = _load_ids(buffer, next_page, last_first, head, tokens, key_part, N, LIKE)
        scores = warpgroup_mma_wait(0, [scores])
        scores = gl.where((first + column < tokens)[None, :], scores, float("-inf"))
        raised = gl.maximum(top, gl.max(scores, 1) * scale_log2)
        keep = gl.exp2(top - raised)
        weights = gl.exp2(scores * scale_log2 - raised[:, None])
        total = total * keep + gl.sum(weights, 1)
        top = raised
        acc *= gl.convert_layout(keep, gl.SliceLayout(1, OUTPUT))[:, None]
        weights = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, OUTPUT, 2))
        acc = warpgroup_mma(weights, value_tiles.index(i % 2), acc, is_async=True)
        value_tiles.index((i + 1) % 2).store(_values(vc, vs, vt, vr, next_first, tokens, VALUE, CB, HEAD_DIM, N, LIKE))
        fence_async_shared()
        vc, vs, vt, vr = _load_part(
            buffer, page, later_first, value_ids, value_book, head, tokens, value_part, CB, HEAD_DIM, N, LIKE
        )
        value_ids = _load_ids(buffer, next_page, last_first, head, tokens, value_part, N, LIKE)
        page = next_page
        first, next_first, later_first = next_first, later_first, last_first
        entry, last_first = _advance(entry, last_first, i + 4 < count, tokens, N)
        next_page = gl.load(pages + entry)
        acc = warpgroup_mma_wait(0, [acc])

    out_row = gl.arange(0, M, gl.SliceLayout(1, SCORES))
    live = out_row < live_rows
    where = (slot.to(gl.int64) * rows + (query0 + (row0 + out_row) // group)) * (heads * group)
    where += head * group + (row0 + out_row) % group
    gl.store(partial_lse + where, (top + gl.log2(total)) * LN_2, mask=live)
    WIDE: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    total, where, live = gl.convert_layout(total, WIDE), gl.convert_layout(where, WIDE), gl.convert_layout(live, WIDE)
    out_channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUTPUT))
    acc /= total[:, None]
    if VALUE.balanced:
        balance = (buffer + (book + value_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM
        acc *= gl.load(balance + out_channel).to(gl.float32)[None, :]
    at = where[:, None] * HEAD_DIM + out_channel[None, :]
    gl.store(partials + at, acc, mask=live[:, None] & (at >= 0))
