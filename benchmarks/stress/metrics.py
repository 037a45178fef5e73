"""Figures of a run, from its event log.

Times are virtual seconds from intended arrival; play-out starts with a stream's first chunk. Fairness figures are
those of the checker. Decision times are real and therefore no part of the log.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stress.checker import Checker, Violation
from stress.stats import jain, mean, percentile

__all__ = ["Metrics", "measure"]


@dataclass
class Metrics:
    """What a run was like.

    Attributes:
        first_chunk_seconds: arrival to first chunk, by stream; `first_by_tenant` the same by tenant.
        chunk_seconds: time between a stream's chunks.
        lateness_seconds: how late chunks came for their viewers, early ones negative.
        stalled_streams, streams: streams whose viewer had to wait, and all that finished.
        stall_seconds, play_seconds: of all viewers.
        chunks, wasted_chunks: chunks finished; those planned that came to nothing or belong to streams that failed or
            were cancelled.
        chunk_times: when each chunk was finished.
        last_arrival: when the last stream came.
        lost_streams: streams that failed.
        parks: how often a stream was parked.
        moved_seconds: time spent on transfers and on squeezing.
        moved_nbytes: bytes that left the pool for the host or came back.
        seconds: length of the run.
        used_nbytes: pool bytes in use at each step; `pool_nbytes` is the pool.
        service: cost units by tenant, divided by weight.
        gap, gap_unit: largest change of the difference in service of two tenants in line, and U.
        violations: what the checker found.
    """

    first_chunk_seconds: list[float] = field(default_factory=list)
    first_by_tenant: dict[str, list[float]] = field(default_factory=dict)
    chunk_seconds: list[float] = field(default_factory=list)
    lateness_seconds: list[float] = field(default_factory=list)
    stalled_streams: int = 0
    streams: int = 0
    stall_seconds: float = 0.0
    play_seconds: float = 0.0
    chunks: int = 0
    wasted_chunks: int = 0
    chunk_times: list[float] = field(default_factory=list)
    last_arrival: float = 0.0
    lost_streams: int = 0
    parks: int = 0
    moved_seconds: float = 0.0
    moved_nbytes: int = 0
    seconds: float = 0.0
    used_nbytes: list[int] = field(default_factory=list)
    pool_nbytes: int = 0
    service: dict[str, float] = field(default_factory=dict)
    gap: float = 0.0
    gap_unit: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The figures that are compared."""
        seconds, chunks, streams = self.seconds or 1.0, self.chunks or 1, self.streams or 1
        pool = self.pool_nbytes or 1
        return {
            "first_chunk_p50_seconds": percentile(self.first_chunk_seconds, 0.5),
            "first_chunk_p99_seconds": percentile(self.first_chunk_seconds, 0.99),
            "chunk_p50_seconds": percentile(self.chunk_seconds, 0.5),
            "chunk_p99_seconds": percentile(self.chunk_seconds, 0.99),
            "lateness_p99_seconds": percentile(self.lateness_seconds, 0.99),
            "continuous_play_ratio": 1 - self.stalled_streams / streams,
            "stall_ratio": self.stall_seconds / self.play_seconds if self.play_seconds else 0.0,
            "goodput_chunks_per_second": max(0.0, self.chunks - self.wasted_chunks) / seconds,
            "goodput_streams_per_second": (self.streams - self.stalled_streams) / seconds,
            "chunks_per_second_under_load": sum(t <= self.last_arrival for t in self.chunk_times)
            / (self.last_arrival or 1.0),
            "lost_streams": float(self.lost_streams),
            "jain": jain(list(self.service.values())),
            "largest_gap_over_unit": self.gap / self.gap_unit if self.gap_unit else 0.0,
            "waste_ratio": self.wasted_chunks / chunks,
            "transfer_ratio": self.moved_seconds / seconds,
            "moved_bytes_per_chunk": self.moved_nbytes / chunks,
            "parks_per_chunk": self.parks / chunks,
            "pool_used_mean_ratio": mean(self.used_nbytes) / pool,
            "pool_used_peak_ratio": max(self.used_nbytes, default=0) / pool,
        }


@dataclass
class _Play:
    tenant: str
    arrived: float
    frames: int
    fps: float | None
    committed: int = 0
    chunks: int = 0
    first: float | None = None
    latest: float = 0.0
    stalled: float = 0.0


class _Meter:
    """Reads records one by one."""

    def __init__(self) -> None:
        self.result = Metrics()
        self.plays: dict[str, _Play] = {}
        self._arrived: float | None = None
        self._pending: dict[str, int] = {}
        self._planned = 0

    def take(self, record: dict[str, Any]) -> None:
        """The next record."""
        kind = record["kind"]
        handler = getattr(self, f"_{record['event'] if kind == 'engine' else kind}", None)
        if handler is not None:
            handler(record)

    def _open(self, record: dict[str, Any]) -> None:
        self.result.pool_nbytes = record["pool_nbytes"]

    def _arrive(self, record: dict[str, Any]) -> None:
        self._arrived = self.result.last_arrival = record["at"]

    def _submit(self, record: dict[str, Any]) -> None:
        at = self.result.seconds if self._arrived is None else self._arrived
        self._arrived = None
        self.plays[record["id"]] = _Play(record["tenant"], at, record["frames"], record["deadline_fps"])

    def _plan(self, record: dict[str, Any]) -> None:
        self.result.parks += len(record["parked"])
        self._planned = len(record["running"])

    def _memory(self, record: dict[str, Any]) -> None:
        self.result.used_nbytes.append(sum(record["used"]))

    def _report(self, record: dict[str, Any]) -> None:
        self._pending = record["committed"]
        self.result.lost_streams += len(record["failed"])
        for name in record["failed"]:
            self._pending[name] = 0
            self._waste(name)

    def _cancel(self, record: dict[str, Any]) -> None:
        play = self.plays.get(record["id"])
        if play is not None and play.committed < play.frames:
            self._waste(record["id"])

    def _waste(self, name: str) -> None:
        self.result.wasted_chunks += self.plays[name].chunks
        self.plays[name].chunks = 0

    def _clock(self, record: dict[str, Any]) -> None:
        result = self.result
        result.moved_seconds += record["moved"]
        result.moved_nbytes = record["moved_nbytes"]
        result.seconds = record["t"]
        done = 0
        for name, frames in self._pending.items():
            if frames:
                done += 1
                self._chunk_done(self.plays[name], frames)
        result.chunks += done
        result.chunk_times += [result.seconds] * done
        result.wasted_chunks += self._planned - done
        self._pending, self._planned = {}, 0

    def _chunk_done(self, play: _Play, frames: int) -> None:
        result, now = self.result, self.result.seconds
        if play.first is None:
            play.first = now
            result.first_chunk_seconds.append(now - play.arrived)
            result.first_by_tenant.setdefault(play.tenant, []).append(now - play.arrived)
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


def measure(lines: Iterable[str]) -> Metrics:
    """The figures of a log, and what the checker finds in it."""
    checker, meter = Checker(), _Meter()
    for line in lines:
        record: dict[str, Any] = json.loads(line)
        checker.take(record)
        meter.take(record)
    result = meter.result
    result.service = {name: service / weight for name, (service, weight) in checker.services().items()}
    result.violations = checker.finish() if checker.ledger.open else []
    result.gap = checker.service.largest_gap
    result.gap_unit = checker.service.unit if checker.ledger.open else 0.0
    return result
