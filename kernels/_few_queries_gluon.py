"""Attention of at most 16 query rows to 2-bit pages, one warp a program: a Gluon kernel for tensor cores of sm_80 on.

Codes go from the page to the tensor cores without ever becoming values. A 2-bit field that is masked where it stands,
bits 2i and 2i + 1 of a byte, is the float16 subnormal ``code * 4^i * 2^-24``, and the layouts below put every byte
where ``mma.m16n8k16`` wants it, so that nothing moves between lanes:

    scores      q . code for each block of channels, times the block's scale, plus (q . centroid)[id] from a table
    output      (weights * scale) . code + weights . centroid rows

A program walks groups of 16 code rows, which are 64 tokens of one page. Scores have queries as rows, the output has
channels as rows: what a lane holds of the first is what it needs for the second. Lane ``4 * g + t`` owns code rows
``4 * t ... 4 * t + 3`` of a group; in products they come in the order ``8 * (row // 2 % 2) + 2 * t + row % 2``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

__all__ = ["few_queries_kernel"]

ITEM = gl.constexpr(9)
"""Fields of a share, see `qvg_paged.kernels.few_queries.Shares`."""
UNIT = gl.constexpr(256)
TILE = gl.constexpr(256)
SLACK = gl.constexpr(4.0)
"""Weights may exceed the running reference by this power of two: with scales up to 448 they still fit float16."""
LN_2 = gl.constexpr(0.6931471805599453)

SHIFTED = gl.constexpr("shr.u32 $0, $1, 8;")
PAIRED = gl.constexpr("""prmt.b32 $0, $4, $5, 0x5410;
prmt.b32 $2, $4, $5, 0x7632;
shr.u32 $1, $0, 8;
shr.u32 $3, $2, 8;""")
BYTES = gl.constexpr("""prmt.b32 $0, $4, 0, 0x4440;
prmt.b32 $1, $4, 0, 0x4441;
prmt.b32 $2, $4, 0, 0x4442;
prmt.b32 $3, $4, 0, 0x4443;""")
FLOATS = gl.constexpr("""{
.reg .b16 lo, hi, a, b, c, d;
.reg .b32 p, q;
mov.b32 {lo, hi}, $4;
cvt.rn.f16x2.e4m3x2 p, lo;
cvt.rn.f16x2.e4m3x2 q, hi;
mov.b32 {a, b}, p;
mov.b32 {c, d}, q;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b;
cvt.f32.f16 $2, c;
cvt.f32.f16 $3, d;
}""")


@gluon.jit
def _shift_keys(codes):
    """Bytes of a key tile, each one channel further."""
    return gl.inline_asm_elementwise(SHIFTED, "=r,r", [codes], dtype=gl.uint8, is_pure=True, pack=4)


@gluon.jit
def _pair_values(even, odd):
    """Bytes of even and odd rows: by channel modulo 4, the low bytes of the halves of a register are a pair of rows."""
    return gl.inline_asm_elementwise(
        PAIRED, "=r,=r,=r,=r,r,r", [even, odd], dtype=(gl.uint8, gl.uint8, gl.uint8, gl.uint8), is_pure=True, pack=4
    )


@gluon.jit
def _mask_keys(codes, shifted, PLACE: gl.constexpr):
    """Field `PLACE` of every byte as float16; of four channels in the order 0, 2, 1, 3."""
    MASK: gl.constexpr = f"and.b32 $0, $2, {0x00030003 << 2 * PLACE};\nand.b32 $1, $3, {0x00030003 << 2 * PLACE};"
    return gl.inline_asm_elementwise(MASK, "=r,=r,r,r", [codes, shifted], dtype=gl.float16, is_pure=True, pack=4)


@gluon.jit
def _key_operand(codes, shifted, PLACE: gl.constexpr, CB: gl.constexpr, MMA: gl.constexpr):
    """Codes ``[16 rows, channels]`` of one place as the operand ``[channels, 16]``."""
    x = _mask_keys(codes, shifted, PLACE)
    x = gl.permute(gl.reshape(x, [16, 4, CB // 16, 2, 2]), [2, 3, 1, 4, 0])
    return gl.convert_layout(gl.reshape(x, [CB, 16]), gl.DotOperandLayout(1, MMA, 2))


@gluon.jit
def _value_operand(low, low_next, high, high_next, PLACE: gl.constexpr, CB: gl.constexpr, MMA: gl.constexpr):
    """Paired codes ``[8 pairs of rows, channels]`` of one place as the operand ``[channels, 16]``."""
    x = gl.join(_mask_keys(low, low_next, PLACE), _mask_keys(high, high_next, PLACE))
    x = gl.reshape(x, [2, 4, 8, CB // 32, 2, 2, 2])  # row // 2 % 2, t, g, word, channel % 2, row % 2, channel // 2 % 2
    x = gl.reshape(gl.permute(x, [3, 6, 4, 2, 0, 1, 5]), [CB, 16])
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def _load_words(base, first, stride, inside, WHOLE: gl.constexpr, PLACE: gl.constexpr, WORDS: gl.constexpr):
    """A byte of each of 16 tokens, four consecutive ones in a word; of tokens past the end, that of another token."""
    words = gl.zeros([4], gl.int32, WORDS)
    if WHOLE:
        words = gl.load((base + PLACE * 64 + first).to(gl.pointer_type(gl.int32)) + gl.arange(0, 4, WORDS))
    else:
        row = gl.arange(0, 4, WORDS) * 4 + first
        for byte in gl.static_range(4):
            token = gl.minimum(gl.minimum(row + byte, stride - 1) + PLACE * stride, inside - 1)
            words |= gl.load(base + token).to(gl.int32) << (8 * byte)
    return words


@gluon.jit
def _load_places(base, first, stride, inside, WHOLE: gl.constexpr, WORDS: gl.constexpr):
    """The words of all four places of a byte."""
    return (
        _load_words(base, first, stride, inside, WHOLE, 0, WORDS),
        _load_words(base, first, stride, inside, WHOLE, 1, WORDS),
        _load_words(base, first, stride, inside, WHOLE, 2, WORDS),
        _load_words(base, first, stride, inside, WHOLE, 3, WORDS),
    )


@gluon.jit
def _load_tokens(
    buffer, page, part, head, tokens, tile, first, stride, inside,
    WHOLE: gl.constexpr, BLOCKS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Ids, and scales of the first and of the last block, of the tokens of a group."""
    ids = buffer + (page + part.ids + head * tokens + tile * TILE)
    scales = buffer + (page + part.scales + head * BLOCKS * tokens + tile * TILE)
    known = _load_places(ids, first, stride, inside, WHOLE, WORDS)
    scales_a = _load_places(scales, first, stride, inside, WHOLE, WORDS)
    scales_b = scales_a
    if BLOCKS == 2:
        scales_b = _load_places(scales + tokens, first, stride, inside, WHOLE, WORDS)
    return known, scales_a, scales_b


@gluon.jit
def _in_product_order(a, b, c, d, LIKE: gl.constexpr):
    x = gl.join(gl.join(a, b), gl.join(c, d))  # [t, row % 2, row // 2 % 2]
    return gl.convert_layout(gl.reshape(gl.permute(x, [2, 0, 1]), [16]), LIKE)


@gluon.jit
def _ids(words, LIKE: gl.constexpr):
    a, b, c, d = gl.inline_asm_elementwise(
        BYTES, "=r,=r,=r,=r,r", [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )
    return _in_product_order(a, b, c, d, LIKE)


@gluon.jit
def _scales(words, LIKE: gl.constexpr):
    a, b, c, d = gl.inline_asm_elementwise(
        FLOATS, "=f,=f,=f,=f,r", [words], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1
    )
    return _in_product_order(a, b, c, d, LIKE)


@gluon.jit
def _top_rows(x, ROWS: gl.constexpr):
    """The first `ROWS` of 16 rows."""
    if ROWS == 8:
        x, _ = gl.split(gl.permute(gl.reshape(x, [2, 8, 16]), [1, 2, 0]))
    return x


@gluon.jit
def _columns(weights, dtype: gl.constexpr, MMA: gl.constexpr):
    """Weights ``[ROWS, 16]`` as the second operand ``[16, ROWS]`` of the product with values."""
    return gl.convert_layout(gl.permute(weights.to(dtype), [1, 0]), gl.DotOperandLayout(1, MMA, 2))


@gluon.jit
def _residual_scores(query, starts, codes, shifted, words, PLACE: gl.constexpr, CB: gl.constexpr, ROWS: gl.constexpr,
                     MMA: gl.constexpr):  # fmt: skip
    start = gl.zeros([16, 16], gl.float32, MMA) + (starts * 4.0**PLACE)[:, None]
    raw = _top_rows(mma_v2(query, _key_operand(codes, shifted, PLACE, CB, MMA), start), ROWS)
    return raw * _scales(words, gl.SliceLayout(0, raw.type.layout))[None, :]


@gluon.jit
def _scores(
    query, keys, ids, scales_a, scales_b, table,
    PLACE: gl.constexpr, BLOCKS: gl.constexpr, CB: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Scores ``[ROWS, 16]`` of the tokens at one place."""
    scores = _residual_scores(query[0], query[2], keys[0], keys[1], scales_a[PLACE], PLACE, CB, ROWS, MMA)
    if BLOCKS == 2:
        scores += _residual_scores(query[1], query[3], keys[2], keys[3], scales_b[PLACE], PLACE, CB, ROWS, MMA)
    LIKE: gl.constexpr = scores.type.layout
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LIKE))
    at = (table + row)[:, None] + _ids(ids[PLACE], gl.SliceLayout(0, LIKE))[None, :] * ROWS
    return scores * (0.25**PLACE) + gl.load(at)


@gluon.jit
def _mask(scores, first, stride, inside, PLACE: gl.constexpr):
    """Scores without those past the end of a page."""
    place = gl.arange(0, 16, gl.SliceLayout(0, scores.type.layout))
    row = first + place // 2 % 4 * 4 + place // 8 * 2 + place % 2
    valid = (row < stride) & (row + PLACE * stride < inside)
    return gl.where(valid[None, :], scores, float("-inf"))


@gluon.jit
def _centroid_rows(table, ids, CB: gl.constexpr, HEAD_DIM: gl.constexpr, MMA: gl.constexpr):
    """Rows `ids` of a codebook, channels of one block, as the operand ``[channels, 16]``."""
    channel = gl.arange(0, CB, gl.SliceLayout(0, ids.type.layout.parent))
    rows = gl.load((table + channel)[None, :] + ids[:, None] * HEAD_DIM)  # [16, channels]
    rows = gl.reshape(gl.permute(gl.reshape(rows, [16, 8, CB // 8]), [2, 1, 0]), [CB, 16])
    return gl.convert_layout(rows, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def _add_place(
    acc, sums, weights, plain, codes, scales, rows, centroids,
    PLACE: gl.constexpr, CB: gl.constexpr, HEAD_DIM: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    scale = _scales(scales[PLACE], gl.SliceLayout(0, weights.type.layout))
    scaled = _columns(weights * scale[None, :], gl.float16, MMA)
    ones = gl.full([16, 16], 4.0**PLACE * 2.0**-24, gl.float16, gl.DotOperandLayout(0, MMA, 2))
    acc = mma_v2(_value_operand(codes[0], codes[1], codes[2], codes[3], PLACE, CB, MMA), scaled, acc)
    acc = mma_v2(_centroid_rows(centroids, rows[PLACE], CB, HEAD_DIM, MMA), plain[PLACE], acc)
    return acc, mma_v2(ones, scaled, sums)


@gluon.jit
def _add_block(
    acc, sums, weights, plain, even, odd, scales, rows, centroids,
    CB: gl.constexpr, HEAD_DIM: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Add weighted values of a block of channels to `acc`, and their weighted scales, in units of codes, to `sums`."""
    codes = _pair_values(even, odd)
    acc, sums = _add_place(acc, sums, weights[0], plain, codes, scales, rows, centroids, 0, CB, HEAD_DIM, MMA)
    acc, sums = _add_place(acc, sums, weights[1], plain, codes, scales, rows, centroids, 1, CB, HEAD_DIM, MMA)
    acc, sums = _add_place(acc, sums, weights[2], plain, codes, scales, rows, centroids, 2, CB, HEAD_DIM, MMA)
    return _add_place(acc, sums, weights[3], plain, codes, scales, rows, centroids, 3, CB, HEAD_DIM, MMA)


@gluon.jit
def _load_query(query, BLOCK: gl.constexpr, CB: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
                MMA: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    at = gl.arange(0, CB, gl.SliceLayout(0, layout))
    channel = (at // 2 % 4) * (CB // 4) + at // 16 * 4 + at % 2 * 2 + at // 8 % 2
    return gl.load(query + row[:, None] * HEAD_DIM + BLOCK * CB + channel[None, :], mask=row[:, None] < ROWS, other=0.0)


@gluon.jit
def _store(acc, sums, balance, total, at, live, partials, unit, offset, BLOCK: gl.constexpr, CB: gl.constexpr,
           HEAD_DIM: gl.constexpr, BALANCED: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    place = gl.arange(0, CB, gl.SliceLayout(1, MMA))
    channel = BLOCK * CB + place % 8 * (CB // 8) + place // 8
    offsets = gl.max(sums, 0) * offset  # rows of `sums` are equal
    out = (acc + offsets[None, :]) * (unit / total)[None, :]
    if BALANCED:
        out *= gl.load(balance + channel).to(gl.float32)[:, None]
    gl.store(partials + at[None, :] * HEAD_DIM + channel[:, None], out, mask=live[None, :] & (channel[:, None] >= 0))


@gluon.jit
def _code_row(row, stride, WHOLE: gl.constexpr):
    if not WHOLE:
        row = gl.minimum(row, stride - 1)
    return row


@gluon.jit
def _attend_group(  # noqa: PLR0915 - one step of a loop whose state stays in registers
    state, query, log2_unit, table, centroids, buffer, page, tile, first, inside, head, tokens, key_part, value_part,
    UNIT_OUT: gl.constexpr, WHOLE: gl.constexpr, BLOCKS: gl.constexpr, CB: gl.constexpr, HEAD_DIM: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PAIRS: gl.constexpr, GATHER: gl.constexpr, WORDS: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Attend to 16 code rows, 64 tokens, of a page; `WHOLE`: they lie in a full tile of aligned tokens."""
    acc_a, acc_b, sums_a, sums_b, top, total = state
    stride = (inside + 3) // 4
    place = gl.arange(0, 16, gl.SliceLayout(1, KEYS))
    key_row = _code_row(first + place // 2 % 4 * 4 + place // 8 * 2 + place % 2, stride, WHOLE)
    pair = gl.arange(0, 8, gl.SliceLayout(1, PAIRS))
    even_row = _code_row(first + pair % 4 * 4 + pair // 4 * 2, stride, WHOLE)
    odd_row = _code_row(first + pair % 4 * 4 + pair // 4 * 2 + 1, stride, WHOLE)
    pair_channel = gl.arange(0, CB, gl.SliceLayout(0, PAIRS))
    codes = (head * key_part.rows + tile * 64) * HEAD_DIM
    key_at = key_row[:, None] * HEAD_DIM + gl.arange(0, CB, gl.SliceLayout(0, KEYS))[None, :]
    key_at = buffer + (page + key_part.codes + codes) + key_at
    even_at = buffer + (page + value_part.codes + codes) + (even_row[:, None] * HEAD_DIM + pair_channel[None, :])
    odd_at = buffer + (page + value_part.codes + codes) + (odd_row[:, None] * HEAD_DIM + pair_channel[None, :])
    keys_a, even_a, odd_a = gl.load(key_at), gl.load(even_at), gl.load(odd_at)
    keys_b, even_b, odd_b = keys_a, even_a, odd_a
    if BLOCKS == 2:
        keys_b, even_b, odd_b = gl.load(key_at + CB), gl.load(even_at + CB), gl.load(odd_at + CB)

    ids, scales_a, scales_b = _load_tokens(
        buffer, page, key_part, head, tokens, tile, first, stride, inside, WHOLE, BLOCKS, WORDS
    )
    keys = (keys_a, _shift_keys(keys_a), keys_b, _shift_keys(keys_b))
    s0 = _scores(query, keys, ids, scales_a, scales_b, table, 0, BLOCKS, CB, ROWS, MMA)
    s1 = _scores(query, keys, ids, scales_a, scales_b, table, 1, BLOCKS, CB, ROWS, MMA)
    s2 = _scores(query, keys, ids, scales_a, scales_b, table, 2, BLOCKS, CB, ROWS, MMA)
    s3 = _scores(query, keys, ids, scales_a, scales_b, table, 3, BLOCKS, CB, ROWS, MMA)
    if not WHOLE:
        s0, s1 = _mask(s0, first, stride, inside, 0), _mask(s1, first, stride, inside, 1)
        s2, s3 = _mask(s2, first, stride, inside, 2), _mask(s3, first, stride, inside, 3)
    ids, scales_a, scales_b = _load_tokens(
        buffer, page, value_part, head, tokens, tile, first, stride, inside, WHOLE, BLOCKS, WORDS
    )

    peak = gl.max(gl.maximum(gl.maximum(s0, s1), gl.maximum(s2, s3)), 1) * log2_unit
    if gl.max(peak - top, 0) > SLACK:
        raised = gl.maximum(top, peak)
        keep = gl.exp2(top - raised)
        total *= keep
        top = raised
        spread = gl.convert_layout(keep, gl.SliceLayout(0, MMA))[None, :]
        acc_a *= spread
        sums_a *= spread
        if BLOCKS == 2:
            acc_b *= spread
            sums_b *= spread
    # Times 8 / 4^place: with its scale, that of a code at this place.
    w0 = gl.exp2(s0 * log2_unit[:, None] - (top - 3.0)[:, None])
    w1 = gl.exp2(s1 * log2_unit[:, None] - (top - 1.0)[:, None])
    w2 = gl.exp2(s2 * log2_unit[:, None] - (top + 1.0)[:, None])
    w3 = gl.exp2(s3 * log2_unit[:, None] - (top + 3.0)[:, None])
    total += gl.sum((w0 + w1 * 4.0) + (w2 * 16.0 + w3 * 64.0), 1)

    LINE: gl.constexpr = gl.SliceLayout(1, GATHER)
    rows = (_ids(ids[0], LINE), _ids(ids[1], LINE), _ids(ids[2], LINE), _ids(ids[3], LINE))
    weights = (w0, w1, w2, w3)
    plain = (
        _columns(w0 * UNIT_OUT, gl.bfloat16, MMA), _columns(w1 * (UNIT_OUT * 4.0), gl.bfloat16, MMA),
        _columns(w2 * (UNIT_OUT * 16.0), gl.bfloat16, MMA), _columns(w3 * (UNIT_OUT * 64.0), gl.bfloat16, MMA),
    )  # fmt: skip
    acc_a, sums_a = _add_block(
        acc_a, sums_a, weights, plain, even_a, odd_a, scales_a, rows, centroids, CB, HEAD_DIM, MMA
    )
    if BLOCKS == 2:
        acc_b, sums_b = _add_block(
            acc_b, sums_b, weights, plain, even_b, odd_b, scales_b, rows, centroids + CB, CB, HEAD_DIM, MMA
        )
    return acc_a, acc_b, sums_a, sums_b, top, total


@gluon.jit(
    do_not_specialize=["rows", "heads", "group", "tokens", "table_floats"],
    do_not_specialize_on_alignment=["partial_lse"],
)
def few_queries_kernel(  # noqa: PLR0915 - one loop whose state stays in registers
    partials, partial_lse, tables, buffer, pages, items, rows, heads, group, tokens, table_floats,
    key_part, value_part,
    VALUE: gl.constexpr, HEAD_DIM: gl.constexpr, CB: gl.constexpr, ROWS: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = HEAD_DIM // CB
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    # Registers, then lanes (t, t, g, g, g): coordinates of each basis.
    KEYS: gl.constexpr = gl.DistributedLinearLayout(
        ([[0, 1], [0, 2], [0, 4], [0, 8]] if CB == 64 else [[0, 1], [0, 2], [0, 4]]) + [[8, 0]],
        [[0, CB // 4], [0, CB // 2], [1, 0], [2, 0], [4, 0]], [], [], [16, CB],
    )  # fmt: skip
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        ([[0, 1], [0, 2], [0, 4]] if CB == 64 else [[0, 1], [0, 2]]) + [[4, 0]],
        [[1, 0], [2, 0], [0, CB // 8], [0, CB // 4], [0, CB // 2]], [], [], [8, CB],
    )  # fmt: skip
    GATHER: gl.constexpr = gl.DistributedLinearLayout(
        ([[0, 1], [0, 2], [0, 4]] if CB == 64 else [[0, 1], [0, 2]]) + [[1, 0], [8, 0]],
        [[2, 0], [4, 0], [0, CB // 8], [0, CB // 4], [0, CB // 2]], [], [], [16, CB],
    )  # fmt: skip
    WORDS: gl.constexpr = gl.DistributedLinearLayout([], [[1], [2], [0], [0], [0]], [], [], [4])

    head = gl.program_id(1)
    item = items + gl.program_id(0) * ITEM
    table_id, book, entry = gl.load(item), gl.load(item + 1).to(gl.int64) * UNIT, gl.load(item + 2)
    group_id, count, slot = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
    query0, row0, live_rows = gl.load(item + 6), gl.load(item + 7), gl.load(item + 8)

    table = tables + (table_id * heads + head).to(gl.int64) * table_floats
    halves = (table + key_part.num_centroids * ROWS).to(gl.pointer_type(gl.float16))
    factors = table + key_part.num_centroids * ROWS + ROWS * HEAD_DIM // 2
    query_a = _load_query(halves, 0, CB, HEAD_DIM, ROWS, MMA)
    query_b = query_a
    in_rows = gl.arange(0, 16, gl.SliceLayout(1, MMA))
    starts_a = gl.load(factors + ROWS + in_rows, mask=in_rows < ROWS, other=0.0)
    starts_b = starts_a
    if BLOCKS == 2:
        query_b = _load_query(halves, 1, CB, HEAD_DIM, ROWS, MMA)
        starts_b = gl.load(factors + 2 * ROWS + in_rows, mask=in_rows < ROWS, other=0.0)

    query = (query_a, query_b, starts_a, starts_b)
    LIKE: gl.constexpr = _top_rows(gl.zeros([16, 16], gl.float32, MMA), ROWS).type.layout
    RUN: gl.constexpr = gl.SliceLayout(1, LIKE)
    log2_unit = gl.load(factors + gl.arange(0, ROWS, RUN))  # log2 of a weight per unit of score
    state = (
        gl.zeros([CB, ROWS], gl.float32, MMA), gl.zeros([CB, ROWS], gl.float32, MMA),
        gl.zeros([16, ROWS], gl.float32, MMA), gl.zeros([16, ROWS], gl.float32, MMA),
        gl.full([ROWS], float("-inf"), gl.float32, RUN), gl.zeros([ROWS], gl.float32, RUN),
    )  # fmt: skip
    centroids = (buffer + (book + value_part.centroids)).to(gl.pointer_type(gl.bfloat16))
    centroids += head * value_part.num_centroids * HEAD_DIM
    groups = (tokens // TILE) * 4 + (tokens % TILE + 63) // 64
    UNIT_OUT: gl.constexpr = 2.0**-24 / VALUE.step
    for _ in range(count):
        page = gl.load(pages + entry).to(gl.int64) * UNIT
        tile, first = group_id // 4, group_id % 4 * 16
        inside = gl.minimum(tokens - tile * TILE, TILE)
        if ALIGNED and inside == TILE:
            state = _attend_group(
                state, query, log2_unit, table, centroids, buffer, page, tile, first, inside, head, tokens,
                key_part, value_part, UNIT_OUT, True, BLOCKS, CB, HEAD_DIM, ROWS, KEYS, PAIRS, GATHER, WORDS, MMA,
            )  # fmt: skip
        else:
            state = _attend_group(
                state, query, log2_unit, table, centroids, buffer, page, tile, first, inside, head, tokens,
                key_part, value_part, UNIT_OUT, False, BLOCKS, CB, HEAD_DIM, ROWS, KEYS, PAIRS, GATHER, WORDS, MMA,
            )  # fmt: skip
        group_id += 1
        if group_id == groups:
            group_id = 0
            entry += 1

    acc_a, acc_b, sums_a, sums_b, top, total = state
    query_row = row0 + gl.arange(0, ROWS, RUN)
    live = gl.arange(0, ROWS, RUN) < live_rows
    where = (slot.to(gl.int64) * rows + (query0 + query_row // group)) * (heads * group)
    where += head * group + query_row % group
    gl.store(partial_lse + where, (top - 3.0 + gl.log2(total)) * LN_2, mask=live)
    spread: gl.constexpr = gl.SliceLayout(0, MMA)
    total, where, live = (
        gl.convert_layout(total, spread),
        gl.convert_layout(where, spread),
        gl.convert_layout(live, spread),
    )
    balance = (buffer + (book + value_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM
    offset: gl.constexpr = VALUE.offset / VALUE.step
    _store(
        acc_a,
        sums_a,
        balance,
        total,
        where,
        live,
        partials,
        1.0 / UNIT_OUT,
        offset,
        0,
        CB,
        HEAD_DIM,
        VALUE.balanced,
        MMA,
    )
    if BLOCKS == 2:
        _store(
            acc_b,
            sums_b,
            balance,
            total,
            where,
            live,
            partials,
            1.0 / UNIT_OUT,
            offset,
            1,
            CB,
            HEAD_DIM,
            VALUE.balanced,
            MMA,
        )
