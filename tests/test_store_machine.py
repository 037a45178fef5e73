"""Random lives of several streams against a dictionary of frames, books and bytes checked after every step."""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import FAST, attention, content, dense_bytes, make_cache, make_model, page_bytes, span_bytes, write

from qvg_paged import Chunk, Demand, FreeFill, KVCacheManager, OutOfMemoryError, StateError, Stream, Timeline, Window
from qvg_paged.budget import object_counts

pytestmark = pytest.mark.usefixtures("one_thread")

SPAN = 3
WINDOWS = [
    Window(recent_frames=3),
    Window(sink_frames=2, recent_frames=4, retrieval_frames=3),
    Window(sink_frames=1, recent_frames=5, bf16_sink=True, bf16_recent=2),
]
FORMATS = {"qvg4-int2": FAST, "dense": "dense"}


@dataclass
class Told:
    """A stream as the dictionary knows it."""

    stream: Stream
    window: Window
    seeds: dict[int, int] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    spans: dict[int, tuple[int, ...]] = field(default_factory=dict)
    committed: int = 0
    chunk: Chunk | None = None
    written: list[int] | None = None


@lru_cache(maxsize=4096)
def expected_span(cache: KVCacheManager, seeds: tuple[int, ...]) -> list[bytes]:
    return span_bytes(cache, seeds)


class StoreMachine(RuleBasedStateMachine):
    """Open, chunk, write, commit, abort, fork, evict, retrieve, close, and a pool that is too small for all of it."""

    streams: dict[str, Told]
    cache: KVCacheManager

    @initialize(
        fmt=st.sampled_from(["qvg4-int2", "qvg4-int2", "dense"]), dtype=st.sampled_from([torch.float32, torch.bfloat16])
    )
    def start(self, fmt: str, dtype: torch.dtype) -> None:
        model = make_model(dtype=dtype)
        self.cache = make_cache(
            pool=14 * model.frame_nbytes, model=model, format=FORMATS[fmt], span_frames=SPAN, free_fill=FreeFill.POISON
        )
        self.streams = {}
        self.serial = 0
        self.peak: Counter[int] = Counter()
        self.open(WINDOWS[0], "t")

    def pick(self, data: st.DataObject, *, chunk: bool | None = None) -> Told:
        able = [told for told in self.streams.values() if chunk is None or (told.chunk is not None) is chunk]
        return data.draw(st.sampled_from(able))

    def any_stream(self, chunk: bool | None = None) -> bool:
        return any(chunk is None or (told.chunk is not None) is chunk for told in self.streams.values())

    @precondition(lambda self: len(self.streams) < 4)
    @rule(window=st.sampled_from(WINDOWS), tenant=st.sampled_from("tu"))
    def open(self, window: Window, tenant: str) -> None:
        self.serial += 1
        stream = self.cache.open(f"s{self.serial}", tenant=tenant, window=window)
        self.streams[stream.id] = Told(stream, window)

    @precondition(lambda self: self.any_stream(chunk=False))
    @rule(data=st.data(), frames=st.integers(1, 3), both=st.booleans())
    def begin(self, data: st.DataObject, frames: int, both: bool) -> None:
        tolds = [self.pick(data, chunk=False)]
        if both:
            tolds += [t for t in self.streams.values() if t.chunk is None and t is not tolds[0]][:1]
        old = sorted(set(tolds[0].stored) - set(tolds[0].stream.visible())) if len(tolds) == 1 else []
        self.begin_on(tolds, frames, data.draw(st.lists(st.sampled_from(old), unique=True)) if old else [])

    def begin_on(self, tolds: list[Told], frames: int, retrieve: list[int]) -> None:
        before = [page_bytes(told.stream) for told in tolds]
        try:
            chunks = self.cache.begin_chunks([told.stream for told in tolds], frames, retrieve=retrieve)
        except OutOfMemoryError:
            assert not self.must_fit(tolds, frames)
            assert [page_bytes(told.stream) for told in tolds] == before
            return
        for told, chunk in zip(tolds, chunks, strict=True):
            assert chunk.frames == range(told.committed, told.committed + frames)
            sink = {*range(min(told.window.sink_frames, told.committed))}
            newest = {*range(max(0, told.committed - told.window.recent_frames), told.committed)}
            assert chunk.visible == tuple(sorted(sink | newest | set(retrieve)))
            told.chunk, told.written = chunk, None
        self.peak |= Counter(slot.nbytes for slot in self.cache.store.pool.live().values())

    def must_fit(self, tolds: list[Told], frames: int) -> bool:
        """Whether the pool has promised room: a size never holds more slabs than its peak count needs."""
        live = Counter(slot.nbytes for slot in self.cache.store.pool.live().values())
        need = Demand()
        for told in tolds:
            closed_spans = told.stream.timeline.closed_spans
            closing = closed_spans(told.committed + frames) - closed_spans(told.committed)
            need = need + Demand(frames, closing * SPAN, closing)
        counts = object_counts(self.cache.layouts, need)
        most = {size: max(self.peak[size], live[size] + counts[size]) for size in {*self.peak, *counts}}
        return self.cache.budget.slabs.slabs_for(most) <= self.cache.budget.slabs.num_slabs

    @precondition(lambda self: self.any_stream(chunk=True))
    @rule(data=st.data(), partly=st.booleans())
    def write(self, data: st.DataObject, partly: bool) -> None:
        self.write_to(self.pick(data, chunk=True), partly)

    def write_to(self, told: Told, partly: bool) -> None:
        assert told.chunk is not None
        seeds = [self.serial * 1000 + i for i in range(len(told.chunk.frames))]
        self.serial += 1
        write(told.chunk, seeds, range(1) if partly else None)
        if not partly:
            told.written = seeds
        elif told.written is not None:
            write(told.chunk, told.written, range(1))

    @precondition(lambda self: self.any_stream(chunk=True))
    @rule(data=st.data(), layer=st.integers(0, 1))
    def attend(self, data: st.DataObject, layer: int) -> None:
        """Attention sees what `read` gives for the visible frames, then the chunk's own."""
        told = self.pick(data, chunk=True)
        chunk, model = told.chunk, self.cache.model
        assert chunk is not None
        seeds = told.written or list(range(len(chunk.frames)))
        if told.written is None:
            write(chunk, seeds)
            told.written = seeds
        own = torch.cat([content(model, seed)[layer] for seed in seeds], 1)
        q = torch.randn(own.shape[1:])
        out = chunk.attend(layer, q, own[0], own[1])
        k, v = told.stream.read(layer, chunk.visible, dtype=torch.float32)
        expected = attention(q, torch.cat([k, own[0].float()]), torch.cat([v, own[1].float()]))
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)

    @precondition(lambda self: self.any_stream(chunk=True))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.commit_to(self.pick(data, chunk=True))

    def commit_to(self, told: Told) -> None:
        assert told.chunk is not None
        if told.written is None:
            with pytest.raises(StateError, match="never written"):
                told.chunk.commit()
            return
        told.chunk.commit()
        told.seeds.update(zip(told.chunk.frames, told.written, strict=True))
        told.stored |= set(told.chunk.frames)
        told.committed = told.chunk.frames.stop
        told.chunk = told.written = None
        if self.cache.config.format == FAST:
            first = told.window.sink_frames if told.window.bf16_sink else 0
            while (start := first + len(told.spans) * SPAN) + SPAN <= told.committed - told.window.bf16_recent:
                told.spans[start] = tuple(told.seeds[frame] for frame in range(start, start + SPAN))
        oldest = told.committed - told.window.recent_frames - told.window.retrieval_frames
        told.stored = {frame for frame in told.stored if frame >= oldest or frame < told.window.sink_frames}

    @precondition(lambda self: self.any_stream(chunk=False))
    @rule(data=st.data(), chunks=st.lists(st.integers(1, 3), min_size=1, max_size=4))
    def generate(self, data: st.DataObject, chunks: list[int]) -> None:
        """Several chunks of one stream from begin to commit: this is what gets histories long."""
        told = self.pick(data, chunk=False)
        for frames in chunks:
            self.begin_on([told], frames, [])
            if told.chunk is None:
                return
            self.write_to(told, partly=False)
            self.commit_to(told)

    @precondition(lambda self: self.any_stream(chunk=True))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        told = self.pick(data, chunk=True)
        assert told.chunk is not None
        told.chunk.abort()
        told.chunk = told.written = None

    @precondition(lambda self: self.any_stream() and len(self.streams) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        told = self.pick(data)
        used = self.cache.stats().used_nbytes
        self.serial += 1
        branch = told.stream.fork(f"s{self.serial}")
        assert self.cache.stats().used_nbytes == used, "a fork shares every page"
        self.streams[branch.id] = Told(
            branch, told.window, dict(told.seeds), set(told.stored), dict(told.spans), told.committed
        )

    @precondition(lambda self: len(self.streams) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        told = self.pick(data)
        told.stream.close()
        del self.streams[told.stream.id]

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats.used_nbytes == sum(stats.tenant_nbytes.values())
        assert stats.used_nbytes <= stats.peak_nbytes <= self.cache.budget.pool

    @invariant()
    def every_byte_is_what_the_dictionary_says(self) -> None:
        if not hasattr(self, "cache"):
            return
        for told in self.streams.values():
            assert told.stream.committed == told.committed
            assert set(told.stream.pages) == told.stored == set(Timeline.kept(told.stream.timeline, told.committed))
            expected = {frame: dense_bytes(self.cache.model, told.seeds[frame]) for frame in told.stored}
            for start, seeds in told.spans.items():
                frames = [frame for frame in range(start, start + SPAN) if frame in told.stored]
                if frames:
                    encoded = expected_span(self.cache, seeds)
                    expected.update({frame: encoded[frame - start] for frame in frames})
            assert page_bytes(told.stream) == expected

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for told in self.streams.values():
                told.stream.close()
            assert self.cache.stats().used_nbytes == 0
            self.cache.check_integrity()


StoreMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase
