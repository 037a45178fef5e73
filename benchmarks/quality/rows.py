"""The caches of the frontier: published baselines, the library's formats, and every candidate by itself."""

from collections.abc import Iterable
from dataclasses import replace

from quality.candidate_rows import beside_preset, candidates, limits, residual_balance
from quality.candidates import Candidate
from quality.codecs import RoundToNearest
from quality.loop import Cache
from quality.row import Row, both, library, pair
from qvg_paged import FORMATS, QVG, QVG_PRO, Grid

__all__ = ["SAME_BYTES_WINDOW", "SETS", "rows_named"]

SAME_BYTES_WINDOW = 25
"""Unquantised frames that cost a stream what all 64 frames of the shipped model cost in `best-2bit`, peak bytes."""
OUTLIER_ROWS = (
    "QVG int2 Kc=8",
    "QVG int2 Kc=16",
    "qvg4-int2 Kc=8",
    "residual balance, Kc=25/25",
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


SETS: dict[str, list[Row]] = {
    "presets": presets(),
    "controls": list(CONTROLS),
    "baselines": baselines(),
    "finalists": finalists(),
    "beside": beside_preset(),
    "candidates": candidates(),
    "residual": residual_balance(),
    "limits": limits(),
}
SETS["outliers"] = [
    row
    for row in (*SETS["presets"], *SETS["finalists"], *SETS["baselines"], *SETS["residual"])
    if row.name in {*PRESETS, *OUTLIER_ROWS}
]
SETS["frontier"] = [*SETS["presets"], *SETS["finalists"], *SETS["baselines"], *SETS["controls"]]
SETS["all"] = [*SETS["frontier"], *SETS["beside"], *SETS["residual"], *SETS["limits"], *SETS["candidates"]]
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
