"""Encoding: a span of K or V becomes pages and a codebook.

    y = x / balance                                 balanced codecs; rounded to the model's dtype
    for every stage:  ids = nearest centroid of y;  y = y - centroid[ids]      rounded to the model's dtype
    codes, scales = blocks of y                     straight into the planes of the pages

Heads are independent. They are worked on in groups, so that the workspace is bounded whatever the number of heads.
"""

from collections.abc import Sequence
from types import ModuleType

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import BalanceRule, CentroidType
from qvg_paged.kernels.kmeans import Centroids, fit, round_centroids, seed_rows
from qvg_paged.kernels.layout import GRANULE, PLANE_ALIGNMENT, PartLayout, align
from qvg_paged.kernels.rope import RoPELayout

__all__ = ["encode_part", "encode_workspace_nbytes", "packer"]

GROUP_BYTES = 16 << 20
"""Residual bytes worked on at once (at least one head)."""
SUM_TOKENS = 2048
"""Tokens whose sums the Triton launcher keeps apart before it adds them in order."""
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
    triton = uses_triton(backend, x.device)
    if layout.codec.is_dense:
        _write_dense(x, layout, buffer, part_offsets)
        return
    group = _group_heads(layout, len(x))
    with kernel_scope(x.device):
        for head in range(0, layout.heads, group):
            heads = slice(head, min(head + group, layout.heads))
            some = None if initial_centroids is None else initial_centroids[:, heads]
            given = None if ids is None else ids[:, heads]
            _encode_heads(x[:, heads], layout, buffer, part_offsets, codebook_offset, head, some, given, triton)
        if codebook_offset is not None:
            reference.zero_padding(buffer, layout.codebook_planes, codebook_offset)


def encode_workspace_nbytes(layout: PartLayout, span_tokens: int) -> int:
    """Upper bound of the temporary bytes of `encode_part` for spans of up to `span_tokens` tokens, either backend."""
    codec, dim, tokens = layout.codec, layout.head_dim, layout.tokens
    if codec.is_dense:
        return GRANULE
    heads = _group_heads(layout, span_tokens)
    piece = min(span_tokens, reference.slice_tokens(heads)) * heads
    book = layout.num_centroids * heads
    quantise = min(heads * span_tokens, max(tokens, reference.BATCH_ELEMENTS // dim))
    parts = -(-span_tokens // SUM_TOKENS)
    steps = [
        piece * dim * 3 * 8 if codec.balanced else 0,
        book * dim * 4 + piece * (dim * 8 + layout.num_centroids * 8 + 16),
        piece * (dim * 16 + 16),
        quantise * dim * 40,
        parts * book * (dim + 1) * 4,
    ]
    held = heads * span_tokens * (dim * layout.dtype.itemsize + codec.stages) + book * dim * 32 + heads * dim * 32
    return align(held + max(steps) + (1 << 16), GRANULE)


def _group_heads(layout: PartLayout, span_tokens: int) -> int:
    head_bytes = span_tokens * layout.head_dim * layout.dtype.itemsize
    return max(1, min(layout.heads, GROUP_BYTES // head_bytes))


def _encode_heads(
    x: torch.Tensor,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    codebook_offset: int | None,
    first_head: int,
    initial: torch.Tensor | None,
    given: torch.Tensor | None,
    triton: bool,
) -> None:
    codec, heads = layout.codec, x.shape[1]
    residual = torch.empty((heads, len(x), layout.head_dim), dtype=x.dtype, device=x.device)
    residual.copy_(x.transpose(0, 1))
    if codec.balanced:
        assert codebook_offset is not None
        balance = _spread(residual, layout.pairing, codec.balance_rule)
        plane = layout.plane("balance").view(buffer, codebook_offset)
        plane[first_head : first_head + heads] = _stored(balance, layout)
        for some in _slices(residual):
            residual[:, some] = (residual[:, some].float() / balance.float()[:, None]).to(x.dtype)
    ids = torch.empty((codec.stages, heads, len(x)), dtype=torch.uint8, device=x.device) if given is None else given
    for stage in range(codec.stages):
        assert codebook_offset is not None
        centroids = _stage(residual, layout, stage, ids[stage], initial, given is not None, triton)
        _write_centroids(centroids, layout, buffer, codebook_offset, stage, first_head)
        _subtract(residual, ids[stage], centroids.values)
    pack = packer(triton)
    pack.quantise_pack(residual, ids if codec.stages else None, layout, buffer, part_offsets, first_head)


def _stage(
    residual: torch.Tensor,
    layout: PartLayout,
    stage: int,
    ids: torch.Tensor,
    initial: torch.Tensor | None,
    given: bool,
    triton: bool,
) -> Centroids:
    codec, (heads, tokens, _) = layout.codec, residual.shape
    if initial is not None:
        start = initial[stage].float()
    else:
        rows = seed_rows(tokens, heads, layout.num_centroids, codec.seed + stage)
        rows = rows.int().to(residual.device, non_blocking=True)
        start = residual[torch.arange(heads, device=rows.device)[:, None], rows].float()
    if given:
        return round_centroids(start, codec.centroid_type)
    kind, iterations = codec.centroid_type, codec.iterations
    return fit(residual, start, ids, iterations=iterations, kind=kind, triton=triton)


def packer(triton: bool) -> ModuleType:
    """The module whose `quantise_pack` writes pages."""
    if not triton:
        return reference
    from qvg_paged.kernels import _encode_triton  # noqa: PLC0415 - triton is only loaded where it is used

    return _encode_triton


def _slices(residual: torch.Tensor) -> list[slice]:
    step = reference.slice_tokens(len(residual))
    return [slice(start, start + step) for start in range(0, residual.shape[1], step)]


def _subtract(residual: torch.Tensor, ids: torch.Tensor, centroids: torch.Tensor) -> None:
    head = torch.arange(len(residual), device=residual.device)[:, None]
    for some in _slices(residual):
        rows = centroids[head, ids[:, some].int()]
        residual[:, some] = (residual[:, some].float() - rows.float()).to(residual.dtype)


def _spread(x: torch.Tensor, pairing: RoPELayout | None, rule: BalanceRule) -> torch.Tensor:
    """What channels are divided by, from their standard deviation over the span, ``[heads, head_dim]`` bfloat16.

    Channels of a RoPE pair share the root mean square of theirs, so that balancing commutes with the rotation. A
    spread the dtype cannot resolve beside the channel's mean counts as zero, and zero becomes 1. Summed in float64:
    the rounded result is the same on every device.
    """
    tokens = x.shape[1]
    mean = sum(x[:, some].sum(1, dtype=torch.float64) for some in _slices(x)) / tokens
    assert isinstance(mean, torch.Tensor)
    variance = sum((x[:, some] - mean[:, None]).square_().sum(1) for some in _slices(x)) / tokens
    assert isinstance(variance, torch.Tensor)
    resolution = max(torch.finfo(x.dtype).eps / 8, 2.0**-16)
    variance = torch.where(variance > (mean * resolution).square(), variance, 0.0)
    if pairing is RoPELayout.INTERLEAVED:
        variance = variance.unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, -1)
    elif pairing is RoPELayout.HALF_SPLIT:
        variance = variance.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2)
    spread = variance.sqrt()
    if rule is BalanceRule.ROOT:
        middle = spread.median(-1, keepdim=True).values
        spread = torch.maximum((spread * middle).sqrt(), spread / 2)
    spread = spread.to(torch.bfloat16)
    return torch.where(spread > torch.finfo(torch.bfloat16).tiny, spread, 1.0)


def _stored(x: torch.Tensor, layout: PartLayout) -> torch.Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1) if layout.split_pairs else x


def _write_centroids(
    centroids: Centroids, layout: PartLayout, buffer: torch.Tensor, offset: int, stage: int, first_head: int
) -> None:
    owned = slice(first_head, first_head + len(centroids.stored))
    raw = torch.uint8 if layout.codec.centroid_type is CentroidType.FP8 else torch.bfloat16
    plane = layout.plane("centroids").view(buffer, offset).view(raw)
    plane[stage, owned] = _stored(centroids.stored.view(raw), layout)
    if centroids.scales is not None:
        layout.plane("centroid_scales").view(buffer, offset)[stage, owned] = centroids.scales


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
