"""Host memory for parked streams: one pinned buffer, handed out in extents.

An image is a sequence of bytes that may lie in several extents, so whatever is free can be used: there is no
fragmentation to make room for. Every byte that is handed out is overwritten by the image before anyone may read it.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

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


class HostArena:
    """Allocator over one host buffer, which is taken (and pinned) when it is first needed.

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
        self._buffer: torch.Tensor | None = None
        self._free = [Extent(0, nbytes)] if nbytes else []

    def allocate(self, nbytes: int) -> list[Extent]:
        """Extents of `nbytes` bytes together, from the lowest.

        Raises:
            OutOfMemoryError: they are not free; nothing changed.
        """
        fault_point("host.allocate")
        if nbytes > self.nbytes - self.used_nbytes:
            raise OutOfMemoryError(
                f"host memory exhausted: {nbytes} bytes requested, {self.nbytes - self.used_nbytes} of {self.nbytes} "
                "are free; raise host_memory, or set disk_path and disk_memory",
                nbytes,
                self.nbytes - self.used_nbytes,
            )
        if self._buffer is None and nbytes:
            self._buffer = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        taken: list[Extent] = []
        left = nbytes
        while left:
            first = self._free.pop(0)
            if first.nbytes > left:
                self._free.insert(0, Extent(first.start + left, first.stop))
                first = Extent(first.start, first.start + left)
            taken.append(first)
            left -= first.nbytes
        self.used_nbytes += nbytes
        return taken

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
        assert self._buffer is not None
        return self._buffer[extent.start : extent.stop]

    def check_integrity(self, held: Sequence[Extent]) -> None:
        """Raise `IntegrityError` unless `held` and what is free cover the arena exactly once."""
        place = 0
        for extent in sorted([*held, *self._free]):
            if extent.start != place:
                raise IntegrityError(f"host memory: byte {place} is lost or has two owners")
            place = extent.stop
        if place != self.nbytes or self.used_nbytes != sum(extent.nbytes for extent in held):
            raise IntegrityError(f"host memory: {self.used_nbytes} bytes are counted as used, images hold otherwise")
