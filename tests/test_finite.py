"""The check of a commit: every NaN and infinity is found, and no number is taken for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from tiny import WINDOW, make_cache, make_model, write

from qvg_paged import CacheConfig, Chunk, FreeFill, KVCacheManager
from qvg_paged.config import ModelSpec
from qvg_paged.finite import FiniteCheck
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.finite import FiniteFlags

pytest.importorskip("triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = (Backend.TORCH, Backend.TRITON)


def check_of(cache: KVCacheManager, backend: Backend) -> FiniteCheck:
    return FiniteCheck(cache.store.pool, cache.layouts[0], cache.model.dtype, backend)


def values_of(cache: KVCacheManager, chunk: Chunk, frame: int) -> torch.Tensor:
    pool, page = cache.store.pool, chunk.reservation.scratch[frame]
    return pool.bytes_of(page.slot).view(cache.model.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, backend: Backend) -> None:
    cache = make_cache(model=make_model(dtype=dtype))
    check = check_of(cache, backend)
    with cache.open("a", window=WINDOW).begin_chunk() as chunk:
        count = cache.layouts[0].page_nbytes // dtype.itemsize
        for frame, place, number in product((0, 2), (0, 1, count // 2 + 1, count - 1), ("inf", "-inf", "nan")):
            values = values_of(cache, chunk, frame)
            values[place] = float(number)
            assert check.broken([chunk]) == [chunk], (frame, place, number)
            values[place] = 0
            assert check.broken([chunk]) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(dtype: torch.dtype, backend: Backend) -> None:
    cache = make_cache(model=make_model(dtype=dtype))
    with cache.open("a", window=WINDOW).begin_chunk() as chunk:
        for sign in (1, -1):
            values_of(cache, chunk, 1).fill_(sign * torch.finfo(dtype).max)
            assert check_of(cache, backend).broken([chunk]) == []
        values_of(cache, chunk, 1).fill_(torch.finfo(dtype).tiny)
        assert check_of(cache, backend).broken([chunk]) == []


@pytest.mark.parametrize("fill", FreeFill)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_chunks_that_hold_it_are_named_and_nobodys_bytes_do_not_count(backend: Backend, fill: FreeFill) -> None:
    """Pages that end in the middle of a granule, slabs with a rest, both of which may hold anything."""
    model = ModelSpec(num_layers=1, num_kv_heads=1, head_dim=64, tokens_per_frame=65, frames_per_chunk=3)
    cache = KVCacheManager(model, CacheConfig(memory="64MiB", span_frames=8, free_fill=fill, device="cpu"))
    check = check_of(cache, backend)
    streams = [cache.open(name, window=WINDOW) for name in "abcd"]
    chunks = cache.begin_chunks(streams)
    for chunk in chunks:
        chunk.write(0, *torch.ones(2, 195, 1, 64).bfloat16())
    assert check.broken(chunks) == []
    values_of(cache, chunks[1], 2)[7] = float("nan")
    values_of(cache, chunks[3], 0)[0] = float("inf")
    for _ in range(2):
        assert check.broken(chunks) == [chunks[1], chunks[3]]
    assert check.broken(chunks[:1]) == []


def test_more_chunks_than_flags_are_checked_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvg_paged.finite.FLAGS", 2)
    cache = make_cache()
    check = check_of(cache, Backend.TRITON)
    chunks = cache.begin_chunks([cache.open(name, window=WINDOW) for name in "abcde"])
    for chunk in chunks:
        write(chunk, [1, 2, 3])
    for chunk in (chunks[1], chunks[4]):
        values_of(cache, chunk, 0)[0] = float("nan")
    assert check.broken(chunks) == [chunks[1], chunks[4]]


def test_launches_are_repeated_until_the_pools_memory_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    pool, check = cache.store.pool, check_of(cache, Backend.TRITON)
    with cache.open("a", window=WINDOW).begin_chunk(1) as chunk:
        assert check.broken([chunk]) == []
        kept = dict(pool.made)
        assert kept
        assert check.broken([chunk]) == []
        assert pool.made == kept
        chunk.abort()
    pool.resize(pool.num_slabs - 1)
    assert not pool.made
    with cache.open("b", window=WINDOW).begin_chunk(1) as chunk:
        values_of(cache, chunk, 0)[3] = float("inf")
        assert check.broken([chunk]) == [chunk]
        monkeypatch.setattr("qvg_paged.kernels.finite.KEPT", 1)
        values_of(cache, chunk, 0)[3] = 0
        assert check.broken([chunk]) == []


def test_a_check_that_fails_halfway_leaves_nothing_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    check = check_of(cache, Backend.TRITON)
    chunks = cache.begin_chunks([cache.open(name, window=WINDOW) for name in "ab"])
    values = values_of(cache, chunks[0], 0)
    values[0] = float("nan")
    look = FiniteFlags.look

    def fail_at_the_second(flags: FiniteFlags, start: int, stop: int, number: int) -> None:
        if number:
            raise RuntimeError("launch")
        look(flags, start, stop, number)

    with monkeypatch.context() as broken:
        broken.setattr(FiniteFlags, "look", fail_at_the_second)
        with pytest.raises(RuntimeError, match="launch"):
            check.broken(chunks)
    values[0] = 0
    assert check.broken(chunks) == []


def test_two_checks_of_a_pool_do_not_set_each_others_flags() -> None:
    cache = make_cache()
    one, other = check_of(cache, Backend.TRITON), check_of(cache, Backend.TRITON)
    with cache.open("a", window=WINDOW).begin_chunk(1) as chunk:
        assert one.broken([chunk]) == []
        values_of(cache, chunk, 0)[0] = float("nan")
        assert other.broken([chunk]) == [chunk]
        values_of(cache, chunk, 0)[0] = 0
        assert one.broken([chunk]) == []


def test_kernels_are_launched_on_the_pools_device_whatever_the_current_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    check, scopes = check_of(cache, Backend.TRITON), list[torch.device]()

    @contextmanager
    def scope(device: torch.device) -> Iterator[None]:
        scopes.append(device)
        yield
        scopes.pop()

    def look(*_: object) -> None:
        assert scopes == [cache.device]

    monkeypatch.setattr("qvg_paged.finite.kernel_scope", scope)
    monkeypatch.setattr(FiniteFlags, "look", look)
    with cache.open("a", window=WINDOW).begin_chunk() as chunk:
        assert check.broken([chunk]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_finds_a_single_number_in_long_stretches(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype, num_kv_heads=3, head_dim=128, tokens_per_frame=1560)
    cache = make_cache(pool=320 << 20, model=model, device="cuda", staging="64MiB")
    check = cache.finite
    chunks = cache.begin_chunks([cache.open(name, window=WINDOW) for name in "ab"])
    for chunk in chunks:
        for layer in range(model.num_layers):
            chunk.write(layer, *torch.randn(2, 4680, 3, 128, device="cuda").to(dtype))
    assert check.broken(chunks) == []
    count = cache.layouts[0].page_nbytes // dtype.itemsize
    for frame, place in product((0, 2), (0, 1, count // 3, count - 1)):
        values = values_of(cache, chunks[1], frame)
        before = values[place].clone()
        values[place] = float("nan")
        assert check.broken(chunks) == [chunks[1]]
        values[place] = before
        assert check.broken(chunks) == []
