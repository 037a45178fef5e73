"""Compile ahead: the first chunk of a process should not wait for kernels."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch

from qvg_paged.budget import Budget, estimate, least_staging, page_layouts
from qvg_paged.config import CacheConfig, ModelSpec, Rung, Window
from qvg_paged.errors import ConfigError
from qvg_paged.kernels.attention import AttentionPath
from qvg_paged.kernels.partials import run_merges
from qvg_paged.ladder import deepest_rung
from qvg_paged.manager import KVCacheManager
from qvg_paged.stream import Stream

__all__ = ["warm_up"]

STREAMS = 2
LEAST_MEMORY = 64 << 20


def warm_up(model: ModelSpec, config: CacheConfig) -> float:
    """Run once what a manager of `model` and `config` launches: encode, every path it may choose, merge, demote, read.

    Two streams fill a span in managers of their own with one layer of the model, on the current CUDA stream; their
    memory goes back to PyTorch. Call it once per process before the first chunk. What Triton compiles it also keeps on
    disk (``TRITON_CACHE_DIR``), where the next process finds it.

    Returns:
        Seconds it took.

    Raises:
        ConfigError: `config` cannot hold one chunk of `model`.
        torch.OutOfMemoryError: the device has no room for a span of one layer beside what is there.
    """
    start = time.perf_counter()
    staging = Budget.split(model, config).staging
    least = least_staging(model, page_layouts(model, config))
    one_layer = replace(model, num_layers=1)
    window = Window(recent_frames=config.span_frames + model.frames_per_chunk)
    for path in _paths(model, config):
        for nbytes, together in ((staging, STREAMS), (least, 1)):  # little staging makes slices merge
            quiet = replace(config, path=path, staging=nbytes, on_event=None, disk_path=None, disk_memory=0)
            _run(one_layer, _sized(one_layer, quiet, window), window, together)
    run_merges(model.head_dim, model.dtype, torch.device(cast(torch.device, config.device)))
    if torch.device(cast(torch.device, config.device)).type == "cuda":
        torch.cuda.synchronize(cast(torch.device, config.device))
    return time.perf_counter() - start


def _paths(model: ModelSpec, config: CacheConfig) -> Iterator[AttentionPath]:
    """The path asked for, or all that `AUTO` may take on the device."""
    if config.path is not AttentionPath.AUTO:
        yield cast(AttentionPath, config.path)
        return
    yield AttentionPath.STAGED
    if cast(torch.device, config.device).type == "cuda" and model.dtype is not torch.float32:
        yield AttentionPath.DIRECT
        if config.allow_fp8:
            yield AttentionPath.STAGED_FP8


def _sized(model: ModelSpec, config: CacheConfig, window: Window) -> CacheConfig:
    """`config` with just the memory for the streams."""
    memory = LEAST_MEMORY
    while True:
        sized = replace(config, memory=memory)
        try:
            if estimate(model, sized, window).streams >= STREAMS:
                return sized
        except ConfigError:
            pass
        memory *= 2


def _run(model: ModelSpec, config: CacheConfig, window: Window, together: int) -> None:
    cache = KVCacheManager(model, config)
    streams = [cache.open(f"warm-up-{number}", window=window) for number in range(STREAMS)]
    for stream in streams:
        while stream.committed < config.span_frames:
            _write_chunk(cache, stream)
    for frames in {1, model.frames_per_chunk}:
        _attend(cache, streams, frames, together)
    lowest = deepest_rung(cache.config, streams[0].quality_floor)
    if lowest > Rung.NONE:
        cache.demote(streams[:1], lowest)
        _attend(cache, streams, 1, together)
    streams[0].read(0, list(streams[0].pages)[:1])


def _attend(cache: KVCacheManager, streams: Sequence[Stream], frames: int, together: int) -> None:
    chunks = cache.begin_chunks(streams, frames)
    for some in (*([chunk] for chunk in chunks), chunks[:together]):
        q, k, v = _tensors(cache, sum(chunk.num_tokens for chunk in some))
        for _ in range(2):  # the second call decodes ahead for a third
            cache.attend(0, some, q, k, v)
    cache.commit(chunks)


def _write_chunk(cache: KVCacheManager, stream: Stream) -> None:
    with stream.begin_chunk() as chunk:
        _, k, v = _tensors(cache, chunk.num_tokens)
        chunk.write(0, k, v)
        chunk.commit()


def _tensors(cache: KVCacheManager, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values."""
    model = cache.model
    q, k, v = (
        torch.randn(tokens, heads, model.head_dim, dtype=model.dtype, device=cache.device)
        for heads in (model.query_heads, model.num_kv_heads, model.num_kv_heads)
    )
    return q, k, v
