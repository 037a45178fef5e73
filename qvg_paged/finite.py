"""The check of a commit: whether what was written into scratch pages is finite."""

from collections.abc import Sequence
from math import isfinite

import torch

from qvg_paged.chunk import Chunk
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.page import Page
from qvg_paged.pool import SlabPool

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Finds NaN and infinity in unquantised pages: a sum per stretch of memory, and one wait for the device."""

    def __init__(self, pool: SlabPool, layout: PageLayout, dtype: torch.dtype) -> None:
        self._pool = pool
        self._dtype = dtype
        self._scale = GRANULE // dtype.itemsize
        payload = layout.num_layers * layout.layer_nbytes
        self._payload = payload // dtype.itemsize
        self._whole = payload == layout.page_nbytes  # what follows the payload of a page is nobody's

    def broken(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that hold NaN or infinity. The host has then waited for the current stream."""
        sums = [values.sum() for chunk in chunks for values in self._values(chunk.reservation.scratch)]
        found = sums[0].item() if len(sums) == 1 else sum(torch.stack(sums).tolist())
        if isfinite(found):
            return []
        return [chunk for chunk in chunks if not all(map(_is_finite, self._values(chunk.reservation.scratch)))]

    def _values(self, pages: list[Page]) -> list[torch.Tensor]:
        """What the pages, as they were taken, hold: a tensor per stretch of memory."""
        scale, dtype, stretch = self._scale, self._dtype, self._pool.stretch
        if self._whole:
            runs = self._pool.stretches(pages[0].nbytes, [page.handle for page in pages])
            return [stretch(dtype, first * scale, end * scale) for first, end in runs]
        return [stretch(dtype, page.id * scale, page.id * scale + self._payload) for page in pages]


def _is_finite(values: torch.Tensor) -> bool:
    """By their ends, which are NaN if any value is: of finite values, too, the sum may be infinite."""
    return all(map(isfinite, torch.stack(values.aminmax()).tolist()))
