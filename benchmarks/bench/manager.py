"""Rows of what the manager costs the host: begin, table upload, commit with eviction; a page in and out of the pool."""

import time
from collections.abc import Iterator

import torch

from bench.rows import Case, System
from bench.settings import Bench
from bench.timing import Clock, summary
from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, Stream, Window
from qvg_paged.fence import Fence
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.pool import SlabGeometry, SlabPool

__all__ = ["ALL", "BOOKKEEPING", "BOTH", "manager_cases"]

BEGIN, UPLOAD, COMMIT = "begin", "table upload", "commit and evict"
BOOKKEEPING, ALL = "begin, commit and evict", "all of it"
ALLOCATE, FREE, BOTH = "allocate a page", "free a page", "allocate and free a page"
HANDED_ON = "allocate and free a page, its slab handed on"
FRAMES, HISTORY, SPAN = 3, 48, 24
CHUNKS, QUICK_CHUNKS = 160, 24
POOL_PAGES, POOL_CYCLES = (24, 128), 200


def manager_cases(bench: Bench) -> Iterator[Case]:
    """Bookkeeping alone, the same with uploads to the device, and the pool by itself."""
    count = QUICK_CHUNKS if bench.options.quick or bench.is_small else CHUNKS
    about = {"frames": FRAMES, "history_frames": HISTORY, "span_frames": SPAN, "chunks": count}
    cpu = torch.device("cpu")
    yield Case(
        "manager", f"chunk of {FRAMES} frames, bookkeeping", {**about, "device": "cpu", "tokens_per_frame": 1},
        lambda: _chunk_systems(cpu, 1, count), BOOKKEEPING, ("bookkeeping",),
    )  # fmt: skip
    yield Case(
        "manager", f"chunk of {FRAMES} frames, with table upload",
        {**about, "device": bench.device.type, "tokens_per_frame": 64}, lambda: _chunk_systems(bench.device, 64, count),
        ALL, ("bookkeeping with table upload",),
    )  # fmt: skip
    for pages in POOL_PAGES:
        yield Case(
            "manager", f"pool, {pages} pages, per page", {"pages": pages, "device": "cpu"},
            lambda pages=pages: _pool_systems(pages), BOTH, (f"pool, {pages} pages",),
        )  # fmt: skip


def _chunk_systems(device: torch.device, tokens: int, count: int) -> Iterator[System]:
    """Tiny pages: what is measured is the host. Waits for the device (the check of a commit) are part of it."""
    model = ModelSpec(num_layers=1, num_kv_heads=1, head_dim=64, tokens_per_frame=tokens, frames_per_chunk=FRAMES)
    cache = KVCacheManager(model, CacheConfig(memory="64MiB", span_frames=SPAN, device=device))
    stream = cache.open("bench", window=Window(recent_frames=HISTORY))
    values = torch.randn(FRAMES * tokens, 1, 64, device=device).bfloat16()
    clock = Clock(device)
    for _ in range(2 * HISTORY // FRAMES):
        _chunk_times(stream, values, clock)
    times = [_chunk_times(stream, values, clock) for _ in range(count)]
    for place, name in enumerate((BEGIN, UPLOAD, COMMIT)):
        yield _measured(name, [row[place] for row in times])
    yield _measured(BOOKKEEPING, [begin + commit for begin, _, commit in times])
    yield _measured(ALL, [sum(row) for row in times])


def _chunk_times(stream: Stream, values: torch.Tensor, clock: Clock) -> tuple[float, float, float]:
    clock.synchronize()
    start = time.perf_counter()
    chunk = stream.begin_chunk()
    begun = time.perf_counter()
    assert chunk.table.groups
    uploaded = time.perf_counter()
    chunk.write(0, values, values)
    clock.synchronize()
    written = time.perf_counter()
    chunk.commit()
    return begun - start, uploaded - begun, time.perf_counter() - written


def _measured(name: str, seconds: list[float]) -> System:
    timing = summary([second * 1e3 for second in seconds])
    return System(name, lambda _: None, timing=timing, ours=True)


def _pool_systems(pages: int) -> Iterator[System]:
    """Pages as small as they get: overwriting them is part of it, but what is measured is the books."""
    device = torch.device("cpu")
    pool = SlabPool(SlabGeometry(GRANULE * 64, 64), [GRANULE], device)

    def cycle(*, hand_on: bool) -> tuple[float, float]:
        start = time.perf_counter()
        handles = pool.take(GRANULE, pages, "bench")
        taken = time.perf_counter()
        pool.give_back(GRANULE, handles, "bench", Fence.record(device))
        if hand_on:
            pool.reclaim(wait=True)
        return (taken - start) / pages, (time.perf_counter() - taken) / pages

    for hand_on in (False, True):
        times = [cycle(hand_on=hand_on) for _ in range(POOL_CYCLES)][1:]
        if not hand_on:
            yield _measured(ALLOCATE, [row[0] for row in times])
            yield _measured(FREE, [row[1] for row in times])
        yield _measured(HANDED_ON if hand_on else BOTH, [sum(row) for row in times])
