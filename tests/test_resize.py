"""The pool gives memory back and takes it again; what is stored moves and stays what it is."""

import pytest
from tiny import grow, make_cache, page_bytes

from qvg_paged import (
    ArgumentError,
    CacheEvent,
    EventKind,
    FreeFill,
    KVCacheManager,
    OutOfMemoryError,
    StateError,
    Window,
    inject_fault,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = Window(recent_frames=4)


def test_memory_goes_back_and_streams_are_what_they_were() -> None:
    events: list[CacheEvent] = []
    cache = make_cache(free_fill=FreeFill.POISON, host_memory="1MiB", on_event=events.append)
    streams = [cache.open(f"s{number}", window=WINDOW) for number in range(9)]
    for number, stream in enumerate(streams):
        grow(stream, 5, first_seed=10 * number)
    for stream in streams[:6]:
        stream.close()
    kept = {stream.id: page_bytes(stream) for stream in streams[6:]}
    slab, before = cache.budget.slabs.slab_nbytes, cache.pool_nbytes
    buffer = cache.store.pool.buffer
    returned = cache.shrink(before // 2)
    assert before // 2 <= returned < before // 2 + slab
    assert cache.pool_nbytes == before - returned == buffer.numel() == buffer.untyped_storage().nbytes()
    assert cache.store.pool.buffer is buffer
    assert cache.budget.total < make_cache(host_memory="1MiB").budget.total
    cache.check_integrity()
    assert {stream.id: page_bytes(stream) for stream in streams[6:]} == kept
    streams[6].park()
    streams[6].resume()
    grow(streams[6], 3, first_seed=70)
    with pytest.raises(OutOfMemoryError, match=r"shrink: .* wanted back, .* can be spared; close, demote or park"):
        cache.shrink(cache.pool_nbytes)
    assert cache.grow(1) == 0
    assert cache.grow(returned - slab) == returned - slab
    assert cache.grow(before) == slab
    assert cache.pool_nbytes == before
    cache.check_integrity()
    assert page_bytes(streams[7]) == kept["s7"]
    assert [(e.nbytes, e.detail) for e in events if e.kind is EventKind.RESIZE] == [
        (returned, "shrunk"), (returned - slab, "grown"), (slab, "grown"),
    ]  # fmt: skip
    cache.store.pool.reclaim(wait=True)
    free = cache.store.pool.bytes_of
    assert all((free(slot) == 0xFF).all() for slot in cache.store.pool.allocate(cache.layouts[0].page_nbytes, 9, "t"))


def test_an_empty_pool_keeps_what_one_chunk_needs() -> None:
    cache = make_cache()
    with pytest.raises(OutOfMemoryError) as caught:
        cache.shrink(cache.pool_nbytes)
    assert cache.shrink(caught.value.available) == caught.value.available
    grow(cache.open("a", window=WINDOW), 3)
    assert cache.shrink(0) == 0


def test_nothing_shrinks_while_something_is_in_flight() -> None:
    cache = make_cache(host_memory="1MiB")
    stream = cache.open("a", window=WINDOW)
    grow(stream, 3)
    for resize in (cache.shrink, cache.grow):
        with stream.begin_chunk(), pytest.raises(StateError, match=r"expected no open chunk .*, got \['a'\]"):
            resize(1)
        for wrong in (-1, True, 1.5, "1GiB"):
            with pytest.raises(ArgumentError, match="nbytes: expected a number of bytes >= 0"):
                resize(wrong)  # type: ignore[arg-type]
    stream.park()
    stream.prefetch_resume()
    with pytest.raises(StateError):
        cache.shrink(1)
    before = cache.pool_nbytes
    stream.resume()
    with inject_fault("pool.resize", RuntimeError("device lost")), pytest.raises(RuntimeError):
        cache.shrink(1)
    assert cache.pool_nbytes == before
    cache.check_integrity()


def _fill_up(cache: KVCacheManager) -> None:
    for number in range(1000):
        grow(cache.open(f"s{number}", window=WINDOW), 4, first_seed=10 * number)


def test_pages_at_the_upper_end_move_down_before_the_pool_is_cut() -> None:
    cache = make_cache(pool=512 << 10, free_fill=FreeFill.POISON)
    with pytest.raises(OutOfMemoryError):
        _fill_up(cache)
    streams = list(cache.streams.values())
    for stream in streams[: 3 * len(streams) // 4]:
        stream.close()
    kept = {stream.id: page_bytes(stream) for stream in cache.streams.values()}
    highest = max(slot.id for slot in cache.store.pool.live().values())
    returned = cache.shrink(cache.pool_nbytes // 2)
    assert returned > 0
    assert highest * 256 > cache.pool_nbytes > max(slot.id for slot in cache.store.pool.live().values()) * 256
    assert {stream.id: page_bytes(stream) for stream in cache.streams.values()} == kept
    cache.check_integrity()
