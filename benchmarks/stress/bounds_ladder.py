"""Streams that stay on the device on the lowest rung, against unquantised ones and 2-bit ones without ladder."""

from dataclasses import replace

from qvg_paged.budget import object_counts, stream_timeline
from qvg_paged.config import CacheConfig, Rung
from qvg_paged.ladder import squeeze
from qvg_paged.timeline import Demand, Timeline
from stress.bounds import Row
from stress.models import MODELS, Geometry, StaticCache

__all__ = ["ladder"]

POOL = 120 << 30
"""Of a GPU with 141 GB that holds the model besides."""


def _fit(cache: StaticCache, need: Demand) -> int:
    """How often a demand fits the pool."""
    count = 0
    while cache.slabs.slabs_for(object_counts(cache.layouts, need * (count + 1))) <= cache.slabs.num_slabs:
        count += 1
    return count


def _steady(timeline: Timeline, chunk: int) -> Demand:
    """Most that a stream ever has with an open chunk."""
    return timeline.worst_demand(chunk, None)


def streams(geometry: Geometry, pool: int = POOL) -> tuple[int, int, int]:
    """Streams that fit for ever, chunks open: unquantised, in 2 bits, and on the ladder's lowest rung."""
    model, window = geometry.model, geometry.window
    cache = StaticCache(geometry, pool)
    dense = StaticCache(geometry, pool, format="dense")
    chunk = model.frames_per_chunk
    config: CacheConfig = replace(cache.config, demote_to=cache.config.format)
    static = stream_timeline(cache.config, window)
    lowest = squeeze(stream_timeline(config, window), Rung.TAIL, 0, model)
    return (
        _fit(dense, Timeline(window, None).worst_demand(chunk, None)),
        _fit(cache, _steady(static, chunk)),
        _fit(cache, _steady(lowest, chunk)),
    )


def ladder() -> list[Row]:
    """Rows for Self-Forcing and LingBot-v2."""
    rows = []
    for name, heads in (("self-forcing", 12), ("lingbot-v2", 5)):  # LingBot's 40 heads are sharded over 8 ranks
        geometry = replace(MODELS[name], model=replace(MODELS[name].model, num_kv_heads=heads))
        dense, static, lowest = streams(geometry)
        text = (
            f"{POOL >> 30} GiB pool: {dense} streams unquantised, {static} in qvg4-int2 with dense tails, {lowest} "
            "without (rung TAIL: frames are quantised a chunk at a time); scratch of every open chunk counted"
        )
        for bound, base, what in ((3.0, dense, "unquantised"), (1.3, static, "2-bit without ladder")):
            ratio = lowest / base if base else float("inf")
            rows.append(
                Row(f"ladder, {name}: streams by {what}", f">= {bound}x", f"{ratio:.2f}x", ratio >= bound, text)
            )
    return rows
