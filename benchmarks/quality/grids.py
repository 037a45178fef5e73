"""Grids and small linear algebra of the candidates."""

from functools import cache

import torch
from torch import Tensor

from qvg_paged.kernels import _blocks
from qvg_paged.kernels.formats import Grid

__all__ = [
    "EXACT",
    "LEVELS",
    "WIDTH",
    "fp8",
    "leading",
    "nearest",
    "pair_size",
    "searched",
    "spread_of",
]

LEVELS = {
    "ternary": (-1.0, 0.0, 1.0),
    "3113": (-3.0, -1.0, 1.0, 3.0),
    "4114": (-4.0, -1.0, 1.0, 4.0),
    "8": tuple(float(i) for i in range(-7, 8, 2)),
    "int4": tuple(float(i) for i in range(-7, 8)),
    "16": tuple(float(i) for i in range(-15, 16, 2)),
}
EXACT = {"ternary": Grid.TERNARY, "3113": Grid.QUATERNARY, "int4": Grid.INT4}
WIDTH = {"ternary": 2, "3113": 2, "4114": 2, "asym2": 2, "8": 3, "int4": 4, "16": 4, "2+2": 4, "2+2 dropped": 2}


def pair_size(moment: Tensor) -> Tensor:
    """Root mean square of the queries in each RoPE pair, up to a factor, ``[heads, 1, dim]``."""
    energy = moment.diagonal(dim1=1, dim2=2)[:, None]
    return energy.unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, -1).clamp_min(1e-12).sqrt()


def leading(square: Tensor, rank: int) -> Tensor:
    """Leading `rank` eigenvectors of symmetric ``[heads, dim, dim]`` matrices, by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(square.shape[-1], rank, generator=generator, dtype=torch.float64).to(square.device)
    square = square.double() / square.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp_min(1e-20)
    square = square + 1e-6 * torch.eye(square.shape[-1], device=square.device)
    for _ in range(12):
        vectors = square @ vectors
        vectors = vectors / vectors.square().sum(1, keepdim=True).sqrt()
        gram = vectors.transpose(1, 2) @ vectors + 1e-9 * torch.eye(rank, device=square.device)
        lower = torch.linalg.cholesky(gram)
        vectors = torch.linalg.solve_triangular(lower, vectors.transpose(1, 2), upper=False).transpose(1, 2)
    return vectors.float()


def fp8(x: Tensor) -> Tensor:
    return x.clamp(max=_blocks.FP8_MAX).to(torch.float8_e4m3fn).float()


def nearest(x: Tensor, scale: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The nearest of ``scale * levels``."""
    values, middle = _table(levels, str(x.device))
    place = torch.bucketize(x / scale.clamp_min(1e-20), middle)
    return values[place] * scale


@cache
def _table(levels: tuple[float, ...], device: str) -> tuple[Tensor, Tensor]:
    """Levels, and the thresholds between them."""
    values = torch.tensor(levels, device=device)
    return values, (values[1:] + values[:-1]) / 2


def spread_of(x: Tensor, pairs: bool) -> Tensor:
    """Standard deviation of channels, or of RoPE pairs of them, over the tokens of ``[heads, tokens, dim]``."""
    variance = x.var(1, keepdim=True, correction=0)
    if pairs:
        variance = variance.unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, -1)
    return variance.sqrt()


def searched(blocks: Tensor, levels: tuple[float, ...]) -> Tensor:
    """FP8 scales ``[..., 1]`` of least squared error, among the largest magnitude's and those below it."""
    start = fp8(blocks.abs().amax(-1, keepdim=True) / levels[-1])
    best, error = start, torch.full_like(start, torch.inf)
    for step in range(_blocks.SEARCH_STEPS):
        tried = fp8(start * 2.0 ** (-step / 8))
        now = (blocks - nearest(blocks, tried, levels)).square().sum(-1, keepdim=True)
        best, error = torch.where(now < error, tried, best), torch.minimum(now, error)
    return best
