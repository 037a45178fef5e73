"""The same model with outlier channels in its keys, as large video models have them.

A factor common to the two channels of a RoPE pair commutes with the rotation, so a larger key gain and an equally
smaller query gain leave every attention score, and thus the output, as it was. What a cache stores changes: a few key
channels become many times larger than the rest.
"""

import torch
from torch import Tensor

from world_model.model import WorldModelConfig

__all__ = ["with_key_outliers"]


def with_key_outliers(
    weights: dict[str, Tensor],
    config: WorldModelConfig | None = None,
    *,
    pairs: int = 8,
    factors: tuple[float, float] = (6.0, 20.0),
    seed: int = 3,
) -> dict[str, Tensor]:
    """Weights of the same function with `pairs` enlarged RoPE pairs in every head of every layer.

    The state dict `weights` is not changed; gains are computed in float32 and keep their dtype. The factors are drawn
    uniformly between the two of `factors`.
    """
    config = config or WorldModelConfig()
    all_pairs = config.head_dim // 2
    if not 0 <= pairs <= all_pairs:
        raise ValueError(f"pairs: expected 0 to {all_pairs}, got {pairs}")
    generator = torch.Generator().manual_seed(seed)
    changed = dict(weights)
    for layer in range(config.layers):
        gain = torch.ones(config.heads, all_pairs)
        for head in gain:
            chosen = torch.randperm(all_pairs, generator=generator)[:pairs]
            head[chosen] = factors[0] + (factors[1] - factors[0]) * torch.rand(pairs, generator=generator)
        channels = gain.flatten().repeat_interleave(2)
        for norm, factor in (("nk", channels), ("nq", 1 / channels)):
            name = f"blocks.{layer}.{norm}.g"
            changed[name] = (weights[name].float() * factor.to(weights[name].device)).to(weights[name].dtype)
    return changed
