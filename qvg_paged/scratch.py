"""Writes a chunk's K and V into its scratch pages: one launch or two copies a layer, whatever the pages' places."""

import math
from functools import cached_property
from itertools import pairwise

import torch

from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.kernels.store import can_store, store_tokens
from qvg_paged.page import Page
from qvg_paged.pool import SlabPool

__all__ = ["ScratchWriter"]

WORD = 8


class ScratchWriter:
    """Scatters tokens of all frames of a chunk batch into unquantised pages."""

    def __init__(self, pool: SlabPool, layout: PageLayout, pages: list[Page], backend: Backend = Backend.AUTO) -> None:
        self._pool = pool
        self._layout = layout
        self._pages = pages
        self._backend = backend

    @cached_property
    def _step(self) -> int | None:
        """Granules from a page to the next one, if that is the same everywhere."""
        steps = {after.id - page.id for page, after in pairwise(self._pages)}
        return None if len(steps) > 1 else steps.pop() if steps else 0

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
        offsets = self._layout.key_offset(layer), self._layout.value_offset(layer)
        if self._step is not None and can_store(k, v, self._backend):
            pages, tokens = self._pool.viewed(k.dtype), self._layout.key.tokens
            store_tokens(k, v, pages, tokens, self._pages[0].id, self._step, *offsets)
            return
        for x, offset in zip((k, v), offsets, strict=True):
            rows = _words(x).view(-1, self._rows.shape[1])
            self._rows[offset // self._row_nbytes :].index_copy_(0, self._index, rows)


def _words(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    if x.data_ptr() % WORD or x.storage_offset() * x.itemsize % WORD:
        x = x.clone()
    return x.view(torch.int64)
