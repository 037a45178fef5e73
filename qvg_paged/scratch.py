"""Writes a chunk's K and V into its scratch pages: one copy per tensor and layer, whatever the pages' places."""

import torch

from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.page import Page

__all__ = ["ScratchWriter"]

UNIT = 128
"""Bytes per row of the copy: divides every page address and every row of 64 two-byte channels."""


class ScratchWriter:
    """Scatters tokens of all frames of a chunk batch into unquantised pages."""

    def __init__(self, buffer: torch.Tensor, layout: PageLayout, pages: list[Page]) -> None:
        self._rows = buffer.view(-1, UNIT)
        self._layout = layout
        first = torch.tensor([page.id * (GRANULE // UNIT) for page in pages])
        inside = torch.arange(layout.key.nbytes // UNIT)
        self._index = (first[:, None] + inside).flatten().to(buffer.device, non_blocking=True)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k`, `v` ``[frames * tokens, heads, head_dim]`` of `layer`."""
        for x, offset in ((k, self._layout.key_offset(layer)), (v, self._layout.value_offset(layer))):
            rows = x.contiguous().view(torch.uint8).view(-1, UNIT)
            self._rows[offset // UNIT :].index_copy_(0, self._index, rows)
