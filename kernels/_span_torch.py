"""Encodes a span with PyTorch: what the Triton path is tested against, and the path of a CPU.

Heads are worked on in groups, so that the workspace is bounded whatever their number.
"""

from collections.abc import Sequence

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels._span_plan import sample_stride, seen_stride
from qvg_paged.kernels.formats import BalanceRule, CentroidType, Codec
from qvg_paged.kernels.kmeans import Centroids, fit, round_centroids, seed_rows
from qvg_paged.kernels.layout import PartLayout
from qvg_paged.kernels.rope import RoPELayout

__all__ = ["OUTLIER", "centroid_resolution", "encode_heads", "spread_resolution", "workspace_nbytes"]

OUTLIER = 4.0
"""Medians of the spread to which `BalanceRule.RESIDUAL` brings larger channels before it smooths."""
GROUP_BYTES = 16 << 20
"""Residual bytes worked on at once (at least one head)."""


def workspace_nbytes(layout: PartLayout, span_tokens: int) -> int:
    """Upper bound of the temporary bytes of `encode_heads`."""
    codec, dim, tokens = layout.codec, layout.head_dim, layout.tokens
    heads = _group_heads(layout, span_tokens)
    piece = min(span_tokens, reference.slice_tokens(heads)) * heads
    book = layout.num_centroids * heads
    quantise = min(heads * span_tokens, max(tokens, reference.BATCH_ELEMENTS // dim))
    steps = [
        piece * dim * 3 * 8 if codec.balanced else 0,
        book * dim * 4 + piece * (dim * 8 + layout.num_centroids * 8 + 16),
        piece * (dim * 16 + 16),
        quantise * dim * 40,
    ]
    seen = heads * span_tokens * (2 * dim * layout.dtype.itemsize + codec.stages + 1)
    held = seen + book * dim * 32 + heads * dim * 32
    return held + max(steps)


def encode_heads(
    x: torch.Tensor,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    codebook_offset: int | None,
    initial: torch.Tensor | None,
    given: torch.Tensor | None,
) -> None:
    """Write pages and codebook of one tensor; arguments as in `encode_part`."""
    group = _group_heads(layout, len(x))
    for head in range(0, layout.heads, group):
        heads = slice(head, min(head + group, layout.heads))
        some = None if initial is None else initial[:, heads]
        ids = None if given is None else given[:, heads]
        _encode_group(x[:, heads], layout, buffer, part_offsets, codebook_offset, head, some, ids)


def _group_heads(layout: PartLayout, span_tokens: int) -> int:
    head_bytes = span_tokens * layout.head_dim * layout.dtype.itemsize
    return max(1, min(layout.heads, GROUP_BYTES // head_bytes))


def _encode_group(
    x: torch.Tensor,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    codebook_offset: int | None,
    first_head: int,
    initial: torch.Tensor | None,
    given: torch.Tensor | None,
) -> None:
    codec, heads = layout.codec, x.shape[1]
    residual = torch.empty((heads, len(x), layout.head_dim), dtype=x.dtype, device=x.device)
    residual.copy_(x.transpose(0, 1))
    owned, balance = slice(first_head, first_head + heads), None
    if codec.balanced:
        assert codebook_offset is not None
        balance = _spread(residual if codec.is_rebalanced else _seen(residual, layout), layout.pairing, codec)
        layout.plane("balance").view(buffer, codebook_offset)[owned] = _stored(balance, layout)
        _divide(residual, balance)
    energy = _energy(_sample(residual)) if codec.is_rebalanced else None
    ids = torch.empty((codec.stages, heads, len(x)), dtype=torch.uint8, device=x.device) if given is None else given
    found = []
    for stage in range(codec.stages):
        found.append(_stage(residual, layout, stage, ids[stage], initial, given is not None))
        _subtract(residual, ids[stage], found[-1].values)
    if energy is not None:
        assert balance is not None
        assert codebook_offset is not None
        before, balance = balance.float(), _rebalanced(residual, energy, balance, layout)
        layout.plane("balance").view(buffer, codebook_offset)[owned] = _stored(balance, layout)
        residual.copy_(x.transpose(0, 1))
        _divide(residual, balance)
        factor = (before / balance.float())[:, None]
        found = [round_centroids(centroids.values * factor, codec.centroid_type) for centroids in found]
        for stage, centroids in enumerate(found):
            _subtract(residual, ids[stage], centroids.values)
    for stage, centroids in enumerate(found):
        assert codebook_offset is not None
        _write_centroids(centroids, layout, buffer, codebook_offset, stage, first_head)
    reference.quantise_pack(residual, ids if codec.stages else None, layout, buffer, part_offsets, first_head)


def _stage(
    residual: torch.Tensor,
    layout: PartLayout,
    stage: int,
    ids: torch.Tensor,
    initial: torch.Tensor | None,
    given: bool,
) -> Centroids:
    codec, tokens, iterations = layout.codec, residual.shape[1], layout.codec.iterations
    if initial is not None:
        start = initial[stage].float()
    else:
        rows = seed_rows(tokens, 1, layout.num_centroids, codec.seed + stage)[0]
        start = residual[:, rows.to(residual.device)].float()
    if given:
        return round_centroids(start, codec.centroid_type)
    kind, some = codec.centroid_type, residual if stage else _seen(residual, layout)
    if iterations > 1 and some is not residual:
        start = fit(some, start, ids.new_empty(some.shape[:2]), iterations=iterations - 1, kind=kind).values.float()
        iterations = 1
    return fit(residual, start, ids, iterations=iterations, kind=kind)


def _seen(residual: torch.Tensor, layout: PartLayout) -> torch.Tensor:
    """What balancing and all iterations but the last look at: one of some tokens of every frame, like `residual`."""
    frames = residual.shape[1] // layout.tokens
    stride = seen_stride(frames, layout.tokens, layout.num_centroids)
    if stride == 1:
        return residual
    used = layout.tokens // stride * stride
    sample: torch.Tensor = residual.unflatten(1, (frames, layout.tokens))[:, :, :used:stride].flatten(1, 2)
    return sample


def _slices(residual: torch.Tensor) -> list[slice]:
    step = reference.slice_tokens(len(residual))
    return [slice(start, start + step) for start in range(0, residual.shape[1], step)]


def _subtract(residual: torch.Tensor, ids: torch.Tensor, centroids: torch.Tensor) -> None:
    head = torch.arange(len(residual), device=residual.device)[:, None]
    for some in _slices(residual):
        rows = centroids[head, ids[:, some].int()]
        residual[:, some] = (residual[:, some].float() - rows.float()).to(residual.dtype)


def _divide(residual: torch.Tensor, balance: torch.Tensor) -> None:
    inverse = 1.0 / balance.float()
    for some in _slices(residual):
        residual[:, some] = (residual[:, some].float() * inverse[:, None]).to(residual.dtype)


def _sample(x: torch.Tensor) -> torch.Tensor:
    """The tokens of ``[heads, tokens, head_dim]`` that `BalanceRule.RESIDUAL` looks at."""
    return x[:, :: sample_stride(x.shape[1])]


def _energy(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares of the channels, ``[heads, head_dim]`` float64."""
    total = sum(x[:, some].double().square_().sum(1) for some in _slices(x))
    assert isinstance(total, torch.Tensor)
    return total


def _rebalanced(
    residual: torch.Tensor, energy: torch.Tensor, balance: torch.Tensor, layout: PartLayout
) -> torch.Tensor:
    """What channels are divided by in the end, ``[heads, head_dim]`` bfloat16.

    Args:
        residual: what smoothing left of the tensor as it was divided by `balance`.
        energy: of the sampled tokens of the tensor that was smoothed, as `_energy` says.
        balance: what it was divided by, ``[heads, head_dim]`` bfloat16; kept where nothing was left.
        layout: pairing, and how finely centroids are stored: what is left is taken to be no smaller than what
            rounding a centroid once more may leave.
    """
    some = _sample(residual)
    left = _energy(some)
    least = energy * centroid_resolution(layout.codec.centroid_type) ** 2
    mean = _paired(torch.where(left > 0, torch.maximum(left, least), 0.0), layout.pairing) / some.shape[1]
    wide = (mean.sqrt().float() * balance.float()).to(torch.bfloat16)
    return torch.where(wide > torch.finfo(torch.bfloat16).tiny, wide, balance)


def _paired(x: torch.Tensor, pairing: RoPELayout | None) -> torch.Tensor:
    """`x` ``[heads, head_dim]``, or its means over RoPE pairs."""
    heads = len(x)
    if pairing is RoPELayout.INTERLEAVED:
        return x.view(heads, -1, 2).mean(-1).repeat_interleave(2, -1)
    if pairing is RoPELayout.HALF_SPLIT:
        return x.view(heads, 2, -1).mean(-2).repeat(1, 2)
    return x


def centroid_resolution(kind: CentroidType) -> float:
    """About what rounding to storage may change of a centroid, relative to it."""
    return {CentroidType.BF16: 2.0**-8, CentroidType.FP8: 2.0**-5}[kind]


def _spread(x: torch.Tensor, pairing: RoPELayout | None, codec: Codec) -> torch.Tensor:
    """What channels are divided by first, from their standard deviation over the span, ``[heads, head_dim]`` bfloat16.

    Channels of a RoPE pair share the root mean square of theirs, so that balancing commutes with the rotation. A
    spread the dtype cannot resolve beside the channel's mean counts as zero, and zero becomes 1. Summed in float64:
    the rounded result is the same on every device.
    """
    x = _sample(x) if codec.is_rebalanced else x
    tokens = x.shape[1]
    mean = sum(x[:, some].sum(1, dtype=torch.float64) for some in _slices(x)) / tokens
    assert isinstance(mean, torch.Tensor)
    variance = sum((x[:, some] - mean[:, None]).square_().sum(1) for some in _slices(x)) / tokens
    assert isinstance(variance, torch.Tensor)
    variance = torch.where(variance > (mean * spread_resolution(x.dtype)).square(), variance, 0.0)
    spread = _paired(variance, pairing).sqrt()
    if codec.is_rebalanced or codec.balance_rule is BalanceRule.ROOT:
        middle = spread.median(-1, keepdim=True).values
        if codec.is_rebalanced:
            spread = torch.where((middle > 0) & (spread > OUTLIER * middle), spread / (OUTLIER * middle), 1.0)
        else:
            spread = torch.maximum((spread * middle).sqrt(), spread / 2)
    spread = spread.to(torch.bfloat16)
    return torch.where(spread > torch.finfo(torch.bfloat16).tiny, spread, 1.0)


def spread_resolution(dtype: torch.dtype) -> float:
    """A channel's spread counts as zero where it is smaller than its mean times this."""
    return max(torch.finfo(dtype).eps / 8, 2.0**-16)


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
