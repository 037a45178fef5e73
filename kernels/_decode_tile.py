"""Decoding in Triton: some rows of the `codes` plane of one head of one page into keys or values.

    x = balance * (scale * (step * code + offset) + sum over stages of centroid[id])

Channels are handled as two tiles, the first and the second of every RoPE pair, so that turning them is elementwise.
Float32 throughout, for kernels launched without contraction of products into sums: the values are those of the PyTorch
twin, bit for bit. What a program needs of all its tokens is asked for before anything is stored, since nothing tells
the compiler that stores leave it alone.
"""

import triton
import triton.language as tl

__all__ = ["angles", "at_place", "decode_head", "natural_channels", "turn_and_store"]


@triton.jit
def angles(cos_frame_ptr, sin_frame_ptr, cos_space_ptr, sin_space_ptr, token, D: tl.constexpr, ROPE: tl.constexpr):
    """Cosines and sines of the pairs of some tokens, ``[rows, D / 2]``; without a rotation, nothing of use.

    Tables are those of `RoPETables.wide`, at the frame's row and at the first token of a frame.
    """
    cos, sin = 1.0, 0.0
    if ROPE:
        pair = tl.arange(0, D // 2)
        at = (token * (D // 2))[:, None] + pair
        cos = tl.load(cos_space_ptr + at) * tl.load(cos_frame_ptr + pair)
        sin = tl.load(sin_space_ptr + at) + tl.load(sin_frame_ptr + pair)
    return cos, sin


@triton.jit
def turn_and_store(
    first, second, cos, sin, out_ptr, inside, D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Turn pairs ``[rows, D / 2]`` and write them at `out_ptr` ``[rows, 1]`` in natural channel order."""
    pair = tl.arange(0, D // 2)
    if ROPE:
        turned = first * cos - second * sin
        second = first * sin + second * cos
        first = turned
    dtype = out_ptr.dtype.element_ty
    if INTERLEAVED:
        joined = tl.interleave(first.to(dtype), second.to(dtype))  # [R, D]
        tl.store(out_ptr + tl.arange(0, D), joined, mask=inside)
    else:
        tl.store(out_ptr + pair, first.to(dtype), mask=inside)
        tl.store(out_ptr + D // 2 + pair, second.to(dtype), mask=inside)


@triton.jit
def natural_channels(second: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channel of the first or second member of every pair."""
    pair = tl.arange(0, D // 2)
    return 2 * pair + second if INTERLEAVED else pair + second * (D // 2)


@triton.jit
def _stored_channels(second: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr):
    """Where that channel is stored."""
    natural = natural_channels(second, D, INTERLEAVED)
    if not SPLIT:
        stored = natural
    elif INTERLEAVED:
        stored = tl.arange(0, D // 2) + second * (D // 2)
    else:
        stored = natural // 2 + (natural % 2) * (D // 2)
    return stored


@triton.jit
def _joined(even, odd):
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _load_codes(ptr, row, second: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr):
    """Bytes of the first or second members of pairs of some rows (int32), each ``[rows, D / 2]`` int32."""
    if INTERLEAVED == SPLIT:  # they lie together: words, taken apart, cost less than bytes
        word = second * (D // 8) + tl.arange(0, D // 8)
        words = tl.load(ptr.to(tl.pointer_type(tl.int32)) + (row * (D // 4))[:, None] + word)
        even = _joined(words & 0xFF, (words >> 16) & 0xFF)
        odd = _joined((words >> 8) & 0xFF, (words >> 24) & 0xFF)
        bytes_ = _joined(even, odd)
    else:
        bytes_ = tl.load(ptr + (row * D)[:, None] + _stored_channels(second, D, INTERLEAVED, SPLIT)).to(tl.int32)
    return bytes_


@triton.jit
def _load_centroids(
    ptr, row, second: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr
):
    """First or second members of pairs of the centroids `row` ``[rows]``, as stored or wider, ``[rows, D / 2]``."""
    if INTERLEAVED == SPLIT and ptr.dtype.element_ty == tl.bfloat16:
        word = second * (D // 4) + tl.arange(0, D // 4)
        words = tl.load(ptr.to(tl.pointer_type(tl.int32)) + (row * (D // 2))[:, None] + word)
    else:
        words = tl.load(ptr + (row * D)[:, None] + _stored_channels(second, D, INTERLEAVED, SPLIT))
    return words


@triton.jit
def _wide(loaded, scale_ptr, FP8: tl.constexpr):
    """Float32 of what `_load_centroids` found."""
    if loaded.dtype == tl.int32:
        wide = _joined((loaded << 16).to(tl.float32, bitcast=True), (loaded & -65536).to(tl.float32, bitcast=True))
    else:
        wide = loaded.to(tl.float32)
    if FP8:
        wide *= tl.load(scale_ptr)
    return wide


@triton.jit
def _levels(bytes_, bias, shift: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, STEP: tl.constexpr):
    """Levels of the codes at bit `shift`, float32, times what `_scales` divides by: bits in place, no conversion.

    The bits become the last places of `bias`, which is 2**23: as an argument, since an instruction takes one constant.
    With steps of two, the middle of the lowest codes is not a whole number: they alone are shifted.
    """
    halves: tl.constexpr = STEP == 2 and shift == 0
    middle: tl.constexpr = TOP if halves else TOP * (1 << shift) // STEP
    placed = (bytes_ << 1) & (2 * ((1 << BITS) - 1)) if halves else bytes_ & (((1 << BITS) - 1) << shift)
    return (placed | bias).to(tl.float32, bitcast=True) - (8388608.0 + middle)


@triton.jit
def _scales(
    at, tokens, second: tl.constexpr, shift: tl.constexpr, D: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Scales of the first or second members of the pairs of some tokens, broadcastable to ``[rows, D / 2]``.

    `at` is where those of the first block are, ``[rows]``.
    """
    unit: tl.constexpr = 1.0 if STEP == 2 and shift == 0 else STEP / (1 << shift)
    width: tl.constexpr = B // 2 if INTERLEAVED or B == D else B  # pairs that share a block
    blocks: tl.constexpr = D // 2 // width
    first: tl.constexpr = 0 if INTERLEAVED or B == D else second * blocks
    bytes_ = tl.load(at[:, None] + (first + tl.arange(0, blocks))[None, :] * tokens)  # [R, blocks]
    # As the bits of a float32, subnormal where E4M3 is: only the exponent's bias differs, by 120.
    scales = (bytes_.to(tl.int32) << 20).to(tl.float32, bitcast=True) * (1.329227995784916e36 * unit)
    if blocks > 1:
        rows: tl.constexpr = at.shape[0]
        scales = tl.reshape(tl.broadcast_to(scales[:, :, None], (rows, blocks, width)), (rows, D // 2))
    return scales


@triton.jit
def _both_scales(
    at, tokens, shift: tl.constexpr, D: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, INTERLEAVED: tl.constexpr
):
    first = _scales(at, tokens, 0, shift, D, B, STEP, INTERLEAVED)
    second = first
    if not (INTERLEAVED or B == D):
        second = _scales(at, tokens, 1, shift, D, B, STEP, INTERLEAVED)
    return first, second


@triton.jit
def _balance(balance_ptr, stored, BALANCED: tl.constexpr):
    factors = 1.0
    if BALANCED:
        factors = tl.load(balance_ptr + stored).to(tl.float32)  # [D/2]
    return factors


@triton.jit
def at_place(base, row, size, stride, place: tl.constexpr, WHOLE: tl.constexpr):
    """`base` at the tokens of a tile whose codes are at a place of the rows' bytes; past its end, at its last token."""
    return base + row + place * stride if WHOLE else base + tl.minimum(row + place * stride, size - 1)


@triton.jit
def _centroids(
    ids, ptr, STAGES: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr
):
    """Centroids whose numbers are at `ids` ``[rows]``: first and second members of pairs."""
    first, second = 0.0, 0.0
    if STAGES > 0:
        row = tl.load(ids).to(tl.int32)
        first = _load_centroids(ptr, row, 0, D, INTERLEAVED, SPLIT)
        second = _load_centroids(ptr, row, 1, D, INTERLEAVED, SPLIT)
    return first, second


@triton.jit
def decode_head(
    turns, bias, out_ptr, codes_ptr, scales_ptr, ids_ptr, centroids_ptr, book_scales_ptr, balance_ptr, row, size,
    stride, tokens, heads, num_centroids, stride_token, D: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr,
    TOP: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr, BALANCED: tl.constexpr,
    SPLIT: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Decode rows `row` ``[rows]`` of the codes of a tile of `size` tokens, of one head.

    Pointers are the head's own; those of codes, scales, ids and output are at the tile's first row or token. `turns`
    are cosines and sines for every place of a byte. A tile with all the tokens a tile may have is `WHOLE`.
    """
    stored_a, stored_b = _stored_channels(0, D, INTERLEAVED, SPLIT), _stored_channels(1, D, INTERLEAVED, SPLIT)
    present = row if WHOLE else tl.minimum(row, stride - 1)
    bytes_a = _load_codes(codes_ptr, present, 0, D, INTERLEAVED, SPLIT)
    bytes_b = _load_codes(codes_ptr, present, 1, D, INTERLEAVED, SPLIT)
    balance_a, balance_b = _balance(balance_ptr, stored_a, BALANCED), _balance(balance_ptr, stored_b, BALANCED)
    scales, smooth = (), ()
    for place in tl.static_range(8 // BITS):
        at = at_place(scales_ptr, row, size, stride, place, WHOLE)
        scales += (_both_scales(at, tokens, BITS * place, D, B, STEP, INTERLEAVED),)  # type: ignore[assignment]
        at = at_place(ids_ptr, row, size, stride, place, WHOLE)
        smooth += (_centroids(at, centroids_ptr, STAGES, D, INTERLEAVED, SPLIT),)  # type: ignore[assignment]
    for place in tl.static_range(8 // BITS):
        first = _levels(bytes_a, bias, BITS * place, BITS, TOP, STEP)
        second = _levels(bytes_b, bias, BITS * place, BITS, TOP, STEP)
        if STAGES == 0:
            first *= scales[place][0]
            second *= scales[place][1]
        else:
            # Scaled levels are exact: to add in the same instruction rounds as to add afterwards.
            first = tl.fma(first, scales[place][0], _wide(smooth[place][0], book_scales_ptr, FP8))
            second = tl.fma(second, scales[place][1], _wide(smooth[place][1], book_scales_ptr, FP8))
        for stage in tl.static_range(1, STAGES):
            at = at_place(ids_ptr + stage * tokens, row, size, stride, place, WHOLE)
            stage_ptr = centroids_ptr + stage * heads * num_centroids * D
            more = _centroids(at, stage_ptr, STAGES, D, INTERLEAVED, SPLIT)
            first += _wide(more[0], book_scales_ptr + stage * heads, FP8)
            second += _wide(more[1], book_scales_ptr + stage * heads, FP8)
        if BALANCED:
            first *= balance_a
            second *= balance_b
        token = row + place * stride
        inside = None if WHOLE else ((row < stride) & (token < size))[:, None]
        out = out_ptr + place * stride * stride_token + (row.to(tl.int64) * stride_token)[:, None]
        turn_and_store(first, second, turns[place][0], turns[place][1], out, inside, D, ROPE, INTERLEAVED)
