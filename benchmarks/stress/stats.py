"""Small statistics: Jain's index, percentiles, bootstrap intervals."""

from collections.abc import Iterable, Sequence
from random import Random

__all__ = ["bootstrap", "jain", "mean", "percentile"]


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 if all shares are equal, 1/n if one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Interval of the mean of `values`, the same for the same values.

    Args:
        values: independent observations, say one per seed.
        confidence: how often such intervals hold the mean.
        draws: samples with replacement.
    """
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    rng = Random(f"{len(values)} {sum(values)!r}")
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(draws))
    cut = (1 - confidence) / 2
    return percentile(means, cut), percentile(means, 1 - cut)
