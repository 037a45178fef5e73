"""Encodes a span with Triton: all heads of K and V in a dozen launches, none of which waits for the host."""

from functools import lru_cache

import torch

from qvg_paged.kernels import _centroids_triton, _encode_triton, _kmeans_triton, _rebalance_triton
from qvg_paged.kernels._encode_triton import SpanPlaces
from qvg_paged.kernels._span_plan import group_rows
from qvg_paged.kernels._spread_triton import write_spread
from qvg_paged.kernels._tokens_triton import RowGroup, SpanTokens, check_power_of_two, empty_ids
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.kmeans import Centroids, round_centroids, seed_rows
from qvg_paged.kernels.layout import PartLayout

__all__ = ["SpanPlaces", "SpanTokens", "encode_group", "encode_rows", "fit_rows"]


def encode_rows(
    tokens: SpanTokens,
    places: SpanPlaces,
    initial: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> None:
    """Write pages and codebooks of a span.

    Args:
        tokens: K, V or both.
        places: where they go.
        initial: ``[stages, rows, num_centroids, head_dim]`` centroids to start from in place of seeded tokens.
        ids: ``[stages, rows, span_tokens]`` uint8, to be taken as given together with `initial`.
    """
    layout = places.layouts[0]
    check_power_of_two(layout.head_dim)
    total = tokens.tensors * tokens.heads
    step = group_rows(total, tokens.span_tokens, layout)
    for first in range(0, total, step):
        rows = range(first, min(first + step, total))
        some = slice(rows.start, rows.stop)
        given = None if ids is None else ids[:, some].contiguous()
        encode_group(tokens, places, rows, None if initial is None else initial[:, some], given)


def encode_group(
    tokens: SpanTokens,
    places: SpanPlaces,
    rows: range,
    initial: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> None:
    """`encode_rows` for some rows; `initial` and `given` are theirs."""
    layout, device = places.layouts[0], places.buffer.device
    codec, dim, count = layout.codec, layout.head_dim, layout.num_centroids
    inverse = write_spread(tokens, places.layouts, places.buffer, places.books, rows) if codec.balanced else None
    shape = (codec.stages, len(rows), count, dim)
    group = RowGroup(
        tokens=tokens, rows=rows, inverse=inverse,
        ids=empty_ids(codec.stages, len(rows), tokens.span_tokens, device) if given is None else given,
        centroids=torch.empty(shape, dtype=torch.bfloat16, device=device),
        norms=torch.empty(shape[1:3], dtype=torch.float32, device=device),
    )  # fmt: skip
    fp8 = codec.centroid_type is CentroidType.FP8
    stored = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) if fp8 else group.centroids
    scales = torch.empty(shape[:2], dtype=torch.float32, device=device) if fp8 else None
    for stage in range(codec.stages):
        _fit(group, stage, layout, stored, scales, None if initial is None else initial[stage], given is None)
    if codec.is_rebalanced:
        _rebalance(group, places, stored, scales)
    if codec.stages:
        _encode_triton.write_centroids(group, places, stored, scales)
    _encode_triton.pack(group, places)


def _rebalance(
    group: RowGroup, places: SpanPlaces, stored: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Balance the rows anew by what smoothing leaves of them; their centroids are stored as that asks for."""
    factor = _rebalance_triton.rebalance(group, places)[:, None]
    for stage, values in enumerate(group.centroids):
        means = values * factor
        if scales is not None:
            _centroids_triton.round_to_fp8(group, stage, means, stored[stage], scales[stage])
        else:
            values.copy_(means)


def _fit(
    group: RowGroup,
    stage: int,
    layout: PartLayout,
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    initial: torch.Tensor | None,
    search: bool,
) -> None:
    """Centroids of a stage and, unless ids are given, the nearest one of every token."""
    codec = layout.codec

    def keep(means: torch.Tensor) -> None:
        if scales is not None:
            _centroids_triton.round_to_fp8(group, stage, means.contiguous(), stored[stage], scales[stage])
            return
        found = round_centroids(means, codec.centroid_type)
        group.centroids[stage] = found.values
        group.norms.copy_(found.values.float().square().sum(-1))

    exact = scales is None  # bfloat16 centroids are rounded by the kernels themselves
    means = group.centroids[stage] if exact else torch.empty(stored.shape[1:], device=stored.device)
    if initial is not None:
        keep(initial.float())
    else:
        seeds = _seeds(group.tokens.span_tokens, group.num_centroids, codec.seed + stage, stored.device)
        _centroids_triton.seed(group, stage, seeds, means)
        if not exact:
            keep(means)
    if not search:
        return
    for _ in range(codec.iterations):
        _kmeans_triton.assign(group, stage)
        _centroids_triton.update(group, stage, means)
        if not exact:
            keep(means)
    _kmeans_triton.assign(group, stage)


def fit_rows(
    residual: torch.Tensor, initial: torch.Tensor, ids: torch.Tensor, iterations: int, kind: CentroidType
) -> Centroids:
    """K-means of any tokens; arguments as in `qvg_paged.kernels.kmeans.fit`."""
    check_power_of_two(residual.shape[2])
    found = round_centroids(initial.contiguous(), kind)
    group = RowGroup(
        tokens=SpanTokens.of(residual.transpose(0, 1), residual.shape[1]), rows=range(len(residual)), inverse=None,
        ids=empty_ids(1, len(ids), ids.shape[1], ids.device), centroids=found.values.clone()[None],
        norms=found.values.float().square().sum(-1),
    )  # fmt: skip
    means = torch.empty_like(initial, memory_format=torch.contiguous_format)
    for _ in range(iterations):
        _kmeans_triton.assign(group, 0)
        _centroids_triton.update(group, 0, means)
        found = round_centroids(means, kind)
        group.centroids[0] = found.values
        group.norms.copy_(found.values.float().square().sum(-1))
    _kmeans_triton.assign(group, 0)
    ids.copy_(group.ids[0])
    return found


@lru_cache(maxsize=256)
def _seeds(span_tokens: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    return seed_rows(span_tokens, 1, count, seed)[0].int().to(device)
