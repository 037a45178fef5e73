"""How a manager's bytes are split, and what a stream costs."""

from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch

from qvg_paged.config import CacheConfig, ModelSpec, Window
from qvg_paged.errors import ConfigError
from qvg_paged.kernels.attention import attention_workspace_nbytes
from qvg_paged.kernels.encode import encode_workspace_nbytes
from qvg_paged.kernels.formats import DENSE, PageFormat
from qvg_paged.kernels.layout import GRANULE, PageLayout, align
from qvg_paged.kernels.requantise import requantise_workspace_nbytes
from qvg_paged.kernels.rope import RoPELayout
from qvg_paged.pool import SlabGeometry
from qvg_paged.timeline import Demand, Timeline

__all__ = ["Budget", "Estimate", "demotion_reserve", "estimate", "least_demand", "least_staging", "page_layouts"]

STAGING_SHARE = 16
MAX_DEFAULT_STAGING = 256 << 20
STAGING_CHANNELS = 12 * 128
"""KV channels of a token (heads times head_dim) for which `MAX_DEFAULT_STAGING` is meant; wider models get more."""
OVERHEAD_SHARE = 64
MIN_OVERHEAD = 512 << 10


def page_layouts(model: ModelSpec, config: CacheConfig) -> tuple[PageLayout, ...]:
    """Layouts of unquantised pages (index 0), unless the format is dense of quantised ones (1), of demoted ones (2)."""
    fmt = cast(PageFormat, config.format)

    def layout(page_format: PageFormat) -> PageLayout:
        return PageLayout.build(
            page_format,
            num_layers=model.num_layers,
            tokens=model.tokens_per_frame,
            heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            span_tokens=config.span_frames * model.tokens_per_frame,
            split_pairs=model.read_rope is not None and model.key_pairing is RoPELayout.INTERLEAVED,
            key_pairing=model.key_pairing,
        )

    formats = [DENSE] if fmt.is_dense else [DENSE, fmt]
    if config.demote_to not in (None, fmt):
        formats.append(cast(PageFormat, config.demote_to))
    return tuple(map(layout, formats))


def object_counts(layouts: tuple[PageLayout, ...], demand: Demand) -> Counter[int]:
    """Pool objects of `demand` by size in bytes."""
    counts: Counter[int] = Counter({layouts[0].page_nbytes: demand.dense_pages})
    if len(layouts) > 1:
        counts[layouts[1].page_nbytes] += demand.quantised_pages
        if layouts[1].codebook_nbytes:
            counts[layouts[1].codebook_nbytes] += demand.codebooks
    if demand.demoted_pages:
        counts[layouts[-1].page_nbytes] += demand.demoted_pages
    return counts


def object_sizes(layouts: tuple[PageLayout, ...]) -> list[int]:
    """Sizes of all pool objects."""
    return [
        size for size in object_counts(layouts, Demand(1, 1, 1, len(layouts) - 2 if len(layouts) > 2 else 0)) if size
    ]


def demotion_reserve(model: ModelSpec, config: CacheConfig) -> Demand:
    """Pool objects that are kept free for demotion: a page of every further format, or what a short span takes."""
    if config.demote_to is None:
        return Demand()
    cell = min(model.frames_per_chunk, config.span_frames)
    further = len(page_layouts(model, config)) - 2
    return Demand(quantised_pages=cell, codebooks=1, demoted_pages=cell * further)


def least_staging(model: ModelSpec, layouts: tuple[PageLayout, ...]) -> int:
    """Bytes of staging with which any chunk can be attended to."""
    queries = model.frames_per_chunk * model.tokens_per_frame
    return attention_workspace_nbytes(layouts, model.query_heads, queries, torch.float32)


@dataclass(frozen=True)
class Budget:
    """Bytes of a manager, adding up to at most ``CacheConfig.memory``.

    Attributes:
        pool: pages and codebooks.
        staging: scratch for decoded history and partial results of attention.
        encode: most that encoding a span allocates for a moment.
        overhead: block tables, rotary tables, small copies of queries.
        slabs: how the pool is cut.
        reserve: pool objects kept free for demotion.
    """

    pool: int
    staging: int
    encode: int
    overhead: int
    slabs: SlabGeometry
    reserve: Demand = field(default_factory=Demand)

    @property
    def total(self) -> int:
        """All of it."""
        return self.pool + self.staging + self.encode + self.overhead

    @classmethod
    def split(cls, model: ModelSpec, config: CacheConfig) -> "Budget":
        """Split ``config.memory``.

        Raises:
            ConfigError: the pool could not hold one chunk of one stream; the message says how much is needed.
        """
        memory = cast(int, config.memory)
        layouts = page_layouts(model, config)
        least = least_staging(model, layouts)
        staging = cast("int | None", config.staging)
        if staging is not None and staging < least:
            raise ConfigError(f"staging: expected at least {least} bytes (one page of K and V, decoded), got {staging}")
        encode = _encode_nbytes(model, config, layouts)
        reserve = demotion_reserve(model, config)

        most = MAX_DEFAULT_STAGING * -(-model.num_kv_heads * model.head_dim // STAGING_CHANNELS)

        def attempt(total: int) -> "Budget | None":
            scratch = align(staging or max(least, min(total // STAGING_SHARE, most)), GRANULE)
            overhead = max(MIN_OVERHEAD, total // OVERHEAD_SHARE)
            slabs = _slabs(model, config, layouts, total - scratch - encode - overhead)
            return cls(slabs.nbytes, scratch, encode, overhead, slabs, reserve) if slabs else None

        budget, needed = attempt(memory), memory
        if budget is None:
            while attempt(needed) is None:
                needed += needed // 64 + GRANULE
            raise ConfigError(
                f"memory: expected at least {needed} bytes for one chunk, its span, staging and workspace, "
                f"got {memory}; raise it or shorten span_frames"
            )
        return budget


def least_demand(model: ModelSpec, config: CacheConfig) -> Demand:
    """One chunk and the spans it may close, and what is kept free: the least a pool must hold."""
    chunk, span = model.frames_per_chunk, config.span_frames
    closing = -(-chunk // span)
    dense = cast(PageFormat, config.format).is_dense
    demand = Demand(chunk + 1) if dense else Demand(chunk + span, closing * span, closing)
    return demand + demotion_reserve(model, config)


def _slabs(model: ModelSpec, config: CacheConfig, layouts: tuple[PageLayout, ...], nbytes: int) -> SlabGeometry | None:
    """How a pool of `nbytes` is cut, or None if it cannot hold one chunk and the spans it may close."""
    demand = least_demand(model, config)
    sizes = object_sizes(layouts)
    try:
        slabs = SlabGeometry.choose(sizes, nbytes)
    except ConfigError:
        return None
    return slabs if slabs.slabs_for(object_counts(layouts, demand)) <= slabs.num_slabs else None


def _encode_nbytes(model: ModelSpec, config: CacheConfig, layouts: tuple[PageLayout, ...]) -> int:
    if len(layouts) == 1:
        return 0
    tokens = config.span_frames * model.tokens_per_frame
    gathered = tokens * model.num_kv_heads * model.head_dim * model.dtype.itemsize
    parts = [part for part in (layouts[1].key, layouts[1].value) if not part.codec.is_dense]
    requantise = [requantise_workspace_nbytes(part, config.span_frames) for part in parts] if len(layouts) > 2 else []
    return max([gathered + encode_workspace_nbytes(part, tokens) for part in parts] + requantise)


@dataclass(frozen=True)
class Estimate:
    """What one stream costs at its worst, and how many fit.

    Attributes:
        stream_nbytes: pages and codebooks of one stream, open chunk and closing span included.
        dense_stream_nbytes: the same stream unquantised.
        streams: streams that fit at their worst all at once.
        dense_streams: streams that would fit unquantised in the same memory.
        demand: the objects of one stream.
        budget: how the manager's memory is split.
    """

    stream_nbytes: int
    dense_stream_nbytes: int
    streams: int
    dense_streams: int
    demand: Demand
    budget: Budget

    @property
    def ratio(self) -> float:
        """Unquantised bytes over bytes, for the same stream."""
        return self.dense_stream_nbytes / self.stream_nbytes


def stream_timeline(config: CacheConfig, window: Window) -> Timeline:
    """Rules of a stream with that window."""
    fmt = cast(PageFormat, config.format)
    return Timeline(window, None if fmt.is_dense else config.span_frames)


def estimate(model: ModelSpec, config: CacheConfig, window: Window, frames: int | None = None) -> Estimate:
    """Bytes of a stream of `frames` frames (None: endless) and how many such streams fit.

    Raises:
        ConfigError: the budget cannot hold one chunk, or the window cannot hold a span.
    """
    budget = Budget.split(model, config)
    layouts = page_layouts(model, config)
    demand = stream_timeline(config, window).worst_demand(model.frames_per_chunk, frames)
    counts = object_counts(layouts, demand)
    plain = Timeline(window, None).worst_demand(model.frames_per_chunk, frames)
    dense_nbytes = plain.dense_pages * layouts[0].page_nbytes

    fit = 0
    reserve = budget.reserve
    while budget.slabs.slabs_for(object_counts(layouts, demand * (fit + 1) + reserve)) <= budget.slabs.num_slabs:
        fit += 1
    return Estimate(
        stream_nbytes=sum(size * count for size, count in counts.items()),
        dense_stream_nbytes=dense_nbytes,
        streams=fit,
        dense_streams=cast(int, config.memory) // dense_nbytes,
        demand=demand,
        budget=budget,
    )
