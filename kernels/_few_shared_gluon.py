"""What the warps of a program keep in shared memory: scores of centroids, weights of centroids, outputs in the end.

The value of a token is its centroid plus a residual, so that the centroids' part of the output is a sum over centroids,
each times the weight of all tokens that have it. Those weights are summed here, one addition a token and query, and
multiply the codebook once in the end: no row of it is read per token.

Sums are integers, because the hardware adds those to shared memory at once while it adds floats in a loop: a weight of
one is ``2^FRACTION_BITS``. That bounds the keys of a warp, see `qvg_paged.kernels.few_queries.MOST_GROUPS`. They become
integers by an addition that leaves them in the low bits of a float32.

Regions of ``[256, ROWS]`` words: scores, which all warps share, then the sums of each warp. After the loops the first
holds reference and total of each warp, and the others take the outputs. Addresses are integers, and everything but the
first zeros is read and written in assembly: Gluon has no additions to shared memory in all releases, and takes warps
that walk different keys for copies of each other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qvg_paged.kernels._few_operands_gluon import WARPS

__all__ = [
    "FRACTION_BITS", "SLACK", "add_weights", "allocate", "await_tables", "meet", "read_floats", "rescale", "settle",
    "stage", "warp_number", "weights_of", "write_floats",
]  # fmt: skip

SLACK = gl.constexpr(4.0)
"""Weights may exceed the running reference by this power of two: with scales up to 448 they still fit float16."""
FRACTION_BITS = gl.constexpr(16)
"""4096 keys, all with a weight of ``2^SLACK`` and one centroid, add up to ``2^32``."""

BASE = gl.constexpr("mov.u32 $0, global_smem;")
WARP = gl.constexpr("mov.u32 $0, %tid.x;\nshr.u32 $0, $0, 5;")
AWAIT = gl.constexpr("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nmov.u32 $0, $1;")
SETTLE = gl.constexpr("bar.warp.sync 0xffffffff;\nmov.u32 $0, $1;")
MEET = gl.constexpr("bar.sync 0;\nmov.u32 $0, $1;")
COPY = gl.constexpr("cp.async.cg.shared.global [$1], [$2], 16;\nmov.u32 $0, $1;")
COPIED = gl.constexpr("cp.async.wait_all;\nbar.sync 0;\nmov.u32 $0, $1;")
ADD = gl.constexpr("""{
.reg .u32 fixed;
.reg .f32 moved;
fma.rn.f32 moved, $2, $3, 0f4B000000;
mov.b32 fixed, moved;
and.b32 fixed, fixed, 0x007FFFFF;
red.shared.add.u32 [$1], fixed;
mov.u32 $0, fixed;
}""")
RESCALE = gl.constexpr("""{
.reg .u32 fixed;
.reg .f32 weight;
ld.shared.u32 fixed, [$1];
cvt.rn.f32.u32 weight, fixed;
mul.f32 weight, weight, $2;
cvt.rni.u32.f32 fixed, weight;
st.shared.u32 [$1], fixed;
mov.u32 $0, fixed;
}""")
READ = gl.constexpr("""{
.reg .u32 fixed;
ld.shared.u32 fixed, [$1];
cvt.rn.f32.u32 $0, fixed;
}""")
READ_FLOAT = gl.constexpr("ld.shared.f32 $0, [$1];")
WRITE_FLOAT = gl.constexpr("st.shared.f32 [$1], $2;\nmov.u32 $0, $1;")


@gluon.jit
def allocate(any_number, ROWS: gl.constexpr):
    """Address of the regions, all sums zero once warps have met; it is the only shared memory of the kernel."""
    REGION: gl.constexpr = 256 * ROWS
    regions = gl.allocate_shared_memory(gl.int32, [WARPS + 1, REGION], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    for warp in gl.static_range(WARPS):
        regions.index(warp + 1).store(gl.zeros([REGION], gl.int32, LINE))
    return gl.inline_asm_elementwise(BASE, "=r,r", [any_number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def warp_number(any_number):
    """The number of this warp: it makes every warp's copy of what follows from it its own."""
    return gl.inline_asm_elementwise(WARP, "=r,r", [any_number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_tables(table_id):
    """`table_id`, once the launch before this one has ended; the one after it may begin."""
    return gl.inline_asm_elementwise(AWAIT, "=r,r", [table_id], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def settle(sums):
    """`sums`, once all lanes have done to them what they had to do."""
    return gl.inline_asm_elementwise(SETTLE, "=r,r", [sums], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet(address):
    """`address`, once all warps are here."""
    return gl.inline_asm_elementwise(MEET, "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def stage(scores, table, num_centroids, ROWS: gl.constexpr):
    """Copy the scores of centroids, ``[num_centroids, ROWS]``; their address, once all warps have done their part."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    place = gl.arange(0, 64 * ROWS, LINE)
    source = table + gl.minimum(place, num_centroids * (ROWS // 4) - 1) * 4
    gl.inline_asm_elementwise(
        COPY, "=r,r,l", [scores + place * 16, source.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.inline_asm_elementwise(COPIED, "=r,r", [scores], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_floats(at):
    """Floats at addresses `at`, which follow from what `meet` or `stage` returned after they were written."""
    return gl.inline_asm_elementwise(READ_FLOAT, "=f,r", [at], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def write_floats(at, values):
    """Write floats to addresses `at`."""
    gl.inline_asm_elementwise(WRITE_FLOAT, "=r,r,f", [at, values], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add_weights(sums, weights, one, ids, ROWS: gl.constexpr):
    """Add ``weights [ROWS, keys]`` times `one` to the sums of `ids`, rounded to integers below ``2^23``."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, weights.type.layout))
    at = (sums + row * 4)[:, None] + ids[None, :] * (4 * ROWS)
    ones = gl.full([ROWS, 16], one, gl.float32, weights.type.layout)
    gl.inline_asm_elementwise(ADD, "=r,r,f,f", [at, weights, ones], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def rescale(sums, keep, num_centroids, ROWS: gl.constexpr, LIKE: gl.constexpr):
    """Multiply the sums of each row by `keep`."""
    sums = settle(sums)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LIKE))
    column = gl.arange(0, 16, gl.SliceLayout(0, LIKE))
    at = (sums + row * 4)[:, None] + column[None, :] * (4 * ROWS)
    factor = keep[:, None] + gl.zeros([ROWS, 16], gl.float32, LIKE)
    for first in range(0, (num_centroids + 63) // 64 * 64, 16):
        gl.inline_asm_elementwise(
            RESCALE, "=r,r,f", [at + first * (4 * ROWS), factor], dtype=gl.int32, is_pure=False, pack=1
        )
    return settle(sums)


@gluon.jit
def weights_of(sums, first, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Sums ``[16, ROWS]`` of the centroids from `first` on as float32."""
    centroid = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    at = (sums + first * (4 * ROWS) + centroid * (4 * ROWS))[:, None] + (row * 4)[None, :]
    return gl.inline_asm_elementwise(READ, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)
