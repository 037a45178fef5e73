"""Writes a chunk's K and V into its scratch pages: one copy per tensor and layer, whatever the pages' places."""

import math
from functools import cached_property

import torch

from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.page import Page
from qvg_paged.pool import SlabPool

__all__ = ["ScratchWriter"]

WORD = 8


class ScratchWriter:
    """Scatters tokens of all frames of a chunk batch into unquantised pages."""

    def __init__(self, pool: SlabPool, layout: PageLayout, pages: list[Page]) -> None:
        self._pool = pool
        self._layout = layout
        self._pages = pages

    @cached_property
    def _row_nbytes(self) -> int:
        """Bytes per row of the copy: divides every page address and every part of a page, at least 128 of them."""
        return math.gcd(GRANULE, self._layout.key.nbytes)

    @cached_property
    def _rows(self) -> torch.Tensor:
        return self._pool.viewed(torch.int64).view(-1, self._row_nbytes // WORD)

    @cached_property
    def _index(self) -> torch.Tensor:
        """Row of the pool for each row of K, in layer 0."""
        device = self._rows.device
        rows = GRANULE // self._row_nbytes
        first = torch.tensor([page.id * rows for page in self._pages]).to(device, non_blocking=True)
        return (first[:, None] + torch.arange(self._layout.key.nbytes // self._row_nbytes, device=device)).flatten()

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k`, `v` ``[frames * tokens, heads, head_dim]`` of `layer`."""
        for x, offset in ((k, self._layout.key_offset(layer)), (v, self._layout.value_offset(layer))):
            rows = _words(x).view(-1, self._rows.shape[1])
            self._rows[offset // self._row_nbytes :].index_copy_(0, self._index, rows)


def _words(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    if x.data_ptr() % WORD or x.storage_offset() * x.itemsize % WORD:
        x = x.clone()
    return x.view(torch.int64)
