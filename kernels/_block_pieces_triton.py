"""Blocks of channels as the pack kernel holds them: read in pieces, so that few threads share one, and stored again."""

import triton
import triton.language as tl

__all__ = ["read_blocks", "store_blocks"]


@triton.jit
def _read_piece(
    x_ptr, inverse_ptr, ids_ptr, centroids_ptr, token, inside, channel, row, rows, span_tokens, num_centroids,
    token_stride, D: tl.constexpr, STAGES: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """What is left of some channels ``[1, blocks, channels]`` of a frame's tokens ``[R, 1, 1]``, as `read_tokens`."""
    x = tl.load(x_ptr + token.to(tl.int64) * token_stride + channel, mask=inside, other=0.0)
    dtype = x.dtype
    if BALANCED:
        x = (x.to(tl.float32) * tl.load(inverse_ptr + row * D + channel)).to(dtype)
    for stage in tl.static_range(STAGES):
        source = ids_ptr + (stage * rows + row).to(tl.int64) * span_tokens + token
        chosen = tl.load(source, mask=inside, other=0).to(tl.int32)
        at = ((stage * rows + row) * num_centroids + chosen) * D
        centroid = tl.load(centroids_ptr + at + channel, mask=inside, other=0.0)
        x = (x.to(tl.float32) - centroid.to(tl.float32)).to(dtype)
    return x.to(tl.float32)


@triton.jit
def read_blocks(
    x_ptr, inverse_ptr, ids_ptr, centroids_ptr, token, inside, row, rows, span_tokens, num_centroids, token_stride,
    D: tl.constexpr, B: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """What is left of the blocks of a frame's tokens ``[R]``, ``[R, blocks, B]``, `W` pieces of a block in a thread.

    Fewer threads then share a block, and what is done once per thread and block is done less often. Of the last axis,
    piece `w` has every `W`-th place from `w` on.
    """
    C: tl.constexpr = B // W
    token, inside = token[:, None, None], inside[:, None, None]
    channel = (tl.arange(0, D // B) * B)[None, :, None] + tl.arange(0, C)[None, None, :]
    x = _read_piece(
        x_ptr, inverse_ptr, ids_ptr, centroids_ptr, token, inside, channel, row, rows, span_tokens, num_centroids,
        token_stride, D, STAGES, BALANCED,
    )  # fmt: skip
    if W > 1:
        second = _read_piece(
            x_ptr, inverse_ptr, ids_ptr, centroids_ptr, token, inside, channel + C, row, rows, span_tokens,
            num_centroids, token_stride, D, STAGES, BALANCED,
        )  # fmt: skip
        if W == 4:
            third = _read_piece(
                x_ptr, inverse_ptr, ids_ptr, centroids_ptr, token, inside, channel + 2 * C, row, rows, span_tokens,
                num_centroids, token_stride, D, STAGES, BALANCED,
            )  # fmt: skip
            fourth = _read_piece(
                x_ptr, inverse_ptr, ids_ptr, centroids_ptr, token, inside, channel + 3 * C, row, rows, span_tokens,
                num_centroids, token_stride, D, STAGES, BALANCED,
            )  # fmt: skip
            x, second = tl.join(x, third), tl.join(second, fourth)
        x = tl.reshape(tl.join(x, second), (token.shape[0], D // B, B))
    return x


@triton.jit
def _store_piece(out_ptr, packed, inside, split, first, D: tl.constexpr):
    """Store codes ``[R, blocks, C]`` of the channels from `first` ``[1, blocks, 1]`` on, in stored channel order."""
    R: tl.constexpr = packed.shape[0]
    blocks: tl.constexpr = packed.shape[1]
    C: tl.constexpr = packed.shape[2]
    if split != 0:
        even, odd = tl.split(tl.reshape(packed, (R, blocks, C // 2, 2)))
        pair = first // 2 + tl.arange(0, C // 2)[None, None, :]
        tl.store(out_ptr + pair, even, mask=inside)
        tl.store(out_ptr + D // 2 + pair, odd, mask=inside)
    else:
        tl.store(out_ptr + first + tl.arange(0, C)[None, None, :], packed, mask=inside)


@triton.jit
def store_blocks(
    out_ptr, packed, inside, split, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Store codes in the order of `read_blocks` at `out_ptr` ``[R, 1, 1]``."""
    C: tl.constexpr = B // W
    first = (tl.arange(0, D // B) * B)[None, :, None]
    if W == 1:
        _store_piece(out_ptr, packed, inside, split, first, D)
    elif W == 2:
        one, two = tl.split(tl.reshape(packed, (R, D // B, C, 2)))
        _store_piece(out_ptr, one, inside, split, first, D)
        _store_piece(out_ptr, two, inside, split, first + C, D)
    else:
        even, odd = tl.split(tl.reshape(packed, (R, D // B, C, 2, 2)))
        one, three = tl.split(even)
        two, four = tl.split(odd)
        _store_piece(out_ptr, one, inside, split, first, D)
        _store_piece(out_ptr, two, inside, split, first + C, D)
        _store_piece(out_ptr, three, inside, split, first + 2 * C, D)
        _store_piece(out_ptr, four, inside, split, first + 3 * C, D)
