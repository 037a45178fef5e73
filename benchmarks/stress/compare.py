"""Compares two result files seed by seed, and says so when the difference is no larger than the noise."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvg_paged.errors import ArgumentError
from stress.stats import bootstrap, mean

__all__ = ["BETTER", "Difference", "compare", "read_result"]

BETTER = {
    "first_chunk_p50_seconds": -1, "first_chunk_p99_seconds": -1, "chunk_p50_seconds": -1, "chunk_p99_seconds": -1,
    "lateness_p99_seconds": -1, "continuous_play_ratio": 1, "stall_ratio": -1, "goodput_chunks_per_second": 1,
    "goodput_streams_per_second": 1, "chunks_per_second_under_load": 1, "lost_streams": -1, "jain": 1,
    "largest_gap_over_unit": -1, "waste_ratio": -1, "transfer_ratio": -1, "parks_per_chunk": -1,
}  # fmt: skip
"""Figures that have a better side, and which."""


@dataclass(frozen=True)
class Difference:
    """One figure of two results.

    Attributes:
        name: of the figure.
        before, after: its means.
        low, high: 95 % interval of the mean difference, by bootstrap over paired seeds.
        verdict: ``better``, ``worse``, ``different`` or ``no difference``.
    """

    name: str
    before: float
    after: float
    low: float
    high: float
    verdict: str


def read_result(path: Path) -> dict[str, Any]:
    """A result file of ``qvg-paged stress``.

    Raises:
        ArgumentError: it is something else.
    """
    try:
        content = json.loads(path.read_text())
        content["results"]["runs"][0]["metrics"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ArgumentError(f"{path}: expected a result file of qvg-paged stress ({type(error).__name__})") from None
    return content  # type: ignore[no-any-return]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Every figure of two results over the seeds that both have.

    Raises:
        ArgumentError: they share fewer than three seeds, too few to tell a difference from noise.
    """
    old, new = ({run["seed"]: run["metrics"] for run in result["results"]["runs"]} for result in (before, after))
    seeds = sorted(old.keys() & new.keys())
    if len(seeds) < 3:
        raise ArgumentError(
            f"seeds: expected at least 3 that both results ran, found {len(seeds)}; run both with --seeds 10"
        )
    names = [name for name in old[seeds[0]] if all(name in run for one in (old, new) for run in one.values())]
    return [_difference(name, [old[s][name] for s in seeds], [new[s][name] for s in seeds]) for name in names]


def _difference(name: str, old: Sequence[float], new: Sequence[float]) -> Difference:
    low, high = bootstrap([b - a for a, b in zip(old, new, strict=True)])
    verdict = "no difference"
    if low > 0 or high < 0:
        side = BETTER.get(name, 0) * (1 if low > 0 else -1)
        verdict = {1: "better", -1: "worse", 0: "different"}[side]
    return Difference(name, mean(old), mean(new), low, high, verdict)
