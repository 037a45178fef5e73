"""The smallest engine: streams share one pool, admission keeps it from running out, random tensors are the model."""

import time

import torch

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, Window
from qvg_paged.scheduler import Outcome, Scheduler, StreamRequest

model = ModelSpec(num_layers=4, num_kv_heads=2, head_dim=64, tokens_per_frame=64, frames_per_chunk=3)
cache = KVCacheManager(model, CacheConfig(memory="32MiB", format="qvg4-int2", span_frames=6))
scheduler = Scheduler(cache)
window = Window(sink_frames=1, recent_frames=12)
for name in ("shot-1", "shot-2"):
    print(scheduler.submit(StreamRequest(name, "studio", frames=24, window=window)).text)


def generate(stream_id: str, frames: int) -> int:
    """One chunk of a stream: three noisy passes, a clean one, commit. An error aborts it."""
    with cache.streams[stream_id].begin_chunk(frames) as chunk:
        for _ in range(4):
            for layer in range(model.num_layers):
                q, k, v = torch.randn(3, chunk.num_tokens, model.num_kv_heads, model.head_dim, dtype=model.dtype)
                chunk.attend(layer, q, k, v)
        chunk.commit()
    return frames


while scheduler.busy:
    plan = scheduler.step(time.monotonic())
    for done in plan.finished:
        print(done.stream_id, done.text, cache.stats().streams[done.stream_id])
        cache.streams[done.stream_id].close()
    for new in plan.admitted:
        cache.open(new.stream_id, tenant="studio", window=window)
    scheduler.update(plan, Outcome({run.stream_id: generate(run.stream_id, len(run.frames)) for run in plan.running}))
cache.check_integrity()
