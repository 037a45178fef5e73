"""What a chunk costs, for `make bench-tests`; `make test` runs each once, untimed.

Geometry of the shipped world model: 12 layers, 3 heads of 128 channels, 64 tokens a frame, 8 frames a span.
"""

from typing import Any

import pytest
import torch

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, RoPESpec, Stream, Window

LAYERS, HEADS, DIM, TOKENS, SPAN = 12, 3, 128, 64, 8


@pytest.fixture
def stream() -> Stream:
    """A stream whose history fills its window of 40 frames, the newest span about to close."""
    model = ModelSpec(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        tokens_per_frame=TOKENS,
        frames_per_chunk=1,
        rope="on_read",
        rope_spec=RoPESpec(head_dim=DIM, grid=(8, 8)),
    )
    cache = KVCacheManager(model, CacheConfig(memory="64MiB", span_frames=SPAN))
    opened = cache.open("bench", window=Window(recent_frames=40))
    for _ in range(6 * SPAN - 1):
        commit_frame(opened)
    return opened


def commit_frame(stream: Stream) -> None:
    k, v = torch.randn(2, TOKENS, HEADS, DIM).bfloat16()
    with stream.begin_chunk() as chunk:
        for layer in range(LAYERS):
            chunk.write(layer, k, v)
        chunk.commit()


def test_attending_to_a_quantised_history(benchmark: Any, stream: Stream) -> None:
    q = torch.randn(TOKENS, HEADS, DIM)
    k = v = q.bfloat16()
    with stream.begin_chunk() as chunk:
        out = benchmark(chunk.attend, 0, q, k, v)
    assert out.isfinite().all()


def test_beginning_and_aborting_a_chunk(benchmark: Any, stream: Stream) -> None:
    before = stream.digests()
    benchmark(lambda: stream.begin_chunk().abort())
    assert stream.digests() == before


def test_committing_frames_with_spans_that_close_and_frames_that_leave(benchmark: Any, stream: Stream) -> None:
    committed = stream.committed
    benchmark.pedantic(commit_frame, args=(stream,), rounds=2 * SPAN)
    assert stream.committed > committed
    assert len(stream.pages) == 40
    stream.manager.check_integrity()
