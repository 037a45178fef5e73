"""Encodes a span with Triton: all heads of K and V in a dozen launches, none of which waits for the host."""

from functools import cache

import torch

from qvg_paged.kernels import _centroids_triton, _encode_triton, _kmeans_triton, _rebalance_triton
from qvg_paged.kernels._encode_triton import SpanPlaces
from qvg_paged.kernels._span_plan import group_rows, scratch_nbytes, seen_stride, sum_runs, workspace_nbytes
from qvg_paged.kernels._span_workspace import Workspace
from qvg_paged.kernels._spread_triton import write_spread
from qvg_paged.kernels._tokens_triton import RowGroup, SpanTokens, check_power_of_two, empty_ids, sample_of
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.kmeans import Centroids, round_centroids, seed_rows
from qvg_paged.kernels.layout import PartLayout

__all__ = ["SpanPlaces", "SpanTokens", "encode_group", "encode_rows", "fit_rows"]


def encode_rows(
    tokens: SpanTokens,
    places: SpanPlaces,
    initial: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Write pages and codebooks of a span.

    Args:
        tokens: K, V or both.
        places: where they go.
        initial: ``[stages, rows, num_centroids, head_dim]`` centroids to start from in place of seeded tokens.
        ids: ``[stages, rows, span_tokens]`` uint8, to be taken as given together with `initial`.
        workspace: temporary memory of `workspace_nbytes`; None to take it anew.
    """
    layout = places.layouts[0]
    check_power_of_two(layout.head_dim)
    total = tokens.tensors * tokens.heads
    if workspace is None:
        workspace = Workspace(workspace_nbytes(layout, tokens.span_tokens), places.buffer.device)
    step = group_rows(total, tokens.span_tokens, layout)
    for first in range(0, total, step):
        rows = range(first, min(first + step, total))
        some = slice(rows.start, rows.stop)
        given = None if ids is None else ids[:, some].contiguous()
        workspace.clear()
        encode_group(tokens, places, rows, workspace, None if initial is None else initial[:, some], given)


def encode_group(
    tokens: SpanTokens,
    places: SpanPlaces,
    rows: range,
    workspace: Workspace,
    initial: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> None:
    """`encode_rows` for some rows; `initial` and `given` are theirs."""
    layout, take = places.layouts[0], workspace.take
    codec, dim, count = layout.codec, layout.head_dim, layout.num_centroids
    stride = seen_stride(tokens.frames, tokens.frame_tokens, count)
    scratch = take((len(rows) * scratch_nbytes(tokens.span_tokens, layout),), torch.uint8)
    inverse = None
    if codec.balanced:
        inverse = take((len(rows), dim), torch.float32)
        seen = tokens if codec.is_rebalanced else tokens.sample(stride)
        write_spread(seen, places.layouts, places.buffer, places.books, rows, inverse, scratch)
    shape = (codec.stages, len(rows), count, dim)
    group = RowGroup(
        tokens=tokens, rows=rows, inverse=inverse,
        ids=empty_ids(codec.stages, len(rows), tokens.span_tokens, workspace) if given is None else given,
        centroids=take(shape, torch.bfloat16), norms=take(shape[1:3], torch.float32), scratch=scratch,
    )  # fmt: skip
    fp8 = codec.centroid_type is CentroidType.FP8
    stored = take(shape, torch.float8_e4m3fn) if fp8 else group.centroids
    scales = take(shape[:2], torch.float32) if fp8 else None
    means = take(shape[1:], torch.float32) if fp8 else None
    sample = sample_of(group, stride, workspace) if given is None else group
    for stage in range(codec.stages):
        start = None if initial is None else initial[stage]
        _fit((group if stage else sample, group), stage, layout, stored, scales, means, start, given is None)
    if codec.is_rebalanced:
        _rebalance(group, places, workspace, stored, scales, means)
    if codec.stages:
        _encode_triton.write_centroids(group, places, stored, scales)
    _encode_triton.pack(group, places)


def _rebalance(
    group: RowGroup,
    places: SpanPlaces,
    workspace: Workspace,
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    means: torch.Tensor | None,
) -> None:
    """Balance the rows anew by what smoothing leaves of them; their centroids are stored as that asks for."""
    factor = workspace.take((len(group.rows), group.tokens.head_dim), torch.float32)
    _rebalance_triton.rebalance(group, places, factor)
    for stage, values in enumerate(group.centroids):
        _rebalance_triton.multiply(values, factor, values if means is None else means)
        if means is not None:
            assert scales is not None
            _centroids_triton.round_to_fp8(group, stage, means, stored[stage], scales[stage])


def _fit(
    groups: tuple[RowGroup, RowGroup],
    stage: int,
    layout: PartLayout,
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    means: torch.Tensor | None,
    initial: torch.Tensor | None,
    search: bool,
) -> None:
    """Centroids of a stage and, unless ids are given, the nearest one of every token.

    All iterations but the last look at the first of the `groups`, the same rows with fewer tokens. `means` is where
    those of centroids that are stored in FP8 go.
    """
    codec, (sample, group) = layout.codec, groups

    def keep(means: torch.Tensor) -> None:
        if scales is not None:
            _centroids_triton.round_to_fp8(group, stage, means.contiguous(), stored[stage], scales[stage])
            return
        found = round_centroids(means, codec.centroid_type)
        group.centroids[stage] = found.values
        group.norms.copy_(found.values.float().square().sum(-1))

    exact = scales is None  # bfloat16 centroids are rounded by the kernels themselves
    if means is None:
        means = group.centroids[stage]
    if initial is not None:
        keep(initial.float())
    else:
        seeds = _seeds(group.tokens.span_tokens, group.num_centroids, codec.seed + stage, stored.device)
        _centroids_triton.seed(group, stage, seeds, means)
        if not exact:
            keep(means)
    if not search:
        return
    for left in reversed(range(codec.iterations)):
        seen = sample if left else group
        _kmeans_triton.assign(seen, stage)
        _centroids_triton.update(seen, stage, means)
        if not exact:
            keep(means)
    _kmeans_triton.assign(group, stage)


def fit_rows(
    residual: torch.Tensor, initial: torch.Tensor, ids: torch.Tensor, iterations: int, kind: CentroidType
) -> Centroids:
    """K-means of any tokens; arguments as in `qvg_paged.kernels.kmeans.fit`."""
    check_power_of_two(residual.shape[2])
    found = round_centroids(initial.contiguous(), kind)
    heads, count, dim = initial.shape
    sums = heads * sum_runs(1, residual.shape[1]) * count * (dim + 1) * 4
    workspace = Workspace(sums + ids.numel() + 1024, residual.device)
    group = RowGroup(
        tokens=SpanTokens.of(residual.transpose(0, 1), residual.shape[1]), rows=range(heads), inverse=None,
        ids=empty_ids(1, heads, ids.shape[1], workspace), centroids=found.values.clone()[None],
        norms=found.values.float().square().sum(-1), scratch=workspace.take((sums,), torch.uint8),
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


@cache
def _seeds(span_tokens: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Kept for good: launches that are repeated know where they lie."""
    return seed_rows(span_tokens, 1, count, seed)[0].int().to(device)
