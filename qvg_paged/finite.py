"""The check of a commit: whether what was written into scratch pages is finite."""

from collections.abc import Sequence
from math import isfinite

import torch

from qvg_paged.chunk import Chunk
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.page import Page
from qvg_paged.pool import SlabPool
from qvg_paged.slabs import place_runs

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Finds NaN and infinity in unquantised pages: a sum per stretch of memory, and one wait for the device."""

    def __init__(self, pool: SlabPool, layout: PageLayout, dtype: torch.dtype) -> None:
        self._pool = pool
        self._dtype = dtype
        self._scale = GRANULE // dtype.itemsize
        self._units = layout.page_nbytes // GRANULE
        payload = layout.num_layers * layout.layer_nbytes
        self._payload = payload // dtype.itemsize
        self._whole = payload == layout.page_nbytes  # what follows the payload of a page is nobody's

    def broken(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that hold NaN or infinity. The host has then waited for the current stream."""
        values = self._pool.viewed(self._dtype)
        sums: list[torch.Tensor] = []
        for chunk in chunks:
            for start, stop in self._stretches(chunk.reservation.scratch):
                sums.append(values[start:stop].sum())
        found = sums[0].item() if len(sums) == 1 else sum(torch.stack(sums).tolist())
        if isfinite(found):
            return []
        return [chunk for chunk in chunks if not all(map(self._is_finite, self._stretches(chunk.reservation.scratch)))]

    def _is_finite(self, stretch: tuple[int, int]) -> bool:
        """By the ends of the values, which are NaN if any is: of finite values, too, the sum may be infinite."""
        start, stop = stretch
        ends = self._pool.viewed(self._dtype)[start:stop].aminmax()
        return all(map(isfinite, torch.stack(ends).tolist()))

    def _stretches(self, pages: list[Page]) -> list[tuple[int, int]]:
        """First value and end of each stretch that the pages, as they were taken, fill."""
        scale = self._scale
        if self._whole:
            return [(first * scale, end * scale) for first, end in place_runs([p.handle for p in pages], self._units)]
        return [(page.id * scale, page.id * scale + self._payload) for page in pages]
