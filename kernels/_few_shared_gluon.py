"""What a program of one warp keeps in shared memory: the weights of centroids, and a copy of the scores of centroids.

The value of a token is its centroid plus a residual, so that the centroids' part of the output is a sum over centroids,
each times the weight of all tokens that have it. Those weights are summed here, one addition a token and query, and
multiply the codebook once in the end: no row of it is read per token.

Sums are integers, because the hardware adds those to shared memory at once while it adds floats in a loop: a weight of
one is ``2^FRACTION_BITS``. That bounds the keys of a program, see `qvg_paged.kernels.few_queries.MOST_GROUPS`.

The memory is declared in assembly, and addresses are integers: Gluon has no additions to shared memory in all releases.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "FRACTION_BITS", "SLACK", "add_weights", "allocate", "read_scores", "rescale", "settle", "stage", "weights_of"
]  # fmt: skip

SLACK = gl.constexpr(4.0)
"""Weights may exceed the running reference by this power of two: with scales up to 448 they still fit float16."""
FRACTION_BITS = gl.constexpr(16)
"""4096 keys, all with a weight of ``2^SLACK`` and one centroid, add up to ``2^32``."""

SETTLE = gl.constexpr("bar.warp.sync 0xffffffff;\nmov.u32 $0, $1;")
COPY = gl.constexpr("cp.async.cg.shared.global [$1], [$2], 16;\nmov.u32 $0, $1;")
COPIED = gl.constexpr("cp.async.wait_all;\nbar.warp.sync 0xffffffff;\nmov.u32 $0, $1;")
ADD = gl.constexpr("""{
.reg .u32 fixed;
cvt.rni.u32.f32 fixed, $2;
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


@gluon.jit
def allocate(any_number, ROWS: gl.constexpr, STAGED: gl.constexpr):
    """Address of the sums ``[256, ROWS]`` and room for the scores; they hold anything until `rescale` by zero."""
    SIZE: gl.constexpr = 2048 * ROWS if STAGED else 1024 * ROWS
    ALLOCATE: gl.constexpr = (
        f"{{\n.shared .align 16 .b8 weights_of_centroids[{SIZE}];\nmov.u32 $0, weights_of_centroids;\n}}"
    )
    return gl.inline_asm_elementwise(ALLOCATE, "=r,r", [any_number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def settle(sums):
    """`sums`, once all lanes have done to them what they had to do."""
    return gl.inline_asm_elementwise(SETTLE, "=r,r", [sums], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def stage(sums, table, num_centroids, ROWS: gl.constexpr):
    """Copy the scores of centroids, ``[num_centroids, ROWS]``, behind the sums; their address."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = gl.arange(0, 64 * ROWS, LINE)
    source = table + gl.minimum(place, num_centroids * (ROWS // 4) - 1) * 4
    scores = sums + 1024 * ROWS
    gl.inline_asm_elementwise(
        COPY, "=r,r,l", [scores + place * 16, source.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.inline_asm_elementwise(COPIED, "=r,r", [scores], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_scores(scores, ids, ROWS: gl.constexpr, LIKE: gl.constexpr):
    """Staged scores ``[ROWS, keys]`` of `ids`."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LIKE))
    at = (scores + row * 4)[:, None] + ids[None, :] * (4 * ROWS)
    return gl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def add_weights(sums, weights, ids, ROWS: gl.constexpr):
    """Add ``weights [ROWS, keys]``, of which one is ``2^FRACTION_BITS``, to the sums of `ids`."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, weights.type.layout))
    at = (sums + row * 4)[:, None] + ids[None, :] * (4 * ROWS)
    gl.inline_asm_elementwise(ADD, "=r,r,f", [at, weights], dtype=gl.int32, is_pure=False, pack=1)


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
