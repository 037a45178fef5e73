"""Sums of the tokens of every centroid on Hopper's asynchronous tensor cores: a Gluon kernel, for sm_90.

A program adds up one run of tiles of one row: ones and zeros ``[K, T]`` times tokens ``[T, D]``. The ones and zeros are
made in the registers that the product takes them from, those of the next tile while it is under way; tokens come into
shared memory as stored, some tiles ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

__all__ = ["copy_tile", "next_tile", "sum_kernel"]

load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Its name differs between releases of Triton."""
EQUAL = gl.constexpr("set.eq.bf16x2.bf16x2 $0, $1, $2;")


@gluon.jit
def copy_tile(
    shared, x_ptr, starts_ptr, frame, first, frame_tokens, token_stride, D: gl.constexpr, T: gl.constexpr,
    LOAD: gl.constexpr,
):  # fmt: skip
    """Ask for the tokens of a frame from `first` on; behind the frame's end there are zeros."""
    token = gl.arange(0, T, gl.SliceLayout(1, LOAD))
    start = gl.multiple_of(gl.load(starts_ptr + frame), 16) + first.to(gl.int64) * token_stride
    at = (token.to(gl.int64) * token_stride)[:, None] + gl.arange(0, D, gl.SliceLayout(0, LOAD))[None, :]
    load_async(shared, x_ptr + start + at, mask=(token < frame_tokens - first)[:, None])


@gluon.jit
def next_tile(frame, first, more, frame_tokens, T: gl.constexpr):
    """Frame and first token of the next tile; of this one if there are no `more`."""
    over = first + T >= frame_tokens
    return frame + (more & over).to(gl.int32), gl.where(more, gl.where(over, 0, first + T), first)


@gluon.jit
def _label(number):
    """A bfloat16 for each of 256 numbers, no two of which are equal: its bits count from 0.5."""
    return (number + 0x3F00).to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _load_labels(ids_ptr, frame, first, frame_tokens, T: gl.constexpr, LIKE: gl.constexpr):
    """Labels of the centroids of `T` tokens of a frame; behind its end, of whatever."""
    return _label(gl.load(ids_ptr + frame * frame_tokens + first + gl.arange(0, T, LIKE)).to(gl.int32))


@gluon.jit
def _members(k, chosen):
    """Ones where a token ``[T]`` belongs to a centroid ``[K]``, else zeros, ``[K, T]`` bfloat16."""
    k, chosen = gl.broadcast(k[:, None], chosen[None, :])
    return gl.inline_asm_elementwise(EQUAL, "=r,r,r", [k, chosen], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit(do_not_specialize=[
    "starts_ptr", "first_row", "heads", "frames", "frame_tokens", "span_tokens", "num_centroids"
])
def sum_kernel(
    sums_ptr, counts_ptr, x_ptr, starts_ptr, ids_ptr, first_row, heads, frames, frame_tokens, span_tokens,
    num_centroids, token_stride, head_stride, D: gl.constexpr, K: gl.constexpr, T: gl.constexpr, RUN: gl.constexpr,
    LANES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """As `_sum_kernel` of the first stage; `K` is at least 128, warps are 8."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, D, 16])
    MEMBERS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, D], gl.bfloat16)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    run, row = gl.program_id(0), gl.program_id(1)
    starts_ptr += (first_row + row) // heads * frames
    x_ptr += ((first_row + row) % heads).to(gl.int64) * head_stride
    ids_ptr += row.to(gl.int64) * span_tokens
    per_frame = gl.cdiv(frame_tokens, T)
    begin = run * (RUN // T)
    count = gl.minimum(RUN // T, frames * per_frame - begin)
    frame, first = begin // per_frame, begin % per_frame * T  # of the tile that is asked for next
    id_frame, id_first = frame, first
    tiles = gl.allocate_shared_memory(gl.bfloat16, [AHEAD + 1, T, D], SHARED)
    for ahead in gl.static_range(AHEAD):
        copy_tile(tiles.index(ahead), x_ptr, starts_ptr, frame, first, frame_tokens, token_stride, D, T, LOAD)
        async_copy.commit_group()
        frame, first = next_tile(frame, first, ahead + 1 < count, frame_tokens, T)
    LIKE: gl.constexpr = gl.SliceLayout(0, MEMBERS)
    k = _label(gl.arange(0, K, gl.SliceLayout(1, MEMBERS)))
    members = _members(k, _load_labels(ids_ptr, id_frame, id_first, frame_tokens, T, LIKE))
    id_frame, id_first = next_tile(id_frame, id_first, count > 1, frame_tokens, T)
    following = _load_labels(ids_ptr, id_frame, id_first, frame_tokens, T, LIKE)
    sums = gl.zeros([K, D], gl.float32, SUMS)
    for tile in range(count):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        # Its place in shared memory held the tile before this one, whose product every warp has waited for.
        copy_tile(
            tiles.index((tile + AHEAD) % (AHEAD + 1)), x_ptr, starts_ptr, frame, first, frame_tokens, token_stride,
            D, T, LOAD,
        )  # fmt: skip
        async_copy.commit_group()
        frame, first = next_tile(frame, first, tile + AHEAD + 1 < count, frame_tokens, T)
        sums = warpgroup_mma(members, tiles.index(tile % (AHEAD + 1)), sums, is_async=True)
        upcoming = _members(k, following)
        id_frame, id_first = next_tile(id_frame, id_first, tile + 2 < count, frame_tokens, T)
        following = _load_labels(ids_ptr, id_frame, id_first, frame_tokens, T, LIKE)
        sums = warpgroup_mma_wait(0, [sums])
        members = upcoming
    async_copy.wait_group(0)
    place = (row * gl.num_programs(0) + run) * num_centroids
    out_k = gl.arange(0, K, gl.SliceLayout(1, SUMS))
    at = (place + out_k)[:, None].to(gl.int64) * D + gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(sums_ptr + at, sums, mask=(out_k < num_centroids)[:, None])
    token = run * RUN + gl.arange(0, LANES, LINE)
    mine = (gl.arange(0, LANES, LINE) < RUN) & (token < span_tokens)
    chosen = gl.load(ids_ptr + token, mask=mine, other=0).to(gl.int32)
    number = gl.arange(0, K, LINE)
    members_of = gl.histogram(chosen, K, layout=LINE) - gl.where(number == 0, LANES - gl.sum(mine.to(gl.int32), 0), 0)
    gl.store(counts_ptr + place + number, members_of, mask=number < num_centroids)
