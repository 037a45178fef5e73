"""Host memory for parked streams: a few pinned buffers, handed out in extents.

An image is a sequence of bytes that may lie in several extents, so whatever is free can be used: there is no
fragmentation to make room for. Every byte that is handed out is overwritten by the image before anyone may read it.
PyTorch rounds pinned memory up to a power of two, so the buffers have such sizes: no more is taken than was allowed.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from qvg_paged.errors import IntegrityError, OutOfMemoryError
from qvg_paged.events import fault_point

__all__ = ["Extent", "HostArena"]


@dataclass(frozen=True, order=True)
class Extent:
    """Bytes ``start`` to ``stop`` of the arena."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.stop - self.start


LEAST_BUFFER = 1 << 20
"""Buffers of fewer bytes are not worth cutting further."""


def buffer_sizes(nbytes: int) -> list[int]:
    """Powers of two, and a rest of less than `LEAST_BUFFER`, that add up to `nbytes`; the largest first."""
    sizes = []
    while nbytes:
        sizes.append(nbytes if nbytes < LEAST_BUFFER else 1 << (nbytes.bit_length() - 1))
        nbytes -= sizes[-1]
    return sizes


class HostArena:
    """Allocator over host buffers, which are taken (and pinned) when they are first needed.

    Args:
        nbytes: its size.
        pinned: whether a device copies from and to it.

    Attributes:
        used_nbytes: bytes handed out.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.nbytes = nbytes
        self.used_nbytes = 0
        self._pinned = pinned
        sizes = buffer_sizes(nbytes)
        self._starts = list(accumulate(sizes, initial=0))
        self._buffers: list[torch.Tensor] = []
        self._free = [Extent(0, nbytes)] if nbytes else []

    def allocate(self, nbytes: int) -> list[Extent]:
        """Extents of `nbytes` bytes together, from the lowest.

        Raises:
            OutOfMemoryError: they are not free, or the machine does not have them; nothing changed.
        """
        fault_point("host.allocate")
        if nbytes > self.nbytes - self.used_nbytes:
            raise OutOfMemoryError(
                f"host memory exhausted: {nbytes} bytes requested, {self.nbytes - self.used_nbytes} of {self.nbytes} "
                "are free; raise host_memory, or set disk_path and disk_memory",
                nbytes,
                self.nbytes - self.used_nbytes,
            )
        if not self._buffers and nbytes:
            self._buffers = self._take()
        taken: list[Extent] = []
        left = nbytes
        while left:
            first = self._free.pop(0)
            stop = min(first.start + left, first.stop, self._starts[self._buffer_of(first.start) + 1])
            if stop < first.stop:
                self._free.insert(0, Extent(stop, first.stop))
            taken.append(Extent(first.start, stop))
            left -= taken[-1].nbytes
        self.used_nbytes += nbytes
        return taken

    def _take(self) -> list[torch.Tensor]:
        try:
            sizes = [stop - start for start, stop in pairwise(self._starts)]
            return [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for size in sizes]
        except RuntimeError as error:
            raise OutOfMemoryError(
                f"host memory: the machine does not give {self.nbytes} bytes{' of pinned memory' * self._pinned}; "
                "lower host_memory",
                self.nbytes,
                0,
            ) from error

    def _buffer_of(self, start: int) -> int:
        return bisect.bisect(self._starts, start) - 1

    def free(self, extents: Sequence[Extent]) -> None:
        """Return extents; neighbours become one again."""
        for extent in extents:
            place = bisect.bisect(self._free, extent)
            start, stop = extent.start, extent.stop
            if place < len(self._free) and self._free[place].start == stop:
                stop = self._free.pop(place).stop
            if place and self._free[place - 1].stop == start:
                place -= 1
                start = self._free.pop(place).start
            self._free.insert(place, Extent(start, stop))
            self.used_nbytes -= extent.nbytes

    def bytes_of(self, extent: Extent) -> torch.Tensor:
        """Its bytes, writable."""
        index = self._buffer_of(extent.start)
        start = self._starts[index]
        return self._buffers[index][extent.start - start : extent.stop - start]

    def check_integrity(self, held: Sequence[Extent]) -> None:
        """Raise `IntegrityError` unless `held` and what is free cover the arena exactly once."""
        place = 0
        for extent in sorted([*held, *self._free]):
            if extent.start != place:
                raise IntegrityError(f"host memory: byte {place} is lost or has two owners")
            place = extent.stop
        if place != self.nbytes or self.used_nbytes != sum(extent.nbytes for extent in held):
            raise IntegrityError(f"host memory: {self.used_nbytes} bytes are counted as used, images hold otherwise")
