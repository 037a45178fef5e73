"""The staged path on a GPU: decoding ahead across layers changes no bit, and lengths compile nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from attention_case import LAYER, Case, build_case

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, RoPESpec, Window
from qvg_paged.kernels import AttentionPath, BlockTable, Lookahead, paged_attention
from qvg_paged.kernels.formats import FORMATS
from qvg_paged.kernels.partials import run_merges

pytestmark = pytest.mark.gpu

OURS = FORMATS["qvg4-int2"].with_codecs(num_centroids=16)
DENSE = FORMATS["dense"]
STAGED = [AttentionPath.STAGED, AttentionPath.STAGED_FP8]
MODEL = ModelSpec(
    num_layers=4, num_kv_heads=4, head_dim=128, tokens_per_frame=192, frames_per_chunk=2, rope="on_read",
    rope_spec=RoPESpec(head_dim=128, grid=(12, 16)),
)  # fmt: skip


@contextmanager
def compilations() -> Iterator[list[str]]:
    from triton import knobs  # noqa: PLC0415 - only where triton is

    made: list[str] = []

    def compiling(*_: object, **kwargs: object) -> None:
        made.append(str(kwargs.get("repr")))

    before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, compiling
    try:
        yield made
    finally:
        knobs.runtime.jit_post_compile_hook = before


def first_pages(case: Case, count: int) -> BlockTable:
    some = slice(0, count)
    return BlockTable(
        pages=case.table.pages[some], codebooks=case.table.codebooks[some], formats=case.table.formats[some],
        positions=case.table.positions[some], indptr=(0, count), device=case.table.device,
    )  # fmt: skip


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("path", [*STAGED, AttentionPath.DIRECT])
def test_fifty_lengths_compile_nothing_new(path: AttentionPath, rotates: bool) -> None:
    rope = RoPESpec(head_dim=128, grid=(12, 25)) if rotates else None
    case = build_case([DENSE, OURS], [[0] + [1] * 50], tokens=300, head_dim=128, dtype=torch.bfloat16, rope=rope,
                      device="cuda")  # fmt: skip
    workspace = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")

    def attend(pages: int, queries: int) -> None:
        q = torch.randn(queries, 2, 128, dtype=torch.bfloat16, device="cuda")
        paged_attention(
            q, case.buffer, first_pages(case, pages), case.layouts, LAYER, cu_seqlens_q=[0, queries], rope=rope,
            path=path, workspace=workspace,
        )  # fmt: skip

    run_merges(128, torch.bfloat16, torch.device("cuda"))
    for queries in (600, 900):
        attend(30, queries)
    with compilations() as made:
        for pages in range(2, 52):
            attend(pages, 600 + 6 * pages)
    assert made == []


@pytest.mark.parametrize("path", STAGED)
def test_decoding_ahead_for_the_next_layer_changes_no_bit(path: AttentionPath) -> None:
    model = ModelSpec(num_layers=3, num_kv_heads=2, head_dim=128, tokens_per_frame=300, frames_per_chunk=1)
    cache = KVCacheManager(model, CacheConfig(memory="256MiB", span_frames=4, device="cuda", path=path))
    stream = cache.open("a", window=Window(recent_frames=16))
    while stream.committed < 16:
        with stream.begin_chunk() as chunk:
            for layer in range(3):
                k, v = torch.randn(2, 300, 2, 128, dtype=torch.bfloat16, device="cuda")
                chunk.write(layer, k, v)
            chunk.commit()
    q = torch.randn(600, 2, 128, dtype=torch.bfloat16, device="cuda")
    chunk = stream.begin_chunk()
    for layer in range(3):
        k, v = torch.randn(2, 300, 2, 128, dtype=torch.bfloat16, device="cuda")
        chunk.write(layer, k, v)
    table = chunk.table
    buffer, workspace = cache._pool.buffer, torch.empty(8 << 20, dtype=torch.uint8, device="cuda")

    def attend(layer: int, lookahead: Lookahead) -> torch.Tensor:
        out, _ = paged_attention(
            q, buffer, table, cache.layouts, layer, cu_seqlens_q=[0, 600], path=path, workspace=workspace,
            lookahead=lookahead,
        )  # fmt: skip
        return out

    alone = []
    for layer in range(3):
        lookahead = Lookahead()
        alone.append(attend(layer, lookahead))
        lookahead.settle()
        workspace.fill_(0xFF)
    kept = Lookahead()
    for layer in [0, 1, 2, 0, 1, 2, 0, 2, 1, 1, 2, 0, 1, 0]:
        assert torch.equal(attend(layer, kept), alone[layer])
    kept.settle()


@pytest.mark.parametrize("path", STAGED)
def test_a_manager_that_decodes_ahead_generates_what_one_that_does_not_generates(path: AttentionPath) -> None:
    def generated(ahead: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = CacheConfig(memory="256MiB", span_frames=4, device="cuda", path=path)
        cache = KVCacheManager(MODEL, config)
        cache._lock.lookahead._captured = not ahead
        streams = [cache.open(name, window=Window(sink_frames=1, recent_frames=12)) for name in "ab"]
        outs = []
        for number in range(10):
            chunks = cache.begin_chunks(streams)
            for step in range(2):
                for some in ([[chunk] for chunk in chunks] if number % 2 else [chunks]):
                    for layer in range(MODEL.num_layers):
                        size = sum(chunk.num_tokens for chunk in some), 4, 128
                        q, k, v = torch.randn(3, *size, dtype=torch.bfloat16, device="cuda")
                        outs.append(cache.attend(layer, some, q, k, v))
                    if number == 5 and step == 0:
                        cache.abort(chunks.pop())
                        break
            cache.commit(chunks)
        torch.cuda.synchronize()
        return outs

    for one, other in zip(generated(True), generated(False), strict=True):
        assert torch.equal(one, other)
