"""Candidates by themselves, one change at a time, and what could be added to the preset."""

from dataclasses import replace

from quality.candidates import Candidate
from quality.codecs import DenseSpan, Library
from quality.row import Row, library, pair
from qvg_paged import FORMATS, QVG, BalanceRule

__all__ = ["beside_preset", "candidates", "limits", "residual_balance"]

K = Candidate(balance="pair")
V = Candidate()
QVG4 = FORMATS["qvg4-int2"].key


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


def residual_balance() -> list[Row]:
    """Channels balanced by what clustering leaves of them, and how many centroids keys and values then want."""
    base = {"centroid_bits": 8, "block": 128}
    k = replace(K, **base, balance="cap", residual="pair")  # type: ignore[arg-type]
    v, plain = replace(V, **base, residual="channel"), replace(V, **base)  # type: ignore[arg-type]

    def ours(name: str, key: int, value: int, first: Candidate = k, second: Candidate = v) -> Row:
        return pair(name, replace(first, centroids=key), replace(second, centroids=value))

    knee = replace(k, balance="knee4", residual="none")

    def low_rank(rank: int, feedback: float = 0.0) -> Row:
        codecs = (replace(codec, centroids=0, rank=rank, feedback=feedback) for codec in (k, v))
        shaped = ", both shaped" if feedback else ""
        return pair(f"residual balance, {rank} / {rank} components in 2 bits, no centroids{shaped}", *codecs)

    return [
        ours("residual balance of K, Kc=42/10", 42, 10, second=plain),
        ours("residual balance of V, Kc=42/10", 42, 10, first=knee),
        ours("residual balance, Kc=42/10", 42, 10),
        ours("residual balance, Kc=25/25", 25, 25),
        ours("residual balance, Kc=37/16", 37, 16),
        ours("residual balance, Kc=34/19", 34, 19),
        ours("residual balance, Kc=32/16", 32, 16),
        ours("residual balance of K, Kc=25/25", 25, 25, second=plain),
        ours("residual balance, clustered as is, Kc=42/10", 42, 10, first=replace(k, balance="none")),
        ours("residual balance, clustered by the root, Kc=42/10", 42, 10, first=replace(k, balance="knee4")),
        ours("residual balance, clustered by the spread, Kc=42/10", 42, 10, first=replace(k, balance="pair")),
        ours("residual balance, query-shaped rounding 1, Kc=25/25", 25, 25, first=replace(k, feedback=1.0)),
        ours("residual balance, V rounded by the output projection, Kc=25/25", 25, 25, second=replace(v, feedback=1.0)),
        ours("residual balance, both shaped, Kc=25/25", 25, 25, *(replace(c, feedback=1.0) for c in (k, v))),
        ours("residual balance, K query-weighted distances, Kc=25/25", 25, 25, first=replace(k, query_distance=True)),
        ours("residual balance, blocks of 64, Kc=17/17", 17, 17, replace(k, block=64), replace(v, block=64)),
        ours("residual balance, Kc=16/33", 16, 33),
        library("qvg4-int2, residual balance, Kc=8", replace(QVG4, num_centroids=8, balance_rule=BalanceRule.RESIDUAL),
                group="candidate"),
        low_rank(8),
        low_rank(14),
        low_rank(8, 1.0),
        low_rank(14, 1.0),
        ours("residual balance, levels -4 -1 1 4, Kc=25/25", 25, 25, *(replace(c, levels="4114") for c in (k, v))),
    ]


def limits() -> list[Row]:
    """What more bits, or an exact half of the cache, would bring."""
    base = {"centroid_bits": 8, "block": 128, "centroids": 25}
    k = replace(K, **base, balance="cap", residual="pair")  # type: ignore[arg-type]
    v = replace(V, **base, residual="channel")  # type: ignore[arg-type]
    eight, int4 = ({"levels": levels} for levels in ("8", "int4"))

    def ours(name: str, key: dict[str, str], value: dict[str, str]) -> Row:
        return pair(name, replace(k, **key), replace(v, **value))  # type: ignore[arg-type]

    return [
        pair("exact keys, values in 2 bits", DenseSpan(), v),
        pair("keys in 2 bits, exact values", k, DenseSpan()),
        ours("keys in 2 bits, values in 3", {}, eight),
        ours("keys in 3 bits, values in 2", eight, {}),
        ours("3 bits", eight, eight),
        ours("keys in 2 bits, values in 4", {}, int4),
        ours("keys in 3 bits, values in 4", eight, int4),
        ours("4 bits", int4, int4),
        pair("2 bits, first frame exact", k, v, dense_first=1),
        pair("2 bits, first span exact", k, v, dense_first=16),
        pair("2 bits, newest 16 frames exact", k, v, dense_recent=16),
    ]
