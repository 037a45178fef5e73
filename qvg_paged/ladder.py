"""Arithmetic of squeezed streams: what is dense, quantised or demoted after a number of committed frames, no tensors.

A stream on the first rung has no dense tail: the frames after its last regular span form short spans (cells) of a
chunk's length on a grid of their own, each quantised as soon as it is full. On the second rung all quantised pages
are in ``CacheConfig.demote_to``.
"""

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import cast

from qvg_paged.config import CacheConfig, ModelSpec, QualityFloor, Rung, Window
from qvg_paged.kernels.formats import PageFormat
from qvg_paged.timeline import Demand, Timeline

__all__ = ["Relief", "Squeeze", "SqueezedTimeline", "deepest_rung", "least_retrieval", "lowered", "squeeze"]


class Relief(Enum):
    """What makes a stream smaller in the pool, in the order in which it is tried before the stream is parked."""

    TAIL = "tail"
    """Its dense tail is quantised."""
    SPANS = "spans"
    """Its spans are demoted."""
    RETRIEVAL = "retrieval"
    """Its retrieval memory shrinks."""


@dataclass(frozen=True)
class Squeeze:
    """How far a stream was squeezed: a value from which its rules follow.

    Attributes:
        rung: how it is stored.
        since: frames that were committed when it left the first rung.
        retrieval_frames: what is left of its retrieval memory; None for all of it.
    """

    rung: Rung = Rung.NONE
    since: int = 0
    retrieval_frames: int | None = None

    def window(self, window: Window) -> Window:
        """The window as it is now."""
        return window if self.retrieval_frames is None else replace(window, retrieval_frames=self.retrieval_frames)


@dataclass(frozen=True)
class SqueezedTimeline(Timeline):
    """Rules of a stream that was squeezed.

    Attributes:
        since: frames that were committed then.
        cell_frames: frames of a short span.
        rung: how far.
    """

    since: int = 0
    cell_frames: int = 1
    rung: Rung = Rung.TAIL

    @property
    def regular_spans(self) -> int:
        """Spans that were closed in the regular way."""
        return super().closed_spans(self.since)

    @property
    def first_cell(self) -> int:
        """First frame of the first cell."""
        assert self.span_frames is not None
        return self.first_span + self.regular_spans * self.span_frames

    def closed_spans(self, committed: int) -> int:
        """Spans and cells that are full."""
        return self.regular_spans + max(0, (committed - self.first_cell) // self.cell_frames)

    def span(self, index: int) -> range:
        """Frames of a span or of a cell."""
        if index < self.regular_spans:
            return super().span(index)
        start = self.first_cell + (index - self.regular_spans) * self.cell_frames
        return range(start, start + self.cell_frames)

    @property
    def closing_frames(self) -> int:
        """Frames of a span that a commit closes."""
        return self.cell_frames

    @property
    def closing_format(self) -> int:
        """Index of the layout in which a commit closes it."""
        return int(self.rung)

    def demand(self, committed: int, chunk_frames: int) -> Demand:
        """Pool objects in use while a chunk is open after `committed` frames, reservation included."""
        assert self.span_frames is not None
        sink = min(self.window.sink_frames, committed)
        oldest = max(sink, committed - self.window.recent_frames - self.window.retrieval_frames)
        closed = self.closed_spans(committed)
        closing = self.closed_spans(committed + chunk_frames) - closed
        end = self.span(closed - 1).stop if closed else self.first_span
        ranges = range(self.first_span, min(sink, end)), range(max(oldest, self.first_span), min(committed, end))
        quantised = sum(map(len, ranges))
        books = 0
        seen = -1
        for frames in ranges:
            if frames:
                first, last = self._span_of(frames[0]), self._span_of(frames[-1])
                books += last - max(first, seen + 1) + 1
                seen = last
        pages = quantised + closing * self.cell_frames
        dense = sink + committed - oldest - quantised + chunk_frames
        if self.rung is Rung.SPANS:
            return Demand(dense, 0, books + closing, pages)
        return Demand(dense, pages, books + closing)

    def _span_of(self, frame: int) -> int:
        assert self.span_frames is not None
        if frame < self.first_cell:
            return (frame - self.first_span) // self.span_frames
        return self.regular_spans + (frame - self.first_cell) // self.cell_frames


def squeeze(timeline: Timeline, rung: Rung, committed: int, model: ModelSpec) -> Timeline:
    """The rules of a stream that goes down to `rung` after `committed` frames; itself if it is there already."""
    if rung is Rung.NONE or timeline.span_frames is None:
        return timeline
    if isinstance(timeline, SqueezedTimeline):
        return replace(timeline, rung=max(rung, timeline.rung))
    given = {field.name: getattr(timeline, field.name) for field in fields(Timeline)}
    cell = min(model.frames_per_chunk, timeline.span_frames)
    return SqueezedTimeline(**given, since=committed, cell_frames=cell, rung=rung)


def least_retrieval(config: CacheConfig, window: Window) -> int:
    """Fewest frames kept past the visible ones with which a span still fills before its frames leave the window."""
    if cast(PageFormat, config.format).is_dense:
        return 0
    return min(window.retrieval_frames, max(0, config.span_frames - 1 - window.recent_frames + window.bf16_recent))


def deepest_rung(config: CacheConfig, floor: QualityFloor) -> Rung:
    """How far down a stream with that floor can go."""
    if config.demote_to is None:
        return Rung.NONE
    further = cast(PageFormat, config.demote_to) != config.format
    return min(floor.rung, Rung.SPANS if further else Rung.TAIL)


def lowered(
    config: CacheConfig, window: Window, floor: QualityFloor, now: Squeeze, committed: int, relief: Relief
) -> Squeeze | None:
    """The squeeze after that relief; None where the floor or the configuration allows none, or it had it already."""
    if relief is Relief.RETRIEVAL:
        kept = now.window(window).retrieval_frames
        least = max(min(floor.retrieval_frames, window.retrieval_frames), least_retrieval(config, window))
        return replace(now, retrieval_frames=least) if least < kept else None
    target = Rung.TAIL if relief is Relief.TAIL else Rung.SPANS
    if not now.rung < target <= deepest_rung(config, floor):
        return None
    return replace(now, rung=target, since=now.since if now.rung else committed)
