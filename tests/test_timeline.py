"""The arithmetic of windows and spans against a stream told frame by frame."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_paged import ConfigError, Demand, Timeline, Window


@dataclass
class Told:
    """Frames of one stream, moved about by hand as the design describes it."""

    window: Window
    span: int | None
    committed: int = 0
    dense: set[int] = field(default_factory=set)
    quantised: set[int] = field(default_factory=set)
    books: dict[int, set[int]] = field(default_factory=dict)
    spans_closed: int = 0

    def _first_open(self) -> int:
        first = self.window.sink_frames if self.window.bf16_sink else 0
        return first + self.spans_closed * (self.span or 0)

    def chunk(self, frames: int) -> Demand:
        """Commit `frames`; what was held while the chunk was open."""
        after = self.committed + frames
        closing: list[list[int]] = []
        while self.span is not None and self._first_open() + self.span <= after - self.window.bf16_recent:
            closing.append(list(range(self._first_open(), self._first_open() + self.span)))
            self.spans_closed += 1
        held = Demand(
            len(self.dense) + frames,
            len(self.quantised) + sum(map(len, closing)),
            len(self.books) + len(closing),
        )
        self.dense |= set(range(self.committed, after))
        self.committed = after
        for span in closing:
            assert set(span) <= self.dense, "a frame left before its span was full"
            self.dense -= set(span)
            self.quantised |= set(span)
            self.books[span[0]] = set(span)
        oldest = after - self.window.recent_frames - self.window.retrieval_frames
        gone = {f for f in self.dense | self.quantised if self.window.sink_frames <= f < oldest}
        self.dense -= gone
        self.quantised -= gone
        self.books = {first: book - gone for first, book in self.books.items() if book - gone}
        return held


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    span = draw(st.none() | st.integers(1, 6))
    bf16_recent = draw(st.integers(0, 4))
    least = max(1, bf16_recent + (span or 1) - 1)
    window = Window(
        sink_frames=draw(st.integers(0, 4)),
        recent_frames=draw(st.integers(least, least + 6)),
        bf16_sink=draw(st.booleans()),
        bf16_recent=bf16_recent,
        retrieval_frames=draw(st.integers(0, 4)),
    )
    return Timeline(window, span)


@settings(max_examples=300, deadline=None)
@given(timelines(), st.lists(st.integers(1, 4), min_size=1, max_size=25))
def test_kept_visible_and_demand_follow_a_stream_told_frame_by_frame(timeline: Timeline, chunks: list[int]) -> None:
    told = Told(timeline.window, timeline.span_frames)
    worst = timeline.worst_demand(4)
    worst_to_end = timeline.worst_demand(4, sum(chunks))
    for frames in chunks:
        before, stored = told.committed, told.dense | told.quantised
        closing = timeline.closing(before, frames) + told.spans_closed
        expected = timeline.demand(before, frames)
        held = told.chunk(frames)
        assert held == expected
        assert closing == told.spans_closed
        gone = (stored | set(range(before, told.committed))) - (told.dense | told.quantised)
        assert set(timeline.leaving(before, told.committed)) == gone
        for bound in (worst, worst_to_end):
            assert bound.most(held) == bound, "a chunk held more than the worst case"
        assert set(timeline.kept(told.committed)) == told.dense | told.quantised
        assert timeline.closed_spans(told.committed) == told.spans_closed
        visible = timeline.visible(told.committed)
        assert visible == sorted(set(visible))
        newest = range(max(0, told.committed - timeline.window.recent_frames), told.committed)
        assert set(visible) == {*range(min(timeline.window.sink_frames, told.committed)), *newest}


@settings(max_examples=50, deadline=None)
@given(timelines(), st.integers(1, 4))
def test_the_worst_case_is_reached_and_no_larger_than_needed(timeline: Timeline, chunk_frames: int) -> None:
    """Of each kind of object, some stream that grows by single frames and then one chunk holds the stated number."""
    worst = timeline.worst_demand(chunk_frames)
    reached = Demand()
    for single_frames in range(60):
        told = Told(timeline.window, timeline.span_frames)
        for _ in range(single_frames):
            told.chunk(1)
        reached = reached.most(told.chunk(chunk_frames))
    assert reached == worst


@settings(max_examples=300, deadline=None)
@given(timelines(), st.integers(1, 5), st.none() | st.integers(1, 80))
def test_the_worst_case_is_that_of_all_counts_of_frames(timeline: Timeline, chunk: int, total: int | None) -> None:
    """What `worst_demand` finds by looking at a few counts, against looking at all of them."""
    worst = Demand()
    for committed in range(120 if total is None else total):
        worst = worst.most(timeline.demand(committed, chunk if total is None else min(chunk, total - committed)))
    assert timeline.worst_demand(chunk, total) == worst


@pytest.mark.parametrize("frames", [None, 1 << 31])
def test_a_window_of_any_size_is_reckoned_at_once(frames: int | None) -> None:
    """A request names the window; it must not be able to keep the scheduler busy."""
    newest, sink = 1 << 30, 1 << 29
    worst = Timeline(Window(recent_frames=newest, sink_frames=sink), 16).worst_demand(4, frames)
    assert newest + sink <= worst.quantised_pages <= newest + sink + 16
    assert worst.codebooks >= worst.quantised_pages // 16
    assert worst.dense_pages == 15 + 4
    pinned = Timeline(Window(recent_frames=newest, sink_frames=sink, bf16_sink=True), 16).worst_demand(4, frames)
    assert pinned.dense_pages == sink + 15 + 4


def test_a_longer_stream_never_needs_less() -> None:
    timeline = Timeline(Window(sink_frames=2, recent_frames=9, bf16_recent=2), 4)
    demands = [timeline.worst_demand(3, frames) for frames in range(1, 50)]
    assert all(later.most(earlier) == later for earlier, later in pairwise(demands))
    assert demands[-1] == timeline.worst_demand(3)


def test_a_span_that_would_leave_the_window_before_it_is_full_is_refused_and_the_limit_is_sharp() -> None:
    window = Window(recent_frames=6, retrieval_frames=2, bf16_recent=3)
    with pytest.raises(ConfigError, match="retrieval_frames - bf16_recent \\+ 1 = 6, got 7"):
        Timeline(window, 7)
    told = Told(window, 6)
    for _ in range(40):
        told.chunk(1)
    assert Timeline(window, 6).kept(40) == sorted(told.dense | told.quantised)
    Timeline(window, None)


def test_spans_start_after_an_unquantised_sink() -> None:
    window = Window(sink_frames=3, recent_frames=8, bf16_sink=True)
    timeline = Timeline(window, 4)
    assert timeline.span(0) == range(3, 7)
    assert timeline.span(2) == range(11, 15)
    assert [timeline.closed_spans(committed) for committed in (0, 6, 7, 10, 11)] == [0, 0, 1, 1, 2]
    assert Timeline(Window(sink_frames=3, recent_frames=8), 4).span(0) == range(4)


def test_demands_add_up() -> None:
    demand = Demand(3, 2, 1)
    assert demand + demand == demand * 2 == Demand(6, 4, 2)
    assert demand.most(Demand(1, 5, 0)) == Demand(3, 5, 1)
