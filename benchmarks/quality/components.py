"""Mean and principal components of a span in place of centroids, with few bits for every coefficient."""

import torch
from torch import Tensor

from quality.grids import LEVELS, leading, nearest, searched
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.kmeans import round_centroids

__all__ = ["components", "low_rank"]


def low_rank(x: Tensor, rank: int, bits: int) -> Tensor:
    """Leading components of ``[heads, tokens, dim]`` in BF16, coefficients on a symmetric grid of `bits` bits."""
    basis = leading(x.transpose(1, 2) @ x, rank).bfloat16().float()
    part = x @ basis
    top = (1 << (bits - 1)) - 1
    # one FP8 scale per token for coefficients that are brought to a like size by their spread
    spread = part.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8).bfloat16().float()
    part = part / spread
    scale = (part.abs().amax(-1, keepdim=True) / top).to(torch.float8_e4m3fn).float().clamp_min(2.0**-9)
    return ((part / scale).round_().clamp_(-top, top) * scale * spread) @ basis.transpose(1, 2)


def components(x: Tensor, rank: int) -> Tensor:
    """Mean and leading components in eight bits, coefficients on four levels with a searched scale per token."""
    mean = _eight_bits(x.mean(1, keepdim=True))
    basis = leading((x - mean).transpose(1, 2) @ (x - mean), rank)
    part = (x - mean) @ basis
    spread = part.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)
    part = part / spread
    coded = nearest(part, searched(part, LEVELS["3113"]), LEVELS["3113"])
    return mean + coded @ _eight_bits((basis * spread).transpose(1, 2))


def _eight_bits(x: Tensor) -> Tensor:
    """As centroids are kept: E4M3 with a scale per head."""
    return round_centroids(x, CentroidType.FP8).values.float()
