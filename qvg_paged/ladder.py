"""Arithmetic of squeezed streams: what is dense, quantised or demoted after a number of committed frames, no tensors.

A stream on the first rung has no dense tail: the frames after its last regular span form short spans (cells) of a
chunk's length on a grid of their own, each quantised as soon as it is full. On the second rung all quantised pages
are in ``CacheConfig.demote_to``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from qvg_paged.config import CacheConfig, ModelSpec, Rung, Window
from qvg_paged.errors import ConfigError
from qvg_paged.timeline import Demand, Timeline

__all__ = ["SqueezedTimeline", "least_retrieval", "squeeze"]


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
        closed = self.closed_spans(committed)
        closing = self.closed_spans(committed + chunk_frames) - closed
        end = self.span(closed - 1).stop if closed else self.first_span
        kept = self.kept(committed)
        quantised = [frame for frame in kept if self.first_span <= frame < end]
        books = {self._span_of(frame) for frame in quantised}
        pages = len(quantised) + closing * self.cell_frames
        dense = len(kept) - len(quantised) + chunk_frames
        if self.rung is Rung.SPANS:
            return Demand(dense, 0, len(books) + closing, pages)
        return Demand(dense, pages, len(books) + closing)

    def _decisive(self, chunk_frames: int, last: int) -> Iterable[int]:
        """All of them: spans and cells do not repeat themselves with one period."""
        del chunk_frames
        return range(last)

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
    for frames in range(window.retrieval_frames + 1):
        try:
            Timeline(replace(window, retrieval_frames=frames), config.span_frames)
        except ConfigError:
            continue
        return frames
    return window.retrieval_frames
