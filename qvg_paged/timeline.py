"""Which frames are visible, kept, dense or quantised after a number of committed frames: arithmetic, no tensors.

Everything here is a pure function of the count of committed frames, so the store, `estimate` and a scheduler's
admission all follow the same rules.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from qvg_paged.config import Window
from qvg_paged.errors import ConfigError

__all__ = ["Demand", "Timeline"]


@dataclass(frozen=True)
class Demand:
    """Pool objects of a stream: unquantised pages, quantised pages, codebooks, pages in ``CacheConfig.demote_to``."""

    dense_pages: int = 0
    quantised_pages: int = 0
    codebooks: int = 0
    demoted_pages: int = 0

    def __init__(
        self, dense_pages: int = 0, quantised_pages: int = 0, codebooks: int = 0, demoted_pages: int = 0
    ) -> None:
        """As generated, without the price of a frozen dataclass's fields: schedulers add up many."""
        fields = self.__dict__
        fields["dense_pages"], fields["quantised_pages"] = dense_pages, quantised_pages
        fields["codebooks"], fields["demoted_pages"] = codebooks, demoted_pages

    def __add__(self, other: "Demand") -> "Demand":
        return Demand(
            self.dense_pages + other.dense_pages,
            self.quantised_pages + other.quantised_pages,
            self.codebooks + other.codebooks,
            self.demoted_pages + other.demoted_pages,
        )

    def __sub__(self, other: "Demand") -> "Demand":
        return Demand(
            self.dense_pages - other.dense_pages,
            self.quantised_pages - other.quantised_pages,
            self.codebooks - other.codebooks,
            self.demoted_pages - other.demoted_pages,
        )

    def __mul__(self, count: int) -> "Demand":
        return Demand(
            self.dense_pages * count,
            self.quantised_pages * count,
            self.codebooks * count,
            self.demoted_pages * count,
        )

    def most(self, other: "Demand") -> "Demand":
        """The larger of each."""
        return Demand(
            max(self.dense_pages, other.dense_pages),
            max(self.quantised_pages, other.quantised_pages),
            max(self.codebooks, other.codebooks),
            max(self.demoted_pages, other.demoted_pages),
        )


@dataclass(frozen=True)
class Timeline:
    """Rules of one stream: its window, and its span length (None if nothing is quantised)."""

    window: Window
    span_frames: int | None

    def __post_init__(self) -> None:
        window, span = self.window, self.span_frames
        longest = window.recent_frames + window.retrieval_frames - window.bf16_recent + 1
        if span is not None and span > longest:
            raise ConfigError(
                f"span_frames: expected <= recent_frames + retrieval_frames - bf16_recent + 1 = {longest}, got {span}; "
                "frames would leave the window before their span is full (shorten the span or use format='dense')"
            )

    @cached_property
    def first_span(self) -> int:
        """First frame of the first span."""
        return self.window.sink_frames if self.window.bf16_sink else 0

    def closed_spans(self, committed: int) -> int:
        """Spans that are full and old enough to be quantised."""
        if self.span_frames is None:
            return 0
        full = (committed - self.window.bf16_recent - self.first_span) // self.span_frames
        return full if full > 0 else 0

    def span(self, index: int) -> range:
        """Frames of a span."""
        assert self.span_frames is not None
        start = self.first_span + index * self.span_frames
        return range(start, start + self.span_frames)

    @property
    def closing_frames(self) -> int:
        """Frames of a span that a commit closes."""
        return self.span_frames or 0

    @property
    def closing_format(self) -> int:
        """Index of the layout in which a commit closes it."""
        return 1

    def visible(self, committed: int) -> list[int]:
        """Frames the next chunk attends to without asking, ascending."""
        return self._sink_and_newest(committed, self.window.recent_frames)

    def kept(self, committed: int) -> list[int]:
        """Frames still stored, ascending."""
        return self._sink_and_newest(committed, self.window.recent_frames + self.window.retrieval_frames)

    def leaving(self, before: int, after: int) -> range:
        """Frames that leave the stream when it goes from `before` committed frames to `after`."""
        window = self.window
        sink, stored = window.sink_frames, window.recent_frames + window.retrieval_frames
        if after - stored <= sink:
            return range(0)
        return range(max(sink, before - stored), after - stored)

    def closing(self, committed: int, frames: int) -> int:
        """Spans that are closed when `frames` more are committed."""
        if self.span_frames is None:
            return 0
        return self.closed_spans(committed + frames) - self.closed_spans(committed)

    def _sink_and_newest(self, committed: int, newest: int) -> list[int]:
        sink = min(self.window.sink_frames, committed)
        return [*range(sink), *range(max(sink, committed - newest), committed)]

    def demand(self, committed: int, chunk_frames: int) -> Demand:
        """Pool objects in use while a chunk is open after `committed` frames, reservation included."""
        sink = min(self.window.sink_frames, committed)
        oldest = max(sink, committed - self.window.recent_frames - self.window.retrieval_frames)
        kept = sink + committed - oldest
        if self.span_frames is None:
            return Demand(kept + chunk_frames)
        closed = self.closed_spans(committed)
        closing = self.closed_spans(committed + chunk_frames) - closed
        first, span = self.first_span, self.span_frames
        end = first + closed * span
        sink_frames = range(first, min(sink, end))
        newest_frames = range(max(oldest, first), min(committed, end))
        live = _blocks(range(sink_frames.start - first, sink_frames.stop - first), span)
        seen = sink_frames.stop - 1 - first if sink_frames else -1
        after = max(newest_frames.start - first, (seen // span + 1) * span)
        live += _blocks(range(after, max(after, newest_frames.stop - first)), span)
        quantised = len(sink_frames) + len(newest_frames)
        return Demand(kept - quantised + chunk_frames, quantised + closing * span, live + closing)

    def worst_demand(self, chunk_frames: int, total_frames: int | None = None) -> Demand:
        """Most of each kind of pool object a stream of `total_frames` (None: endless) ever holds."""
        window, span = self.window, self.span_frames or 1
        steady = self.first_span + window.sink_frames + window.recent_frames + window.retrieval_frames + 3 * span
        last = steady + chunk_frames if total_frames is None else min(total_frames, steady + chunk_frames)
        worst = Demand()
        for committed in self._decisive(chunk_frames, max(last, 1)):
            frames = chunk_frames if total_frames is None else min(chunk_frames, total_frames - committed)
            worst = worst.most(self.demand(committed, max(frames, 1)))
        return worst

    def _decisive(self, chunk_frames: int, last: int) -> Iterable[int]:
        """Counts of committed frames below `last` among which every kind of object is at its most.

        Unquantised pages are most while the first span fills. All else grows until the window is full, and from there
        on repeats itself with every span. So the cost does not depend on the window, which comes with a request.
        """
        window, span = self.window, self.span_frames or 1
        filling = self.first_span + window.bf16_recent
        full = window.sink_frames + window.recent_frames + window.retrieval_frames
        head = range(max(0, filling - chunk_frames), min(last, filling + 2 * span + chunk_frames))
        tail = range(max(0, min(full, last) - 2 * span - chunk_frames), min(last, full + 3 * span + 2 * chunk_frames))
        return chain(head, tail)


def _blocks(frames: range, span: int) -> int:
    """Blocks of `span` frames that these frames, counted from the first block on, touch."""
    return frames[-1] // span - frames[0] // span + 1 if frames else 0
