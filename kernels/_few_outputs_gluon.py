"""How the warps of a program of the kernel for few queries add up their outputs, and the centroids' part of them.

Outputs have channels as rows, in tiles of 16: the layout would give larger ones to different warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qvg_paged.kernels._few_operands_gluon import BLOCK, CENTROIDS, MMA, WARPS, row_operand
from qvg_paged.kernels._few_shared_gluon import FRACTION_BITS, read_floats, weights_of, write_floats

__all__ = [
    "add_centroids", "add_tiles", "hand_over", "highest_reference", "kept", "load_centroids", "store_outputs", "times"
]  # fmt: skip

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def add_tiles(acc, tiles, weights):
    return (
        mma_v2(tiles[0], weights, acc[0]), mma_v2(tiles[1], weights, acc[1]),
        mma_v2(tiles[2], weights, acc[2]), mma_v2(tiles[3], weights, acc[3]),
    )  # fmt: skip


@gluon.jit
def times(acc, factor):
    return acc[0] * factor, acc[1] * factor, acc[2] * factor, acc[3] * factor


@gluon.jit
def load_centroids(table, first, num_centroids, BLOCKS: gl.constexpr):
    """The first and the last block of 16 rows of a codebook; past its end, of the last row."""
    row = first + gl.arange(0, 16, gl.SliceLayout(1, CENTROIDS))
    channel = gl.arange(0, BLOCK, gl.SliceLayout(0, CENTROIDS))
    row = gl.minimum(row, num_centroids - 1)
    at = (table + channel)[None, :] + row[:, None] * (BLOCKS * BLOCK)
    rows_a = gl.load(at)
    rows_b = rows_a
    if BLOCKS == 2:
        rows_b = gl.load(at + BLOCK)
    return rows_a, rows_b


@gluon.jit
def highest_reference(base, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The highest reference ``[ROWS]`` of all warps."""
    at = base + gl.arange(0, ROWS, LAYOUT) * 4
    top = read_floats(at)
    for warp in gl.static_range(1, WARPS):
        top = gl.maximum(top, read_floats(at + warp * (4 * ROWS)))
    return top


@gluon.jit
def kept(base, warp, top, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """What the weights of a warp are worth by the reference of all."""
    return gl.exp2(read_floats(base + warp * (4 * ROWS) + gl.arange(0, ROWS, LAYOUT) * 4) - top)


@gluon.jit
def add_centroids(
    acc_a, acc_b, rows_a, rows_b, base, warp, centroids, num_centroids,
    UNIT_OUT: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Add every `WARPS`-th block of centroids, the first one given, each times its weight of all warps."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    LINE: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    top = highest_reference(base, ROWS, LINE)
    for first in range(16 * warp, num_centroids, 16 * WARPS):
        after_a, after_b = load_centroids(centroids, first + 16 * WARPS, num_centroids, BLOCKS)
        weights = gl.zeros([16, ROWS], gl.float32, LAYOUT)
        for other in gl.static_range(WARPS):
            sums = base + (other + 1) * (1024 * ROWS)
            weights += weights_of(sums, first, ROWS, LAYOUT) * kept(base, other, top, ROWS, LINE)[None, :]
        weights = (weights * (UNIT_OUT * 2.0 ** (3 - FRACTION_BITS))).to(gl.bfloat16)
        acc_a = add_tiles(acc_a, row_operand(rows_a), weights)
        if BLOCKS == 2:
            acc_b = add_tiles(acc_b, row_operand(rows_b), weights)
        rows_a, rows_b = after_a, after_b
    return acc_a, acc_b


@gluon.jit
def hand_over(region, acc, sums, OFFSET: gl.constexpr, BLOCK_ID: gl.constexpr, LINE: gl.constexpr):
    """Write a block of outputs, what the grid's offset adds included."""
    offsets = gl.max(sums, 0) * OFFSET  # rows of `sums` are equal
    ROWS: gl.constexpr = sums.shape[1]
    at = gl.arange(0, 16, gl.SliceLayout(1, MMA))[:, None] * 4
    at += (region + BLOCK_ID * (4 * BLOCK) + gl.arange(0, ROWS, gl.SliceLayout(0, MMA)) * (4 * LINE))[None, :]
    for tile in gl.static_range(4):
        write_floats(at + 64 * tile, acc[tile] + offsets[None, :])


@gluon.jit
def store_outputs(
    partials, partial_lse, base, balance, slot, query0, row0, live_rows, rows, heads, group, head,
    UNIT_OUT: gl.constexpr, BALANCED: gl.constexpr, ROWS: gl.constexpr, BLOCKS: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """Store the sum of what warps have handed over."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    RUN: gl.constexpr = gl.SliceLayout(1, OUT)
    row, channel = gl.arange(0, ROWS, RUN), gl.arange(0, BLOCKS * BLOCK, gl.SliceLayout(0, OUT))
    top, total = highest_reference(base, ROWS, RUN), gl.zeros([ROWS], gl.float32, RUN)
    out = gl.zeros([ROWS, BLOCKS * BLOCK], gl.float32, OUT)
    place = channel // BLOCK * BLOCK + channel % 8 * 8 + channel % BLOCK // 8
    for warp in gl.static_range(WARPS):
        total += read_floats(base + (WARPS + warp) * (4 * ROWS) + row * 4) * kept(base, warp, top, ROWS, RUN)
        region = base + (warp + 1) * (1024 * ROWS)
        out += read_floats((region + row * (4 * LINE))[:, None] + (place * 4)[None, :])
    out *= ((1.0 / UNIT_OUT) / total)[:, None]
    if BALANCED:
        out *= gl.load(balance + channel).to(gl.float32)[None, :]
    query_row, live = row0 + row, row < live_rows
    where = (slot.to(gl.int64) * rows + (query0 + query_row // group)) * (heads * group)
    where += head * group + query_row % group
    gl.store(partial_lse + where, (top - 3.0 + gl.log2(total)) * LN_2, mask=live)
    at = where[:, None] * (BLOCKS * BLOCK) + channel[None, :]
    gl.store(partials + at, out, mask=live[:, None] & (channel[None, :] >= 0))
