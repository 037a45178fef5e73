"""Encoding: a span of K or V becomes pages and a codebook.

    y = x * (1 / balance)                           balanced codecs; rounded to the model's dtype
    for every stage:  ids = nearest centroid of y;  y = y - centroid[ids]      rounded to the model's dtype
    codes, scales = blocks of y                     straight into the planes of the pages

Heads are independent. Where Triton runs, all of K and V go in the same launches (`_span_triton`); PyTorch works on
groups of heads (`_span_torch`). The workspace is bounded whatever the number of heads.
"""

from collections.abc import Sequence
from types import ModuleType

import torch

from qvg_paged.kernels import _span_plan, _span_torch, reference
from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.layout import GRANULE, PLANE_ALIGNMENT, PartLayout, align

__all__ = ["encode_part", "encode_workspace_nbytes", "packer"]

MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def encode_part(
    x: torch.Tensor,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    codebook_offset: int | None,
    *,
    initial_centroids: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> None:
    """Write the pages and the codebook of one tensor (K or V) of one layer of a span.

    Args:
        x: ``[frames * tokens, heads, head_dim]`` in the layout's dtype, natural channel order, any strides.
        layout: planes of the part.
        buffer: 1-D uint8 pool, written.
        part_offsets: byte of the pool at which the part of each frame's page starts.
        codebook_offset: byte of the pool at which the codebook part starts; None if the codec keeps none.
        initial_centroids: ``[stages, heads, num_centroids, head_dim]``, natural channel order, of balanced values if
            the codec balances: a warm start in place of seeded tokens.
        ids: ``[stages, heads, frames * tokens]`` uint8: take `initial_centroids` (rounded to their storage) and these
            ids as given.
        backend: Triton or PyTorch.

    Raises:
        ArgumentError: an argument does not fit; nothing was written.
    """
    _check(x, layout, buffer, part_offsets, codebook_offset)
    _check_given(x, layout, initial_centroids, ids)
    if layout.codec.is_dense:
        _write_dense(x, layout, buffer, part_offsets)
        return
    with kernel_scope(x.device):
        if uses_triton(backend, x.device):
            _encode_with_triton(x, layout, buffer, part_offsets, codebook_offset, initial_centroids, ids)
        else:
            _span_torch.encode_heads(x, layout, buffer, part_offsets, codebook_offset, initial_centroids, ids)
        if codebook_offset is not None:
            reference.zero_padding(buffer, layout.codebook_planes, codebook_offset)


def _encode_with_triton(
    x: torch.Tensor,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    codebook_offset: int | None,
    initial: torch.Tensor | None,
    ids: torch.Tensor | None,
) -> None:
    from qvg_paged.kernels import _span_triton  # noqa: PLC0415 - triton is only loaded where it is used

    table = torch.tensor([*part_offsets, codebook_offset or 0]).to(x.device, non_blocking=True)
    places = _span_triton.SpanPlaces(buffer, (layout,), table[None, :-1], table[-1:])
    _span_triton.encode_rows(_span_triton.SpanTokens.of(x, layout.tokens), places, initial, ids)


def packer(triton: bool) -> ModuleType:
    """The module whose `quantise_pack` writes pages."""
    if not triton:
        return reference
    from qvg_paged.kernels import _encode_triton  # noqa: PLC0415 - triton is only loaded where it is used

    return _encode_triton


def encode_workspace_nbytes(layout: PartLayout, span_tokens: int) -> int:
    """Upper bound of the temporary bytes of encoding K and V of spans of up to `span_tokens` tokens, either backend.

    Both together with Triton, one after the other with PyTorch.
    """
    if layout.codec.is_dense:
        return GRANULE
    torch_nbytes = _span_torch.workspace_nbytes(layout, span_tokens)
    return align(max(torch_nbytes, _span_plan.workspace_nbytes(layout, span_tokens)) + (1 << 16), GRANULE)


def _write_dense(x: torch.Tensor, layout: PartLayout, buffer: torch.Tensor, part_offsets: Sequence[int]) -> None:
    plane = layout.plane("values")
    for frame, offset in enumerate(part_offsets):
        plane.view(buffer, offset).copy_(x[frame * layout.tokens : (frame + 1) * layout.tokens])
        reference.zero_padding(buffer, layout.planes, offset)


def _check(
    x: torch.Tensor, layout: PartLayout, buffer: torch.Tensor, part_offsets: Sequence[int], codebook_offset: int | None
) -> None:
    shape = (len(part_offsets) * layout.tokens, layout.heads, layout.head_dim)
    if tuple(x.shape) != shape or not part_offsets:
        raise ArgumentError(f"x: expected shape {shape} for {len(part_offsets)} frames, got {tuple(x.shape)}")
    if x.dtype is not layout.dtype or x.dtype not in MODEL_DTYPES:
        raise ArgumentError(f"x: expected dtype {layout.dtype} of the layout, got {x.dtype}")
    if x.requires_grad:
        raise ArgumentError("x: expected a tensor without gradients, got one that requires grad; detach it")
    if buffer.dtype is not torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
        raise ArgumentError(f"buffer: expected a contiguous 1-D uint8 tensor, got {buffer.dtype} {tuple(buffer.shape)}")
    if buffer.device != x.device:
        raise ArgumentError(f"x: expected the pool's device {buffer.device}, got {x.device}")
    for offset in part_offsets:
        _check_offset("part_offsets", offset, layout.nbytes, buffer.numel())
    if layout.codebook_planes and codebook_offset is None:
        raise ArgumentError("codebook_offset: expected a byte offset for this codec, got None")
    if codebook_offset is not None:
        _check_offset("codebook_offset", codebook_offset, layout.codebook_nbytes, buffer.numel())


def _check_offset(name: str, offset: int, nbytes: int, limit: int) -> None:
    if offset % PLANE_ALIGNMENT or not 0 <= offset <= limit - nbytes:
        raise ArgumentError(
            f"{name}: expected a multiple of {PLANE_ALIGNMENT} that leaves {nbytes} of the buffer's {limit} bytes, "
            f"got {offset}"
        )


def _check_given(x: torch.Tensor, layout: PartLayout, initial: torch.Tensor | None, ids: torch.Tensor | None) -> None:
    stages = 0 if layout.codec.is_dense else layout.codec.stages
    if initial is not None:
        shape = (stages, layout.heads, layout.num_centroids, layout.head_dim)
        if not stages or tuple(initial.shape) != shape or initial.device != x.device:
            raise ArgumentError(
                f"initial_centroids: expected shape {shape} on {x.device} and a codec with stages, "
                f"got {tuple(initial.shape)} on {initial.device}"
            )
    if ids is None:
        return
    if initial is None:
        raise ArgumentError("ids: expected together with initial_centroids, got ids alone")
    wanted = (stages, layout.heads, len(x))
    if tuple(ids.shape) != wanted or ids.dtype is not torch.uint8 or ids.device != x.device:
        raise ArgumentError(
            f"ids: expected uint8 {wanted} on {x.device}, got {ids.dtype} {tuple(ids.shape)} on {ids.device}"
        )
