"""Figures of a run, from its event log.

Times are virtual seconds from intended arrival; play-out starts with a stream's first chunk. Fairness figures are
those of the checker. Decision times are real and therefore no part of the log.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stress.checker import Checker

__all__ = ["Metrics", "jain", "measure", "percentile"]


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 if all shares are equal, 1/n if one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class Metrics:
    """What a run was like.

    Attributes:
        first_chunk_seconds: arrival to first chunk, by stream.
        chunk_seconds: time between a stream's chunks.
        lateness_seconds: how late chunks came for their viewers, early ones negative.
        stalled_streams, streams: streams whose viewer had to wait, and all that finished.
        stall_seconds, play_seconds: of all viewers.
        chunks, wasted_chunks: chunks finished; those planned that came to nothing or belong to streams that failed or
            were cancelled.
        parks: how often a stream was parked.
        moved_seconds: time spent on transfers.
        seconds: length of the run.
        service: cost units by tenant, divided by weight.
        gap, gap_unit: largest change of the difference in service of two tenants in line, and U.
    """

    first_chunk_seconds: list[float] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)
    lateness_seconds: list[float] = field(default_factory=list)
    stalled_streams: int = 0
    streams: int = 0
    stall_seconds: float = 0.0
    play_seconds: float = 0.0
    chunks: int = 0
    wasted_chunks: int = 0
    parks: int = 0
    moved_seconds: float = 0.0
    seconds: float = 0.0
    service: dict[str, float] = field(default_factory=dict)
    gap: float = 0.0
    gap_unit: float = 0.0

    def summary(self) -> dict[str, float]:
        """The figures that are compared."""
        return {
            "first_chunk_p50_seconds": percentile(self.first_chunk_seconds, 0.5),
            "first_chunk_p99_seconds": percentile(self.first_chunk_seconds, 0.99),
            "chunk_p50_seconds": percentile(self.chunk_seconds, 0.5),
            "chunk_p99_seconds": percentile(self.chunk_seconds, 0.99),
            "lateness_p99_seconds": percentile(self.lateness_seconds, 0.99),
            "continuous_play_ratio": 1 - self.stalled_streams / self.streams if self.streams else 1.0,
            "stall_ratio": self.stall_seconds / self.play_seconds if self.play_seconds else 0.0,
            "goodput_chunks_per_second": (self.chunks - self.wasted_chunks) / self.seconds if self.seconds else 0.0,
            "jain": jain(list(self.service.values())),
            "largest_gap_over_unit": self.gap / self.gap_unit if self.gap_unit else 0.0,
            "waste_ratio": self.wasted_chunks / self.chunks if self.chunks else 0.0,
            "transfer_ratio": self.moved_seconds / self.seconds if self.seconds else 0.0,
            "parks_per_chunk": self.parks / self.chunks if self.chunks else 0.0,
        }


@dataclass
class _Play:
    arrived: float
    frames: int
    fps: float | None
    committed: int = 0
    chunks: int = 0
    first: float | None = None
    latest: float = 0.0
    stalled: float = 0.0


def measure(lines: Iterable[str]) -> Metrics:
    """The figures of a log."""
    checker, result = Checker(), Metrics()
    plays: dict[str, _Play] = {}
    arrived, pending, planned = 0.0, {}, 0
    for line in lines:
        record: dict[str, Any] = json.loads(line)
        checker.take(record)
        kind = record["kind"]
        if kind == "submit":
            at, arrived = (arrived, -1.0) if arrived >= 0 else (result.seconds, -1.0)
            plays[record["id"]] = _Play(at, record["frames"], record["deadline_fps"])
        elif kind == "engine" and record["event"] == "arrive":
            arrived = record["at"]
        elif kind == "plan":
            result.parks += len(record["parked"])
            planned = len(record["running"])
        elif kind == "report":
            pending = record["committed"]
            for name in record["failed"]:
                pending[name] = 0
                result.wasted_chunks += plays[name].chunks
        elif kind == "engine" and record["event"] == "clock":
            result.moved_seconds += record["moved"]
            result.seconds = record["t"]
            done = sum(_chunk_done(result, plays[name], frames) for name, frames in pending.items() if frames)
            result.chunks += done
            result.wasted_chunks += planned - done
            pending, planned = {}, 0
        elif kind == "cancel" and record["id"] in plays and plays[record["id"]].committed < plays[record["id"]].frames:
            result.wasted_chunks += plays[record["id"]].chunks
            plays[record["id"]].chunks = 0
    shares: dict[str, float] = defaultdict(float)
    for name, (service, weight) in checker.services().items():
        shares[name] = service / weight
    result.service = dict(shares)
    result.gap, result.gap_unit = checker.service.largest_gap, checker.service.unit
    return result


def _chunk_done(result: Metrics, play: _Play, frames: int) -> int:
    now = result.seconds
    if play.first is None:
        play.first = now
        result.first_chunk_seconds.append(now - play.arrived)
    else:
        result.chunk_seconds.append(now - play.latest)
        if play.fps is not None:
            late = now - (play.first + play.stalled + play.committed / play.fps)
            result.lateness_seconds.append(late)
            play.stalled += max(0.0, late)
    play.latest = now
    play.committed += frames
    play.chunks += 1
    if play.committed == play.frames:
        result.streams += 1
        result.stalled_streams += play.stalled > 0
        result.stall_seconds += play.stalled
        result.play_seconds += play.stalled + (play.frames / play.fps if play.fps else 0.0)
    return 1
