"""What attention of few queries needs of the queries and a codebook, computed once per codebook and KV head.

A table, in 4-byte units, for `ROWS` query rows (units of scores are chosen so that ``scale * raw product`` is one):

    centroids  [num_centroids, ROWS] float32     score of a key that is exactly this centroid
    queries    [16, head_dim] float16            balanced, times a power of two that brings the largest near 2^13
    units      [ROWS] float32                    log2 of a weight per unit of score
    starts     [blocks, ROWS] float32            what the grid's offset adds to the raw product of a block
"""

import triton
import triton.language as tl

from qvg_paged.kernels._page_tiles import read_balance

__all__ = ["query_tables_kernel", "table_floats"]

CENTROIDS = 64
UNIT = tl.constexpr(256)
FIELD = tl.constexpr(2.0**24)
"""A float16 whose bits are an integer below 1024 is that integer times 2^-24."""


def table_floats(num_centroids: int, head_dim: int, blocks: int, rows: int) -> int:
    """Size of a table in 4-byte units."""
    return num_centroids * rows + 16 * head_dim // 2 + (1 + blocks) * rows


@triton.jit(do_not_specialize=["heads", "group", "floats"])
def query_tables_kernel(
    tables, q, buffer, work, scale_log2, heads, group, floats, key_part, q_stride, q_head_stride,
    KEY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CENTROIDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (table, KV head, chunk of centroids); `work` holds ``codebook, first query, first row, rows``."""
    if OVERLAP:  # the kernel that reads the tables may begin
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    head = tl.program_id(1)
    item = work + tl.program_id(0) * 4
    book, first_query, first_row, live = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    row = tl.arange(0, 16)
    channel = tl.arange(0, HEAD_DIM)
    at = (first_query + (first_row + row) // group).to(tl.int64) * q_stride
    at += (head * group + (first_row + row) % group) * q_head_stride
    query = tl.load(q + at[:, None] + channel[None, :], mask=(row < live)[:, None], other=0.0).to(tl.float32)
    query *= read_balance(buffer, book, head, channel, key_part, KEY, HEAD_DIM)[None, :]
    largest = tl.max(tl.abs(query), 1)
    power = tl.exp2(13.0 - tl.floor(tl.log2(tl.where(largest > 0.0, largest, 1.0))))
    query *= power[:, None]  # [16, HEAD_DIM]

    table = tables + (tl.program_id(0) * heads + head).to(tl.int64) * floats
    book_bytes = book.to(tl.int64) * UNIT
    centroid = tl.program_id(2) * CENTROIDS + tl.arange(0, CENTROIDS)
    rows = (buffer + (book_bytes + key_part.centroids)).to(tl.pointer_type(tl.bfloat16))
    rows += (head * key_part.num_centroids + centroid)[:, None] * HEAD_DIM + channel[None, :]
    known = tl.load(rows, mask=(centroid < key_part.num_centroids)[:, None], other=0.0).to(tl.float32)
    scores = tl.dot(known, tl.trans(query), input_precision="tf32x3") / (16777216.0 * KEY.step)  # [CENTROIDS, 16]
    inside = (centroid < key_part.num_centroids)[:, None] & (row < ROWS)[None, :]
    tl.store(table + centroid[:, None] * ROWS + row[None, :], scores, mask=inside)
    power_unit = scale_log2 * KEY.step * 16777216.0
    if tl.program_id(2) == 0:
        rounded = query.to(tl.float16)
        halves = (table + key_part.num_centroids * ROWS).to(tl.pointer_type(tl.float16))
        tl.store(halves + row[:, None] * HEAD_DIM + channel[None, :], rounded)
        factors = table + key_part.num_centroids * ROWS + 16 * HEAD_DIM // 2
        mine = row < ROWS
        tl.store(factors + row, power_unit / power, mask=mine)
        for block in tl.static_range(BLOCKS):
            within = channel // (HEAD_DIM // BLOCKS) == block
            total = tl.sum(tl.where(within[None, :], rounded.to(tl.float32), 0.0), 1)
            tl.store(factors + (1 + block) * ROWS + row, total * (KEY.offset / KEY.step / 16777216.0), mask=mine)
