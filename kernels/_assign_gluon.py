"""Nearest centroids on Hopper's asynchronous tensor cores: a Gluon kernel, for sm_90.

A program keeps the centroids of one row in shared memory and walks tiles of tokens, which come in some tiles ahead.
While the tensor cores multiply tokens with one half of the centroids, the minimum over the other half is taken.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from qvg_paged.kernels._sum_gluon import copy_tile, next_tile

__all__ = ["assign_kernel"]


@gluon.jit
def _keep_centroids(
    shared, c_ptr, inverse_ptr, start, num_centroids, D: gl.constexpr, N: gl.constexpr, BALANCED: gl.constexpr,
    LOAD: gl.constexpr,
):  # fmt: skip
    """Centroids from `start` on into shared memory ``[N, D]``, divided by the balance once more."""
    k = start + gl.arange(0, N, gl.SliceLayout(1, LOAD))
    channel = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    c = gl.load(c_ptr + k[:, None] * D + channel[None, :], mask=(k < num_centroids)[:, None], other=0.0)
    if BALANCED:
        c = (c.to(gl.float32) * gl.load(inverse_ptr + channel)[None, :]).to(gl.bfloat16)
    shared.store(c)


@gluon.jit
def _nearest_of(products, norm, start, mask, T: gl.constexpr, N: gl.constexpr):
    """How near the nearest of `N` centroids is, ``2 x c - c c``, with 255 minus its number in the low byte, ``[T, 4]``.

    Each of a lane's numbers but for the two bits in which lanes differ: what is added here are constants. `mask` is
    -256: as an argument, since an instruction takes one constant.
    """
    score = 2.0 * products - norm[None, :]
    number = gl.arange(0, N, norm.type.layout)
    tag = 249 - start - (number & 248) - (number & 1)
    near = ((score.to(gl.int32, bitcast=True) & mask) | tag[None, :]).to(gl.float32, bitcast=True)
    return gl.max(gl.max(gl.reshape(near, [T, N // 8, 4, 2]), 3), 1)


@gluon.jit
def _number(near):
    """Number of the nearest centroid of every token, from what lanes found."""
    lane = gl.arange(0, 4, gl.SliceLayout(0, near.type.layout))
    found = near.to(gl.int32, bitcast=True) | (6 - 2 * lane)[None, :]
    return 255 - (gl.max(found.to(gl.float32, bitcast=True), 1).to(gl.int32, bitcast=True) & 255)


@gluon.jit(do_not_specialize=[
    "starts_ptr", "first_row", "heads", "frames", "frame_tokens", "span_tokens", "num_centroids", "tiles", "mask"
])
def assign_kernel(
    c_ptr, norms_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, first_row, heads, frames, frame_tokens, span_tokens,
    num_centroids, token_stride, head_stride, tiles, mask, D: gl.constexpr, K: gl.constexpr, AHEAD: gl.constexpr,
    BALANCED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `_assign_kernel` of the first stage."""
    T: gl.constexpr = 16 * num_warps
    N: gl.constexpr = K // 2
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, N, 16]
    )
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    OF_N: gl.constexpr = gl.SliceLayout(0, PRODUCTS)
    row = gl.program_id(1)
    starts_ptr += (first_row + row) // heads * frames
    x_ptr += ((first_row + row) % heads).to(gl.int64) * head_stride
    ids_ptr += row.to(gl.int64) * span_tokens
    per_frame = gl.cdiv(frame_tokens, T)
    begin = gl.program_id(0) * tiles
    count = gl.minimum(tiles, frames * per_frame - begin)
    frame, first = begin // per_frame, begin % per_frame * T  # of the tile that is asked for next
    id_frame, id_first = frame, first
    buffers = gl.allocate_shared_memory(
        gl.bfloat16, [AHEAD + 1, T, D], gl.NVMMASharedLayout.get_default_for([T, D], gl.bfloat16)
    )
    for ahead in gl.static_range(AHEAD):
        copy_tile(buffers.index(ahead), x_ptr, starts_ptr, frame, first, frame_tokens, token_stride, D, T, LOAD)
        async_copy.commit_group()
        frame, first = next_tile(frame, first, ahead + 1 < count, frame_tokens, T)
    halves = gl.allocate_shared_memory(
        gl.bfloat16, [2, N, D], gl.NVMMASharedLayout.get_default_for([N, D], gl.bfloat16)
    )
    c_ptr += row * num_centroids * D
    for half in gl.static_range(2):
        _keep_centroids(
            halves.index(half), c_ptr, inverse_ptr + row * D, half * N, num_centroids, D, N, BALANCED, LOAD
        )
    norms_ptr += row * num_centroids
    k = gl.arange(0, N, OF_N)
    norm = gl.load(norms_ptr + k, mask=k < num_centroids, other=3e38)
    second_norm = gl.load(norms_ptr + N + k, mask=N + k < num_centroids, other=3e38)
    zero = gl.zeros([T, N], gl.float32, PRODUCTS)
    lower, upper = halves.index(0).permute((1, 0)), halves.index(1).permute((1, 0))
    async_copy.wait_group(AHEAD - 1)
    fence_async_shared()
    one = warpgroup_mma(buffers.index(0), lower, zero, use_acc=False, is_async=True)
    one = warpgroup_mma_wait(0, [one])
    near = gl.max(gl.max(gl.reshape(zero, [T, N // 8, 4, 2]), 3), 1)
    for tile in range(count):
        other = warpgroup_mma(buffers.index(tile % (AHEAD + 1)), upper, zero, use_acc=False, is_async=True)
        if mask != 0:  # always: a block of its own, which instructions do not leave
            near = _nearest_of(one, norm, 0, mask, T, N)
        other = warpgroup_mma_wait(0, [other])
        async_copy.wait_group(AHEAD - 2)
        fence_async_shared()
        one = warpgroup_mma(buffers.index((tile + 1) % (AHEAD + 1)), lower, zero, use_acc=False, is_async=True)
        copy_tile(
            buffers.index((tile + AHEAD) % (AHEAD + 1)), x_ptr, starts_ptr, frame, first, frame_tokens,
            token_stride, D, T, LOAD,
        )  # fmt: skip
        async_copy.commit_group()
        frame, first = next_tile(frame, first, tile + AHEAD + 1 < count, frame_tokens, T)
        if mask != 0:
            chosen = _number(gl.maximum(near, _nearest_of(other, second_norm, N, mask, T, N)))
            token = gl.arange(0, T, chosen.type.layout)
            gl.store(
                ids_ptr + id_frame * frame_tokens + id_first + token, chosen.to(gl.uint8),
                mask=token < frame_tokens - id_first,
            )  # fmt: skip
        id_frame, id_first = next_tile(id_frame, id_first, tile + 1 < count, frame_tokens, T)
        one = warpgroup_mma_wait(0, [one])
    async_copy.wait_group(0)
