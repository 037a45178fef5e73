"""Requantising: pages of one format become pages of a cheaper one, under the codebook they have.

    residual = scale * (step * code + offset)       as stored; ids and codebook, balance included, stay as they are
    codes, scales = blocks of the residual          in the target's grid

Nothing is clustered again, so a page can be requantised alone, whatever became of the rest of its span.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.encode import packer
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import Codec
from qvg_paged.kernels.layout import GRANULE, PartLayout, align
from qvg_paged.kernels.reference import BATCH_ELEMENTS

__all__ = ["requantise_part", "requantise_workspace_nbytes", "shares_codebooks"]

BATCH_NBYTES = 32 << 20
"""Residual bytes worked on at once (at least one frame)."""


def shares_codebooks(source: Codec, target: Codec) -> bool:
    """Whether a span in `source` can be requantised to `target`: both read the same codebook."""
    if source.is_dense or target.is_dense:
        return source.is_dense and target.is_dense
    return replace(target, grid=source.grid, block_size=source.block_size, scale_rule=source.scale_rule) == source


def requantise_part(
    buffer: torch.Tensor,
    source: PartLayout,
    target: PartLayout,
    pages: Sequence[int],
    part_offset: int,
    target_offsets: Sequence[int],
    *,
    backend: Backend = Backend.AUTO,
) -> None:
    """Rewrite one tensor (K or V) of one layer of several pages in the codec of `target`.

    Args:
        buffer: 1-D uint8 pool, read and written.
        source, target: planes of the part before and after; they differ in grid, block size and scale rule only.
        pages: ids of the pages to read; a page starts at byte ``GRANULE * id``.
        part_offset: byte of these pages at which the part starts.
        target_offsets: byte of the pool at which the part of each new page starts.
        backend: Triton or PyTorch.

    Raises:
        ArgumentError: the codecs do not share codebooks, or the lists differ in length; nothing was written.
    """
    if not shares_codebooks(source.codec, target.codec) or len(pages) != len(target_offsets):
        raise ArgumentError(
            f"target: expected {source.codec} but for grid, block size and scale rule, and one place per page "
            f"({len(pages)}), got {target.codec} and {len(target_offsets)} places"
        )
    if source.codec.is_dense:
        values = source.plane("values")
        for page, offset in zip(pages, target_offsets, strict=True):
            values.view(buffer, offset).copy_(values.view(buffer, page * GRANULE + part_offset))
        return
    residual_only = replace(source, codec=replace(source.codec, stages=0, balanced=False), num_centroids=0)
    run = packer(uses_triton(backend, buffer.device))
    step = _batch_frames(source)
    with kernel_scope(buffer.device):
        for start in range(0, len(pages), step):
            some = pages[start : start + step]
            units = torch.tensor(some, dtype=torch.int32).to(buffer.device, non_blocking=True)
            shape = (len(some) * source.tokens, source.heads, source.head_dim)
            residual = torch.empty(shape, dtype=torch.float32, device=buffer.device)
            decode_pages(buffer, units, units, residual_only, part_offset, 0, residual, backend=backend)
            ids = None
            if source.codec.stages:
                plane = source.plane("ids")
                found = [plane.view(buffer, page * GRANULE + part_offset) for page in some]
                ids = torch.cat(found, 2).transpose(0, 1).contiguous()  # [stages, heads, frames * tokens]
            by_head = residual.transpose(0, 1).contiguous()
            run.quantise_pack(by_head, ids, target, buffer, target_offsets[start : start + step], 0)


def requantise_workspace_nbytes(layout: PartLayout, span_frames: int) -> int:
    """Upper bound of the temporary bytes of `requantise_part` for up to `span_frames` pages, either backend."""
    if layout.codec.is_dense:
        return GRANULE
    elements = min(span_frames, _batch_frames(layout)) * layout.tokens * layout.heads * layout.head_dim
    ids = 2 * layout.codec.stages * elements // layout.head_dim
    packing = max(BATCH_ELEMENTS, layout.tokens * layout.head_dim) * 40
    return align(2 * 4 * elements + ids + packing + (1 << 16), GRANULE)


def _batch_frames(layout: PartLayout) -> int:
    return max(1, BATCH_NBYTES // (4 * layout.tokens * layout.heads * layout.head_dim))
