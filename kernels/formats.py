"""How numbers are coded: grids, codecs of one tensor, page formats. A leaf module that every layer imports.

A value is read back as

    x = balance * (scale * (step * code + offset) + sum over stages of centroid[id])

with an FP8 E4M3 `scale` per block of consecutive channels of a token (Quant VideoGen, sections 3 and 4).
"""

from dataclasses import dataclass, replace
from enum import Enum

from qvg_paged.kernels.errors import ArgumentError

__all__ = [
    "DENSE",
    "FORMATS",
    "QVG",
    "QVG_PRO",
    "BalanceRule",
    "CentroidType",
    "Codec",
    "Grid",
    "PageFormat",
    "ScaleRule",
    "default_num_centroids",
    "get_format",
]

MAX_CENTROIDS = 256


class Grid(Enum):
    """The levels a residual may take, as multiples of its block's scale."""

    DENSE = "dense"
    """No grid: the token is kept in the model's dtype."""
    TERNARY = "ternary"
    """-1, 0, 1 in two bits; code 3 is never used (as Quant VideoGen released it)."""
    QUATERNARY = "quaternary"
    """-3, -1, 1, 3: every two-bit code carries a level."""
    INT4 = "int4"
    """-7 ... 7 in four bits; code 15 is never used."""

    @property
    def bits(self) -> int:
        """Stored bits of one code; 0 for `DENSE`, whose width is the model dtype's."""
        return {Grid.DENSE: 0, Grid.TERNARY: 2, Grid.QUATERNARY: 2, Grid.INT4: 4}[self]

    @property
    def step(self) -> int:
        """Distance of neighbouring levels: ``level = step * code + offset``."""
        return 2 if self is Grid.QUATERNARY else 1

    @property
    def offset(self) -> int:
        """Level of code 0."""
        return -self.max_level

    @property
    def max_level(self) -> int:
        """Largest level; absmax scaling divides the block's largest magnitude by it."""
        return {Grid.DENSE: 0, Grid.TERNARY: 1, Grid.QUATERNARY: 3, Grid.INT4: 7}[self]


class ScaleRule(Enum):
    """How the encoder picks a block's scale; the stored bytes are the same for all."""

    ABSMAX = "absmax"
    """Largest magnitude over the largest level: nothing is clipped."""
    LEAST_SQUARES = "least-squares"
    """Absmax codes first, then the scale that minimises their squared error, then codes for that scale."""
    SEARCH = "search"
    """The least squared error among FP8 scales from the absmax scale down to 0.4 times as large: of all with sixteen
    levels; with fewer of every third, then of the best one's neighbours."""


class BalanceRule(Enum):
    """What a balanced codec divides channels by; the stored bytes are the same for all."""

    SPREAD = "spread"
    """The spread itself: all channels end alike, and with them the errors relative to a channel's size."""
    ROOT = "root"
    """Its square root, times that of the head's median spread, but never less than half the spread: large channels
    shrink and still get the smaller relative errors, so that a key's small channels, which move few scores, do not cost
    the large ones their precision; outliers of any size end at twice the median."""
    RESIDUAL = "residual"
    """The spread of what smoothing leaves: every channel then meets the grid at its best size, and centroids are placed
    where the tensor itself needs them. While they are, only outliers are divided, by what brings them to four times the
    median. Long spans are judged by a sample of their tokens. Without stages as `SPREAD`."""


class CentroidType(Enum):
    """Storage of the smoothing centroids."""

    BF16 = "bf16"
    FP8 = "fp8"
    """E4M3 with one float32 scale per stage and head: plain E4M3 overflows on real values."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How one tensor (K or V) of a span is stored.

    Attributes:
        grid: levels of the residual.
        block_size: consecutive channels that share a scale (B in the paper); the whole head if it has fewer.
        stages: progressive smoothing stages (S in the paper); 0 quantises the tensor itself.
        num_centroids: centroids per stage and head, or None for what `tokens_per_centroid` says.
        tokens_per_centroid: one centroid for so many tokens of a span, 256 at most, so that the codebook costs as much
            whatever the span; None for `default_num_centroids` of the span.
        balanced: divide channels by a vector per head that is kept, before they are quantised.
        balance_rule: encoder's choice of that vector from the channels' spread over the span.
        scale_rule: encoder's choice of scale.
        centroid_type: storage of the centroids.
        iterations: Lloyd iterations of each stage; in the first stage of a long span all but the last, and balancing,
            look at one token of four.
        seed: seed of the initial centroids (a generator of the encoder's own).
    """

    grid: Grid
    block_size: int = 64
    stages: int = 1
    num_centroids: int | None = None
    tokens_per_centroid: int | None = None
    balanced: bool = False
    balance_rule: BalanceRule = BalanceRule.SPREAD
    scale_rule: ScaleRule = ScaleRule.ABSMAX
    centroid_type: CentroidType = CentroidType.BF16
    iterations: int = 10
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.block_size < 4 or self.block_size & (self.block_size - 1):
            raise ArgumentError(f"block_size: expected a power of two >= 4, got {self.block_size}")
        if not 0 <= self.stages <= 8:
            raise ArgumentError(f"stages: expected 0 to 8, got {self.stages}")
        if self.num_centroids is not None and not 1 <= self.num_centroids <= MAX_CENTROIDS:
            raise ArgumentError(
                f"num_centroids: expected 1 to {MAX_CENTROIDS} (ids are one byte), got {self.num_centroids}"
            )
        if self.tokens_per_centroid is not None and self.tokens_per_centroid < 1:
            raise ArgumentError(f"tokens_per_centroid: expected >= 1, got {self.tokens_per_centroid}")
        if self.iterations < 0:
            raise ArgumentError(f"iterations: expected >= 0, got {self.iterations}")

    @property
    def is_dense(self) -> bool:
        """Whether tokens are kept unquantised."""
        return self.grid is Grid.DENSE

    @property
    def is_rebalanced(self) -> bool:
        """Whether the balance is chosen after smoothing."""
        return self.balanced and self.stages > 0 and self.balance_rule is BalanceRule.RESIDUAL

    def fitted(self, head_dim: int) -> "Codec":
        """The same codec with blocks no longer than a head."""
        return replace(self, block_size=head_dim) if 4 <= head_dim < self.block_size else self

    def centroids_for(self, span_tokens: int) -> int:
        """Centroids per stage and head for a span of `span_tokens` tokens (0 without stages)."""
        if self.is_dense or self.stages == 0:
            return 0
        if self.num_centroids is None and self.tokens_per_centroid is not None:
            return min(MAX_CENTROIDS, max(1, span_tokens // self.tokens_per_centroid))
        return self.num_centroids or default_num_centroids(span_tokens)


def default_num_centroids(span_tokens: int) -> int:
    """Largest power of two <= `span_tokens` / 16, between 1 and 256.

    A codebook of 256 BF16 centroids weighs as much as 1,872 INT2 tokens of 128 channels: short spans need fewer.
    """
    return min(MAX_CENTROIDS, 1 << max(0, (span_tokens // 16).bit_length() - 1))


DENSE_CODEC = Codec(grid=Grid.DENSE, stages=0)
QVG = Codec(grid=Grid.TERNARY, stages=1, block_size=64)
"""Preset of the paper: one stage, blocks of 64."""
QVG_PRO = Codec(grid=Grid.TERNARY, stages=4, block_size=16)
"""Preset of the paper for higher fidelity: four stages, blocks of 16."""


@dataclass(frozen=True, kw_only=True)
class PageFormat:
    """A named pair of codecs; a page holds one frame in one format."""

    name: str
    key: Codec
    value: Codec

    @property
    def is_dense(self) -> bool:
        """Whether neither tensor is quantised."""
        return self.key.is_dense and self.value.is_dense

    def with_codecs(self, **changes: object) -> "PageFormat":
        """Same format with `changes` (fields of `Codec`) applied to both quantised tensors."""
        key = self.key if self.key.is_dense else replace(self.key, **changes)  # type: ignore[arg-type]
        value = self.value if self.value.is_dense else replace(self.value, **changes)  # type: ignore[arg-type]
        return replace(self, key=key, value=value)


def _both(name: str, codec: Codec) -> PageFormat:
    return PageFormat(name=name, key=codec, value=codec)


def _preset(grid: Grid, tokens_per_centroid: int) -> Codec:
    return Codec(
        grid=grid, block_size=128, tokens_per_centroid=tokens_per_centroid, balanced=True,
        balance_rule=BalanceRule.RESIDUAL, scale_rule=ScaleRule.SEARCH, centroid_type=CentroidType.FP8,
    )  # fmt: skip


DENSE = _both("dense", DENSE_CODEC)
FORMATS: dict[str, PageFormat] = {
    fmt.name: fmt
    for fmt in (
        DENSE,
        _both("qvg-int2", QVG),
        _both("qvg-pro-int2", QVG_PRO),
        _both("qvg-int4", replace(QVG, grid=Grid.INT4)),
        _both("qvg4-int2", replace(QVG, grid=Grid.QUATERNARY, balanced=True, scale_rule=ScaleRule.SEARCH)),
        PageFormat(name="best-2bit", key=_preset(Grid.QUATERNARY, 27), value=_preset(Grid.QUATERNARY, 64)),
        PageFormat(name="balanced", key=_preset(Grid.INT4, 64), value=_preset(Grid.QUATERNARY, 48)),
        PageFormat(name="near-lossless", key=_preset(Grid.INT4, 32), value=_preset(Grid.INT4, 32)),
    )
}
"""The known formats by name. The last three are the presets that docs/quality.md justifies: at most 2.35, 3.3 and 4.4
bits per number with 128 channels a head, everything counted, whatever the span."""


def get_format(fmt: "str | PageFormat") -> PageFormat:
    """Format by name, or `fmt` itself if it is one already.

    Raises:
        ArgumentError: the name is unknown; the message lists the known ones.
    """
    if isinstance(fmt, PageFormat):
        return fmt
    if fmt not in FORMATS:
        raise ArgumentError(f"format: expected one of {', '.join(FORMATS)}, got {fmt!r}")
    return FORMATS[fmt]
