"""One cache under test, and what it stores."""

from dataclasses import dataclass

from quality.codecs import Library, SpanCodec
from quality.loop import Cache
from qvg_paged import Codec

__all__ = ["REAL_GEOMETRIES", "Row", "both", "library", "pair"]

REAL_GEOMETRIES = {"Self-Forcing": (37440, 128), "LongCat": (29640, 128), "HY-WorldPlay": (7040, 256)}
"""Tokens of a span and channels of a head, as Quant VideoGen runs these models."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cache under test.

    Attributes:
        name: as printed.
        cache: what is run.
        group: "control", "baseline", "library", "finalist" or "candidate".
    """

    name: str
    cache: Cache
    group: str = "candidate"

    @property
    def batch(self) -> tuple[int, bool]:
        """Rows of a batch have this in common."""
        return self.cache.window or 0, bool(self.cache.correction)

    def bits(self, tokens: int, dim: int, frames: int) -> float:
        """Stored bits per number of spans of `tokens`; frames kept dense weigh their share of `frames`."""
        coded = (self.cache.key.bits(tokens, dim) + self.cache.value.bits(tokens, dim)) / 2
        dense = (self.cache.dense_first + self.cache.dense_recent) / frames
        return dense * 16 + (1 - dense) * coded

    def tokens_per_centroid(self, tokens: int) -> float:
        """Tokens of a span of `tokens` that share a centroid, of the denser codebook of K and V."""
        most = max(self.cache.key.centroids_for(tokens), self.cache.value.centroids_for(tokens))
        return tokens / most if most else float("inf")

    def real_bits(self, model: str, tokens: int) -> float:
        """Stored bits per number at a real model's geometry with as many tokens per centroid as here.

        Ids are one byte: a span that would need more than 256 centroids is cut into shorter ones.
        """
        span, dim = REAL_GEOMETRIES[model]
        return sum(_at(codec, tokens, span, dim) for codec in (self.cache.key, self.cache.value)) / 2


def _at(codec: SpanCodec, tokens: int, span: int, dim: int) -> float:
    here = codec.centroids_for(tokens)
    if not here:
        return codec.bits(span, dim)
    span = min(span, 256 * tokens // here)
    return codec.with_centroids(max(1, here * span // tokens)).bits(span, dim)


def both(name: str, codec: SpanCodec, group: str = "candidate", **changes: object) -> Row:
    """The same codec for K and V."""
    return Row(name=name, cache=Cache(key=codec, value=codec, **changes), group=group)  # type: ignore[arg-type]


def library(name: str, key: Codec, value: Codec | None = None, group: str = "library") -> Row:
    """Codecs of the library."""
    return Row(name=name, cache=Cache(key=Library(key), value=Library(value or key, key=False)), group=group)


def pair(name: str, key: SpanCodec, value: SpanCodec, **changes: object) -> Row:
    """Two candidates."""
    return Row(name=name, cache=Cache(key=key, value=value, **changes))  # type: ignore[arg-type]
