"""Attention of at most 16 query rows to 2-bit pages: a Gluon kernel for tensor cores of sm_89 on.

No K or V is decoded: codes go from the page to the tensor cores (`_few_operands_gluon`), and centroids only meet what
was computed or summed per centroid (`_query_tables_triton`, `_few_shared_gluon`):

    scores      q . code for each block of channels, times the block's scale, plus (q . centroid)[id] from a table
    output      (weights * scale) . code, plus in the end (weights summed by id) . centroids

A program walks groups of 16 code rows, which are 64 tokens of one page. Scores have queries as rows, the output has
channels as rows: what a lane holds of the first is what it needs for the second, and nothing crosses lanes. While a
group is attended, its values are on their way, and so are the keys of the next one.

The warps of a program walk parts of its share without waiting for each other; they have a table of scores in common
and meet in the end to add up what each has. Whatever follows from `warp_number` differs from warp to warp, though
every layout says that warps are copies of each other: nothing but `_few_shared_gluon` may move data between them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qvg_paged.kernels._few_loads_gluon import TILE, load_keys, load_values
from qvg_paged.kernels._few_operands_gluon import (
    BLOCK,
    MMA,
    WARPS,
    as_ids,
    as_scales,
    columns,
    key_operand,
    pair_values,
    scaled_columns,
    value_operand,
)
from qvg_paged.kernels._few_outputs_gluon import (
    add_centroids,
    add_tiles,
    hand_over,
    highest_reference,
    kept,
    load_centroids,
    store_outputs,
    times,
)
from qvg_paged.kernels._few_shared_gluon import (
    FRACTION_BITS,
    SLACK,
    add_weights,
    allocate,
    await_tables,
    meet,
    read_floats,
    rescale,
    stage,
    warp_number,
    write_floats,
)

__all__ = ["few_queries_kernel"]

ITEM = gl.constexpr(9)
"""Fields of a share, see `qvg_paged.kernels.few_queries.Shares`."""
UNIT = gl.constexpr(256)


@gluon.jit
def _top_rows(x, ROWS: gl.constexpr):
    """The first `ROWS` of 16 rows."""
    if ROWS == 8:
        x, _ = gl.split(gl.permute(gl.reshape(x, [2, 8, 16]), [1, 2, 0]))
    return x


@gluon.jit
def _load_query(query, BLOCK_ID: gl.constexpr, BLOCKS: gl.constexpr):
    """A block of the queries in the order of channels in which keys come."""
    layout: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    at = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    channel = (at // 2 % 4) * (BLOCK // 4) + at // 16 * 4 + at % 2 * 2 + at // 8 % 2
    return gl.load(query + row[:, None] * (BLOCKS * BLOCK) + BLOCK_ID * BLOCK + channel[None, :])


@gluon.jit
def _residual_scores(query, starts, codes, words, PLACE: gl.constexpr, ROWS: gl.constexpr):
    zero = gl.zeros([16, 16], gl.float32, MMA)
    raw = _top_rows(mma_v2(query, key_operand(codes, PLACE), zero), ROWS)
    raw += (starts * 4.0**PLACE)[:, None]
    return raw * as_scales(words, gl.SliceLayout(0, raw.type.layout))[None, :]


@gluon.jit
def _scores(query, keys, known, PLACE: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr):
    """Scores ``[ROWS, 16]`` of the tokens at one place, those of their centroids given."""
    scores = _residual_scores(query[0], query[2], keys[0], keys[3][PLACE], PLACE, ROWS)
    if BLOCKS == 2:
        scores += _residual_scores(query[1], query[3], keys[1], keys[4][PLACE], PLACE, ROWS)
    return scores * (0.25**PLACE) + known


@gluon.jit
def _look_up(scores, words, ROWS: gl.constexpr, LIKE: gl.constexpr):
    """Scores ``[ROWS, 16]`` of the centroids of tokens."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LIKE))
    return read_floats((scores + row * 4)[:, None] + as_ids(words, gl.SliceLayout(0, LIKE))[None, :] * (4 * ROWS))


@gluon.jit
def _cut(scores, first, stride, inside, PLACE: gl.constexpr):
    """Scores without those past the end of a page."""
    place = gl.arange(0, 16, gl.SliceLayout(0, scores.type.layout))
    row = first + place // 2 % 4 * 4 + place // 8 * 2 + place % 2
    valid = (row < stride) & (row + PLACE * stride < inside)
    return gl.where(valid[None, :], scores, float("-inf"))


@gluon.jit
def _add_place(acc, sums, weights, paired, words, PLACE: gl.constexpr):
    scaled = scaled_columns(weights, words)
    ones = gl.full([16, 16], 4.0**PLACE * 2.0**-24, gl.float16, gl.DotOperandLayout(0, MMA, 2))
    return add_tiles(acc, value_operand(paired, PLACE), scaled), mma_v2(ones, scaled, sums)


@gluon.jit
def _add_block(acc, sums, weights, even, odd, scales):
    """Add weighted codes of a block of channels to `acc`, and their weighted scales, in units of codes, to `sums`."""
    paired = pair_values(even, odd)
    acc, sums = _add_place(acc, sums, weights[0], paired, scales[0], 0)
    acc, sums = _add_place(acc, sums, weights[1], paired, scales[1], 1)
    acc, sums = _add_place(acc, sums, weights[2], paired, scales[2], 2)
    return _add_place(acc, sums, weights[3], paired, scales[3], 3)


@gluon.jit(
    do_not_specialize=["rows", "heads", "group", "tokens", "table_floats"],
    do_not_specialize_on_alignment=["partial_lse"],
)
def few_queries_kernel(  # noqa: PLR0915 - one loop whose state stays in registers
    partials, partial_lse, tables, buffer, pages, items, rows, heads, group, tokens, table_floats,
    key_part, value_part,
    VALUE: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, ALIGNED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Program (share, KV head); `BLOCKS` of channels a head."""
    head = gl.program_id(1)
    item = items + gl.program_id(0) * ITEM
    table_id, book, entry = gl.load(item), gl.load(item + 1).to(gl.int64) * UNIT, gl.load(item + 2)
    group_id, count, slot = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
    query0, row0, live_rows = gl.load(item + 6), gl.load(item + 7), gl.load(item + 8)

    LIKE: gl.constexpr = _top_rows(gl.zeros([16, 16], gl.float32, MMA), ROWS).type.layout
    RUN: gl.constexpr = gl.SliceLayout(1, LIKE)
    LINE: gl.constexpr = gl.SliceLayout(0, LIKE)
    row = gl.arange(0, ROWS, RUN)
    base, warp = allocate(slot, ROWS), warp_number(slot)
    weights_by_id = base + (warp + 1) * (1024 * ROWS)
    begin = count * warp // WARPS
    count = count * (warp + 1) // WARPS - begin

    none = gl.zeros([16, ROWS], gl.float32, MMA)
    acc_a, acc_b = (none, none, none, none), (none, none, none, none)
    sums_a, sums_b = gl.zeros([16, ROWS], gl.float32, MMA), gl.zeros([16, ROWS], gl.float32, MMA)
    top, total = gl.full([ROWS], float("-inf"), gl.float32, RUN), gl.zeros([ROWS], gl.float32, RUN)
    groups = (tokens // TILE) * 4 + (tokens % TILE + 63) // 64
    group_id += begin
    entry += group_id // groups
    group_id %= groups
    last = entry + gl.maximum(group_id + count - 1, 0) // groups
    page = gl.load(pages + entry).to(gl.int64) * UNIT
    entry = gl.minimum(entry + 1, last)
    page_after = gl.load(pages + entry).to(gl.int64) * UNIT
    codes_a, codes_b, ids, scales_a, scales_b = load_keys(
        buffer, page, key_part, head, tokens, group_id, ALIGNED, BLOCKS
    )  # fmt: skip
    if OVERLAP:
        table_id = await_tables(table_id)
    table = tables + (table_id * heads + head).to(gl.int64) * table_floats
    halves = (table + key_part.num_centroids * ROWS).to(gl.pointer_type(gl.float16))
    factors = table + key_part.num_centroids * ROWS + 16 * BLOCKS * BLOCK // 2
    query_a, starts_a = _load_query(halves, 0, BLOCKS), gl.load(factors + ROWS + row)
    query_b, starts_b = query_a, starts_a
    if BLOCKS == 2:
        query_b, starts_b = _load_query(halves, 1, BLOCKS), gl.load(factors + 2 * ROWS + row)
    query = (query_a, query_b, starts_a, starts_b)
    log2_unit = gl.load(factors + row)  # log2 of a weight per unit of score
    base = stage(base, table, key_part.num_centroids, ROWS)
    UNIT_OUT: gl.constexpr = 2.0**-24 / VALUE.step
    ONE: gl.constexpr = 2.0 ** (FRACTION_BITS - 3)
    for done in range(count):
        here = group_id
        even_a, even_b, odd_a, odd_b, value_ids, value_scales_a, value_scales_b = load_values(
            buffer, page, value_part, head, tokens, here, ALIGNED, BLOCKS
        )
        known0, known1 = _look_up(base, ids[0], ROWS, LIKE), _look_up(base, ids[1], ROWS, LIKE)
        known2, known3 = _look_up(base, ids[2], ROWS, LIKE), _look_up(base, ids[3], ROWS, LIKE)
        group_id += 1
        if group_id == groups:
            group_id = 0
            page = page_after
            entry = gl.minimum(entry + 1, last)
            page_after = gl.load(pages + entry).to(gl.int64) * UNIT
        keys = (codes_a, codes_b, ids, scales_a, scales_b)
        s0, s1 = _scores(query, keys, known0, 0, BLOCKS, ROWS), _scores(query, keys, known1, 1, BLOCKS, ROWS)
        s2, s3 = _scores(query, keys, known2, 2, BLOCKS, ROWS), _scores(query, keys, known3, 3, BLOCKS, ROWS)
        inside = gl.minimum(tokens - here // 4 * TILE, TILE)
        if not ALIGNED or inside < TILE:
            first, stride = here % 4 * 16, (inside + 3) // 4
            s0, s1 = _cut(s0, first, stride, inside, 0), _cut(s1, first, stride, inside, 1)
            s2, s3 = _cut(s2, first, stride, inside, 2), _cut(s3, first, stride, inside, 3)
        codes_a, codes_b, ids, scales_a, scales_b = load_keys(
            buffer, page, key_part, head, tokens, group_id, ALIGNED, BLOCKS
        )  # fmt: skip

        peak = gl.max(gl.maximum(gl.maximum(s0, s1), gl.maximum(s2, s3)), 1) * log2_unit
        if gl.max(peak - top, 0) > SLACK:
            raised = gl.maximum(top, peak)
            keep = gl.exp2(top - raised)
            total *= keep
            top = raised
            if done > 0:
                weights_by_id = rescale(weights_by_id, keep, value_part.num_centroids, ROWS, LIKE)
                spread = gl.convert_layout(keep, gl.SliceLayout(0, MMA))[None, :]
                acc_a, sums_a = times(acc_a, spread), sums_a * spread
                if BLOCKS == 2:
                    acc_b, sums_b = times(acc_b, spread), sums_b * spread
        # Times 8 / 4^place: with its scale, that of a code at this place.
        w0 = gl.exp2(s0 * log2_unit[:, None] - (top - 3.0)[:, None])
        w1 = gl.exp2(s1 * log2_unit[:, None] - (top - 1.0)[:, None])
        w2 = gl.exp2(s2 * log2_unit[:, None] - (top + 1.0)[:, None])
        w3 = gl.exp2(s3 * log2_unit[:, None] - (top + 3.0)[:, None])
        total += gl.sum((w0 + w1 * 4.0) + (w2 * 16.0 + w3 * 64.0), 1)
        add_weights(weights_by_id, w0, ONE, as_ids(value_ids[0], LINE), ROWS)
        add_weights(weights_by_id, w1, ONE * 4.0, as_ids(value_ids[1], LINE), ROWS)
        add_weights(weights_by_id, w2, ONE * 16.0, as_ids(value_ids[2], LINE), ROWS)
        add_weights(weights_by_id, w3, ONE * 64.0, as_ids(value_ids[3], LINE), ROWS)
        weights = (columns(w0), columns(w1), columns(w2), columns(w3))
        acc_a, sums_a = _add_block(acc_a, sums_a, weights, even_a, odd_a, value_scales_a)
        if BLOCKS == 2:
            acc_b, sums_b = _add_block(acc_b, sums_b, weights, even_b, odd_b, value_scales_b)

    centroids = (buffer + (book + value_part.centroids)).to(gl.pointer_type(gl.bfloat16))
    centroids += head * value_part.num_centroids * (BLOCKS * BLOCK)
    rows_a, rows_b = load_centroids(centroids, 16 * warp, value_part.num_centroids, BLOCKS)
    base = meet(base)
    write_floats(base + warp * (4 * ROWS) + row * 4, top)
    write_floats(base + (WARPS + warp) * (4 * ROWS) + row * 4, total)
    base = meet(base)
    ACROSS: gl.constexpr = gl.SliceLayout(0, MMA)
    spread = kept(base, warp, highest_reference(base, ROWS, ACROSS), ROWS, ACROSS)[None, :]
    acc_a, sums_a = times(acc_a, spread), sums_a * spread
    if BLOCKS == 2:
        acc_b, sums_b = times(acc_b, spread), sums_b * spread
    acc_a, acc_b = add_centroids(
        acc_a, acc_b, rows_a, rows_b, base, warp, centroids, value_part.num_centroids, UNIT_OUT, BLOCKS, ROWS
    )  # fmt: skip
    base = meet(base)
    OFFSET: gl.constexpr = VALUE.offset / VALUE.step
    OUT_LINE: gl.constexpr = BLOCKS * BLOCK + 4  # other banks for the next row
    region = base + (warp + 1) * (1024 * ROWS)
    hand_over(region, acc_a, sums_a, OFFSET, 0, OUT_LINE)
    if BLOCKS == 2:
        hand_over(region, acc_b, sums_b, OFFSET, 1, OUT_LINE)
    base = meet(base)
    balance = (buffer + (book + value_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * (BLOCKS * BLOCK)
    store_outputs(
        partials, partial_lse, base, balance, slot, query0, row0, live_rows, rows, heads, group, head,
        UNIT_OUT, VALUE.balanced, ROWS, BLOCKS, OUT_LINE,
    )  # fmt: skip
