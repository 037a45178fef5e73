"""The check of a commit: whether what was written into scratch pages is finite."""

from collections.abc import Sequence
from math import isfinite

import torch

from qvg_paged.chunk import Chunk
from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.finite import FLAGS, HALF, FiniteFlags
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.page import Page
from qvg_paged.pool import SlabPool

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Finds NaN and infinity in unquantised pages: by a launch per stretch of memory on a GPU, else by its sum, and by
    one wait for the device.
    """

    def __init__(self, pool: SlabPool, layout: PageLayout, dtype: torch.dtype, backend: Backend = Backend.AUTO) -> None:
        self._pool = pool
        self._dtype = dtype
        self._payload = layout.num_layers * layout.layer_nbytes
        self._whole = self._payload == layout.page_nbytes  # what follows the payload of a page is nobody's
        self._flags: FiniteFlags | None = None
        if uses_triton(backend, pool.buffer.device) and self._payload % HALF == 0:
            self._flags = FiniteFlags(pool.buffer, dtype, pool.made)

    def broken(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that hold NaN or infinity. The host has then waited for the current stream."""
        if self._flags is None:
            return self._summed(chunks)
        if len(chunks) > FLAGS:
            return [*self.broken(chunks[:FLAGS]), *self.broken(chunks[FLAGS:])]
        try:
            with kernel_scope(self._pool.buffer.device):
                for number, chunk in enumerate(chunks):
                    for start, stop in self._stretches(chunk.reservation.scratch):
                        self._flags.look(start, stop, number)
        except BaseException:
            self._flags.found(FLAGS)  # what was launched must not be told of other chunks
            raise
        return [chunk for chunk, found in zip(chunks, self._flags.found(len(chunks)), strict=True) if found]

    def _summed(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        sums = [values.sum() for chunk in chunks for values in self._values(chunk)]
        found = sums[0].item() if len(sums) == 1 else sum(torch.stack(sums).tolist())
        if isfinite(found):
            return []
        return [chunk for chunk in chunks if not all(map(_is_finite, self._values(chunk)))]

    def _values(self, chunk: Chunk) -> list[torch.Tensor]:
        """What its pages hold: a tensor per stretch of memory."""
        size, dtype, stretch = self._dtype.itemsize, self._dtype, self._pool.stretch
        stretches = self._stretches(chunk.reservation.scratch)
        return [stretch(dtype, start // size, stop // size) for start, stop in stretches]

    def _stretches(self, pages: list[Page]) -> list[tuple[int, int]]:
        """First byte and end of each stretch that the pages, as they were taken, fill."""
        if self._whole:
            runs = self._pool.stretches(pages[0].nbytes, [page.handle for page in pages])
            return [(first * GRANULE, end * GRANULE) for first, end in runs]
        return [(page.id * GRANULE, page.id * GRANULE + self._payload) for page in pages]


def _is_finite(values: torch.Tensor) -> bool:
    """By their ends, which are NaN if any value is: of finite values, too, the sum may be infinite."""
    return all(map(isfinite, torch.stack(values.aminmax()).tolist()))
