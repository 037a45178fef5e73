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
    """Finds NaN and infinity in unquantised pages: a reduction per stretch of memory, one wait for the device."""

    def __init__(self, pool: SlabPool, layout: PageLayout, dtype: torch.dtype) -> None:
        self._pool = pool
        self._dtype = dtype
        self._units = layout.page_nbytes // GRANULE
        self._payload = layout.num_layers * layout.layer_nbytes
        self._whole = self._payload == layout.page_nbytes  # what follows the payload of a page is nobody's

    def broken(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that hold NaN or infinity. The host has then waited for the current stream."""
        values, itemsize = self._pool.viewed(self._dtype), self._dtype.itemsize
        owners: list[Chunk] = []
        ends: list[torch.Tensor] = []
        for chunk in chunks:
            for start, stop in self._stretches(chunk.reservation.scratch):
                ends += values[start // itemsize : stop // itemsize].aminmax()  # NaN if any value is
                owners.append(chunk)
        found = torch.stack(ends).tolist() if values.is_cuda else [end.item() for end in ends]
        if all(map(isfinite, found)):
            return []
        pairs = zip(owners, found[::2], found[1::2], strict=True)
        bad = {id(chunk) for chunk, low, high in pairs if not (isfinite(low) and isfinite(high))}
        return [chunk for chunk in chunks if id(chunk) in bad]

    def _stretches(self, pages: list[Page]) -> list[tuple[int, int]]:
        if self._whole:
            return place_runs(sorted([page.handle for page in pages]), self._units)
        return [(page.id * GRANULE, page.id * GRANULE + self._payload) for page in pages]
