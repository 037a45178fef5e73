"""Semantic-aware smoothing: k-means over the tokens of a span, per head, all channels (Quant VideoGen, section 3.1).

Lloyd's iterations on centroids that are rounded to their storage after every update, so that distances are taken to
what a reader will add. A fixed number of iterations: nothing waits for the device.
"""

from dataclasses import dataclass

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels._blocks import FP8_MAX
from qvg_paged.kernels.formats import CentroidType

__all__ = ["Centroids", "fit", "round_centroids", "seed_rows"]


@dataclass(frozen=True)
class Centroids:
    """Centroids of one stage as stored and as read back.

    Attributes:
        stored: ``[heads, num_centroids, head_dim]`` bfloat16 or float8_e4m3fn.
        scales: ``[heads]`` float32 powers of two for float8_e4m3fn, else None.
        values: ``[heads, num_centroids, head_dim]`` bfloat16, exactly ``stored * scales``.
    """

    stored: torch.Tensor
    scales: torch.Tensor | None
    values: torch.Tensor


def seed_rows(tokens: int, heads: int, count: int, seed: int) -> torch.Tensor:
    """Tokens that seed the centroids, ``[heads, count]`` int64 on the CPU.

    One is drawn from each of `count` equal runs of tokens, so that they are distinct and cover the span (where there
    are fewer tokens than centroids some repeat). Drawn by a generator of its own, the same rows on every device.
    """
    draws = torch.rand(heads, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edges = torch.arange(count + 1) * tokens // count
    first, last = edges[:-1], edges[1:]
    return torch.minimum(first + (draws * (last - first)).long(), (last - 1).clamp(min=0)).clamp(max=tokens - 1)


def round_centroids(centroids: torch.Tensor, kind: CentroidType) -> Centroids:
    """Round float32 `centroids` ``[heads, num_centroids, head_dim]`` to their storage.

    FP8 takes one power of two per head, the smallest that brings the largest magnitude into range: values decode
    exactly to bfloat16, and storing them again changes nothing.
    """
    if kind is CentroidType.BF16:
        values = centroids.to(torch.bfloat16)
        return Centroids(values, None, values)
    _, exponent = torch.frexp(centroids.abs().amax((1, 2)) / FP8_MAX)
    # Powers of two from their bits: a device's `pow` may miss them by a rounding.
    scales = ((exponent.clamp(-100, 120).int() + 127) << 23).view(torch.float32)
    wide = scales[:, None, None]
    stored = (centroids / wide).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return Centroids(stored, scales, (stored.float() * wide).to(torch.bfloat16))


def fit(
    residual: torch.Tensor,
    initial: torch.Tensor,
    ids: torch.Tensor,
    *,
    iterations: int,
    kind: CentroidType,
    triton: bool = False,
) -> Centroids:
    """Centroids of `residual` after `iterations` of Lloyd's algorithm, and the nearest one of every token.

    Args:
        residual: ``[heads, tokens, head_dim]`` contiguous.
        initial: ``[heads, num_centroids, head_dim]`` float32. A centroid that no token is nearest to stays as it was.
        ids: ``[heads, tokens]`` uint8, written: the nearest of the returned (rounded) centroids.
        iterations: updates of the centroids.
        kind: storage of the centroids.
        triton: whether Triton's launchers are used.
    """
    if triton:
        from qvg_paged.kernels import _span_triton  # noqa: PLC0415 - triton is only loaded where it is used

        return _span_triton.fit_rows(residual, initial, ids, iterations, kind)
    initial = initial.contiguous()
    centroids = round_centroids(initial, kind)
    means = torch.empty_like(initial)
    for _ in range(iterations):
        reference.assign_centroids(residual, centroids.values, ids)
        reference.centroid_means(residual, ids, centroids.values, means)
        centroids = round_centroids(means, kind)
    reference.assign_centroids(residual, centroids.values, ids)
    return centroids
