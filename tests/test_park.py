"""Streams out of the pool and back: every byte, every fault, every copy."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAST, grow, make_cache, make_model, page_bytes, write

from qvg_paged import (
    ArgumentError,
    CacheConfig,
    CacheEvent,
    ConfigError,
    CorruptedError,
    EventKind,
    FreeFill,
    Grid,
    IntegrityError,
    KVCacheManager,
    OutOfMemoryError,
    QvgPagedError,
    Rung,
    StaleHandleError,
    StateError,
    StorageError,
    Stream,
    Tier,
    Window,
    disk,
    host,
    inject_fault,
)
from qvg_paged.container import HEADER_ALIGNMENT, decode_header, encode_header, owner_of
from qvg_paged.events import TIER_FAULT_POINTS
from qvg_paged.host import Extent, HostArena, buffer_sizes
from qvg_paged.pool import Slot
from qvg_paged.transfer import Mover, Runs

pytestmark = pytest.mark.usefixtures("one_thread")

FINE = replace(FAST.with_codecs(grid=Grid.INT4), name="fine")
WINDOW = Window(sink_frames=1, recent_frames=8, retrieval_frames=2)


def tier_cache(path: Path | None = None, **changes: Any) -> KVCacheManager:
    fields: dict[str, Any] = {"format": FINE, "demote_to": FAST, "free_fill": FreeFill.POISON, "host_memory": "4MiB"}
    if path is not None:
        fields |= {"disk_path": path, "disk_memory": "8MiB"}
    return make_cache(**{**fields, **changes})


def filled(cache: KVCacheManager, name: str = "a", frames: int = 11, seed: int = 0, **changes: Any) -> Stream:
    stream = cache.open(name, window=WINDOW, **changes)
    grow(stream, frames, first_seed=seed)
    return stream


def test_a_park_whose_digests_fail_leaves_the_stream_and_the_host_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tier_cache()
    stream = filled(cache)
    before = page_bytes(stream)

    def digests() -> list[int]:
        raise RuntimeError("device")

    with monkeypatch.context() as broken:
        broken.setattr("qvg_paged.park.start_digests", lambda *_: digests)
        with pytest.raises(RuntimeError, match="device"):
            stream.park(Tier.HOST)
    assert cache.host.used_nbytes == 0
    assert page_bytes(stream) == before
    assert stream.park(Tier.HOST) is Tier.HOST


@pytest.mark.parametrize("tier", Tier)
def test_a_parked_stream_leaves_the_pool_and_comes_back_byte_for_byte(tier: Tier, tmp_path: Path) -> None:
    events: list[CacheEvent] = []
    cache = tier_cache(tmp_path, on_event=events.append)
    stream = filled(cache)
    stream.demote(Rung.SPANS)
    before, quality, pages = page_bytes(stream), stream.ledger, list(stream.pages.values())
    used, digests = cache.stats().used_nbytes, stream.digests()
    events.clear()
    assert stream.park(tier) is tier
    assert cache.stats().used_nbytes == 0
    assert stream.ledger == quality, "the ledger is known while the stream is away"
    cache.check_integrity()
    other = filled(cache, "b", seed=500)  # somebody else overwrites the memory meanwhile
    assert stream.resume() is tier
    assert page_bytes(stream) == before
    assert stream.digests() == digests
    assert (stream.ledger, stream.rung) == (quality, Rung.SPANS)
    kinds = [(e.kind, e.stream, e.detail, e.nbytes) for e in events if e.kind in (EventKind.PARK, EventKind.RESUME)]
    assert kinds == [(kind, "a", tier.value, used) for kind in (EventKind.PARK, EventKind.RESUME)]
    with pytest.raises(StaleHandleError):
        cache.store.retain(pages)
    other.close()
    cache.check_integrity()
    assert cache.host.used_nbytes == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tier", Tier)
def test_a_stream_that_was_away_goes_on_as_one_that_was_not(tier: Tier, tmp_path: Path) -> None:
    told = []
    for away in (False, True):
        cache = tier_cache(tmp_path)
        stream = filled(cache, frames=4)
        for seed in (4, 7, 10):
            if away:
                stream.park(tier)
                stream.prefetch_resume()
                stream.resume()
            grow(stream, 3, first_seed=seed)
        told.append(page_bytes(stream))
    assert told[0] == told[1]


def test_a_parked_stream_answers_nothing_but_its_ledger_and_close() -> None:
    cache = tier_cache()
    stream = filled(cache)
    with stream.begin_chunk(), pytest.raises(StateError, match="has an open chunk"):
        stream.park()
    with pytest.raises(StateError, match="expected a parked stream, 'a' is in the pool"):
        stream.resume()
    with pytest.raises(ArgumentError, match="tier: expected a Tier or None, got 'host'"):
        stream.park("host")  # type: ignore[arg-type]
    stream.park()
    calls: list[Callable[[], Any]] = [
        stream.begin_chunk, stream.digests, lambda: stream.read(0), lambda: stream.fork("b"),
        lambda: stream.demote(Rung.TAIL), lambda: stream.shrink_retrieval(0),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StateError, match="'a' is parked; resume it first"):
            call()
    assert stream.park() is stream.park(Tier.HOST) is Tier.HOST
    stream.close()
    assert cache.host.used_nbytes == 0
    for call in (stream.resume, stream.prefetch_resume, stream.park):
        with pytest.raises(StateError, match="closed"):
            call()


def test_an_empty_stream_can_be_parked_too(tmp_path: Path) -> None:
    for tier in Tier:
        stream = tier_cache(tmp_path).open("a", window=WINDOW)
        stream.park(tier)
        stream.resume()
        grow(stream, 3)


def test_the_host_budget_is_kept_and_the_disk_is_next(tmp_path: Path) -> None:
    nbytes = _nbytes()
    cache = tier_cache(tmp_path, host_memory=nbytes)
    streams = [filled(cache, name, seed=100 * index) for index, name in enumerate("abc")]
    before = [page_bytes(stream) for stream in streams]
    streams[0].park(Tier.HOST)
    with pytest.raises(OutOfMemoryError, match="host memory exhausted"):
        streams[1].park(Tier.HOST)
    assert page_bytes(streams[1]) == before[1]
    assert streams[1].park() is Tier.DISK
    small = tier_cache(tmp_path / "small", host_memory=0, disk_memory=HEADER_ALIGNMENT)
    stream = filled(small)
    with pytest.raises(OutOfMemoryError, match="disk exhausted"):
        stream.park()
    with pytest.raises(OutOfMemoryError, match="host memory exhausted"):
        filled(make_cache()).park()
    with pytest.raises(StorageError, match="a manager without a disk"):
        filled(tier_cache()).park(Tier.DISK)
    for number, each in enumerate(streams[:2]):
        each.resume()
        assert page_bytes(each) == before[number]


def _nbytes() -> int:
    return filled(tier_cache()).manager.stats().used_nbytes


def test_moving_down_keeps_the_host_copy_until_its_room_is_needed(tmp_path: Path) -> None:
    cache = tier_cache(tmp_path, host_memory=_nbytes())
    one, two = filled(cache), filled(cache, "b", seed=100)
    before = page_bytes(one), page_bytes(two)
    one.park()
    assert one.park(Tier.DISK) is Tier.HOST, "the fastest copy counts"
    assert one.park(Tier.DISK) is Tier.HOST
    assert one.parked is not None
    assert one.parked.disk is not None
    two.park(Tier.HOST)
    assert one.parked.tier is Tier.DISK
    with pytest.raises(OutOfMemoryError):
        filled(cache, "c").park(Tier.HOST)
    assert (one.resume(), two.resume()) == (Tier.DISK, Tier.HOST)
    assert (page_bytes(one), page_bytes(two)) == before
    cache.check_integrity()


@pytest.mark.parametrize("damaged", [{Tier.HOST}, {Tier.DISK}, {Tier.HOST, Tier.DISK}])
def test_what_one_copy_has_lost_the_other_gives(damaged: set[Tier], tmp_path: Path) -> None:
    cache = tier_cache(tmp_path)
    stream = filled(cache)
    before = page_bytes(stream)
    stream.park()
    stream.park(Tier.DISK)
    assert stream.parked is not None
    assert stream.parked.host is not None
    assert stream.parked.disk is not None
    if Tier.HOST in damaged:
        cache.host.bytes_of(stream.parked.host[0])[12345] ^= 4
    if Tier.DISK in damaged:
        _flip(stream.parked.disk.path, stream.parked.disk.data_start + 777, 2)
    if len(damaged) == 2:
        for _ in range(2):
            with pytest.raises(CorruptedError, match=r"stream 'a', got others in .*; no intact copy is left"):
                stream.resume()
            cache.check_integrity()
            assert cache.stats().used_nbytes == 0
        stream.close()
        return
    assert stream.resume() is (Tier.DISK if Tier.HOST in damaged else Tier.HOST)
    assert page_bytes(stream) == before


def _flip(path: Path, place: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def test_a_prefetched_stream_is_resident_before_its_turn_and_can_be_given_up_again() -> None:
    cache = tier_cache()
    stream, other = filled(cache), filled(cache, "b", seed=50)
    before, used = page_bytes(stream), cache.stats().used_nbytes
    stream.park()
    half = cache.stats().used_nbytes
    stream.prefetch_resume()
    stream.prefetch_resume()
    assert cache.stats().used_nbytes == used
    cache.check_integrity()
    with pytest.raises(StateError, match="parked"):
        stream.begin_chunk()
    stream.park(Tier.HOST)
    assert stream.resume() is Tier.HOST
    assert page_bytes(stream) == before
    stream.park()
    stream.prefetch_resume()
    stream.close()
    assert cache.stats().used_nbytes == half
    cache.check_integrity()
    other.close()


def test_forks_share_until_one_is_parked_and_its_copy_is_its_own(tmp_path: Path) -> None:
    cache = tier_cache(tmp_path)
    stream = filled(cache)
    fork = stream.fork("b")
    before, used = page_bytes(stream), cache.stats().used_nbytes
    fork.park()
    assert cache.stats().used_nbytes == used, "shared pages stay for the resident one"
    assert cache.host.used_nbytes == used, "the parked one has bytes of its own"
    grow(stream, 3, first_seed=90)
    fork.resume()
    assert page_bytes(fork) == before
    assert not set(map(id, fork.pages.values())) & set(map(id, stream.pages.values()))
    stream.park()
    fork.park(Tier.DISK)
    assert cache.stats().used_nbytes == 0
    stream.resume()
    fork.resume()
    assert page_bytes(fork) == before


def test_resuming_leaves_what_demotion_needs_and_fails_as_a_whole() -> None:
    cache = tier_cache(pool=26 * make_model().frame_nbytes)
    stream = filled(cache)
    before = page_bytes(stream)
    stream.park()
    with pytest.raises(OutOfMemoryError):
        _fill_up(cache)
    used = cache.stats().used_nbytes
    with pytest.raises(OutOfMemoryError):
        stream.resume()
    assert cache.stats().used_nbytes == used
    for hog in cache.streams.copy().values():
        if hog is not stream:
            hog.close()
    stream.resume()
    assert page_bytes(stream) == before


def _fill_up(cache: KVCacheManager) -> None:
    for index in range(20):
        filled(cache, f"h{index}")


class InjectedError(Exception):
    """Planted by a test."""


POINTS = [point for point in TIER_FAULT_POINTS if point.startswith(("host", "park", "disk", "resume"))]


@pytest.mark.parametrize("error", [InjectedError(), OSError(28, "No space left on device")], ids=["bug", "disk full"])
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_anywhere_leaves_the_stream_where_it_was_with_all_its_bytes(
    point: str, error: Exception, tmp_path: Path
) -> None:
    fired = 0
    while True:
        cache = tier_cache(tmp_path / str(fired))
        stream = filled(cache)
        before = page_bytes(stream)
        with inject_fault(point, error, skip=fired) as seen:
            try:
                for tier in Tier:
                    stream.park(tier)
                    stream.resume()
            except StorageError:
                assert isinstance(error, OSError)
            except (InjectedError, OSError):
                assert isinstance(error, InjectedError) or not point.startswith("disk")
            else:
                assert seen[0] <= fired
                break
        cache.check_integrity()
        if stream.parked is not None:
            assert cache.stats().used_nbytes == 0
            stream.resume()
        assert page_bytes(stream) == before
        assert cache.host.used_nbytes == 0
        assert cache.disk is not None
        assert not list(cache.disk.path.iterdir())
        assert cache.disk.used_nbytes == 0
        fired += 1
    assert fired >= 1, "the point was never reached"


def test_a_stream_survives_the_process_and_only_its_owner_gets_it(tmp_path: Path) -> None:
    cache = tier_cache(tmp_path)
    stream = filled(cache, "../a\n", tenant="t", frames=10)
    stream.demote(Rung.TAIL)
    grow(stream, 3, first_seed=10)
    before, quality = page_bytes(stream), stream.ledger
    stream.park(Tier.DISK)
    (file,) = tmp_path.rglob("*")
    assert file.parent == tmp_path
    assert file.stat().st_mode & 0o077 == 0, "for its owner only"
    again = tier_cache(tmp_path)
    assert again.disk is not None
    assert again.disk.used_nbytes > 0
    for wrong in ({"tenant": "u"}, {}):
        with pytest.raises(ArgumentError, match="stream_id: expected a stream that was parked on this disk"):
            again.restore("../a\n", **wrong)
    back = again.restore("../a\n", tenant="t")
    with pytest.raises(ArgumentError, match="expected an id not in use"):
        again.restore("../a\n", tenant="t")
    assert back.resume() is Tier.DISK
    assert (page_bytes(back), back.ledger, back.timeline) == (before, quality, stream.timeline)
    grow(back, 3, first_seed=40)
    with pytest.raises(StorageError, match="restore: expected disk_path"):
        tier_cache().restore("a")


def test_files_of_other_models_are_refused_and_a_used_id_replaces_its_old_file(tmp_path: Path) -> None:
    stream = filled(tier_cache(tmp_path))
    stream.park(Tier.DISK)
    with pytest.raises(StorageError, match="version 1 and the model, formats and layouts of this manager"):
        tier_cache(tmp_path, model=make_model(num_layers=3)).restore("a")
    cache = tier_cache(tmp_path)
    assert cache.disk is not None
    fresh = filled(cache, seed=70)
    before, nbytes = page_bytes(fresh), cache.stats().used_nbytes
    fresh.park(Tier.DISK)
    assert cache.stats().disk_nbytes == cache.disk.used_nbytes == nbytes
    fresh.resume()
    assert page_bytes(fresh) == before


def test_the_container_is_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open  # noqa: PLC0415 - of the tests' extras only

    stream = filled(tier_cache(tmp_path))
    pages = {record: bytes(stream.manager.store.pool.bytes_of(page.slot)) for record, page in stream.pages.items()}
    stream.park(Tier.DISK)
    assert stream.parked is not None
    assert stream.parked.disk is not None
    with safe_open(stream.parked.disk.path, "pt") as file:
        for record in stream.parked.image.pages:
            assert file.get_tensor(str(record.place)).numpy().tobytes() == pages[record.frame]
        assert file.metadata()["version"] == "1"
        assert "a" not in file.metadata()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_file_is_an_error_and_never_a_stream(data: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("park")
    cache = tier_cache(path)
    stream = filled(cache, frames=3)
    stream.park(Tier.DISK)
    assert stream.parked is not None
    assert stream.parked.disk is not None
    file = stream.parked.disk.path
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip in the header", "flip", "cut", "longer", "empty"]))
    if kind.startswith("flip"):
        place = data.draw(st.integers(0, 2000 if kind.endswith("header") else len(content) - 1))
        _flip(file, place, 1 << data.draw(st.integers(0, 7)))
    else:
        at = {"cut": data.draw(st.integers(0, len(content) - 1)), "empty": 0, "longer": len(content)}[kind]
        file.write_bytes(content[:at] + (b"\0" * 8 if kind == "longer" else b""))
    again = tier_cache(path)
    with pytest.raises((CorruptedError, StorageError)):
        again.restore("a").resume()
    again.check_integrity()
    assert again.stats().used_nbytes == 0


def test_headers_that_describe_no_stream_are_refused() -> None:
    cache = tier_cache()
    stream = filled(cache)
    stream.park()
    assert stream.parked is not None
    image, layouts, owner = stream.parked.image, cache.layouts, owner_of("default", "a")
    pages = image.pages
    size = image.sizes[pages[0].place]
    wrong = {
        "objects without digest": replace(image, digests=image.digests[:-1]),
        "frames that the window": replace(image, pages=pages[:-1]),
        "a page of another size": replace(image, sizes=tuple(s + 8 * (s == size) for s in image.sizes)),
        "a codebook of another": replace(image, pages=(replace(pages[0], book=pages[0].place), *pages[1:])),
        "out of range": replace(image, pages=(replace(pages[0], place=10_000), *pages[1:])),
    }
    for message, other in wrong.items():
        header = encode_header(other, owner, layouts)
        with pytest.raises(CorruptedError, match=message):
            decode_header(header, len(header) + other.nbytes, owner, layouts)
    header = encode_header(image, owner, layouts)
    assert decode_header(header, len(header) + image.nbytes, owner, layouts) == (image, len(header))
    with pytest.raises(CorruptedError, match="another's"):
        decode_header(header, len(header) + image.nbytes, owner_of("t", "a"), layouts)
    with pytest.raises(CorruptedError, match="with its own digest"):
        decode_header((100).to_bytes(8, "little") + b"x" * 100, 108, owner, layouts)


KILLED = """
import os, signal, sys
sys.path.append(sys.argv[1])
from pathlib import Path
import test_park, tiny
from qvg_paged import Tier, events
for number, point in enumerate(sys.argv[3:]):
    name, skip = point.split(":")
    if os.fork():
        os.wait()
        continue
    cache = test_park.tier_cache(Path(sys.argv[2]) / str(number))
    kept, stream = test_park.filled(cache, "kept", seed=30), test_park.filled(cache)
    kept.park(Tier.DISK)
    left = [int(skip)]
    def fire():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    events._armed[name] = fire
    stream.park(Tier.DISK)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_process_killed_at_any_write_leaves_whole_streams_and_nothing_else(tmp_path: Path) -> None:
    points = [
        "disk.open:0",
        "disk.write:0",
        "disk.write:1",
        "disk.sync:0",
        "disk.rename:0",
        "disk.published:0",
        "disk.none:0",
    ]
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", KILLED, here, str(tmp_path), *points], check=True, timeout=120)
    for number, point in enumerate(points):
        expected = filled(tier_cache(), "kept", seed=30), filled(tier_cache())
        folder = tmp_path / str(number)
        complete = point in ("disk.published:0", "disk.none:0")
        assert bool(list(folder.glob("*.unfinished"))) == (point in points[1:5])
        cache = tier_cache(folder)
        assert len(list(folder.iterdir())) == 1 + complete
        kept = cache.restore("kept")
        kept.resume()
        assert page_bytes(kept) == page_bytes(expected[0])
        if complete:
            stream = cache.restore("a")
            stream.resume()
            assert page_bytes(stream) == page_bytes(expected[1])
        else:
            with pytest.raises(ArgumentError):
                cache.restore("a")


def test_a_file_that_is_gone_is_an_error_and_the_stream_stays_parked(tmp_path: Path) -> None:
    cache = tier_cache(tmp_path)
    stream = filled(cache)
    stream.park(Tier.DISK)
    assert stream.parked is not None
    assert stream.parked.disk is not None
    stream.parked.disk.path.unlink()
    with pytest.raises(StorageError, match="resume: expected to read"):
        stream.resume()
    cache.check_integrity()
    stream.close()
    assert cache.disk is not None
    assert cache.disk.used_nbytes == 0
    (tmp_path / f"{owner_of('default', 'b')}.qvg.safetensors").mkdir()
    with pytest.raises(StorageError, match="restore: expected to read"):
        cache.restore("b")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="disk_path: expected a folder to write to"):
        tier_cache(blocked / "folder")


def test_a_file_that_was_cut_while_its_stream_was_away_is_an_error(tmp_path: Path) -> None:
    cache = tier_cache(tmp_path)
    stream = filled(cache)
    stream.park(Tier.DISK)
    assert stream.parked is not None
    assert stream.parked.disk is not None
    path = stream.parked.disk.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptedError, match="it ends before"):
        stream.resume()
    cache.check_integrity()


def test_pieces_that_are_smaller_than_pages_and_scattered_host_memory_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PIECE_NBYTES", 10_000)
    cache = tier_cache(tmp_path, host_memory=2 * _nbytes())
    streams = [filled(cache, name, frames=4, seed=seed) for name, seed in zip("abc", (0, 30, 60), strict=True)]
    large = filled(cache, "large", seed=90)
    before = page_bytes(large)
    for stream in streams:
        stream.park(Tier.HOST)
    streams[0].resume()
    streams[2].resume()
    large.park(Tier.HOST)
    assert large.parked is not None
    assert large.parked.host is not None
    assert len(large.parked.host) == 2
    large.park(Tier.DISK)
    cache.host.bytes_of(large.parked.host[1])[5] ^= 1
    assert large.resume() is Tier.DISK
    assert page_bytes(large) == before


def test_settings_of_the_tiers_are_checked(tmp_path: Path) -> None:
    for fields in ({"disk_path": tmp_path}, {"disk_memory": 5}):
        with pytest.raises(ConfigError, match="disk_path, disk_memory: expected both or neither"):
            CacheConfig(memory="1GiB", **fields)
    with pytest.raises(ConfigError):
        CacheConfig(memory="1GiB", host_memory=-5)
    assert CacheConfig(memory="1GiB", host_memory="2KiB").host_memory == 2048


@given(requests=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=40))
def test_host_memory_never_fragments_and_never_gives_a_byte_twice(requests: list[tuple[int, bool]]) -> None:
    arena, held = HostArena(100, pinned=False), list[list[Extent]]()
    for nbytes, back in requests:
        if back and held:
            arena.free(held.pop(nbytes % len(held)))
        elif nbytes > arena.nbytes - arena.used_nbytes:
            with pytest.raises(OutOfMemoryError, match="host memory exhausted"):
                arena.allocate(nbytes)
        else:
            held.append(arena.allocate(nbytes))
            assert sum(extent.nbytes for extent in held[-1]) == nbytes
        arena.check_integrity([extent for extents in held for extent in extents])
    if held and held[0]:
        for wrong in (held[0][:-1], [*held[0], held[0][0]]):
            rest = [extent for extents in held[1:] for extent in extents]
            with pytest.raises(IntegrityError):
                arena.check_integrity([*rest, *wrong])
    arena.used_nbytes += 1
    with pytest.raises(IntegrityError, match="counted as used"):
        arena.check_integrity([extent for extents in held for extent in extents])


@pytest.mark.parametrize("nbytes", [1, (1 << 20) - 1, 1 << 20, (1 << 22) + 5, 22_000_000_123])
def test_buffers_of_host_memory_are_not_rounded_up(nbytes: int) -> None:
    sizes = buffer_sizes(nbytes)
    assert sum(sizes) == nbytes
    assert sizes == sorted(sizes, reverse=True)
    assert all(
        size & (size - 1) == 0 or (index == len(sizes) - 1 and size < 1 << 20) for index, size in enumerate(sizes)
    )


def test_extents_keep_their_bytes_in_whichever_buffer_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LEAST_BUFFER", 8)
    arena = HostArena(100, pinned=False)  # 64, 32 and 4 bytes
    first, second = arena.allocate(60), arena.allocate(40)
    arena.free(first)
    third = arena.allocate(60)
    for value, extents in enumerate((second, third)):
        for extent in extents:
            arena.bytes_of(extent).fill_(value)
    for value, extents in enumerate((second, third)):
        assert [len(arena.bytes_of(extent)) for extent in extents] == [extent.nbytes for extent in extents]
        assert all((arena.bytes_of(extent) == value).all() for extent in extents)
    assert [extent.nbytes for extent in second] == [4, 32, 4]
    arena.check_integrity([*second, *third])


def test_host_memory_that_the_machine_does_not_have_is_out_of_memory() -> None:
    arena = HostArena(1 << 60, pinned=False)
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="lower host_memory"):
            arena.allocate(8)
    arena.check_integrity([])


def test_no_byte_of_a_tenant_reaches_another_through_any_tier(tmp_path: Path) -> None:
    """Streams of two tenants take turns in the same memory; every stream is full of its tenant's own pattern."""
    cache = tier_cache(tmp_path, format="dense", demote_to=None, free_fill=FreeFill.ZERO)
    model = cache.model
    shape = (model.tokens_per_frame, model.num_kv_heads, model.head_dim)
    patterns = {"t": 1.5, "u": -2.25}
    for turn in range(4):
        for tenant, value in patterns.items():
            stream = cache.open(f"{tenant}{turn}", tenant=tenant, window=Window(recent_frames=3))
            with stream.begin_chunk(1) as chunk:
                for page in chunk.reservation.scratch:
                    assert not cache.store.pool.bytes_of(page.slot).any(), "scratch of another's bytes"
                for layer in range(model.num_layers):
                    chunk.write(layer, torch.full(shape, value), torch.full(shape, value))
                chunk.commit()
            stream.park(Tier.HOST if turn % 2 else Tier.DISK)
        for tenant, value in patterns.items():
            stream = cache.streams[f"{tenant}{turn}"]
            stream.resume()
            assert {page.slot.tenant for page in stream.pages.values()} == {tenant}
            assert all((x == value).all() for layer in range(model.num_layers) for x in stream.read(layer))
            stream.close()
    assert Counter(cache.stats().tenant_nbytes) == Counter()


@pytest.mark.parametrize("staging", [0, 64, 200, 5000])
def test_short_runs_go_through_the_staging_buffer_and_arrive_where_they_belong(staging: int) -> None:
    pool = torch.randint(0, 256, (64 * 256,), dtype=torch.uint8)
    slots = [
        Slot(place, 256 * count, "t", place) for place, count in ((1, 1), (2, 2), (9, 1), (12, 20), (40, 1), (42, 1))
    ]
    runs, mover = Runs(slots), Mover(pool, torch.empty(staging * 256 // 64, dtype=torch.uint8) if staging else None)
    expected = torch.cat([pool[slot.id * 256 : slot.id * 256 + slot.nbytes] for slot in slots])
    assert runs.nbytes == expected.numel()
    for start, stop in ((0, runs.nbytes), (100, 3000), (300, 301), (5000, runs.nbytes)):
        piece = torch.zeros(stop - start, dtype=torch.uint8)
        mover.out(runs, start, piece)
        assert piece.equal(expected[start:stop])
    other = pool.clone()
    back = Mover(other, torch.empty(staging, dtype=torch.uint8) if staging else None)
    other.zero_()
    for start in range(0, runs.nbytes, 1000):
        back.into(runs, start, expected[start : start + 1000])
    for slot in slots:
        place = slice(slot.id * 256, slot.id * 256 + slot.nbytes)
        assert other[place].equal(pool[place])
        other[place] = 0
    assert not other.any()


def test_only_typed_errors_leave_the_tiers(tmp_path: Path) -> None:
    for error in (StorageError, CorruptedError, OutOfMemoryError):
        assert issubclass(error, QvgPagedError)
    with filled(tier_cache(tmp_path)).begin_chunk() as chunk:
        write(chunk, [1, 2, 3])
