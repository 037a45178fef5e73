"""Triton launcher of the digest: one program per piece of a range, one atomic addition each.

Integer addition wraps and does not depend on the order, so the result is that of the twin, bit for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["digest_ranges"]

PIECE_WORDS = 1 << 14
BLOCK_WORDS = 1024


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _digest_kernel(words_ptr, starts_ptr, counts_ptr, out_ptr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    start, count = tl.load(starts_ptr + index), tl.load(counts_ptr + index)
    first = tl.program_id(1).to(tl.int64) * PIECE
    total = tl.zeros((BLOCK,), tl.int64)
    for inside in range(0, PIECE, BLOCK):
        position = first + inside + tl.arange(0, BLOCK)
        mask = position < count
        word = tl.load(words_ptr + start + position, mask=mask, other=0)
        total += tl.where(mask, _mix(word + _mix(position * -0x61C8864680B583EB + count * 8)), 0)
    tl.atomic_add(out_ptr + index, tl.sum(total, 0))


def digest_ranges(buffer: torch.Tensor, starts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Digests of ``buffer[start : start + size]`` as signed numbers, ``[n]`` int64; multiples of 8 bytes only."""
    words = buffer[: buffer.numel() // 8 * 8].view(torch.int64)
    table = torch.tensor([[start // 8 for start in starts], [size // 8 for size in sizes]], dtype=torch.int64)
    table = table.to(buffer.device, non_blocking=True)
    out = torch.zeros(len(starts), dtype=torch.int64, device=buffer.device)
    pieces = triton.cdiv(max(sizes) // 8, PIECE_WORDS)
    if pieces:
        _digest_kernel[(len(starts), pieces)](
            words, table[0], table[1], out, PIECE=PIECE_WORDS, BLOCK=BLOCK_WORDS, num_warps=8
        )
    return out
