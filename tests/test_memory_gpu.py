"""The manager's promise about memory, held against the CUDA allocator itself."""

import pytest
import torch

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, RoPESpec, Window

pytestmark = pytest.mark.gpu

LAYERS, HEADS, DIM, GRID, CHUNK, SPAN = 4, 12, 128, (30, 52), 3, 6


@pytest.mark.parametrize("fmt", ["qvg4-int2", "qvg-int2", "dense"])
@pytest.mark.parametrize("path", ["staged", "staged-fp8", "direct"])
def test_the_allocator_never_sees_more_than_the_budget(fmt: str, path: str) -> None:
    """A Wan-sized chunk loop, spans closing and frames leaving the window, outputs of attention counted as well."""
    tokens = GRID[0] * GRID[1]
    model = ModelSpec(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        tokens_per_frame=tokens,
        frames_per_chunk=CHUNK,
        rope="on_read",
        rope_spec=RoPESpec(head_dim=DIM, grid=GRID),
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(CHUNK * tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.synchronize()
    baseline = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = CacheConfig(memory="3GiB", format=fmt, span_frames=SPAN, device="cuda", path=path)
    cache = KVCacheManager(model, config)
    streams = [cache.open(f"s{i}", window=Window(sink_frames=2, recent_frames=12)) for i in range(2)]
    for _ in range(7):
        chunks = cache.begin_chunks(streams)
        for layer in range(LAYERS):
            for chunk in chunks:
                out = chunk.attend(layer, q, k, v)
                assert out.isfinite().all()
                del out
        for chunk in chunks:
            chunk.commit()
    torch.cuda.synchronize()
    cache.check_integrity()
    peak = torch.cuda.max_memory_allocated() - baseline
    assert peak <= 3 << 30, f"peak {peak}, budget {3 << 30}, split {cache.budget}"
    assert cache.budget.pool >= 0.8 * (3 << 30), f"pool is {cache.budget.pool} of {3 << 30}"
    assert cache.stats().peak_total_nbytes <= 3 << 30
