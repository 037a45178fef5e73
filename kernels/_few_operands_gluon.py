"""Bytes of 2-bit pages as operands of tensor cores, for Gluon kernels of one warp.

A 2-bit field that is masked where it stands, bits 2i and 2i + 1 of a byte, is the float16 subnormal
``code * 4^i * 2^-24``, and the layouts below put every byte where ``mma.m16n8k16`` wants it, so that nothing moves
between lanes. Codes are kept as words of four bytes: loops would carry single bytes in a register each.

Lane ``4 * g + t`` owns code rows ``4 * t ... 4 * t + 3`` of a group of 16; in products they come in the order
``8 * (row // 2 % 2) + 2 * t + row % 2``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "BLOCK", "CENTROIDS", "KEYS", "MMA", "PAIRS", "WARPS", "WORDS", "as_ids", "as_scales", "columns", "key_operand",
    "pair_values", "row_operand", "scaled_columns", "value_operand",
]  # fmt: skip

BLOCK = gl.constexpr(64)
"""Channels with a scale of their own."""
WARPS = gl.constexpr(4)
"""Warps of a program. To the compiler they are copies of each other, in truth each walks its own keys."""
COPIES = [[0, 0]] * (WARPS.value.bit_length() - 1)
MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS.value, 1], instr_shape=[16, 8]))
# Registers, then lanes (t, t, g, g, g): coordinates of each basis.
KEYS = gl.constexpr(
    gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], COPIES, [], [16, 16])
)
"""Words of a block of 16 code rows of keys."""
PAIRS = gl.constexpr(
    gl.DistributedLinearLayout([[0, 1], [4, 0]], [[1, 0], [2, 0], [0, 2], [0, 4], [0, 8]], COPIES, [], [8, 16])
)
"""Words of a block of every other of 16 code rows of values."""
CENTROIDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0], [8, 0]], [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]], COPIES, [], [16, 64]
    )
)
"""A block of 16 rows of a codebook."""
WORDS = gl.constexpr(gl.DistributedLinearLayout([], [[1], [2], [0], [0], [0]], [[0]] * len(COPIES), [], [4]))
"""Bytes of 16 tokens."""

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


# The same as float16, which they are exactly.
HALVES = gl.constexpr("""{
.reg .b16 lo, hi;
.reg .b32 p, q;
mov.b32 {lo, hi}, $4;
cvt.rn.f16x2.e4m3x2 p, lo;
cvt.rn.f16x2.e4m3x2 q, hi;
mov.b32 {$0, $1}, p;
mov.b32 {$2, $3}, q;
}""")
MULTIPLY = gl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@gluon.jit
def _four_times(words):
    """Each word as four equal elements, one for each byte in it; they stay one register."""
    words = gl.join(words, words)
    words = gl.join(words, words)
    return gl.reshape(words, [words.shape[0], 4 * words.shape[1]])


@gluon.jit
def _mask(words, shifted, PLACE: gl.constexpr):
    """Field `PLACE` of every byte as float16; of four channels in the order 0, 2, 1, 3."""
    MASK: gl.constexpr = f"and.b32 $0, $2, {0x00030003 << 2 * PLACE};\nand.b32 $1, $6, {0x00030003 << 2 * PLACE};"
    return gl.inline_asm_elementwise(
        MASK, "=r,=r,r,r,r,r,r,r,r,r", [_four_times(words), _four_times(shifted)], dtype=gl.float16, is_pure=True,
        pack=4,
    )  # fmt: skip


@gluon.jit
def key_operand(words, PLACE: gl.constexpr):
    """Codes of one place of 16 rows of keys as the operand ``[channels, 16]``."""
    x = _mask(words, words >> 8, PLACE)
    x = gl.permute(gl.reshape(x, [16, 4, BLOCK // 16, 2, 2]), [2, 3, 1, 4, 0])
    return gl.convert_layout(gl.reshape(x, [BLOCK, 16]), gl.DotOperandLayout(1, MMA, 2))


@gluon.jit
def pair_values(even, odd):
    """Words of even and odd rows: by channel modulo 4, the low bytes of the halves of a word are a pair of rows."""
    return gl.inline_asm_elementwise(
        PAIRED, "=r,=r,=r,=r,r,r", [even, odd], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _four_tiles(x):
    """Tiles ``[16, 16]`` of ``[tile % 2, tile // 2, 16, 16]`` as first operands."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    even, odd = gl.split(gl.permute(x, [1, 2, 3, 0]))
    a, c = gl.split(gl.permute(even, [1, 2, 0]))
    b, d = gl.split(gl.permute(odd, [1, 2, 0]))
    return (
        gl.convert_layout(a, LAYOUT), gl.convert_layout(b, LAYOUT),
        gl.convert_layout(c, LAYOUT), gl.convert_layout(d, LAYOUT),
    )  # fmt: skip


@gluon.jit
def value_operand(paired, PLACE: gl.constexpr):
    """Codes of one place of paired rows of values as operands ``[16 channels, 16]``, four of them."""
    x = gl.join(_mask(paired[0], paired[1], PLACE), _mask(paired[2], paired[3], PLACE))
    x = gl.reshape(x, [2, 4, 8, BLOCK // 32, 2, 2, 2])  # row // 2 % 2, t, g, word, channel % 2, row % 2, channel // 2
    return _four_tiles(gl.reshape(gl.permute(x, [6, 3, 4, 2, 0, 1, 5]), [2, 2, 16, 16]))


@gluon.jit
def row_operand(rows):
    """Rows ``[16, channels]`` as operands ``[16 channels, 16]``, channels as those of values."""
    x = gl.reshape(rows, [16, 8, 2, 2, 2])
    return _four_tiles(gl.reshape(gl.permute(x, [3, 2, 4, 1, 0]), [2, 2, 16, 16]))


@gluon.jit
def columns(weights):
    """Weights ``[ROWS, 16]`` as the second operand ``[16, ROWS]`` of the product with values."""
    return gl.convert_layout(gl.permute(weights.to(gl.float16), [1, 0]), gl.DotOperandLayout(1, MMA, 2))


@gluon.jit
def _in_product_order(a, b, c, d, LIKE: gl.constexpr):
    x = gl.join(gl.join(a, b), gl.join(c, d))  # [t, row % 2, row // 2 % 2]
    return gl.convert_layout(gl.reshape(gl.permute(x, [2, 0, 1]), [16]), LIKE)


@gluon.jit
def as_ids(words, LIKE: gl.constexpr):
    """Bytes as integers, in the order of products."""
    a, b, c, d = gl.inline_asm_elementwise(
        BYTES, "=r,=r,=r,=r,r", [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )
    return _in_product_order(a, b, c, d, LIKE)


@gluon.jit
def as_scales(words, LIKE: gl.constexpr):
    """Bytes as E4M3 numbers, in the order of products."""
    a, b, c, d = gl.inline_asm_elementwise(
        FLOATS, "=f,=f,=f,=f,r", [words], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1
    )
    return _in_product_order(a, b, c, d, LIKE)


@gluon.jit
def scaled_columns(weights, words):
    """Weights ``[16, ROWS]``, as `columns` makes them, times the scales of their tokens."""
    LIKE: gl.constexpr = gl.SliceLayout(1, weights.type.layout)
    a, b, c, d = gl.inline_asm_elementwise(
        HALVES, "=h,=h,=h,=h,r", [words], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1
    )
    weights, scales = gl.broadcast(weights, _in_product_order(a, b, c, d, LIKE)[:, None])
    return gl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [weights, scales], dtype=gl.float16, is_pure=True, pack=2)
