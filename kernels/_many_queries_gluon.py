"""Attention of many query rows to 2-bit pages: a Gluon kernel for Hopper's asynchronous tensor cores (sm_90).

A program owns up to three blocks of 64 query rows of one KV head, with four warps each, and walks tiles of `N` tokens.
Four more warps decode keys and values for all of them (see `qvg_paged.kernels._page_ring_gluon`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qvg_paged.kernels._page_ring_gluon import UNIT, advance, decode_pages_into

__all__ = ["many_queries_kernel"]

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _softmax(scores, top, total, first, tokens, scale_log2, N: gl.constexpr, SCORES: gl.constexpr):
    """Weights of a tile's keys, what they make of earlier weights, largest scores and sums from now on."""
    if first + N > tokens:
        column = gl.arange(0, N, gl.SliceLayout(0, SCORES))
        scores = gl.where((first + column < tokens)[None, :], scores, float("-inf"))
    raised = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    keep = gl.exp2(top - raised)
    weights = gl.exp2(scores * scale_log2 - raised[:, None])
    total = total * keep + gl.sum(weights, 1)
    return weights.to(gl.bfloat16), keep, raised, total


@gluon.jit
def _attend(
    query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
    partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
    slot, query0, row0, live_rows, rows, heads, group, head,
    BLOCK: gl.constexpr, BALANCED: gl.constexpr, HEAD_DIM: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend one block of 64 query rows to `count` tiles and write its partial result."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    queries = query_tiles.index(BLOCK)
    first = begin * N
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, HEAD_DIM], gl.float32, OUTPUT)
    empty = gl.zeros([64, N], gl.float32, SCORES)
    for i in range(count):
        stage, phase = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(key_ready.index(stage), phase)
        scores = warpgroup_mma(queries, key_tiles.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(key_free.index(stage), count=1)
        weights, keep, top, total = _softmax(scores, top, total, first, tokens, scale_log2, N, SCORES)
        acc *= gl.convert_layout(keep, gl.SliceLayout(1, OUTPUT))[:, None]
        mbarrier.wait(value_ready.index(stage), phase)
        acc = warpgroup_mma(gl.convert_layout(weights, LEFT), value_tiles.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(value_free.index(stage), count=1)
        _, first = advance(0, first, True, tokens, N)

    out_row = BLOCK * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    live = out_row < live_rows
    where = (slot.to(gl.int64) * rows + (query0 + (row0 + out_row) // group)) * (heads * group)
    where += head * group + (row0 + out_row) % group
    gl.store(partial_lse + where, (top + gl.log2(total)) * LN_2, mask=live)
    WIDE: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    total, where, live = gl.convert_layout(total, WIDE), gl.convert_layout(where, WIDE), gl.convert_layout(live, WIDE)
    out_channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUTPUT))
    acc *= (1.0 / total)[:, None]
    if BALANCED:
        balance = (buffer + (book + value_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM
        acc *= gl.load(balance + out_channel).to(gl.float32)[None, :]
    at = where[:, None] * HEAD_DIM + out_channel[None, :]
    gl.store(partials + at, acc, mask=live[:, None] & (at >= 0))


@gluon.jit(
    do_not_specialize=["rows", "heads", "group", "tokens", "count_items", "q_stride", "q_head_stride"],
    do_not_specialize_on_alignment=["partial_lse"],
)
def many_queries_kernel(
    partials, partial_lse, q, buffer, pages, items, scale_log2, rows, heads, group, tokens, count_items,
    q_stride, q_head_stride, key_part, value_part,
    KEY: gl.constexpr, VALUE: gl.constexpr, HEAD_DIM: gl.constexpr, CB: gl.constexpr, BLOCKS: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr, DECODE_REGISTERS: gl.constexpr,
):  # fmt: skip
    LANES: gl.constexpr = HEAD_DIM // 8
    WIDE_LIKE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, HEAD_DIM], gl.bfloat16)
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD_DIM], gl.bfloat16)

    head = gl.program_id(0) // count_items
    item = items + gl.program_id(0) % count_items * 9
    book, first_entry = gl.load(item + 1).to(gl.int64) * UNIT, gl.load(item + 2)
    begin, count, slot = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
    query0, row0, live_rows = gl.load(item + 6), gl.load(item + 7), gl.load(item + 8)

    query_tiles = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, 64, HEAD_DIM], QUERIES)
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE_LIKE))
    for block in gl.static_range(BLOCKS):
        row = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, WIDE_LIKE))
        query = query0 + (row0 + row) // group
        at = query.to(gl.int64) * q_stride + (head * group + (row0 + row) % group) * q_head_stride
        queries = gl.load(q + at[:, None] + channel[None, :], mask=(row < live_rows)[:, None], other=0.0)
        if KEY.balanced:
            balance = (buffer + (book + key_part.balance)).to(gl.pointer_type(gl.bfloat16)) + head * HEAD_DIM
            queries = (queries.to(gl.float32) * gl.load(balance + channel).to(gl.float32)[None, :]).to(gl.bfloat16)
        query_tiles.index(block).store(queries)
    key_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, HEAD_DIM], SHARED)
    value_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, HEAD_DIM], SHARED)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=BLOCKS)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=BLOCKS)
    fence_async_shared()

    key_book = (buffer + (book + key_part.centroids)).to(gl.pointer_type(gl.int64))
    key_book += head * key_part.num_centroids * (HEAD_DIM // 4)
    value_book = (buffer + (book + value_part.centroids)).to(gl.pointer_type(gl.int64))
    value_book += head * value_part.num_centroids * (HEAD_DIM // 4)
    pages += first_entry
    KEY_STEP: gl.constexpr = KEY.step
    KEY_OFFSET: gl.constexpr = KEY.offset
    VALUE_STEP: gl.constexpr = VALUE.step
    VALUE_OFFSET: gl.constexpr = VALUE.offset
    BALANCED: gl.constexpr = VALUE.balanced
    # Constants in a tuple with a name would become numbers: the tuples are written out.
    if BLOCKS == 1:
        gl.warp_specialize([
            (_attend, (
                query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
                slot, query0, row0, live_rows, rows, heads, group, head, 0, BALANCED, HEAD_DIM, N, STAGES,
            )),
            (decode_pages_into, (
                key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                buffer, pages, key_book, value_book, begin, count, head, tokens, key_part, value_part,
                KEY_STEP, KEY_OFFSET, VALUE_STEP, VALUE_OFFSET, HEAD_DIM, CB, N, STAGES, WARPS,
            )),
        ], [WARPS], [DECODE_REGISTERS])  # fmt: skip
    elif BLOCKS == 2:
        gl.warp_specialize([
            (_attend, (
                query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
                slot, query0, row0, live_rows, rows, heads, group, head, 0, BALANCED, HEAD_DIM, N, STAGES,
            )),
            (_attend, (
                query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
                slot, query0, row0, live_rows, rows, heads, group, head, 1, BALANCED, HEAD_DIM, N, STAGES,
            )),
            (decode_pages_into, (
                key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                buffer, pages, key_book, value_book, begin, count, head, tokens, key_part, value_part,
                KEY_STEP, KEY_OFFSET, VALUE_STEP, VALUE_OFFSET, HEAD_DIM, CB, N, STAGES, WARPS,
            )),
        ], [4, WARPS], [REGISTERS, DECODE_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (
                query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
                slot, query0, row0, live_rows, rows, heads, group, head, 0, BALANCED, HEAD_DIM, N, STAGES,
            )),
            (_attend, (
                query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
                slot, query0, row0, live_rows, rows, heads, group, head, 1, BALANCED, HEAD_DIM, N, STAGES,
            )),
            (_attend, (
                query_tiles, key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                partials, partial_lse, buffer, book, value_part, begin, count, tokens, scale_log2,
                slot, query0, row0, live_rows, rows, heads, group, head, 2, BALANCED, HEAD_DIM, N, STAGES,
            )),
            (decode_pages_into, (
                key_tiles, value_tiles, key_ready, key_free, value_ready, value_free,
                buffer, pages, key_book, value_book, begin, count, head, tokens, key_part, value_part,
                KEY_STEP, KEY_OFFSET, VALUE_STEP, VALUE_OFFSET, HEAD_DIM, CB, N, STAGES, WARPS,
            )),
        ], [4, 4, WARPS], [REGISTERS, REGISTERS, DECODE_REGISTERS])  # fmt: skip
