"""Compiling ahead: it runs what a manager would, and leaves nothing behind."""

import pytest
import torch

from qvg_paged import (
    AttentionPath,
    CacheConfig,
    ConfigError,
    KVCacheManager,
    ModelSpec,
    RoPESpec,
    Rung,
    Window,
    warm_up,
)
from qvg_paged import warmup as module

MODEL = ModelSpec(
    num_layers=3, num_kv_heads=2, head_dim=64, tokens_per_frame=64, frames_per_chunk=3, rope="on_read",
    rope_spec=RoPESpec(head_dim=64, grid=(8, 8)),
)  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("fmt", "demote_to"), [("qvg4-int2", None), ("qvg-int4", "qvg-int2"), ("dense", None)])
def test_it_commits_attends_and_reads_without_events_of_the_real_config(
    fmt: str, demote_to: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[KVCacheManager] = []

    def manager(model: ModelSpec, config: CacheConfig) -> KVCacheManager:
        made.append(KVCacheManager(model, config))
        return made[-1]

    monkeypatch.setattr(module, "KVCacheManager", manager)
    config = CacheConfig(
        memory="64MiB", format=fmt, demote_to=demote_to, span_frames=8, on_event=lambda _: pytest.fail("an event")
    )
    assert warm_up(MODEL, config) > 0
    assert all(cache.model.num_layers == 1 for cache in made)
    assert {cache.config.path for cache in made} == {AttentionPath.STAGED}
    quantised = [stats.quantised_frames for cache in made for stats in cache.stats().streams.values()]
    assert all((frames > 0) is (fmt != "dense") for frames in quantised)
    assert len({cache.budget.staging for cache in made}) == 2
    if demote_to:
        assert {cache.streams["warm-up-0"].rung for cache in made} == {Rung.SPANS}


def test_memory_that_holds_no_chunk_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match="memory: expected at least"):
        warm_up(MODEL, CacheConfig(memory="1MiB", span_frames=8))


@pytest.mark.gpu
def test_nothing_is_compiled_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs  # noqa: PLC0415 - only where triton is

    config = CacheConfig(memory="256MiB", span_frames=8, device="cuda")
    warm_up(MODEL, config)
    compiled: list[str] = []

    def compiling(*_: object, **kwargs: object) -> None:
        compiled.append(str(kwargs.get("repr")))

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", compiling)
    cache = KVCacheManager(MODEL, config)
    stream = cache.open("a", window=Window(sink_frames=1, recent_frames=20))
    q, k, v = torch.randn(3, 3 * 64, 2, 64, device="cuda").bfloat16()
    for _ in range(12):
        with stream.begin_chunk() as chunk:
            for layer in range(MODEL.num_layers):
                chunk.attend(layer, q, k, v)
            chunk.commit()
    assert compiled == []
