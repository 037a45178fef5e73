"""Bytes of many pool objects from and to the host, in few large copies.

The objects of an image lie in order of address, so neighbours in the pool are neighbours in the image and are copied
together. Runs that are too short to be worth a copy of their own are gathered on the device first.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from qvg_paged.fence import Fence
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.pool import Slot

__all__ = ["Mover", "Runs"]

DIRECT_NBYTES = 1 << 20
"""Runs of at least as many bytes are copied between device and host without a stop."""


class Runs:
    """Where the bytes of an image lie in the pool.

    Args:
        slots: its objects in order; neighbours that touch become one run.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._runs: list[list[int]] = []  # place in the image, place in the pool, bytes
        place = 0
        for slot in slots:
            start = slot.id * GRANULE
            last = self._runs[-1] if self._runs else None
            if last and last[1] + last[2] == start:
                last[2] += slot.nbytes
            else:
                self._runs.append([place, start, slot.nbytes])
            place += slot.nbytes
        self.nbytes = place

    def within(self, start: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """What lies in bytes ``start`` to ``start + nbytes`` of the image: place there, place in the pool, bytes."""
        for place, pool, size in self._runs:
            first, last = max(place, start), min(place + size, start + nbytes)
            if first < last:
                yield first - start, pool + first - place, last - first


class Mover:
    """Copies between the pool and host tensors.

    Args:
        pool: the pool's bytes.
        staging: bytes on the same device that serve as a stop for short runs, on the current stream only; None to
            copy these by themselves as well.
    """

    def __init__(self, pool: torch.Tensor, staging: torch.Tensor | None) -> None:
        self._pool = pool
        self._staging = staging
        self._side: torch.cuda.Stream | None = None

    def out(self, runs: Runs, start: int, piece: torch.Tensor) -> None:
        """Copy a part of an image to `piece` (host, uint8), which is complete once `fence` has passed."""
        self._copy(runs, start, piece, outwards=True, staging=self._staging)

    def into(self, runs: Runs, start: int, piece: torch.Tensor, *, staged: bool = True) -> None:
        """Copy `piece` (host, uint8) to a part of an image in the pool."""
        self._copy(runs, start, piece, outwards=False, staging=self._staging if staged else None)

    def _copy(
        self, runs: Runs, start: int, piece: torch.Tensor, *, outwards: bool, staging: torch.Tensor | None
    ) -> None:
        short: list[tuple[int, int, int]] = []
        for run in runs.within(start, piece.numel()):
            place, pool, nbytes = run
            if staging is None or nbytes >= min(DIRECT_NBYTES, staging.numel()):
                self._flush(short, piece, outwards, staging)
                source, target = self._pool[pool : pool + nbytes], piece[place : place + nbytes]
                _move(source, target, outwards)
                continue
            if short and place + nbytes - short[0][0] > staging.numel():
                self._flush(short, piece, outwards, staging)
            short.append(run)
        self._flush(short, piece, outwards, staging)

    def _flush(
        self, short: list[tuple[int, int, int]], piece: torch.Tensor, outwards: bool, staging: torch.Tensor | None
    ) -> None:
        """Short runs, neighbours in the image, by way of the staging buffer: one copy to or from the host."""
        if not short or staging is None:
            return
        first, last = short[0][0], short[-1][0] + short[-1][2]
        stop, host = staging[: last - first], piece[first:last]
        if not outwards:
            _move(stop, host, outwards)
        for place, pool, nbytes in short:
            _move(self._pool[pool : pool + nbytes], stop[place - first : place - first + nbytes], outwards)
        if outwards:
            _move(stop, host, outwards)
        short.clear()

    def guard(self) -> None:
        """See to it that a pool dropped during a copy is not given to anyone else before that is done."""
        if self._side is not None:
            self._pool.record_stream(self._side)

    def fence(self) -> Fence:
        """A point behind all copies launched on the current stream."""
        return Fence.record(self._pool.device)

    def beside(self) -> AbstractContextManager[object]:
        """Launch copies on a stream of their own, behind what was launched so far."""
        if self._pool.device.type != "cuda":
            return nullcontext()
        if self._side is None:
            self._side = torch.cuda.Stream(self._pool.device)
            self.guard()
        self._side.wait_stream(torch.cuda.current_stream(self._pool.device))
        return torch.cuda.stream(self._side)


def _move(pool: torch.Tensor, host: torch.Tensor, outwards: bool) -> None:
    source, target = (pool, host) if outwards else (host, pool)
    target.copy_(source, non_blocking=True)
