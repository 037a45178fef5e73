"""The smallest asyncio engine: two viewers read their streams as they come, a third hangs up after two chunks."""

import asyncio
from collections.abc import Mapping

import torch

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, Window
from qvg_paged.scheduler import AsyncScheduler, Scheduler, StreamRequest

MODEL = ModelSpec(num_layers=4, num_kv_heads=2, head_dim=64, tokens_per_frame=64, frames_per_chunk=3)


class Engine:
    """Random tensors are the model. The driver calls it from one thread, one method at a time.

    Over this cache nobody is parked or squeezed, so it has no methods for that.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self.cache = cache

    def open(self, request: StreamRequest) -> None:
        """A stream was admitted."""
        self.cache.open(request.id, tenant=request.tenant, window=request.window)

    def generate(self, chunks: Mapping[str, range]) -> Mapping[str, torch.Tensor | Exception]:
        """A chunk of each stream; what goes wrong with one is that stream's own affair."""
        made: dict[str, torch.Tensor | Exception] = {}
        for stream_id, frames in chunks.items():
            try:
                made[stream_id] = self._generate(stream_id, len(frames))
            except Exception as error:
                made[stream_id] = error
        return made

    def _generate(self, stream_id: str, frames: int) -> torch.Tensor:
        with self.cache.streams[stream_id].begin_chunk(frames) as chunk:
            for _ in range(4):
                for layer in range(MODEL.num_layers):
                    q, k, v = torch.randn(3, chunk.num_tokens, MODEL.num_kv_heads, MODEL.head_dim, dtype=MODEL.dtype)
                    out = chunk.attend(layer, q, k, v)
            chunk.commit()
        return out

    def close(self, stream_id: str) -> None:
        """The stream is over."""
        self.cache.streams[stream_id].close()


async def watch(driver: AsyncScheduler[torch.Tensor], name: str, patience: int) -> None:
    """Read a stream's chunks; leaving the block early cancels it."""
    request = StreamRequest(name, "studio", frames=24, window=Window(sink_frames=1, recent_frames=12))
    async with driver.submit(request) as stream:
        shapes = []
        async for chunk in stream:
            shapes.append(list(chunk.shape))
            if len(shapes) == patience:
                break
    print(name, len(shapes), "chunks of", shapes[-1], stream.why.text)


async def main(cache: KVCacheManager) -> None:
    """Three viewers at once."""
    async with AsyncScheduler(Scheduler(cache), Engine(cache)) as driver:
        await asyncio.gather(watch(driver, "shot-1", 100), watch(driver, "shot-2", 100), watch(driver, "shot-3", 2))


cache = KVCacheManager(MODEL, CacheConfig(memory="48MiB", format="qvg4-int2", span_frames=6))
asyncio.run(main(cache))
cache.check_integrity()
