"""Stored pages as tensors and as digests, outside attention."""

from collections.abc import Sequence

import torch

from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.digest import digest_bytes
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.page import Page

__all__ = ["page_digest", "read_pages"]


def read_pages(
    buffer: torch.Tensor, layouts: Sequence[PageLayout], pages: Sequence[Page], layer: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded K and V of `pages`, in order, each ``[pages * tokens, heads, head_dim]`` in `dtype`; keys not rotated."""
    part = layouts[0].key
    shape = (len(pages), part.tokens, part.heads, part.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=buffer.device) for _ in range(2))
    for fmt in sorted({page.format for page in pages}):
        places = [place for place, page in enumerate(pages) if page.format == fmt]
        ids = torch.tensor([[pages[i].id for i in places], [pages[i].codebook_id for i in places]], dtype=torch.int32)
        ids, layout = ids.to(buffer.device), layouts[fmt]
        for out, stored, offset, book in (
            (keys, layout.key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
            (values, layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
        ):
            some = out if len(places) == len(pages) else out.new_empty(len(places), *shape[1:])
            decode_pages(buffer, ids[0], ids[1], stored, offset, book, some.flatten(0, 1))
            if some is not out:
                out[places] = some
    return keys.flatten(0, 1), values.flatten(0, 1)


def page_digest(buffer: torch.Tensor, layout: PageLayout, page: Page) -> int:
    """64-bit digest of a page's bytes and its codebook's."""
    digest = digest_bytes(buffer, page.id * GRANULE, layout.num_layers * layout.layer_nbytes)
    if page.codebook:
        digest ^= digest_bytes(buffer, page.codebook_id * GRANULE, layout.num_layers * layout.codebook_layer_nbytes)
    return digest
