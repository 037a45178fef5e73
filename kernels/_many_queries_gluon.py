"""Attention of many query rows to 2-bit pages: a Gluon kernel for Hopper's asynchronous tensor cores (sm_90).

A program owns up to three blocks of 64 query rows of one KV head, with four warps each, and walks tiles of 64 tokens.
One block alone has eight warps, four for every second tile. Four or eight more warps decode keys and values for all of
them (see `qvg_paged.kernels._page_ring_gluon`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qvg_paged.kernels._page_ring_gluon import (
    CENTROIDS,
    MARK,
    TILE_TOKENS,
    UNIT,
    advance,
    decode_pages_into,
    fetch_codebooks,
    page_tiles,
    tile_tokens,
    turn,
    wait_for_codebooks,
)

__all__ = ["many_queries_kernel"]

LN_2 = gl.constexpr(0.6931471805599453)
SLACK = gl.constexpr(4.0)
"""Weights may exceed the running reference 2 to this power times before it is raised."""
OWN = gl.constexpr(64)
"""Sums of a thread: 32 of each of two query rows, two of one and two of the other in turn."""
TIED = gl.constexpr(",".join(["=f"] * 64 + [str(i) for i in range(64)] + ["f"] * 64))
RESCALED = gl.constexpr(
    "{\n.reg .pred some;\n"
    "setp.ne.f32 some, $128, 0f3F800000;\nsetp.ne.or.f32 some, $130, 0f3F800000, some;\n"
    "vote.sync.any.pred some, some, 0xffffffff;\n@!some bra DONE;\n"
    + "".join(f"mul.f32 ${i}, ${i}, ${128 + i};\n" for i in range(64))
    + "DONE:\n}"
)
"""Sums of a thread times factors of their rows, unless all factors of the warp are one."""


@gluon.jit
def _softmax(scores, top, total, tile, tokens, scale_log2, SCORES: gl.constexpr):
    """Weights of a tile's keys, what they make of earlier weights, largest scores and sums from now on."""
    if tile // 4 == tokens // 256:
        column = gl.arange(0, TILE_TOKENS, gl.SliceLayout(0, SCORES))
        _, token, inside, stride = tile_tokens(tile, tokens, column // 16, column % 16)
        scores = gl.where(((inside < stride) & (token < tokens))[None, :], scores, float("-inf"))
    high = gl.max(scores, 1) * scale_log2
    raised = gl.where(high > top + SLACK, high, top)
    keep = gl.exp2(top - raised)
    weights = gl.exp2(scores * scale_log2 - raised[:, None])
    total = total * keep + gl.sum(weights, 1)
    return weights.to(gl.bfloat16), keep, raised, total


@gluon.jit
def _rescale(acc, keep, OUTPUT: gl.constexpr):
    """Sums of a block times factors of its rows."""
    factor = gl.convert_layout(keep, gl.SliceLayout(1, OUTPUT))[:, None] + gl.zeros(acc.shape, gl.float32, OUTPUT)
    return gl.inline_asm_elementwise(RESCALED, TIED, [acc, factor], dtype=gl.float32, is_pure=True, pack=OWN)


@gluon.jit
def _attend(
    query_tiles, ring, work,
    BLOCK: gl.constexpr, FIRST: gl.constexpr, EACH: gl.constexpr, BALANCED: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Attend one block of 64 query rows to tile `FIRST` and every `EACH`-th after it; write the partial result."""
    tiles, ready, free = ring
    partials, partial_lse, balance, begin, count, tokens, scale_log2, slot, queried, head = work
    query0, row0, live_rows, rows, heads, group = queried
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_TOKENS, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    queries = query_tiles.index(BLOCK)
    tile, per_page = begin, page_tiles(tokens)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, HEAD_DIM], gl.float32, OUTPUT)
    empty = gl.zeros([64, TILE_TOKENS], gl.float32, SCORES)
    at, phase = turn(0, 0, 2 * FIRST, STAGES)
    for _ in gl.static_range(FIRST):
        _, tile = advance(0, tile, True, per_page)
    for _ in range(FIRST, count, EACH):
        mbarrier.wait(ready.index(at), phase)
        scores = warpgroup_mma(queries, tiles.index(at).permute((1, 0)), empty, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(free.index(at), count=1)
        at, phase = turn(at, phase, 1, STAGES)
        weights, keep, top, total = _softmax(scores, top, total, tile, tokens, scale_log2, SCORES)
        acc = _rescale(acc, keep, OUTPUT)
        mbarrier.wait(ready.index(at), phase)
        acc = warpgroup_mma(gl.convert_layout(weights, LEFT), tiles.index(at), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index(at), count=1)
        at, phase = turn(at, phase, 2 * EACH - 1, STAGES)
        for _ in gl.static_range(EACH):
            _, tile = advance(0, tile, True, per_page)

    out_row = BLOCK * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    live = out_row < live_rows
    where = ((slot + FIRST).to(gl.int64) * rows + (query0 + (row0 + out_row) // group)) * (heads * group)
    where += head * group + (row0 + out_row) % group
    gl.store(partial_lse + where, (top + gl.log2(total)) * LN_2, mask=live)
    WIDE: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    total, where, live = gl.convert_layout(total, WIDE), gl.convert_layout(where, WIDE), gl.convert_layout(live, WIDE)
    out_channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUTPUT))
    acc *= gl.where(total > 0, 1.0 / total, 0.0)[:, None]  # zero and -inf where there was no tile
    if BALANCED:
        acc *= gl.load(balance + out_channel).to(gl.float32)[None, :]
    at = where[:, None] * HEAD_DIM + out_channel[None, :]
    gl.store(partials + at, acc, mask=live[:, None] & (at >= 0))


@gluon.jit
def _load_queries(
    to, q, balance, query0, row0, live_rows, group, head, q_stride, q_head_stride,
    BLOCK: gl.constexpr, BALANCED: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """A block of 64 query rows into shared memory, times what keys are without."""
    LANES: gl.constexpr = HEAD_DIM // 8
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
    row = BLOCK * 64 + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
    query = query0 + (row0 + row) // group
    at = query.to(gl.int64) * q_stride + (head * group + (row0 + row) % group) * q_head_stride
    queries = gl.load(q + at[:, None] + channel[None, :], mask=(row < live_rows)[:, None], other=0.0)
    if BALANCED:
        queries = (queries.to(gl.float32) * gl.load(balance + channel).to(gl.float32)[None, :]).to(gl.bfloat16)
    to.store(queries)


@gluon.jit(
    do_not_specialize=["rows", "heads", "group", "tokens", "count_items", "q_stride", "q_head_stride"],
    do_not_specialize_on_alignment=["partial_lse"],
)
def many_queries_kernel(
    partials, partial_lse, q, buffer, pages, items, scale_log2, rows, heads, group, tokens, count_items,
    q_stride, q_head_stride, key_part, value_part,
    KEY: gl.constexpr, VALUE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, DECODE_REGISTERS: gl.constexpr,
):  # fmt: skip
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_TOKENS, HEAD_DIM], gl.bfloat16)
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD_DIM], gl.bfloat16)
    WORD: gl.constexpr = gl.pointer_type(gl.int64)
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    head = gl.program_id(0) // count_items
    item = items + gl.program_id(0) % count_items * 9
    book, first_entry = gl.load(item + 1).to(gl.int64) * UNIT, gl.load(item + 2)
    begin, count, slot = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
    query0, row0, live_rows = gl.load(item + 6), gl.load(item + 7), gl.load(item + 8)
    key_book = buffer + (book + key_part.centroids + head * key_part.num_centroids * (HEAD_DIM * 2))
    value_book = buffer + (book + value_part.centroids + head * value_part.num_centroids * (HEAD_DIM * 2))
    key_balance = (buffer + (book + key_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM
    value_balance = (buffer + (book + value_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM

    codebooks = gl.allocate_shared_memory(gl.int32, [2 * CENTROIDS, HEAD_DIM // 2], WORDS)
    codebooks.slice(0, 1).store(gl.full([1, HEAD_DIM // 2], MARK, gl.int32, LINE))
    fetch_codebooks(key_book.to(WORD), value_book.to(WORD), key_part, value_part, HEAD_DIM)
    query_tiles = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, 64, HEAD_DIM], QUERIES)
    for block in gl.static_range(BLOCKS):
        _load_queries(query_tiles.index(block), q, key_balance, query0, row0, live_rows, group, head, q_stride,
                      q_head_stride, block, KEY.balanced, HEAD_DIM)  # fmt: skip
    tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE_TOKENS, HEAD_DIM], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=BLOCKS)
    fence_async_shared()
    wait_for_codebooks()

    ring = (tiles, ready, free)
    queried = (query0, row0, live_rows, rows, heads, group)
    work = (partials, partial_lse, value_balance, begin, count, tokens, scale_log2, slot, queried, head)
    history = (buffer, pages + first_entry, begin, count, head, tokens, key_part, value_part)
    BALANCED: gl.constexpr = VALUE.balanced
    # Constants in a tuple with a name would become numbers: the tuples are written out.
    if BLOCKS <= 2:
        gl.warp_specialize([
            (_attend, (query_tiles, ring, work, 0, 0, 3 - BLOCKS, BALANCED, HEAD_DIM, STAGES)),
            (_attend, (query_tiles, ring, work, BLOCKS - 1, 2 - BLOCKS, 3 - BLOCKS, BALANCED, HEAD_DIM, STAGES)),
            (decode_pages_into, (ring, history, 0, 2, KEY, VALUE, HEAD_DIM, STAGES)),
            (decode_pages_into, (ring, history, 1, 2, KEY, VALUE, HEAD_DIM, STAGES)),
        ], [4, 4, 4], [REGISTERS, DECODE_REGISTERS, DECODE_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (query_tiles, ring, work, 0, 0, 1, BALANCED, HEAD_DIM, STAGES)),
            (_attend, (query_tiles, ring, work, 1, 0, 1, BALANCED, HEAD_DIM, STAGES)),
            (_attend, (query_tiles, ring, work, 2, 0, 1, BALANCED, HEAD_DIM, STAGES)),
            (decode_pages_into, (ring, history, 0, 1, KEY, VALUE, HEAD_DIM, STAGES)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, DECODE_REGISTERS])  # fmt: skip
    codebooks._keep_alive()
