"""Random lives of several streams against a dictionary of frames, books and bytes checked after every step."""

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import FAST, attention, content, dense_bytes, make_cache, make_model, page_bytes, span_bytes, write

from qvg_paged import (
    Chunk,
    Demand,
    FreeFill,
    Grid,
    KVCacheManager,
    OutOfMemoryError,
    Rung,
    StateError,
    Stream,
    Tier,
    Timeline,
    Window,
)
from qvg_paged.budget import object_counts

pytestmark = pytest.mark.usefixtures("one_thread")

SPAN = 3
WINDOWS = [
    Window(recent_frames=3),
    Window(sink_frames=2, recent_frames=4, retrieval_frames=3),
    Window(sink_frames=1, recent_frames=5, bf16_sink=True, bf16_recent=2),
]
FINE = replace(FAST.with_codecs(grid=Grid.INT4), name="fine")
FORMATS: dict[str, dict[str, Any]] = {
    "qvg4-int2": {"format": FAST},
    "dense": {"format": "dense"},
    "ladder": {"format": FINE, "demote_to": FAST},
}
DENSE, FULL, DIRECT, DEMOTED = "dense", "full", "direct", "demoted"
"""How a frame is stored: unquantised, in the format, in the lower format at once, or demoted to it later."""


@dataclass
class Told:
    """A stream as the dictionary knows it."""

    stream: Stream
    window: Window
    seeds: dict[int, int] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    kinds: dict[int, str] = field(default_factory=dict)
    spans: dict[int, tuple[int, ...]] = field(default_factory=dict)
    committed: int = 0
    rung: Rung = Rung.NONE
    parked: bool = False
    chunk: Chunk | None = None
    written: list[int] | None = None


@lru_cache(maxsize=4096)
def expected_span(cache: KVCacheManager, seeds: tuple[int, ...], kind: str) -> list[bytes]:
    if kind != DEMOTED:
        return span_bytes(cache, seeds, 1 if kind == FULL else 2)
    apart = make_cache(model=cache.model, format=FINE, demote_to=FAST, span_frames=SPAN)
    stream = apart.open("apart", window=Window(recent_frames=SPAN))
    with stream.begin_chunk(SPAN) as chunk:
        write(chunk, list(seeds))
        chunk.commit()
    stream.demote(Rung.SPANS)
    return list(page_bytes(stream).values())


class StoreMachine(RuleBasedStateMachine):
    """Open, chunk, commit, abort, fork, evict, retrieve, demote, shrink, park, resume, close; too small a pool."""

    streams: dict[str, Told]
    cache: KVCacheManager

    @initialize(
        fmt=st.sampled_from(["qvg4-int2", "ladder", "ladder", "dense"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def start(self, fmt: str, dtype: torch.dtype) -> None:
        model = make_model(dtype=dtype)
        self.cache = make_cache(
            pool=14 * model.frame_nbytes, model=model, span_frames=SPAN, free_fill=FreeFill.POISON,
            host_memory=12 * model.frame_nbytes, disk_path=self.make_folder(), disk_memory="1GiB", **FORMATS[fmt],
        )  # fmt: skip
        self.streams = {}
        self.serial = 0
        self.peak: Counter[int] = Counter()
        self.open(WINDOWS[0], "t")

    def make_folder(self) -> str:
        self.folder = tempfile.mkdtemp(prefix="qvg-machine-")
        return self.folder

    def able(self, chunk: bool | None, parked: bool | None) -> list[Told]:
        found = [told for told in self.streams.values() if chunk is None or (told.chunk is not None) is chunk]
        return [told for told in found if parked is None or told.parked is parked]

    def pick(self, data: st.DataObject, *, chunk: bool | None = None, parked: bool | None = False) -> Told:
        return data.draw(st.sampled_from(self.able(chunk, parked)))

    def any_stream(self, chunk: bool | None = None, parked: bool | None = False) -> bool:
        return bool(self.able(chunk, parked))

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
            tolds += [t for t in self.able(False, False) if t is not tolds[0]][:1]
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
        self.remember_peak()

    def remember_peak(self) -> None:
        self.peak |= Counter(slot.nbytes for slot in self.cache.store.pool.live().values())

    def must_fit(self, tolds: list[Told], frames: int) -> bool:
        """Whether the pool has promised room: a size never holds more slabs than its peak count needs.

        And, unless a chunk is open, no more than its objects fill.
        """
        live = Counter(slot.nbytes for slot in self.cache.store.pool.live().values())
        need = Demand()
        for told in tolds:
            closed_spans = told.stream.timeline.closed_spans
            closing = closed_spans(told.committed + frames) - closed_spans(told.committed)
            pages = closing * SPAN
            need += Demand(frames, 0, closing, pages) if told.rung is Rung.SPANS else Demand(frames, pages, closing)
        counts = object_counts(self.cache.layouts, need + self.cache.budget.reserve)
        peak = self.peak if self.any_stream(chunk=True) else Counter[int]()
        most = {size: max(peak[size], live[size] + counts[size]) for size in {*peak, *live, *counts}}
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
        told.kinds.update(dict.fromkeys(told.chunk.frames, DENSE))
        told.stored |= set(told.chunk.frames)
        told.committed = told.chunk.frames.stop
        told.chunk = told.written = None
        self.close_spans(told)
        oldest = told.committed - told.stream.window.recent_frames - told.stream.window.retrieval_frames
        told.stored = {frame for frame in told.stored if frame >= oldest or frame < told.window.sink_frames}

    def close_spans(self, told: Told) -> None:
        """On the first rung a span closes as soon as it is full: cells are as long as spans here."""
        if self.cache.config.format not in (FAST, FINE):
            return
        first = told.window.sink_frames if told.window.bf16_sink else 0
        end = told.committed - (0 if told.rung else told.window.bf16_recent)
        while (start := first + len(told.spans) * SPAN) + SPAN <= end:
            told.spans[start] = tuple(told.seeds[frame] for frame in range(start, start + SPAN))
            told.kinds.update(dict.fromkeys(range(start, start + SPAN), DIRECT if told.rung is Rung.SPANS else FULL))

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
            branch, told.window, dict(told.seeds), set(told.stored), dict(told.kinds), dict(told.spans), told.committed,
            told.rung,
        )  # fmt: skip

    @precondition(lambda self: self.any_stream(chunk=False) and self.cache.config.demote_to is not None)
    @rule(data=st.data(), rung=st.sampled_from([Rung.TAIL, Rung.SPANS]))
    def demote(self, data: st.DataObject, rung: Rung) -> None:
        told = self.pick(data, chunk=False)
        fixed = [(other, page_bytes(other.stream)) for other in self.able(True, False)]
        try:
            told.stream.demote(rung)
        except OutOfMemoryError:
            assert self.any_stream(chunk=True), "what demotion needs was kept free"
        else:
            told.rung = max(told.rung, rung)
        for other, before in fixed:
            assert page_bytes(other.stream) == before
        self.follow_demotion(told)
        self.remember_peak()

    def follow_demotion(self, demoted: Told) -> None:
        """Dense frames of the stream became cells; quantised pages changed for it and for whoever shares them."""
        assert demoted.stream.rung is demoted.rung
        for frame, page in demoted.stream.pages.items():
            if page.format and demoted.kinds[frame] == DENSE:
                start = frame - (frame - demoted.stream.timeline.first_span) % SPAN
                demoted.spans[start] = tuple(demoted.seeds[start + place] for place in range(SPAN))
                demoted.kinds[frame] = FULL
        for told in self.able(False, False):
            for frame, page in told.stream.pages.items():
                if page.format == 2 and told.kinds[frame] == FULL:
                    assert told is demoted or told.stream.tenant == demoted.stream.tenant
                    told.kinds[frame] = DEMOTED
        if demoted.rung is Rung.SPANS:
            assert FULL not in {demoted.kinds[frame] for frame in demoted.stored}

    @precondition(lambda self: self.any_stream(chunk=False))
    @rule(data=st.data(), frames=st.integers(0, 3))
    def shrink(self, data: st.DataObject, frames: int) -> None:
        told = self.pick(data, chunk=False)
        window = told.stream.window
        if frames < window.retrieval_frames and window.recent_frames + frames >= SPAN + window.bf16_recent - 1:
            told.stream.shrink_retrieval(frames)
            told.stored = set(told.stream.timeline.kept(told.committed)) & told.stored

    @precondition(lambda self: self.any_stream(chunk=False))
    @rule(data=st.data(), tier=st.sampled_from([None, Tier.HOST, Tier.DISK]))
    def park(self, data: st.DataObject, tier: Tier | None) -> None:
        told = self.pick(data, chunk=False)
        try:
            told.stream.park(tier)
        except OutOfMemoryError:
            assert tier is Tier.HOST
            return
        told.parked = True

    @precondition(lambda self: self.any_stream(parked=True))
    @rule(data=st.data(), early=st.booleans())
    def resume(self, data: st.DataObject, early: bool) -> None:
        told = self.pick(data, parked=True)
        try:
            if early:
                told.stream.prefetch_resume()
            else:
                told.stream.resume()
                told.parked = False
        except OutOfMemoryError:
            assert told.stream.parked is not None
        self.remember_peak()

    @precondition(lambda self: self.any_stream(parked=True))
    @rule(data=st.data())
    def park_deeper(self, data: st.DataObject) -> None:
        self.pick(data, parked=True).stream.park(Tier.DISK)

    @precondition(lambda self: len(self.streams) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        told = self.pick(data, parked=None)
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
            if told.parked:
                assert set(told.stream.ledger) == told.stored
                continue
            assert set(told.stream.pages) == told.stored == set(Timeline.kept(told.stream.timeline, told.committed))
            expected = {frame: dense_bytes(self.cache.model, told.seeds[frame]) for frame in told.stored}
            for start, seeds in told.spans.items():
                for frame in range(start, start + SPAN):
                    if frame in told.stored:
                        expected[frame] = expected_span(self.cache, seeds, told.kinds[frame])[frame - start]
            assert page_bytes(told.stream) == expected

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for told in self.streams.values():
                told.stream.close()
            stats = self.cache.stats()
            assert (stats.used_nbytes, stats.host_nbytes, stats.disk_nbytes) == (0, 0, 0)
            self.cache.check_integrity()
            shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase
