"""The upper rungs of the ladder: tails and spans stored more cheaply, floors, forks, and what they leave free."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAST, dense_bytes, grow, make_cache, make_model, page_bytes, span_bytes, write

from qvg_paged import (
    FORMATS,
    ArgumentError,
    CacheConfig,
    CacheEvent,
    ConfigError,
    Demand,
    EventKind,
    FreeFill,
    Grid,
    KVCacheManager,
    OutOfMemoryError,
    QualityFloor,
    QualityFloorError,
    Rung,
    StateError,
    Stream,
    Timeline,
    Window,
    estimate,
    inject_fault,
)
from qvg_paged.budget import object_counts
from qvg_paged.compact import compact
from qvg_paged.events import TIER_FAULT_POINTS
from qvg_paged.ladder import squeeze

pytestmark = pytest.mark.usefixtures("one_thread")

FINE = replace(FAST.with_codecs(grid=Grid.INT4), name="fine")
WINDOW = Window(sink_frames=1, recent_frames=8, retrieval_frames=4)


def ladder_cache(**changes: Any) -> KVCacheManager:
    return make_cache(**{"format": FINE, "demote_to": FAST, "free_fill": FreeFill.POISON, **changes})


def formats(stream: Stream) -> list[str]:
    return [quality.format for quality in stream.ledger.values()]


def test_on_the_first_rung_the_dense_tail_is_quantised_in_short_spans_with_codebooks_of_their_own() -> None:
    cache = ladder_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 9)  # spans 0-3, 4-7; frame 8 is the tail
    assert formats(stream) == ["fine"] * 8 + ["dense"]
    assert stream.demote(Rung.TAIL) == 0, "a short span is a chunk long: the tail is not full"
    before = page_bytes(stream)
    grow(stream, 3, first_seed=9)
    assert formats(stream) == ["fine"] * 11 + ["dense"]
    after = page_bytes(stream)
    assert [after[frame] for frame in (8, 9, 10)] == span_bytes(cache, [8, 9, 10], 1)
    assert all(after[frame] == before[frame] for frame in range(8))
    assert after[11] == dense_bytes(cache.model, 11)
    assert [quality.demotions for quality in stream.ledger.values()] == [0] * 8 + [1] * 3 + [0]
    cache.check_integrity()


def test_a_full_tail_is_quantised_at_once_and_its_bytes_come_back() -> None:
    events: list[CacheEvent] = []
    cache = ladder_cache(on_event=events.append)
    stream = cache.open("a", window=replace(WINDOW, bf16_recent=4))
    grow(stream, 9)  # one span of 4 frames, 5 dense ones
    used = cache.stats().used_nbytes
    events.clear()
    returned = stream.demote(Rung.TAIL)
    fine = cache.layouts[1]
    assert returned == 3 * cache.layouts[0].page_nbytes
    assert cache.stats().used_nbytes == used - returned + 3 * fine.page_nbytes + fine.codebook_nbytes
    assert formats(stream) == ["fine"] * 7 + ["dense"] * 2
    assert [(e.kind, e.frames, e.detail) for e in events] == [
        (EventKind.DEMOTE, (4, 5, 6), "dense -> fine"),
        (EventKind.FREE, (), ""),
    ]
    assert stream.demote(Rung.TAIL) == 0
    assert stream.rung is Rung.TAIL
    cache.check_integrity()


def test_on_the_second_rung_spans_keep_codebook_and_ids_and_new_ones_are_stored_cheaply_at_once() -> None:
    cache = ladder_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 9)
    fine, cheap = cache.layouts[1:]
    books = [page.codebook for page in stream.pages.values()]
    before = page_bytes(stream)
    k, v = stream.read(0, range(8), dtype=torch.float32)
    assert stream.demote(Rung.SPANS) == 8 * fine.page_nbytes
    assert [page.codebook for page in stream.pages.values()] == books
    assert formats(stream) == ["qvg4-int2"] * 8 + ["dense"]
    after = page_bytes(stream)
    size, short = fine.num_layers * fine.layer_nbytes, cheap.num_layers * cheap.layer_nbytes
    for frame in range(8):
        assert after[frame][short:] == before[frame][size:], "the codebook is the one it was"
        for one, other, begin, end in (
            (fine.key, cheap.key, 0, 0),
            (fine.value, cheap.value, fine.key.nbytes, cheap.key.nbytes),
        ):
            old, new = (torch.frombuffer(bytearray(found[frame]), dtype=torch.uint8) for found in (before, after))
            assert other.plane("ids").view(new, end).equal(one.plane("ids").view(old, begin))
    coarse_k, coarse_v = stream.read(0, range(8), dtype=torch.float32)
    direct = make_cache().open("a", window=WINDOW)
    grow(direct, 9)
    for exact, coarse, once in zip((k, v), (coarse_k, coarse_v), direct.read(0, range(8)), strict=True):
        assert 0 < (coarse - exact).square().mean() < 1.3 * (once - exact).square().mean()
    grow(stream, 3, first_seed=9)
    assert formats(stream) == ["qvg4-int2"] * 11 + ["dense"]
    assert [quality.demotions for quality in stream.ledger.values()] == [1] * 11 + [0]
    assert page_bytes(stream)[9] == span_bytes(cache, [8, 9, 10], 2)[1]
    with stream.begin_chunk() as chunk:
        write(chunk, [12, 13, 14])
        q = torch.randn(chunk.num_tokens, 2, 64)
        assert chunk.attend(0, q, q, q).isfinite().all(), "three formats in one block table"
    cache.check_integrity()


def test_a_frame_that_was_quantised_early_and_then_demoted_says_so_twice() -> None:
    cache = ladder_cache()
    stream = cache.open("a", window=replace(WINDOW, bf16_recent=4))
    grow(stream, 9)
    stream.demote(Rung.TAIL)
    stream.demote(Rung.SPANS)
    assert [quality.demotions for quality in stream.ledger.values()] == [1] * 4 + [2] * 3 + [0] * 2
    bits = [quality.bits for quality in stream.ledger.values()]
    assert bits[0] < 4 < bits[-1] == 32


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_a_squeezed_stream_holds_is_what_the_arithmetic_says(data: st.DataObject) -> None:
    window = data.draw(
        st.sampled_from(
            [
                Window(recent_frames=4),
                Window(sink_frames=2, recent_frames=6, retrieval_frames=3),
                Window(sink_frames=1, recent_frames=7, bf16_sink=True, bf16_recent=3),
            ]
        )
    )
    cache = ladder_cache(pool=8 << 20)
    stream = cache.open("a", window=window)
    squeezes = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=2))
    for step in range(7):
        if step == squeezes[0]:
            stream.demote(Rung.TAIL)
        if step == squeezes[1]:
            stream.demote(Rung.SPANS)
        frames = data.draw(st.integers(1, 3))
        with stream.begin_chunk(frames) as chunk:
            live = Counter(slot.nbytes for slot in cache.store.pool.live().values())
            expected = stream.timeline.demand(stream.committed, frames)
            assert live == Counter({size: n for size, n in object_counts(cache.layouts, expected).items() if n})
            write(chunk, [step] * frames)
            chunk.commit()
        assert set(stream.pages) == set(stream.timeline.kept(stream.committed))
    cache.check_integrity()


def test_sink_frames_that_the_window_keeps_dense_stay_dense() -> None:
    cache = ladder_cache()
    stream = cache.open("a", window=Window(sink_frames=2, recent_frames=6, bf16_sink=True))
    grow(stream, 9)
    stream.demote(Rung.SPANS)
    assert formats(stream)[:2] == ["dense", "dense"]
    assert set(formats(stream)[2:]) == {"qvg4-int2"}


def test_floors_of_stream_and_tenant_are_kept_and_the_stricter_one_counts() -> None:
    cache = ladder_cache()
    window = replace(WINDOW, bf16_recent=4)
    stream = cache.open("a", tenant="t", window=window, floor=QualityFloor(rung=Rung.TAIL, retrieval_frames=2))
    grow(stream, 12)
    before = page_bytes(stream)
    with pytest.raises(QualityFloorError, match="rung: expected at most TAIL for stream 'a' of tenant 't', got SPANS"):
        stream.demote(Rung.SPANS)
    with pytest.raises(QualityFloorError, match="frames: expected at least 2 for stream 'a'"):
        stream.shrink_retrieval(1)
    cache.set_floor("t", QualityFloor(rung=Rung.NONE))
    with pytest.raises(QualityFloorError, match="at most NONE"):
        stream.demote(Rung.TAIL)
    assert page_bytes(stream) == before
    assert stream.rung is Rung.NONE
    cache.set_floor("t", None)
    cache.set_floor("t", None)
    assert stream.demote(Rung.TAIL) > 0
    with pytest.raises(ArgumentError, match="floor: expected a QualityFloor or None, got 'low'"):
        cache.set_floor("t", "low")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rung: expected a Rung"):
        QualityFloor(rung=1)  # type: ignore[arg-type]
    assert stream.fork("b").quality_floor == stream.quality_floor


def test_a_manager_without_a_ladder_demotes_nothing_and_keeps_nothing_free() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 9)
    with pytest.raises(QualityFloorError, match="demote_to=None allows no more"):
        stream.demote(Rung.TAIL)
    assert cache.budget.reserve == Demand()
    tails_only = ladder_cache(demote_to=FINE)
    other = tails_only.open("a", window=WINDOW)
    grow(other, 9)
    other.demote(Rung.TAIL)
    with pytest.raises(QualityFloorError, match="demote_to='fine' allows no more"):
        other.demote(Rung.SPANS)
    assert len(tails_only.layouts) == 2


def test_only_formats_that_share_codebooks_can_be_demoted_to() -> None:
    for target in ("qvg-int2", "qvg-pro-int2", "dense"):
        with pytest.raises(ConfigError, match="demote_to: expected 'fine' but for grid"):
            CacheConfig(memory="1GiB", format=FINE, demote_to=target)
    with pytest.raises(ConfigError, match="demote_to"):
        CacheConfig(memory="1GiB", format="dense", demote_to="dense")
    with pytest.raises(ConfigError, match="demote_to: expected a format with a name of its own, got 'qvg4-int2' twice"):
        CacheConfig(memory="1GiB", format=FAST.with_codecs(grid=Grid.INT4), demote_to=FAST)
    config = CacheConfig(memory="1GiB", format="qvg-int4", demote_to="qvg-int2")
    assert config.demote_to is FORMATS["qvg-int2"]


def test_bad_demotions_are_errors_and_change_nothing() -> None:
    cache, other = ladder_cache(), ladder_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 9)
    with pytest.raises(ArgumentError, match="rung: expected a Rung, got 1"):
        stream.demote(1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="streams of this manager"):
        other.demote([stream], Rung.TAIL)
    with stream.begin_chunk():
        with pytest.raises(StateError, match="has an open chunk"):
            stream.demote(Rung.TAIL)
        with pytest.raises(StateError, match="has an open chunk"):
            stream.shrink_retrieval(0)
    for wrong in (-1, 5, True, 1.0):
        with pytest.raises(ArgumentError, match="frames: expected 0 to 4"):
            stream.shrink_retrieval(wrong)  # type: ignore[arg-type]
    stream.close()
    with pytest.raises(StateError, match="closed"):
        stream.demote(Rung.TAIL)
    assert squeeze(stream.timeline, Rung.NONE, 9, cache.model) is stream.timeline
    plain = Timeline(WINDOW, None)
    assert squeeze(plain, Rung.TAIL, 9, cache.model) is plain


def test_retrieval_memory_shrinks_and_its_frames_are_gone_for_good() -> None:
    cache = ladder_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 15)
    assert list(stream.pages) == [0, *range(3, 15)]
    returned = stream.shrink_retrieval(1)
    assert list(stream.pages) == [0, *range(6, 15)]
    assert returned == 3 * cache.layouts[1].page_nbytes
    assert stream.shrink_retrieval(1) == 0
    with pytest.raises(ArgumentError, match="retrieve: expected frames that are still stored"):
        stream.begin_chunk(retrieve=[4])
    grow(stream, 6, first_seed=15)
    assert list(stream.pages) == [0, *range(12, 21)]
    cache.check_integrity()


def test_retrieval_memory_never_shrinks_below_what_spans_need_to_fill() -> None:
    cache = ladder_cache()
    stream = cache.open("a", window=Window(recent_frames=2, retrieval_frames=3))
    grow(stream, 9)
    with pytest.raises(ArgumentError, match="frames: expected at least 1, so that spans fill"):
        stream.shrink_retrieval(0)
    stream.shrink_retrieval(1)
    dense = make_cache(format="dense").open("a", window=Window(recent_frames=2, retrieval_frames=3))
    grow(dense, 6)
    dense.shrink_retrieval(0)
    assert list(dense.pages) == [4, 5]


def test_a_shared_span_is_demoted_once_for_all_who_may_and_the_others_keep_it() -> None:
    cache = ladder_cache(pool=4 << 20)
    stream = cache.open("a", window=WINDOW)
    grow(stream, 9)
    willing, busy, proud = (stream.fork(name) for name in ("willing", "busy", "proud"))
    proud.floor = QualityFloor(rung=Rung.TAIL)
    before = page_bytes(stream)
    with busy.begin_chunk() as chunk:
        stream.demote(Rung.SPANS)
        assert formats(willing)[:8] == ["qvg4-int2"] * 8
        assert willing.pages[0] is stream.pages[0]
        assert willing.rung is Rung.NONE
        for other in (busy, proud):
            assert page_bytes(other) == before
        write(chunk, [9, 10, 11])
        chunk.commit()
    cache.check_integrity()
    grow(willing, 3, first_seed=9)
    assert formats(willing) == ["qvg4-int2"] * 8 + ["fine"] * 4
    used = cache.stats().used_nbytes
    for other in (stream, willing, busy, proud):
        other.close()
    assert 0 == cache.stats().used_nbytes < used


def test_a_shared_tail_is_quantised_for_each_holder_or_once_for_those_who_go_together() -> None:
    cache = ladder_cache(pool=4 << 20)
    stream = cache.open("a", window=replace(WINDOW, bf16_recent=4))
    grow(stream, 9)
    fork, third = stream.fork("b"), stream.fork("c")
    before = page_bytes(third)
    assert cache.demote([stream, fork], Rung.TAIL) == 0, "the third still holds the dense pages"
    assert [stream.pages[frame] is fork.pages[frame] for frame in range(9)] == [True] * 9
    assert page_bytes(third) == before
    assert third.demote(Rung.TAIL) == 3 * cache.layouts[0].page_nbytes
    assert page_bytes(third) == page_bytes(stream)
    assert third.pages[4] is not stream.pages[4]
    cache.check_integrity()


def test_a_chunk_never_takes_what_demotion_needs() -> None:
    cache = ladder_cache(pool=24 * make_model().frame_nbytes)
    streams = [cache.open(f"s{i}", window=Window(recent_frames=12, bf16_recent=6)) for i in range(9)]
    with pytest.raises(OutOfMemoryError):
        _grow_all(streams)
    for rung in (Rung.TAIL, Rung.SPANS):
        for stream in streams:
            stream.demote(rung)
    cache.check_integrity()
    grow(streams[0], 3)
    assert cache.can_host([cache.demand(WINDOW, 3)])
    config = cache.config
    assert (
        estimate(cache.model, config, WINDOW).streams
        <= estimate(cache.model, replace(config, demote_to=None), WINDOW).streams
    )


def _grow_all(streams: list[Stream]) -> None:
    for _ in range(9):
        for number, stream in enumerate(streams):
            grow(stream, 3, first_seed=100 * number + stream.committed)


class InjectedError(Exception):
    """Planted by a test."""


@pytest.mark.parametrize(
    "point", [point for point in TIER_FAULT_POINTS if point.startswith("demote")] + ["pool.allocate", "encode.layer"]
)
def test_a_fault_while_a_stream_is_demoted_leaves_every_frame_readable_and_the_books_in_order(point: str) -> None:
    fired = 0
    while True:
        cache = ladder_cache()
        stream = cache.open("a", window=replace(WINDOW, bf16_recent=4))
        grow(stream, 9)
        fork = stream.fork("b")
        before = page_bytes(fork)
        with inject_fault(point, InjectedError(), skip=fired):
            try:
                stream.demote(Rung.SPANS)
            except InjectedError:
                pass
            else:
                break
        cache.check_integrity()
        now = page_bytes(stream)
        for frame, quality in stream.ledger.items():
            assert (now[frame] == before[frame]) == (quality.demotions == 0)
        stream.demote(Rung.SPANS)
        assert formats(stream) == ["qvg4-int2"] * 7 + ["dense"] * 2
        for each in (stream, fork):
            grow(each, 3)
            each.close()
        assert cache.stats().used_nbytes == 0
        fired += 1
    assert fired >= 1, "the point was never reached"


@pytest.mark.parametrize("point", ["demote.reserve", "demote.publish"])
@pytest.mark.parametrize("commits", [0, 1])
def test_a_tail_that_was_quantised_in_part_is_never_quantised_twice(point: str, commits: int) -> None:
    cache = ladder_cache(span_frames=12)
    stream = cache.open("a", window=Window(sink_frames=1, recent_frames=24))
    grow(stream, 11)
    with inject_fault(point, InjectedError(), skip=1), suppress(InjectedError):
        stream.demote(Rung.TAIL)
    assert formats(stream) == ["fine"] * 3 + ["dense"] * 8
    grow(stream, 3 * commits, first_seed=11)
    stream.demote(Rung.TAIL)
    full = 9 + 3 * commits
    assert formats(stream) == ["fine"] * full + ["dense"] * 2
    now = page_bytes(stream)
    for first in range(0, full, 3):
        frames = list(range(first, first + 3))
        assert [now[frame] for frame in frames] == span_bytes(cache, frames, 1)
    cache.check_integrity()


def test_scattered_pages_move_together_when_a_chunk_would_not_fit_otherwise() -> None:
    """Streams of which one frame in many stays leave slabs with one page each; a large chunk needs whole slabs."""
    cache = make_cache(pool=40 * make_model().frame_nbytes)
    streams = [cache.open(f"s{i}", window=Window(sink_frames=1, recent_frames=4)) for i in range(6)]
    for number, stream in enumerate(streams):
        grow(stream, 4, first_seed=10 * number)
    before = {stream.id: page_bytes(stream) for stream in streams}
    pool = cache.store.pool
    held = [stream for index, stream in enumerate(streams) if index % 2]
    for stream in streams[::2]:
        stream.close()
    pool.reclaim(wait=True)
    free = pool.free_nbytes
    with held[0].begin_chunk(1) as chunk:
        fixed = chunk.table.pages
        compact(cache)
        assert chunk.table.pages == fixed
        assert tuple(held[0].pages[frame].id for frame in chunk.visible) == fixed[:-1]
    compact(cache)
    pool.reclaim(wait=True)
    assert pool.free_nbytes >= free
    counts = Counter(slot.nbytes for slot in pool.live().values())
    slabs = cache.budget.slabs
    assert pool.free_nbytes // slabs.slab_nbytes == slabs.num_slabs - slabs.slabs_for(counts)
    assert {stream.id: page_bytes(stream) for stream in held} == {stream.id: before[stream.id] for stream in held}
    cache.check_integrity()


def _open_until_full(cache: KVCacheManager) -> None:
    for number in range(1000):
        grow(cache.open(f"s{number}", window=Window(recent_frames=4)), 4, first_seed=10 * number, per_chunk=2)


def test_a_chunk_finds_room_wherever_pages_lie_as_long_as_their_bytes_fit() -> None:
    cache = make_cache(pool=60 * make_model().frame_nbytes, free_fill=FreeFill.POISON)
    slabs = cache.budget.slabs
    with inject_fault("pool.compact", InjectedError(), skip=1 << 30) as moves:
        with pytest.raises(OutOfMemoryError):
            _open_until_full(cache)
        for stream in list(cache.streams.values())[::3]:
            stream.close()
        kept = {stream.id: page_bytes(stream) for stream in cache.streams.values() if stream.pages}
        late = cache.open("late", window=Window(recent_frames=100, bf16_recent=90))
        while True:
            live = Counter(slot.nbytes for slot in cache.store.pool.live().values())
            fits = slabs.slabs_for(live + object_counts(cache.layouts, Demand(3))) <= slabs.num_slabs
            try:
                grow(late, 3, first_seed=400)
            except OutOfMemoryError:
                break
        assert not fits
        assert moves[0] > 0, "nothing ever had to move"
    assert kept == {name: page_bytes(cache.streams[name]) for name in kept}
    cache.check_integrity()


@pytest.mark.parametrize("point", ["pool.compact", "pool.allocate"])
def test_a_fault_while_pages_move_leaves_them_where_they_are(point: str) -> None:
    fired = 0
    while True:
        cache = make_cache(pool=20 * make_model().frame_nbytes, free_fill=FreeFill.POISON)
        with suppress(OutOfMemoryError):
            _open_until_full(cache)
        for stream in list(cache.streams.values())[::3]:
            stream.close()
        before = {stream.id: page_bytes(stream) for stream in cache.streams.values()}
        with inject_fault(point, InjectedError(), skip=fired) as seen:
            try:
                compact(cache)
            except InjectedError:
                pass
            else:
                assert seen[0] <= fired
                break
        cache.check_integrity()
        assert before == {stream.id: page_bytes(stream) for stream in cache.streams.values()}
        fired += 1
    assert fired >= 1, "the point was never reached"
