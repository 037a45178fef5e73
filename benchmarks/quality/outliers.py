"""The same function with key outliers as large as those of a named real model."""

import torch
from torch import Tensor
from world_model.model import WorldModel
from world_model.outliers import with_key_outliers

from quality.loop import Cache, CodedHistory, prefill
from quality.paths import Paths

__all__ = ["contrast_of", "with_contrast"]


def contrast_of(medians: Tensor) -> Tensor:
    """Largest over median channel of the channels' median magnitudes ``[layers, heads, dim]``, mean over heads."""
    return (medians.amax(-1) / medians.median(-1).values).mean()


@torch.no_grad()
def with_contrast(model: WorldModel, paths: Paths, contrast: float) -> dict[str, Tensor]:
    """Weights whose keys have `contrast` on the first paths: 8 RoPE pairs of every head are enlarged alike."""
    some = slice(0, min(4, len(paths)))
    history = CodedHistory(model, [Cache()], some.stop, paths.given, paths.given, keep=True)
    prefill(model, paths, history, some)
    magnitudes = history.keys.float().abs()  # [layers, paths, tokens, heads, dim]
    medians = magnitudes.permute(0, 3, 4, 1, 2).flatten(3).median(-1).values
    unit = {name: w.new_ones(w.shape) for name, w in model.state_dict().items() if name.endswith(".nk.g")}
    low, high = 1.0, 1000.0
    for _ in range(30):
        factor = (low * high) ** 0.5
        gains = with_key_outliers(_norms(unit), model.config, factors=(factor, factor))
        layers = range(model.config.layers)
        gain = torch.stack([gains[f"blocks.{layer}.nk.g"].view(model.config.heads, -1) for layer in layers])
        low, high = (factor, high) if contrast_of(medians * gain) < contrast else (low, factor)
    return with_key_outliers(model.state_dict(), model.config, factors=(low, low))


def _norms(unit: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**unit, **{name.replace(".nk.", ".nq."): w for name, w in unit.items()}}
