"""What the project promises of its speed, and whether a run kept it.

A bound has a value per row that counts for it; their median (or, where a promise is made of every row, the worst) is
held against what is required.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.attention import RELEASED_CUDNN, RELEASED_FLASH, path_name
from bench.chunk_loop import DENSE_HISTORY
from bench.decode import OURS
from bench.dense_baselines import CUDNN, FLASH
from bench.encode import RELEASED
from bench.manager import ALL, BOOKKEEPING, BOTH
from bench.presets import PLAIN
from bench.ragged import EVEN, SINGLE
from bench.rows import median_ms
from bench.xformers_paged import SPLIT_K
from qvg_paged.kernels import AttentionPath

__all__ = ["BOUNDS", "Bound", "judge"]

Row = dict[str, Any]
Value = Callable[[Row], float | None]
AUTO, STAGED, DIRECT = (path_name(path) for path in (AttentionPath.AUTO, AttentionPath.STAGED, AttentionPath.DIRECT))
FP8 = path_name(AttentionPath.STAGED_FP8)


@dataclass(frozen=True)
class Bound:
    """A promise.

    Attributes:
        value: of a row, or None where the row has no such times.
        required: least value, or most if not `at_least`.
        stretch: what would be better still.
        unit: of the value.
        at_least: whether larger is better.
        every: every row must keep it, rather than their median.
    """

    value: Value
    required: float
    stretch: float | None = None
    unit: str = "x"
    at_least: bool = True
    every: bool = False

    def held_by(self, value: float) -> bool:
        """Whether `value` is good enough."""
        return value >= self.required if self.at_least else value <= self.required

    def combine(self, values: Iterable[float]) -> float:
        """One value for several rows."""
        if self.every:
            return min(values) if self.at_least else max(values)
        return median(values)


def faster(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Value:
    """Least time of `theirs` over least time of `ours`."""

    def value(row: Row) -> float | None:
        mine, other = median_ms(row, *ours), median_ms(row, *theirs)
        return None if mine is None or other is None else other / mine

    return value


def _rate(system: str, key: str) -> Value:
    return lambda row: row["systems"].get(system, {}).get(key)


def _note_ratio(ours: str, theirs: str, note: str) -> Value:
    def value(row: Row) -> float | None:
        mine, other = (row["systems"].get(name, {}).get("notes", {}).get(note) for name in (ours, theirs))
        return None if mine is None or other is None else mine / other

    return value


def _microseconds(system: str, factor: float = 1) -> Value:
    """Median time of a system in microseconds, or in as many parts of one as `factor` says."""

    def value(row: Row) -> float | None:
        found = median_ms(row, system)
        return None if found is None else found * 1e3 * factor

    return value


SINGLE_QUERY = (FLASH, CUDNN, *SPLIT_K[:1])
BOUNDS: dict[str, Bound] = {
    "staged FP8": Bound(faster((FP8,), (CUDNN,)), 1.15, 1.35),
    "staged BF16, 4,680 queries": Bound(faster((STAGED,), (CUDNN,)), 0.93, 1.0),
    "staged BF16, 9,360 queries": Bound(faster((STAGED,), (CUDNN,)), 0.95, 1.0),
    "staged BF16, 4,680 queries, 12 heads": Bound(faster((STAGED,), (CUDNN,)), 0.95, 1.0),
    "staged BF16, 9,360 queries, 12 heads": Bound(faster((STAGED,), (CUDNN,)), 0.97, 1.0),
    "staged, 1,560 queries": Bound(faster((STAGED, FP8), (CUDNN,)), 1.0, 1.3),
    "staged, RoPE on read": Bound(faster((STAGED, FP8), (CUDNN,)), 1.0, 1.25),
    "chunk loop": Bound(faster((AUTO,), (DENSE_HISTORY,)), 1.0, 1.1),
    "direct, 4,680 queries": Bound(_rate(DIRECT, "tflops"), 260, 330, "TFLOP/s"),
    "direct, 16-64 queries": Bound(faster((DIRECT,), (FLASH, CUDNN)), 1.0, 3.0),
    "direct, 1 query": Bound(faster((DIRECT,), SINGLE_QUERY), 1.5, 3.5),
    "released read + cuDNN": Bound(faster((AUTO,), (RELEASED_CUDNN,)), 1.15, every=True),
    "released read, its attention": Bound(faster((AUTO,), (RELEASED_FLASH,)), 1.5, every=True),
    "encode": Bound(faster(("qvg4-int2",), (RELEASED,)), 3.0, 5.0),
    "encode, its format": Bound(faster(("qvg-int2",), (RELEASED,)), 3.0, 5.0),
    "encode, error": Bound(_note_ratio("qvg-int2", RELEASED, "relative_error"), 1.01, None, "x", at_least=False),
    "presets, encode": Bound(faster(("best-2bit",), (PLAIN,)), 1 / 1.5),
    "presets, read path": Bound(faster(("best-2bit",), (PLAIN,)), 1 / 1.03),
    "decode": Bound(_rate(OURS, "roofline_share"), 0.80, 0.90, "of copy"),
    "decode with RoPE": Bound(_rate(OURS, "roofline_share"), 0.65, 0.90, "of copy"),
    "bookkeeping": Bound(_microseconds(BOOKKEEPING), 60, 20, "us", at_least=False),
    "bookkeeping with table upload": Bound(_microseconds(ALL), 150, None, "us", at_least=False),
    "pool, 24 pages": Bound(_microseconds(BOTH, 1e3), 400, None, "ns", at_least=False),
    "pool, 128 pages": Bound(_microseconds(BOTH, 1e3), 160, None, "ns", at_least=False),
    "ragged against single calls": Bound(faster((AUTO,), (AUTO + SINGLE,)), 1.0),
    "ragged against equal streams": Bound(faster((AUTO,), (AUTO + EVEN,)), 1 / 1.1),
}
"""By name; rows say which of them they count for."""


def judge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every bound with the rows that had a value for it: value, spread over rows, held or missed."""
    rows, found = list(rows), []
    for name, bound in BOUNDS.items():
        values = {row["name"]: bound.value(row) for row in rows if name in row["bounds"]}
        known = {row: value for row, value in values.items() if value is not None}
        if not values:
            continue
        value = bound.combine(known.values()) if known else None
        found.append({
            "bound": name, "unit": bound.unit, "required": bound.required, "stretch": bound.stretch,
            "at_least": bound.at_least, "every_row": bound.every, "value": value, "rows": values,
            "held": value is not None and bound.held_by(value),
        })  # fmt: skip
    return found
