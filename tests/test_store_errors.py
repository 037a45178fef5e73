"""Bad input, full pools, broken numbers and injected faults: a typed error, and nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import WINDOW, content, grow, make_cache, make_model, page_bytes, write

from qvg_paged import (
    ArgumentError,
    CacheConfig,
    Chunk,
    ChunkState,
    ConfigError,
    IntegrityError,
    KVCacheManager,
    NonFiniteError,
    OutOfMemoryError,
    QvgPagedError,
    StaleHandleError,
    StateError,
    Stream,
    Window,
    inject_fault,
)
from qvg_paged.events import CHUNK_FAULT_POINTS
from qvg_paged.fence import Fence

pytestmark = pytest.mark.usefixtures("one_thread")


class InjectedError(Exception):
    """Raised at a fault point."""


def books(cache: KVCacheManager) -> Any:
    """Everything a failed call must leave alone."""
    cache.check_integrity()
    streams = {
        name: (stream.committed, stream.chunk, page_bytes(stream)) for name, stream in sorted(cache.streams.items())
    }
    return cache.stats().used_nbytes, streams


def step(cache: KVCacheManager) -> None:
    """One of everything: a pair of chunks, one of which closes a span and evicts, and a fork."""
    a, b = cache.streams["a"], cache.streams["b"]
    chunks = cache.begin_chunks([a, b])
    for chunk in chunks:
        write(chunk, [70, 71, 72])
    chunks[0].commit()
    chunks[1].commit()
    a.fork("c")


@pytest.mark.parametrize("point", CHUNK_FAULT_POINTS)
def test_a_fault_anywhere_leaves_what_was_committed_and_the_books_in_order(point: str) -> None:
    """The n-th call of every fault point fails, n = 0, 1, ... until nothing fires any more."""
    fired = 0
    while True:
        cache = make_cache()
        for name in "ab":
            grow(cache.open(name, window=Window(recent_frames=5)), 6)
        before = books(cache)
        with inject_fault(point, InjectedError(), skip=fired) as seen:
            try:
                step(cache)
            except InjectedError:
                pass
            else:
                assert seen[0] <= fired
                break
        for stream in cache.streams.values():
            if stream.chunk is not None:
                stream.chunk.abort()
        _, streams = books(cache)
        for name in "ab":
            committed, chunk, held = streams[name]
            assert chunk is None
            assert committed in (6, 9)
            if committed == 6:
                assert held == before[1][name][2]
        assert "c" not in streams
        if all(streams[name][0] == 6 for name in "ab"):
            assert books(cache) == before
        for name in "ab":
            grow(cache.streams[name], 3)
        for stream in list(cache.streams.values()):
            stream.close()
        assert books(cache) == (0, {})
        fired += 1
    assert fired >= 1, "the point was never reached"


def test_an_unknown_fault_point_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"pool\.allocate, .*got 'x'"), inject_fault("x", InjectedError()):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_with_numbers_that_are_not_finite_is_aborted_and_no_other_byte_changes(
    value: float, dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    for layer in range(model.num_layers):
        for part in range(2):
            cache = make_cache(model=model)
            good, bad = cache.open("good", window=WINDOW), cache.open("bad", window=WINDOW)
            grow(good, 5)
            grow(bad, 6)
            before = books(cache)
            digests = good.digests(), bad.digests()
            chunk = bad.begin_chunk(2)
            write(chunk, [1, 2])
            frames = torch.cat([content(model, seed)[layer] for seed in (1, 2)], 1)
            frames[part, -1, -1, -1] = value
            chunk.write(layer, frames[0], frames[1])
            with pytest.raises(NonFiniteError, match="frames 6-7 of stream 'bad'"):
                chunk.commit()
            assert books(cache) == before
            assert (good.digests(), bad.digests()) == digests
            grow(bad, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_values_whose_sum_is_not_are_committed(dtype: torch.dtype) -> None:
    cache = make_cache(model=make_model(dtype=dtype), format="dense")
    stream = cache.open("large", window=WINDOW)
    most = torch.finfo(dtype).max
    with stream.begin_chunk(2) as chunk:
        for layer in range(cache.model.num_layers):
            k = torch.full((chunk.num_tokens, cache.model.num_kv_heads, cache.model.head_dim), most, dtype=dtype)
            chunk.write(layer, k, k)
        chunk.commit()
    assert stream.committed == 2
    with stream.begin_chunk(1) as chunk:
        write(chunk, [0])
        wide = torch.full((chunk.num_tokens, cache.model.num_kv_heads, cache.model.head_dim), most, dtype=dtype)
        wide[0, 0, 0] = -torch.inf
        chunk.write(0, wide, wide)
        with pytest.raises(NonFiniteError):
            chunk.commit()


def test_of_chunks_committed_together_only_the_broken_ones_are_aborted() -> None:
    cache = make_cache()
    streams = [cache.open(name, window=WINDOW) for name in ("good", "nan", "infinite")]
    for stream in streams:
        grow(stream, 2)
    chunks = cache.begin_chunks(streams, 1)
    for chunk, factor in zip(chunks, (1.0, float("nan"), float("inf")), strict=True):
        for layer, (k, v) in enumerate(content(cache.model, 3)):
            chunk.write(layer, k, v * factor)
    with pytest.raises(NonFiniteError, match=r"stream 'nan', frames 2-2 of stream 'infinite' hold .* were aborted"):
        cache.commit(chunks)
    assert [chunk.state for chunk in chunks] == [ChunkState.OPEN, ChunkState.ABORTED, ChunkState.ABORTED]
    cache.commit(chunks[:1])
    assert [stream.committed for stream in streams] == [3, 2, 2]
    cache.check_integrity()


def test_a_number_overwritten_before_the_commit_does_no_harm() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    with stream.begin_chunk(1) as chunk:
        broken = content(cache.model, 1)[0] * float("nan")
        chunk.write(0, broken[0], broken[1])
        write(chunk, [1])
        chunk.commit()
    assert stream.read(0)[0].isfinite().all()


def test_a_full_pool_is_an_ordinary_outcome_that_changes_nothing() -> None:
    cache = make_cache(pool=400 << 10)
    streams = [cache.open(f"s{i}", window=WINDOW) for i in range(20)]
    with pytest.raises(OutOfMemoryError) as caught:
        list(map(Stream.begin_chunk, streams))
    error = caught.value
    assert error.requested == 3 * cache.layouts[0].page_nbytes
    assert 0 <= error.available < error.requested
    failed = next(stream for stream in streams if stream.chunk is None)
    cache.check_integrity()
    used = cache.stats().used_nbytes
    with pytest.raises(OutOfMemoryError):
        failed.begin_chunk()
    assert cache.stats().used_nbytes == used
    streams[0].close()
    failed.begin_chunk()
    cache.check_integrity()


def test_pages_and_streams_cannot_be_used_after_they_went_back() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 5)
    page = stream.pages[4]
    chunk = stream.begin_chunk()
    stream.close()
    stream.close()
    assert cache.stats().used_nbytes == 0
    with pytest.raises(StaleHandleError):
        cache.store.release([page], Fence(None))
    with pytest.raises(StaleHandleError):
        cache.store.retain([page])
    q = content(cache.model, 0)[0, 0].repeat(3, 1, 1)
    for use in (
        stream.begin_chunk,
        lambda: stream.fork("b"),
        lambda: stream.read(0),
        stream.digests,
        chunk.commit,
        lambda: chunk.attend(0, q, q, q),
        lambda: chunk.write(0, q, q),
    ):
        with pytest.raises(StateError):
            use()
    chunk.abort()
    assert cache.open("a", window=WINDOW).committed == 0, "the name is free again"
    cache.check_integrity()


def _kv(**changes: Any) -> torch.Tensor:
    shape = {
        "tokens": 16,
        "heads": 2,
        "dim": 64,
        **{k: v for k, v in changes.items() if k in ("tokens", "heads", "dim")},
    }
    return torch.zeros(*shape.values(), dtype=changes.get("dtype", torch.float32), device=changes.get("device", "cpu"))


BAD_CALLS: dict[str, tuple[Callable[[Chunk], object], str]] = {
    "layer too large": (lambda c: c.attend(2, _kv(), _kv(), _kv()), "layer: expected 0 to 1, got 2"),
    "layer negative": (lambda c: c.write(-1, _kv(), _kv()), "layer: expected 0 to 1, got -1"),
    "layer of another type": (lambda c: c.write(True, _kv(), _kv()), "layer: expected 0 to 1, got True"),
    "too few tokens": (
        lambda c: c.attend(0, _kv(), _kv(tokens=8), _kv()),
        r"k: expected shape .*\[16, 2, 64\], got \[8",
    ),
    "too many heads": (lambda c: c.write(0, _kv(), _kv(heads=4)), r"v: expected shape .* got \[16, 4, 64\]"),
    "another head_dim": (lambda c: c.attend(0, _kv(dim=128), _kv(), _kv()), "q: expected shape"),
    "another dtype": (
        lambda c: c.write(0, _kv(dtype=torch.float16), _kv()),
        "k: expected torch.float32, got torch.float16",
    ),
    "integer queries": (lambda c: c.attend(0, _kv(dtype=torch.int32), _kv(), _kv()), "q: expected .* got torch.int32"),
    "another device": (lambda c: c.write(0, _kv(device="meta"), _kv()), "k: expected a tensor on cpu, got meta"),
    "no tensor": (lambda c: c.write(0, [1.0], _kv()), "k: expected a tensor, got list"),  # type: ignore[arg-type]
    "a gradient": (lambda c: c.attend(0, _kv(), _kv(), _kv().requires_grad_()), r"v: expected no gradient"),
    "the same chunk twice": (lambda c: c.stream.manager.write(0, [c, c], _kv(), _kv()), "chunks: expected one or more"),
    "no chunk": (lambda c: c.stream.manager.write(0, [], _kv(), _kv()), "chunks: expected one or more"),
    "another manager": (lambda c: make_cache().write(0, [c], _kv(), _kv()), "chunks of this manager"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_tensors_name_the_argument_and_write_nothing(case: str) -> None:
    call, message = BAD_CALLS[case]
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    chunk = stream.begin_chunk(2)
    write(chunk, [1, 2])
    before = cache.store.pool.buffer.clone()
    with pytest.raises(ArgumentError, match=message):
        call(chunk)
    assert torch.equal(cache.store.pool.buffer, before)
    chunk.commit()


def test_bad_streams_and_positions_name_the_argument_and_change_nothing() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 3)
    before = books(cache)
    foreign = make_cache().open("x", window=WINDOW)
    calls: list[tuple[Callable[[], object], type[QvgPagedError], str]] = [
        (lambda: cache.open("a", window=WINDOW), ArgumentError, "stream_id: .*'a'; close"),
        (lambda: cache.open("", window=WINDOW), ArgumentError, "stream_id: expected a non-empty"),
        (lambda: cache.open(3, window=WINDOW), ArgumentError, "stream_id"),  # type: ignore[arg-type]
        (lambda: cache.open("b", window=Window(recent_frames=2)), ConfigError, "span_frames"),
        (lambda: stream.fork("a"), ArgumentError, "stream_id"),
        (lambda: cache.begin_chunks([stream, stream]), ArgumentError, "each stream once"),
        (lambda: cache.begin_chunks([stream, foreign]), ArgumentError, "streams of this manager"),
        (lambda: stream.begin_chunk(positions={0: "x"}), ArgumentError, "positions"),  # type: ignore[dict-item]
        (lambda: stream.begin_chunk(positions={0: float("nan")}), ArgumentError, "positions: expected finite"),
        (lambda: stream.begin_chunk(positions={0: -1e39}), ArgumentError, "positions: expected finite"),
        (lambda: stream.begin_chunk(positions=[1.0]), ArgumentError, "positions"),  # type: ignore[arg-type]
        (lambda: stream.begin_chunk(retrieve=[-1]), ArgumentError, "retrieve"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
        assert books(cache) == before
    stream.begin_chunk()
    with pytest.raises(StateError, match="'a' has an open chunk"):
        stream.begin_chunk()


def test_an_event_sink_that_raises_does_not_damage_the_books() -> None:
    armed = [False]

    def sink(_: object) -> None:
        if armed[0]:
            raise InjectedError

    cache = make_cache(on_event=sink)
    stream = cache.open("a", window=Window(recent_frames=5))
    grow(stream, 6)
    armed[0] = True
    with pytest.raises(InjectedError):
        stream.begin_chunk()
    assert stream.chunk is None
    armed[0] = False
    chunk = stream.begin_chunk()
    write(chunk, [6, 7, 8])
    armed[0] = True
    with pytest.raises(InjectedError):
        chunk.commit()
    assert stream.committed == 9
    cache.check_integrity()
    with pytest.raises(InjectedError):
        stream.close()
    assert cache.stats().used_nbytes == 0
    cache.check_integrity()


def test_a_memory_that_cannot_hold_one_chunk_says_exactly_how_much_would_do() -> None:
    for model, changes in (
        (make_model(), {}),
        (make_model(), {"format": "dense"}),
        (make_model(frames_per_chunk=5), {"span_frames": 2}),
        (make_model(head_dim=128, dtype=torch.bfloat16), {"span_frames": 24, "format": "qvg-pro-int2"}),
    ):
        fields: dict[str, Any] = {"format": "qvg4-int2", "span_frames": 4, **changes}
        with pytest.raises(ConfigError, match=r"memory: expected at least \d+ bytes for one chunk") as caught:
            KVCacheManager(model, CacheConfig(memory=4096, **fields))
        needed = int(str(caught.value).split("at least ")[1].split(" ")[0])
        with pytest.raises(ConfigError):
            KVCacheManager(model, CacheConfig(memory=int(needed * 0.95), **fields))
        cache = KVCacheManager(model, CacheConfig(memory=needed, **fields))
        assert cache.budget.total <= needed
        dense = fields["format"] == "dense"
        stream = cache.open("a", window=Window(recent_frames=1 if dense else fields["span_frames"]))
        grow(stream, max(model.frames_per_chunk, fields["span_frames"]), per_chunk=model.frames_per_chunk)
        assert dense or any(page.format for page in stream.pages.values()), "a span was closed"


def test_damage_to_owners_and_codebooks_is_found() -> None:
    def owner(cache: KVCacheManager) -> None:
        cache.streams["a"].pages[5].owners += 1

    def users(cache: KVCacheManager) -> None:
        codebook = cache.streams["a"].pages[0].codebook
        assert codebook is not None
        codebook.pages += 1

    def leak(cache: KVCacheManager) -> None:
        cache.store.pool.allocate(cache.layouts[0].page_nbytes, 1, "t")

    for damage in (owner, users, leak):
        cache = make_cache()
        grow(cache.open("a", window=WINDOW), 6)
        cache.check_integrity()
        damage(cache)
        with pytest.raises(IntegrityError):
            cache.check_integrity()
