"""A 64-bit digest of bytes on the device, to compare pages without copying them.

    digest = sum over 8-byte words of mix(word + mix(position + length)), modulo 2**64

The sum does not depend on the order of summation, every term on its position. Not cryptographic.
"""

from collections.abc import Callable, Sequence

import torch

from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.errors import ArgumentError

__all__ = ["digest_bytes", "digest_ranges", "start_digests"]

WORD = 8
CHUNK_WORDS = 1 << 16
MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The two odd constants of the splitmix64 finaliser, as signed numbers."""
SHIFTS = (30, 27, 31)
GOLDEN = -0x61C8864680B583EB


def digest_bytes(buffer: torch.Tensor, start: int, nbytes: int) -> int:
    """Digest of ``buffer[start : start + nbytes]``, between 0 and 2**64 - 1.

    Args:
        buffer: 1-D uint8 tensor.
        start: first byte.
        nbytes: number of bytes; the last word is padded with zeros.

    Raises:
        ArgumentError: the range does not lie inside the buffer.
    """
    if buffer.dtype is not torch.uint8 or buffer.ndim != 1:
        raise ArgumentError(f"buffer: expected a 1-D uint8 tensor, got {buffer.dtype} {tuple(buffer.shape)}")
    if start < 0 or nbytes < 0 or start + nbytes > buffer.numel():
        raise ArgumentError(f"start, nbytes: expected a range inside {buffer.numel()} bytes, got {start} + {nbytes}")
    return int(_digest(buffer, start, nbytes).item()) % 2**64


def digest_ranges(
    buffer: torch.Tensor, starts: Sequence[int], sizes: Sequence[int], *, backend: Backend = Backend.AUTO
) -> list[int]:
    """`digest_bytes` of many ranges, in one launch on a GPU; the host waits once.

    Args:
        buffer: 1-D uint8 tensor.
        starts: first bytes, multiples of 8.
        sizes: numbers of bytes, multiples of 8.
        backend: Triton or PyTorch.

    Raises:
        ArgumentError: a range is not aligned or does not lie inside the buffer.
    """
    return start_digests(buffer, starts, sizes, backend=backend)()


def start_digests(
    buffer: torch.Tensor, starts: Sequence[int], sizes: Sequence[int], *, backend: Backend = Backend.AUTO
) -> Callable[[], list[int]]:
    """`digest_ranges`, launched on the current stream; the host waits when it calls what is returned."""
    for start, size in zip(starts, sizes, strict=True):
        if start % WORD or size % WORD or not 0 <= start <= start + size <= buffer.numel():
            raise ArgumentError(
                f"starts, sizes: expected multiples of {WORD} inside {buffer.numel()} bytes, got {start} + {size}"
            )
    if not starts:
        return list
    if not uses_triton(backend, buffer.device):
        done = [int(_digest(buffer, start, size).item()) % 2**64 for start, size in zip(starts, sizes, strict=True)]
        return lambda: done
    from qvg_paged.kernels import _digest_triton  # noqa: PLC0415 - triton is only loaded where it is used

    with kernel_scope(buffer.device):
        found = _digest_triton.digest_ranges(buffer, starts, sizes)
    return lambda: [value % 2**64 for value in found.tolist()]


def _digest(buffer: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    count = min(CHUNK_WORDS, -(-nbytes // WORD))
    places = torch.arange(count, device=buffer.device).mul_(GOLDEN).add_(nbytes)
    mixed, spare = torch.empty_like(places), torch.empty_like(places)
    for begin in range(0, nbytes, CHUNK_WORDS * WORD):
        end = min(begin + CHUNK_WORDS * WORD, nbytes)
        words = _words(buffer[start + begin : start + end])
        x, other = mixed[: len(words)], spare[: len(words)]
        torch.add(places[: len(words)], _signed(begin // WORD * GOLDEN), out=x)
        _mix_(x, other)
        x += words
        _mix_(x, other)
        total += x.sum()
    return total


def _signed(value: int) -> int:
    """As int64 arithmetic would have it."""
    return (value + 2**63) % 2**64 - 2**63


def _words(piece: torch.Tensor) -> torch.Tensor:
    if piece.numel() % WORD or piece.data_ptr() % WORD or piece.storage_offset() % WORD:
        padded = piece.new_zeros(-(-piece.numel() // WORD) * WORD)
        padded[: piece.numel()] = piece
        piece = padded
    return piece.view(torch.int64)


def _mix_(x: torch.Tensor, spare: torch.Tensor) -> None:
    """The splitmix64 finaliser, in place; arithmetic shifts are masked into logical ones."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        torch.bitwise_right_shift(x, shift, out=spare)
        spare &= (1 << (64 - shift)) - 1
        x ^= spare
        if multiplier != 1:
            x *= multiplier
