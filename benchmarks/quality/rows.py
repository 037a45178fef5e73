"""The caches of the frontier: published baselines, the library's formats, and every candidate by itself."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from quality.candidates import Candidate
from quality.codecs import DenseSpan, Library, RoundToNearest, SpanCodec
from quality.loop import Cache
from qvg_paged import FORMATS, QVG, QVG_PRO, Codec, Grid

__all__ = ["REAL_GEOMETRIES", "SETS", "Row", "rows_named"]

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


SAME_BYTES_WINDOW = 25
"""Unquantised frames that cost a stream what all 64 frames of the shipped model cost in `best-2bit`, peak bytes."""
OUTLIER_ROWS = (
    "QVG int2 Kc=8",
    "QVG int2 Kc=16",
    "qvg4-int2 Kc=8",
    *(f"2 bits, {balance}, Kc=32/16" for balance in ("knee", "root", "spread")),
    "2 bits, knee, Kc=25/25",
    "2 bits, knee, V balanced, Kc=32/16",
    "2 bits, with queries (balance and rounding), Kc=25/25",
)
PRESETS = ("best-2bit", "balanced", "near-lossless")
CONTROLS = (
    Row(name="rerun", cache=Cache(), group="control"),
    Row(name="other noise", cache=Cache(noise=92), group="control"),
    Row(name="last 4 frames", cache=Cache(window=4), group="control"),
    Row(
        name=f"last {SAME_BYTES_WINDOW} frames (bytes of best-2bit)",
        cache=Cache(window=SAME_BYTES_WINDOW),
        group="control",
    ),
)
K = Candidate(balance="pair")
V = Candidate()
OURS = FORMATS["qvg4-int2"].key


def baselines() -> list[Row]:
    """Published methods."""
    rtn = RoundToNearest(block=16, symmetric=True, fp8=True)
    return [
        both("RTN int2 symmetric B16", rtn, "baseline"),
        both("RTN int2 asymmetric B64", RoundToNearest(block=64, fp8=True), "baseline"),
        Row(
            name="KIVI int2 G32", group="baseline",
            cache=Cache(key=RoundToNearest(block=32, per_channel=True), value=RoundToNearest(block=32)),
        ),
        Row(
            name="KIVI int2 G128", group="baseline",
            cache=Cache(key=RoundToNearest(block=128, per_channel=True), value=RoundToNearest(block=128)),
        ),
        both("QuaRot int2 asymmetric B64", RoundToNearest(block=64, rotated=True, fp8=True), "baseline"),
        both("QuaRot int2 symmetric B16", replace(rtn, rotated=True), "baseline"),
        both("RTN int4 asymmetric B64", RoundToNearest(width=4, block=64, fp8=True), "baseline"),
        both("QuaRot int4 asymmetric B64", RoundToNearest(width=4, block=64, rotated=True, fp8=True), "baseline"),
        *(library(f"QVG int2 Kc={n}", replace(QVG, num_centroids=n), group="baseline") for n in (4, 8, 16, 32, 64)),
        *(library(f"QVG-Pro int2 Kc={n}", replace(QVG_PRO, num_centroids=n), group="baseline") for n in (8,)),
        *(
            library(f"QVG int4 Kc={n}", replace(QVG, grid=Grid.INT4, num_centroids=n), group="baseline")
            for n in (8,)
        ),
        *(
            both(f"QVG int2 asymmetric B{b} Kc=8", Candidate(levels="asym2", block=b, rule="absmax"), "baseline")
            for b in (64, 128)
        ),
        *(library(f"qvg4-int2 Kc={n}", replace(OURS, num_centroids=n)) for n in (8, 16)),
        both("Budget-PCA (4 components, token-axis asymmetric B128)",
             Candidate(levels="asym2", block=128, axis="token", centroids=0, rank=4, rank_bits=2), "baseline"),
    ]  # fmt: skip


def presets() -> list[Row]:
    """The library's presets, through its own encoder."""
    return [library(name, FORMATS[name].key, FORMATS[name].value) for name in PRESETS]


def finalists() -> list[Row]:
    """What the presets were chosen from: the kept changes together."""
    k = Candidate(balance="knee4", centroid_bits=8, block=128)
    v = Candidate(balance="none", centroid_bits=8, block=128)

    def ours(name: str, key: int, value: int, **changes: object) -> Row:
        return pair(
            f"2 bits, {name}, Kc={key}/{value}",
            replace(k, centroids=key, **changes),  # type: ignore[arg-type]
            replace(v, centroids=value),
        )

    found = [
        ours("knee", 32, 16),
        pair("K int4, V 2 bits, Kc=16/21", replace(k, levels="int4", centroids=16), replace(v, centroids=21)),
        pair("K 2 bits, V int4, Kc=21/16", replace(k, centroids=21), replace(v, levels="int4", centroids=16)),
        pair("4 bits, blocks of 128, Kc=32", *(replace(c, levels="int4", centroids=32) for c in (k, v))),
        ours("knee", 42, 10),
        ours("knee", 25, 25),
        ours("root", 32, 16, balance="root"),
        ours("spread", 32, 16, balance="pair"),
        pair("2 bits, knee, V balanced, Kc=32/16", replace(k, centroids=32),
             replace(v, centroids=16, balance="channel")),
        ours("knee, query-shaped rounding 2", 32, 16, feedback=2.0),
        pair("2 bits, with queries (balance and rounding), Kc=25/25",
             replace(k, centroids=25, balance="query", feedback=1.0), replace(v, centroids=25, balance="channel")),
        ours("knee", 8, 8),
        pair("4 bits, blocks of 64, Kc=16", *(replace(c, levels="int4", centroids=16, block=64) for c in (k, v))),
    ]  # fmt: skip
    return [replace(row, group="finalist") for row in found]


def candidates() -> list[Row]:
    """One change at a time, then together."""
    fp8 = {"centroid_bits": 8}

    def changed(name: str, **changes: object) -> Row:
        return pair(name, replace(K, **changes), replace(V, **changes))  # type: ignore[arg-type]

    def keys(name: str, **changes: object) -> Row:
        return pair(name, replace(K, **changes), V)  # type: ignore[arg-type]

    def values(name: str, **changes: object) -> Row:
        return pair(name, K, replace(V, **changes))  # type: ignore[arg-type]

    return [
        pair("base: 4 levels, search, Kc=8, K balanced", K, V),
        keys("neither balanced", balance="none"),
        values("both balanced (qvg4-int2)", balance="channel"),
        values("V: one factor per head", balance="head"),
        keys("K balanced after clustering", balance_late=True),
        keys("K divided by root of spread over query", balance="query"),
        changed("absmax", rule="absmax"),
        changed("least squares", rule="least-squares"),
        changed("energy-preserving", rule="energy"),
        keys("K energy-preserving", rule="energy"),
        values("V energy-preserving", rule="energy"),
        changed("levels -4 -1 1 4", levels="4114"),
        changed("blocks of 128", block=128),
        changed("blocks of 32", block=32),
        changed("FP8 Kc=8", **fp8),
        changed("FP8 Kc=16", **fp8, centroids=16),
        changed("FP8 Kc=16, blocks of 128", **fp8, centroids=16, block=128),
        changed("FP8 Kc=24, blocks of 128", **fp8, centroids=24, block=128),
        changed("FP8 Kc=32, blocks of 128", **fp8, centroids=32, block=128),
        changed("FP8 2 stages of 8, blocks of 128", **fp8, stages=2, block=128),
        changed("FP8 2 stages of 8, blocks of 64", **fp8, stages=2),
        changed("FP8 2 stages of 4, blocks of 64", **fp8, stages=2, centroids=4),
        changed("FP8 2 stages of 16, blocks of 128", **fp8, stages=2, centroids=16, block=128),
        changed("FP8 3 stages of 8, blocks of 128", **fp8, stages=3, block=128),
        pair("K FP8 Kc=8, V FP8 Kc=24", replace(K, **fp8), replace(V, **fp8, centroids=24)),
        pair("K FP8 Kc=24, V FP8 Kc=8", replace(K, **fp8, centroids=24), replace(V, **fp8)),
        changed("FP8 Kc=16, energy", **fp8, centroids=16, rule="energy"),
        changed("FP8 Kc=24, blocks of 128, energy", **fp8, centroids=24, block=128, rule="energy"),
        changed("FP8 2 stages of 8, blocks of 128, energy", **fp8, stages=2, block=128, rule="energy"),
        changed("centroid of least error among 4", nearest=4),
        changed("30 iterations", iterations=30),
        changed("3 iterations", iterations=3),
        changed("1 iteration", iterations=1),
        changed("warm start, 10 iterations", warm=True),
        changed("warm start, 1 iteration", warm=True, iterations=1),
        changed("INT8 Kc=8", **fp8, centroid_integers=True),
        keys("query-aware centroids", query_distance=True),
        keys("query-shaped rounding 0.3", feedback=0.3),
        keys("query-shaped rounding 1", feedback=1.0),
        keys("8 query directions of K in 8 bits (PSAC)", compensate=8),
        values("Hadamard on residual of V", rotated=True),
        changed("Hadamard on both residuals", rotated=True),
        changed("mean + 4 components", centroids=0, rank=4),
        changed("mean + 8 components", centroids=0, rank=8),
        changed("mean + 8 components, blocks of 128", centroids=0, rank=8, block=128),
        changed("4 components beside centroids", rank=4),
        changed("4 components beside FP8 Kc=8, blocks of 128", **fp8, rank=4, block=128),
        changed("mean only", centroids=0, mean=True),
        changed("token-axis scales, blocks of 64", axis="token", balance="none"),
        keys("K token-axis scales, blocks of 128", axis="token", block=128),
        pair("logit correction 1", K, V, correction=1.0),
        pair("logit correction 0.5", K, V, correction=0.5),
        pair("logit correction 0.5 in 8 + 8 pairs", K, V, correction=0.5, correction_pairs=8),
        pair("first frame dense", K, V, dense_first=1),
        pair("first 4 frames dense", K, V, dense_first=4),
        pair("newest 4 frames dense", K, V, dense_recent=4),
        pair("newest 16 frames dense", K, V, dense_recent=16),
        keys("K int4, V int2", levels="int4"),
        values("K int2, V int4", levels="int4"),
        changed("K int4, V int4", levels="int4"),
        changed("2+2 bits: both planes", levels="2+2"),
        pair("2+2 bits: second plane of K dropped", replace(K, levels="2+2 dropped"), replace(V, levels="2+2")),
        pair("2+2 bits: second plane of V dropped", replace(K, levels="2+2"), replace(V, levels="2+2 dropped")),
        pair("K only", K, DenseSpan()),
        pair("V only", DenseSpan(), V),
    ]


def beside_preset() -> list[Row]:
    """What could be added to `best-2bit` and to QVG."""
    preset = FORMATS["best-2bit"]
    key, value = Library(preset.key), Library(preset.value, key=False)
    qvg = replace(QVG, num_centroids=8)
    theirs = (Library(qvg), Library(qvg, key=False))
    return [
        pair("best-2bit, first frame dense", key, value, dense_first=1),
        pair("best-2bit, first 4 frames dense", key, value, dense_first=4),
        pair("best-2bit, newest 4 frames dense", key, value, dense_recent=4),
        pair("best-2bit, newest 16 frames dense", key, value, dense_recent=16),
        pair("best-2bit, logit correction 1", key, value, correction=1.0),
        pair("best-2bit, logit correction 0.5", key, value, correction=0.5),
        pair("best-2bit, logit correction 0.5 in 8 + 8 pairs", key, value, correction=0.5, correction_pairs=8),
        pair("QVG int2 Kc=8, logit correction 1", *theirs, correction=1.0),
        pair("QVG int2 Kc=8, logit correction 0.5", *theirs, correction=0.5),
        pair("QVG int2 Kc=8, first 4 frames dense", *theirs, dense_first=4),
        pair("QVG int2 Kc=8, newest 16 frames dense", *theirs, dense_recent=16),
    ]


SETS: dict[str, list[Row]] = {
    "presets": presets(),
    "controls": list(CONTROLS),
    "baselines": baselines(),
    "finalists": finalists(),
    "beside": beside_preset(),
    "candidates": candidates(),
}
SETS["outliers"] = [
    row
    for row in (*SETS["presets"], *SETS["finalists"], *SETS["baselines"])
    if row.name in {*PRESETS, *OUTLIER_ROWS}
]
SETS["frontier"] = [*SETS["presets"], *SETS["finalists"], *SETS["baselines"], *SETS["controls"]]
SETS["all"] = [*SETS["frontier"], *SETS["beside"], *SETS["candidates"]]
"""Rows that are run together."""


def rows_named(names: Iterable[str]) -> list[Row]:
    """Rows, or sets of rows, by name; each once.

    Raises:
        ValueError: a name is unknown.
    """
    known = {row.name: row for rows in SETS.values() for row in rows}
    found: dict[str, Row] = {}
    for name in names:
        some = SETS.get(name) or ([known[name]] if name in known else [])
        if not some:
            raise ValueError(f"rows: expected one of {', '.join([*SETS, *known])}, got {name!r}")
        found.update({row.name: row for row in some})
    return list(found.values())
