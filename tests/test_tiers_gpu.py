"""The ladder on a device: side streams, pinned memory, digests by the kernel."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvg_paged import (
    FORMATS,
    CacheConfig,
    CorruptedError,
    Grid,
    KVCacheManager,
    ModelSpec,
    Rung,
    Stream,
    Tier,
    Window,
)
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.digest import digest_bytes, digest_ranges

pytestmark = pytest.mark.gpu

MODEL = ModelSpec(num_layers=4, num_kv_heads=4, head_dim=128, tokens_per_frame=520, frames_per_chunk=3)
FINE = replace(FORMATS["qvg4-int2"].with_codecs(grid=Grid.INT4), name="fine")


def make(path: Path) -> tuple[KVCacheManager, Stream]:
    config = CacheConfig(
        memory="1GiB", format=FINE, demote_to="qvg4-int2", span_frames=6, device="cuda", host_memory="256MiB",
        disk_path=path, disk_memory="256MiB",
    )  # fmt: skip
    cache = KVCacheManager(MODEL, config)
    stream = cache.open("a", window=Window(recent_frames=18, bf16_recent=3))
    grow(stream, 15)
    return cache, stream


def grow(stream: Stream, frames: int) -> None:
    generator = torch.Generator("cuda").manual_seed(stream.committed)
    shape = (2, 3 * MODEL.tokens_per_frame, MODEL.num_kv_heads, MODEL.head_dim)
    for _ in range(0, frames, 3):
        with stream.begin_chunk() as chunk:
            for layer in range(MODEL.num_layers):
                k, v = torch.randn(shape, device="cuda", generator=generator).to(MODEL.dtype)
                chunk.attend(layer, k, k, v)
            chunk.commit()


@pytest.mark.parametrize("tier", Tier)
def test_bytes_come_back_to_the_device_as_they_left(tier: Tier, tmp_path: Path) -> None:
    cache, stream = make(tmp_path)
    stream.demote(Rung.SPANS)
    before = stream.digests()
    for prefetched in (False, True):
        stream.park(tier)
        assert cache.stats().used_nbytes == 0
        if prefetched:
            stream.prefetch_resume()
        assert stream.resume() is tier
        assert stream.digests() == before
    grow(stream, 3)
    cache.check_integrity()


def test_a_prefetch_runs_beside_chunks_of_other_streams(tmp_path: Path) -> None:
    cache, stream = make(tmp_path)
    other = cache.open("b", window=Window(recent_frames=12))
    before = stream.digests()
    for _ in range(4):
        stream.park()
        stream.prefetch_resume()
        grow(other, 3)
        stream.resume()
        assert stream.digests() == before
    cache.check_integrity()


def test_a_damaged_copy_is_found_on_the_device_and_the_other_taken(tmp_path: Path) -> None:
    cache, stream = make(tmp_path)
    before = stream.digests()
    stream.park()
    stream.park(Tier.DISK)
    assert stream.parked is not None
    assert stream.parked.host is not None
    cache.host.bytes_of(stream.parked.host[0])[99_999] ^= 1
    assert stream.resume() is Tier.DISK
    assert stream.digests() == before
    stream.park(Tier.DISK)
    assert stream.parked.disk is not None
    path = stream.parked.disk.path
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)
    with pytest.raises(CorruptedError):
        stream.resume()


def test_the_pool_shrinks_with_its_streams_in_place(tmp_path: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()  # a pool that is cut from what PyTorch kept of another test goes back with all of that
    cache, stream = make(tmp_path)
    torch.cuda.empty_cache()
    before, reserved = stream.digests(), torch.cuda.memory_reserved()
    returned = cache.shrink(cache.pool_nbytes // 2)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - returned + (4 << 20)
    assert stream.digests() == before
    assert cache.grow(returned) == returned
    grow(stream, 3)
    cache.check_integrity()


def test_digests_of_the_kernel_are_those_of_pytorch() -> None:
    buffer = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, device="cuda")
    starts, sizes = [0, 256, 1 << 20], [64 << 20, 256, 3 << 20]
    expected = [digest_bytes(buffer, start, size) for start, size in zip(starts, sizes, strict=True)]
    assert digest_ranges(buffer, starts, sizes) == expected
    assert digest_ranges(buffer, starts, sizes, backend=Backend.TORCH) == expected
