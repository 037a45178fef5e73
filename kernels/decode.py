"""Decoding: pages become keys or values in natural channel order, keys turned by RoPE on the way if asked to.

x = balance * (scale * (step * code + offset) + sum over stages of centroid[id])         in float32, rounded once
"""

from types import ModuleType

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.layout import PLANE_ALIGNMENT, PageLayout, PartLayout
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["decode_layer", "decode_pages", "read_centroids"]

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def decode_pages(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    part_offset: int,
    codebook_part_offset: int,
    out: torch.Tensor,
    *,
    rope: RoPETables | None = None,
    rope_layout: RoPELayout = RoPELayout.INTERLEAVED,
    backend: Backend = Backend.AUTO,
) -> None:
    """Read one tensor (K or V) of one layer of several pages, quantised or dense.

    Args:
        buffer: 1-D uint8 pool.
        pages: ``[n]`` int32 page ids on the pool's device; a page starts at byte ``GRANULE * id``.
        codebooks: ``[n]`` int32 codebook ids, likewise; not read if the layout has no codebook.
        layout: planes of the part.
        part_offset: byte of a page at which the part starts.
        codebook_part_offset: byte of a codebook at which the part starts.
        out: ``[n * tokens, heads, head_dim]`` bfloat16, float16 or float32, written; the last dimension is contiguous.
        rope: tables with one frame row per page; None leaves the values as stored.
        rope_layout: which channels form a pair.
        backend: Triton or PyTorch.

    Raises:
        ArgumentError: an argument does not fit; nothing was written.
    """
    _check(buffer, pages, codebooks, layout, (part_offset, codebook_part_offset), "out", out)
    if rope is not None:
        _check_rope(rope, layout, len(pages))
    if len(pages) == 0:
        return
    run = _reader(uses_triton(backend, buffer.device))
    with kernel_scope(buffer.device):
        run.decode_pages(buffer, pages, codebooks, layout, part_offset, codebook_part_offset, out, rope, rope_layout)


def decode_layer(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PageLayout,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    rope: RoPETables | None = None,
    rope_layout: RoPELayout = RoPELayout.INTERLEAVED,
    narrow: int = 0,
    backend: Backend = Backend.AUTO,
) -> None:
    """Read K and V of one layer of several pages; on a GPU in one launch if the format stores them alike.

    Args:
        buffer, pages, codebooks, rope_layout, backend: as of `decode_pages`.
        layout: of the pages.
        layer: 0 to ``num_layers - 1``.
        keys, values: ``[n * tokens, heads, head_dim]``, written, as `out` of `decode_pages`.
        rope: tables for the keys; None leaves them as stored.
        narrow: that launch leaves all multiprocessors but so many to others, if not 0.

    Raises:
        ArgumentError: an argument does not fit; nothing was written.
    """
    if not 0 <= layer < layout.num_layers:
        raise ArgumentError(f"layer: expected 0 to {layout.num_layers - 1}, got {layer}")
    offsets = (
        layout.key_offset(layer), layout.key_codebook_offset(layer),
        layout.value_offset(layer), layout.value_codebook_offset(layer),
    )  # fmt: skip
    _check(buffer, pages, codebooks, layout.key, offsets[:2], "keys", keys)
    _check(buffer, pages, codebooks, layout.value, offsets[2:], "values", values)
    if rope is not None:
        _check_rope(rope, layout.key, len(pages))
    if len(pages) == 0:
        return
    run = _reader(uses_triton(backend, buffer.device))
    with kernel_scope(buffer.device):
        if layout.is_uniform and not layout.format.is_dense and keys.dtype == values.dtype:
            given = (buffer, pages, codebooks, layout.key, offsets, (keys, values), rope, rope_layout)
            run.decode_both(*given, narrow)
        else:
            run.decode_pages(buffer, pages, codebooks, layout.key, *offsets[:2], keys, rope, rope_layout)
            run.decode_pages(buffer, pages, codebooks, layout.value, *offsets[2:], values, None, rope_layout)


def read_centroids(buffer: torch.Tensor, layout: PartLayout, codebook_offset: int) -> torch.Tensor:
    """Centroids of a codebook part, ``[stages, heads, num_centroids, head_dim]`` float32 in natural channel order.

    What `encode_part` takes as `initial_centroids` for the next span.
    """
    plane = layout.plane("centroids").view(buffer, codebook_offset).float()
    if layout.codec.centroid_type is CentroidType.FP8:
        plane = plane * layout.plane("centroid_scales").view(buffer, codebook_offset)[..., None, None]
    if layout.split_pairs:
        plane = plane.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return plane


def _reader(triton: bool) -> ModuleType:
    if not triton:
        return reference
    from qvg_paged.kernels import _decode_triton  # noqa: PLC0415 - triton is only loaded where it is used

    return _decode_triton


def _check(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    offsets: tuple[int, int],
    name: str,
    out: torch.Tensor,
) -> None:
    if buffer.dtype is not torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
        raise ArgumentError(f"buffer: expected a contiguous 1-D uint8 tensor, got {buffer.dtype} {tuple(buffer.shape)}")
    for ids, units in (("pages", pages), ("codebooks", codebooks)):
        if units.dtype is not torch.int32 or units.ndim != 1 or units.device != buffer.device:
            raise ArgumentError(
                f"{ids}: expected 1-D int32 on {buffer.device}, "
                f"got {units.dtype} {tuple(units.shape)} on {units.device}"
            )
    if len(codebooks) != len(pages):
        raise ArgumentError(f"codebooks: expected one id per page ({len(pages)}), got {len(codebooks)}")
    for part, offset in zip(("part_offset", "codebook_part_offset"), offsets, strict=True):
        if offset < 0 or offset % PLANE_ALIGNMENT:
            raise ArgumentError(f"{part}: expected a non-negative multiple of {PLANE_ALIGNMENT}, got {offset}")
    shape = (len(pages) * layout.tokens, layout.heads, layout.head_dim)
    if tuple(out.shape) != shape or out.device != buffer.device:
        raise ArgumentError(
            f"{name}: expected shape {shape} on {buffer.device}, got {tuple(out.shape)} on {out.device}"
        )
    if out.dtype not in OUT_DTYPES or out.stride(-1) != 1:
        raise ArgumentError(
            f"{name}: expected {OUT_DTYPES} with a contiguous last dimension, "
            f"got {out.dtype} with strides {out.stride()}"
        )


def _check_rope(rope: RoPETables, layout: PartLayout, pages: int) -> None:
    frames, tokens = tuple(rope.cos_frame.shape), tuple(rope.cos_space.shape)
    if frames[0] != pages or tokens[0] != layout.tokens or frames[1] + tokens[1] != layout.head_dim // 2:
        raise ArgumentError(
            f"rope: expected {pages} frames, {layout.tokens} tokens and {layout.head_dim // 2} pairs, "
            f"got frame table {frames} and space table {tokens}"
        )
