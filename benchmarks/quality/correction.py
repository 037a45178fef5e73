"""How much an error of a key is expected to add to the weight of its score: the part that keys carry.

A score with a random error d weighs ``exp(d^2 / 2)`` too much on average. The error of a token is taken apart: a size
per half of its channels, kept with the token, and a shape over the RoPE pairs that all tokens of a span share, which
the queries take. Exact sizes of the errors are used, which a decoder does not have: this is what a correction could
bring.
"""

import torch
from torch import Tensor

__all__ = ["error_columns"]


def error_columns(error: Tensor, size: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Squared sizes of a span's errors and the shape they share.

    Args:
        error: of the keys before RoPE, ``[layers, paths, tokens, heads, dim]``.
        size: second moment of the queries in every channel, ``[layers, paths, heads, dim]``.
        pairs: RoPE pairs of each half in which errors count: those where the queries meet the largest ones.

    Returns:
        ``[layers, paths, tokens, heads, 2]`` and ``[layers, paths, 1, heads, 2, dim / 2]``: the expected square of a
        channel's error is their product.
    """
    halves = error.unflatten(-1, (2, -1)).square()
    spread = halves.unflatten(-1, (-1, 2)).mean((2, -1))  # [layers, paths, heads, 2, pairs]
    met = spread * size.unflatten(-1, (2, -1, 2)).mean(-1)
    chosen = met.topk(min(pairs, met.shape[-1]), -1).indices
    share = torch.zeros_like(spread).scatter_(-1, chosen, 1.0)
    share, spread = (t.repeat_interleave(2, -1)[:, :, None] for t in (share, spread))
    count = share.sum(-1, keepdim=True)
    weight = share * spread / (share * spread).sum(-1, keepdim=True) * count
    scaled = halves / weight.clamp_min(1e-6) * share
    return scaled.sum(-1) / count.squeeze(-1), weight
