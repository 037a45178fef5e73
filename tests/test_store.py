"""The life of a chunk, of a span and of a stream, scene by scene."""

from typing import Any

import pytest
import torch
from tiny import (
    FAST,
    SPAN,
    WINDOW,
    attention,
    content,
    dense_bytes,
    grow,
    make_cache,
    make_model,
    page_bytes,
    span_bytes,
    write,
)

from qvg_paged import (
    FORMATS,
    ArgumentError,
    AttentionPath,
    CacheConfig,
    CacheEvent,
    EventKind,
    FreeFill,
    IntegrityError,
    OutOfMemoryError,
    RoPESpec,
    StateError,
    Window,
    estimate,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def quantised(stream: Any) -> list[int]:
    return [frame for frame, page in stream.pages.items() if page.format]


def test_a_stream_takes_no_memory_before_its_first_chunk() -> None:
    cache = make_cache()
    cache.open("a", window=WINDOW)
    assert cache.stats().used_nbytes == 0


def test_everything_a_chunk_may_need_is_reserved_before_anything_is_written() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 3)
    dense, packed = cache.layouts
    before = cache.stats().used_nbytes
    chunk = stream.begin_chunk()  # closes the span of frames 0-3
    reserved = 3 * dense.page_nbytes + SPAN * packed.page_nbytes + packed.codebook_nbytes
    assert cache.stats().used_nbytes == before + reserved
    write(chunk, [3, 4, 5])
    assert cache.stats().used_nbytes == before + reserved
    chunk.commit()
    after = 2 * dense.page_nbytes + SPAN * packed.page_nbytes + packed.codebook_nbytes
    assert cache.stats().used_nbytes == after
    assert cache.stats().peak_nbytes == before + reserved


def test_chunks_committed_together_leave_what_one_after_another_leave() -> None:
    digests = []
    for together in (True, False):
        cache = make_cache()
        streams = [cache.open(name, window=WINDOW) for name in "ab"]
        for step in range(3):
            chunks = cache.begin_chunks(streams, 2)
            for number, chunk in enumerate(chunks):
                write(chunk, [10 * step + number, 10 * step + number + 5])
            if together:
                cache.commit(chunks)
            else:
                for chunk in chunks:
                    chunk.commit()
        assert all(quantised(stream) for stream in streams)
        digests.append([stream.digests() for stream in streams])
        cache.check_integrity()
    assert digests[0] == digests[1]
    with pytest.raises(StateError, match="committed; begin another"):
        cache.commit(chunks)


def test_every_step_overwrites_the_scratch_and_only_the_last_one_becomes_history() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    with stream.begin_chunk(2) as chunk:
        for step in range(3):
            write(chunk, [100 + step, 200 + step])
        chunk.commit()
    assert page_bytes(stream) == {0: dense_bytes(cache.model, 102), 1: dense_bytes(cache.model, 202)}


def test_a_commit_with_a_layer_missing_is_an_error_and_the_chunk_can_still_be_completed() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    chunk = stream.begin_chunk(1)
    write(chunk, [1], range(1))
    with pytest.raises(StateError, match=r"layers \[1\] were never written"):
        chunk.commit()
    write(chunk, [1])
    chunk.commit()
    assert stream.committed == 1


def test_an_aborted_chunk_leaves_the_stream_and_the_pool_as_they_were() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 6)
    before, used = page_bytes(stream), cache.stats().used_nbytes
    chunk = stream.begin_chunk()
    write(chunk, [7, 8, 9])
    chunk.abort()
    chunk.abort()
    with stream.begin_chunk() as chunk:
        write(chunk, [7, 8, 9])
    assert (page_bytes(stream), cache.stats().used_nbytes, stream.committed) == (before, used, 6)
    for use in (lambda: write(chunk, [7, 8, 9]), chunk.commit):
        with pytest.raises(StateError, match="aborted"):
            use()


def test_a_span_is_quantised_when_it_is_full_and_its_unquantised_pages_go_back() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    seeds = grow(stream, 3)
    assert quantised(stream) == []
    seeds += grow(stream, 2, 3)
    assert quantised(stream) == [0, 1, 2, 3]
    packed = span_bytes(cache, seeds[:SPAN])
    assert page_bytes(stream) == {**dict(enumerate(packed)), 4: dense_bytes(cache.model, 4)}
    dense, layout = cache.layouts
    expected = SPAN * layout.page_nbytes + layout.codebook_nbytes + dense.page_nbytes
    assert cache.stats().used_nbytes == expected
    assert cache.stats().streams["a"].nbytes == expected
    assert cache.stats().streams["a"].quantised_frames == SPAN


def test_one_chunk_may_close_several_spans() -> None:
    cache = make_cache(span_frames=1)
    stream = cache.open("a", window=WINDOW)
    grow(stream, 3)
    assert quantised(stream) == [0, 1, 2]
    assert len({page.codebook for page in stream.pages.values()}) == 3


def test_frames_leave_the_window_one_by_one_even_inside_a_span_and_the_codebook_goes_with_the_last() -> None:
    cache = make_cache()
    stream = cache.open("a", window=Window(recent_frames=SPAN))
    grow(stream, SPAN)
    layout = cache.layouts[1]
    for frame in range(SPAN, 2 * SPAN - 1):
        codebook = stream.pages[SPAN - 1].codebook
        assert codebook is not None
        grow(stream, 1, frame)
        left = 2 * SPAN - 1 - frame
        assert sorted(stream.pages) == list(range(frame + 1 - SPAN, frame + 1))
        assert codebook.pages == left
        assert cache.stats().streams["a"].codebook_nbytes == layout.codebook_nbytes
    grow(stream, 1, 2 * SPAN - 1)
    assert codebook.slot.id not in cache.store.pool.live() or cache.store.pool.live()[codebook.slot.id] != codebook.slot
    assert sorted(stream.pages) == list(range(SPAN, 2 * SPAN))
    cache.check_integrity()


def test_the_newest_frames_stay_unquantised_if_asked_to() -> None:
    cache = make_cache()
    stream = cache.open("a", window=Window(recent_frames=12, bf16_recent=3))
    grow(stream, 6)
    assert quantised(stream) == []
    grow(stream, 1, 6)
    assert quantised(stream) == [0, 1, 2, 3]
    grow(stream, 4, 7)
    assert quantised(stream) == list(range(8))


def test_sink_frames_stay_unquantised_if_asked_to_and_spans_start_behind_them() -> None:
    cache = make_cache()
    stream = cache.open("a", window=Window(sink_frames=2, recent_frames=8, bf16_sink=True))
    seeds = grow(stream, 14)
    assert quantised(stream) == [6, 7, 8, 9, 10, 11, 12, 13]
    held = page_bytes(stream)
    assert held[1] == dense_bytes(cache.model, 1)
    assert held[6] == span_bytes(cache, seeds[6:10])[0]


def test_frames_kept_past_the_window_can_be_brought_back_and_others_cannot() -> None:
    cache = make_cache()
    stream = cache.open("a", window=Window(sink_frames=1, recent_frames=4, retrieval_frames=3))
    grow(stream, 12)
    assert sorted(stream.pages) == [0, 5, 6, 7, 8, 9, 10, 11]
    plain = stream.begin_chunk(1)
    assert plain.visible == (0, 8, 9, 10, 11)
    plain.abort()
    chunk = stream.begin_chunk(1, retrieve=[7, 5])
    assert chunk.visible == (0, 5, 7, 8, 9, 10, 11)
    own = content(cache.model, 99)[0]
    out = chunk.attend(0, own[0], own[0], own[1])
    k, v = stream.read(0, chunk.visible)
    torch.testing.assert_close(out, attention(own[0], torch.cat([k, own[0]]), torch.cat([v, own[1]])))
    chunk.abort()
    with pytest.raises(ArgumentError, match=r"retrieve: .*\(0, 5-11\), got \[3, 4\].*retrieval_frames"):
        stream.begin_chunk(retrieve=[3, 4, 7])


def test_a_table_is_made_while_the_chunk_is_open_and_says_the_same_ever_after() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 5)
    with stream.begin_chunk(1) as chunk:
        table = chunk.table
        pages = tuple(page.id for page in [*stream.pages.values(), *chunk.reservation.scratch])
        assert (table.pages, table.positions) == (pages, (*chunk.visible, 5))
        on_device = [group.pages.tolist() for group in table.groups.values()]
        write(chunk, [5])
        chunk.commit()
    assert chunk.visible == (0, 1, 2, 3, 4)
    with stream.begin_chunk(1) as late:
        write(late, [6])
        late.commit()
    assert late.visible == (0, 1, 2, 3, 4, 5)
    with pytest.raises(StateError, match="got one that is committed"):
        _ = late.table
    assert chunk.table is table
    assert table.pages == pages
    assert [group.pages.tolist() for group in table.groups.values()] == on_device


def test_a_fork_shares_every_page_and_both_go_their_own_way() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 6)
    used = cache.stats().used_nbytes
    branch = stream.fork("b")
    assert cache.stats().used_nbytes == used
    assert branch.pages == stream.pages
    before = page_bytes(branch)
    grow(stream, 6, 1000)
    assert page_bytes(branch) == before
    grow(branch, 6, 2000)
    mine, theirs = page_bytes(stream), page_bytes(branch)
    assert [frame for frame in mine if mine[frame] == theirs[frame]] == [0]
    assert theirs[4] == span_bytes(cache, [4, 5, 2000, 2001])[0]
    stream.close()
    assert page_bytes(branch) == theirs
    cache.check_integrity()
    branch.close()
    assert cache.stats().used_nbytes == 0


def test_a_fork_leaves_the_open_chunk_with_the_parent() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 2)
    chunk = stream.begin_chunk()
    branch = stream.fork("b")
    assert branch.chunk is None
    grow(branch, 3, 50)
    write(chunk, [2, 3, 4])
    chunk.commit()
    assert page_bytes(branch)[0] != page_bytes(stream)[0]
    cache.check_integrity()


def test_streams_begun_together_start_all_or_none() -> None:
    cache = make_cache(pool=500 << 10)
    pair = [cache.open(name, window=WINDOW) for name in "ab"]
    chunks = cache.begin_chunks(pair, 2)
    assert [chunk.stream for chunk in chunks] == pair
    q = torch.cat([content(cache.model, seed)[0, 0] for seed in range(4)])
    out = cache.attend(0, chunks, q, q, q)
    half = len(q) // 2
    torch.testing.assert_close(out[:half], attention(q[:half], q[:half], q[:half]))
    torch.testing.assert_close(out[half:], attention(q[half:], q[half:], q[half:]))
    table = cache.block_tables(chunks)
    assert table.dense().shape == (2, 2)
    for chunk in chunks:
        chunk.abort()
    other = cache.open("c", window=Window(recent_frames=100, bf16_recent=90))
    with pytest.raises(OutOfMemoryError):
        grow(other, 100)
    before = cache.stats().used_nbytes
    with pytest.raises(OutOfMemoryError):
        cache.begin_chunks([*pair, other], 3)
    assert [stream.chunk for stream in (*pair, other)] == [None] * 3
    assert cache.stats().used_nbytes == before
    cache.check_integrity()


def test_chunks_may_have_fewer_frames_but_not_more() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    for frames in (1, 3, 2):
        start = stream.committed
        chunk = stream.begin_chunk(frames)
        assert chunk.frames == range(start, start + frames)
        assert chunk.num_tokens == frames * cache.model.tokens_per_frame
        write(chunk, list(chunk.frames))
        chunk.commit()
    for frames in (0, 4, -1, 1.5):
        with pytest.raises(ArgumentError, match="frames: expected 1 to frames_per_chunk=3"):
            stream.begin_chunk(frames)  # type: ignore[arg-type]


@pytest.mark.parametrize("rope", [None, "on_read"])
@pytest.mark.parametrize("heads", [(2, 2), (1, 4)])
def test_generation_from_unquantised_pages_is_bit_identical_to_a_plain_cache(
    rope: str | None, heads: tuple[int, int]
) -> None:
    """``format="dense"``, ``path="reference"``: the same attention call on the same numbers, chunk after chunk."""
    spec = RoPESpec(head_dim=64, grid=(2, 4)) if rope else None
    model = make_model(
        num_kv_heads=heads[0],
        num_q_heads=heads[1],
        dtype=torch.bfloat16,
        rope_spec=spec,
        **({"rope": rope} if rope else {}),
    )
    cache = make_cache(model=model, format="dense", path="reference")
    window = Window(sink_frames=1, recent_frames=5)
    stream = cache.open("a", window=window)
    mix = torch.randn(model.num_layers, 3, 64, 64, generator=torch.Generator().manual_seed(3)) / 8
    plain: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in range(model.num_layers)]
    tokens = model.tokens_per_frame

    def plain_attend(layer: int, frames: range, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for place, frame in enumerate(frames):
            rows = slice(place * tokens, (place + 1) * tokens)
            plain[layer][frame] = (k[rows].clone(), v[rows].clone())
        seen = [f for f in sorted(plain[layer]) if f < 1 or f >= frames.start - 5]
        keys = torch.cat([plain[layer][frame][0] for frame in seen])
        keys = spec.rotate(keys, seen) if spec else keys
        values = torch.cat([plain[layer][frame][1] for frame in seen])
        return attention(q, keys, values)

    def run(attend: Any, frames: range, x: torch.Tensor) -> torch.Tensor:
        for layer in range(model.num_layers):
            q, k, v = (x @ mix[layer, part].to(x.dtype) for part in range(3))
            k, v = k[:, : heads[0]], v[:, : heads[0]]
            q = spec.rotate(q, frames) if spec else q
            x = x + attend(layer, frames, q, k, v)
        return x

    for size in (3, 1, 3, 2, 3, 3):
        noise = torch.randn(size * tokens, heads[1], 64).to(torch.bfloat16)
        with stream.begin_chunk(size) as chunk:
            ours, theirs = noise, noise
            for _ in range(2):
                ours = run(lambda layer, _, q, k, v, chunk=chunk: chunk.attend(layer, q, k, v), chunk.frames, ours)
                theirs = run(plain_attend, chunk.frames, theirs)
                assert torch.equal(ours, theirs)
            chunk.commit()


@pytest.mark.parametrize("path", ["reference", "staged", "auto"])
def test_attention_over_quantised_history_equals_attention_over_what_is_read_back(path: str) -> None:
    spec = RoPESpec(head_dim=64, grid=(2, 4))
    model = make_model(rope="on_read", rope_spec=spec, num_q_heads=4)
    cache = make_cache(model=model, path=path)
    stream = cache.open("a", window=WINDOW)
    grow(stream, 11)
    assert quantised(stream)
    assert quantised(stream) != list(stream.pages)
    chunk = stream.begin_chunk(2, positions={0: -3.0, 11: 20.0, 12: 21.0})
    own = torch.cat([content(model, seed)[1] for seed in (50, 51)], 1)
    q = torch.randn(own.shape[1], 4, 64)
    out = chunk.attend(1, q, own[0], own[1])
    k, v = stream.read(1, chunk.visible)
    places = [{0: -3.0}.get(frame, float(frame)) for frame in chunk.visible] + [20.0, 21.0]
    keys = spec.rotate(torch.cat([k, own[0]]), places)
    torch.testing.assert_close(out, attention(q, keys, torch.cat([v, own[1]])), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_read_back_gives_the_stored_frames_in_any_order_and_dtype(fmt: str) -> None:
    cache = make_cache(format=fmt, pool=4 << 20)
    stream = cache.open("a", window=WINDOW)
    grow(stream, 6)
    k, v = stream.read(1, [5, 2], dtype=torch.float16)
    assert k.dtype == v.dtype == torch.float16
    tokens = cache.model.tokens_per_frame
    exact = content(cache.model, 5)[1]
    torch.testing.assert_close(k[:tokens], exact[0].half())
    torch.testing.assert_close(v[:tokens], exact[1].half())
    old = content(cache.model, 2)[1, 1]
    error = (v[tokens:].float() - old).norm() / old.norm()
    assert error <= (1e-3 if fmt == "dense" else 0.2 if fmt == "qvg-int4" else 0.8), "another frame would give 1.4"
    everything, _ = stream.read(1)
    assert len(everything) == 6 * tokens
    with pytest.raises(ArgumentError, match=r"frames: .*got \[9\]"):
        stream.read(1, [9])


def test_bytes_are_the_same_alone_and_in_company_of_other_streams() -> None:
    def run(company: bool) -> dict[int, int]:
        cache = make_cache()
        others = [cache.open(f"o{i}", tenant="x", window=WINDOW) for i in range(3)] if company else []
        stream = cache.open("a", window=WINDOW)
        for step in range(4):
            for i, other in enumerate(others):
                grow(other, 1 + i, 5000 + 100 * i + step)
            grow(stream, 3, 3 * step)
        return stream.digests()

    alone = run(False)
    assert len(set(alone.values())) == len(alone)
    assert run(False) == alone
    assert run(True) == alone


def test_poison_in_free_memory_never_reaches_a_result() -> None:
    cache = make_cache(pool=500 << 10, free_fill=FreeFill.POISON)
    assert cache.store.pool.buffer.view(torch.float32).isnan().all()
    streams = [cache.open(name, window=WINDOW) for name in "ab"]
    for step in range(5):
        for stream in streams:
            with stream.begin_chunk(2) as chunk:
                for layer in range(cache.model.num_layers):
                    own = torch.cat([content(cache.model, step), content(cache.model, step + 1)], 2)[layer]
                    assert chunk.attend(layer, own[0], own[0], own[1]).isfinite().all()
                chunk.commit()
        streams[0].close()
        streams[0] = cache.open("a", window=WINDOW)
    assert all(part.isfinite().all() for part in streams[1].read(0))


def test_the_event_stream_tells_every_byte_in_use() -> None:
    events: list[CacheEvent] = []
    cache = make_cache(on_event=events.append)
    first = cache.open("a", tenant="t", window=Window(recent_frames=6))
    grow(first, 9)
    second = first.fork("b")
    grow(second, 3, 50)
    first.begin_chunk(2).abort()
    used = 0
    tenants = set()
    for event in events:
        used += {EventKind.ALLOCATE: event.nbytes, EventKind.FREE: -event.nbytes}.get(event.kind, 0)
        tenants.add(event.tenant)
    assert used == cache.stats().used_nbytes > 0
    assert tenants == {"t"}
    kinds = {kind: [event for event in events if event.kind is kind] for kind in EventKind}
    assert [event.frames for event in kinds[EventKind.COMMIT] if event.stream == "a"] == [
        (0, 1, 2), (3, 4, 5), (6, 7, 8),
    ]  # fmt: skip
    assert [event.frames for event in kinds[EventKind.PUBLISH] if event.stream == "a"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [event.frames for event in kinds[EventKind.EVICT]] == [(0, 1, 2), (3, 4, 5)]
    first.close()
    second.close()
    freed = sum(event.nbytes for event in events if event.kind is EventKind.FREE)
    assert freed == sum(event.nbytes for event in events if event.kind is EventKind.ALLOCATE)


def test_tenants_bytes_are_told_apart_and_foreign_pages_are_found() -> None:
    cache = make_cache()
    mine = cache.open("a", tenant="t", window=WINDOW)
    theirs = cache.open("b", tenant="u", window=WINDOW)
    grow(mine, 2)
    grow(theirs, 1)
    page = cache.layouts[0].page_nbytes
    assert cache.stats().tenant_nbytes == {"t": 2 * page, "u": page}
    assert mine.fork("c").tenant == "t"
    cache.check_integrity()
    theirs.pages[0] = mine.pages[0]
    with pytest.raises(IntegrityError, match="not its own"):
        cache.check_integrity()


def test_an_estimate_is_what_a_stream_then_takes_at_its_peak() -> None:
    model = make_model(frames_per_chunk=1)
    cache = make_cache(model=model, pool=500 << 10)
    window = Window(sink_frames=1, recent_frames=10)
    config = CacheConfig(memory=cache.config.memory, format=FAST, span_frames=SPAN, staging="1MiB")
    expected = estimate(model, config, window)
    assert expected.streams >= 2
    stream = cache.open("a", window=window)
    grow(stream, 40, per_chunk=1)
    assert 0.9 * expected.stream_nbytes <= cache.stats().peak_nbytes <= expected.stream_nbytes
    assert expected.dense_stream_nbytes == 12 * cache.layouts[0].page_nbytes
    stream.close()
    streams = [cache.open(f"s{i}", window=window) for i in range(expected.streams)]
    for step in range(40):
        for other in streams:
            grow(other, 1, step)
    assert cache.stats().peak_nbytes <= cache.budget.pool


def test_a_path_given_by_name_is_the_enum() -> None:
    assert CacheConfig(memory="1GiB", path="staged").path is AttentionPath.STAGED
