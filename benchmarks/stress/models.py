"""Real geometries by bytes, costs by table, and a cache that is books only.

A `SimulatedCache` answers with the arithmetic of the real store (`qvg_paged.budget`, `qvg_paged.timeline`,
`SlabGeometry`); `stress.ladder_cache` adds the ladder. Costs are parameters in round figures unless they are taken from
what a GPU has measured (`stress.calibration`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from qvg_paged.budget import object_sizes, page_layouts, stream_timeline
from qvg_paged.config import CacheConfig, ModelSpec, Window
from qvg_paged.kernels.formats import PageFormat
from qvg_paged.pool import SlabGeometry
from qvg_paged.timeline import Demand, Timeline

__all__ = ["DRAWN", "MODELS", "Costs", "Geometry", "SimulatedCache", "StaticCache"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of everything that takes time.

    Attributes:
        chunk: a batch of one stream, one chunk.
        chunk_more: each further stream in the batch.
        transfer_rate: bytes per second between pool and host.
        transfer: start of a transfer.
        encode_rate: unquantised bytes per second that a stream's frames are quantised at when it is squeezed.
        source: where these figures come from.
    """

    chunk: float = 1.0
    chunk_more: float = 0.5
    transfer_rate: float = 20e9
    transfer: float = 0.01
    encode_rate: float = 100e9
    source: str = "round figures"

    def batch(self, streams: int) -> float:
        """A chunk of each of `streams` streams."""
        return self.chunk + self.chunk_more * (streams - 1) if streams else 0.0

    def move(self, nbytes: int) -> float:
        """One stream between pool and host."""
        return self.transfer + nbytes / self.transfer_rate

    def squeeze(self, nbytes: int) -> float:
        """Quantising so many unquantised bytes of a stream again."""
        return nbytes / self.encode_rate


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A model and how its streams use the cache.

    Attributes:
        model: geometry of its cache.
        window: what a stream keeps.
        span_frames: frames quantised together.
        pixel_frames: video frames per latent frame.
    """

    model: ModelSpec
    window: Window
    span_frames: int
    pixel_frames: int = 4


def _geometry(layers: int, heads: int, tokens: int, chunk: int, window: Window, span: int) -> Geometry:
    spec = ModelSpec(
        num_layers=layers, num_kv_heads=heads, head_dim=128, tokens_per_frame=tokens, frames_per_chunk=chunk
    )
    return Geometry(model=spec, window=window, span_frames=span)


WORLD = ModelSpec(num_layers=6, num_kv_heads=2, head_dim=128, tokens_per_frame=64, frames_per_chunk=1)
MODELS = {
    "self-forcing": _geometry(30, 12, 1560, 3, Window(sink_frames=1, recent_frames=48), 12),
    "longcat": _geometry(48, 32, 1560, 5, Window(recent_frames=20), 10),
    "hy-worldplay": _geometry(30, 24, 880, 4, Window(recent_frames=48), 12),
    "lingbot-v2": _geometry(40, 40, 3600, 4, Window(sink_frames=6, recent_frames=62), 16),
    "world-model": Geometry(model=WORLD, window=Window(recent_frames=32), span_frames=8, pixel_frames=1),
}
"""Layers, heads, tokens per latent frame and chunk lengths as published; windows shortened to whole spans. The last one
is the small world model of this project."""
DRAWN = ("hy-worldplay", "lingbot-v2", "longcat", "self-forcing")
"""Those that swarms draw."""


@cache
def _worst_demand(timeline: Timeline, chunk: int, frames: int | None) -> Demand:
    return timeline.worst_demand(chunk, frames)


@cache
def _chunk_demand(timeline: Timeline, committed: int, frames: int) -> Demand:
    return timeline.demand(committed, frames)


class StaticCache:
    """Books of a pool for streams of one geometry; cannot park.

    Args:
        geometry: of the streams.
        pool_nbytes: size of the pool.
        format: of quantised pages.
        demote_to: what they can be demoted to, or None.
    """

    def __init__(
        self,
        geometry: Geometry,
        pool_nbytes: int,
        format: str | PageFormat = "qvg4-int2",  # noqa: A002
        demote_to: str | PageFormat | None = None,
    ) -> None:
        self.geometry = geometry
        self.config = CacheConfig(
            memory=pool_nbytes, format=format, span_frames=geometry.span_frames, demote_to=demote_to
        )
        self.layouts = page_layouts(geometry.model, self.config)
        self.slabs = SlabGeometry.choose(object_sizes(self.layouts), pool_nbytes)
        self.pool_nbytes = self.slabs.nbytes
        self.frames_per_chunk = geometry.model.frames_per_chunk
        sizes = [self.layouts[0].page_nbytes, 0, 0, self.layouts[-1].page_nbytes]
        if len(self.layouts) > 1:
            sizes[1:3] = self.layouts[1].page_nbytes, self.layouts[1].codebook_nbytes
        self._sizes = sizes
        self._per_slab = [self.slabs.slab_nbytes // size if size else 1 for size in sizes]

    def demand(self, window: Window, frames: int | None = None) -> Demand:
        """Most of each kind of pool object that a stream of `frames` frames ever holds."""
        return _worst_demand(stream_timeline(self.config, window), self.frames_per_chunk, frames)

    def occupied(self, window: Window, committed: int, frames: int) -> Demand:
        """What the engine uses of the pool while a chunk is open."""
        return _chunk_demand(stream_timeline(self.config, window), committed, frames)

    def by_format(self, demand: Demand) -> list[int]:
        """Pool bytes of unquantised pages, quantised pages and codebooks; demoted pages count as quantised ones."""
        dense, quantised, codebooks, demoted = self._sizes
        pages = demand.quantised_pages * quantised + demand.demoted_pages * demoted
        return [demand.dense_pages * dense, pages, demand.codebooks * codebooks]

    def demand_nbytes(self, demand: Demand) -> int:
        """Pool bytes of `demand`."""
        return sum(self.by_format(demand))

    def can_host(self, demands: Sequence[Demand], nbytes: int | None = None) -> bool:
        """Whether these demands fit together in the pool, or in `nbytes` of it."""
        dense = quantised = codebooks = demoted = 0
        for demand in demands:
            dense += demand.dense_pages
            quantised += demand.quantised_pages
            codebooks += demand.codebooks
            demoted += demand.demoted_pages
        usable = self.slabs.num_slabs if nbytes is None else nbytes // self.slabs.slab_nbytes
        one, two, three, four = self._per_slab
        needed = -(-dense // one) - (-quantised // two) - (-codebooks // three) - (-demoted // four)
        return needed <= usable


class SimulatedCache(StaticCache):
    """The same, and streams can be parked.

    Args:
        geometry: of the streams.
        pool_nbytes: size of the pool.
        host_nbytes: bytes for parked streams.
        costs: time of transfers.
        format, demote_to: of quantised pages.
    """

    def __init__(
        self,
        geometry: Geometry,
        pool_nbytes: int,
        host_nbytes: int,
        costs: Costs,
        format: str = "qvg4-int2",  # noqa: A002
        demote_to: str | None = None,
    ) -> None:
        super().__init__(geometry, pool_nbytes, format, demote_to)
        self.host_nbytes = host_nbytes
        self._costs = costs

    def chunk_demand(self, window: Window, committed: int, frames: int) -> Demand:
        """Pool objects while a chunk of `frames` frames is open after `committed` frames."""
        return self.occupied(window, committed, frames)

    def park_seconds(self, nbytes: int) -> float:
        """Time to move that many bytes to the host."""
        return self._costs.move(nbytes)

    def resume_seconds(self, nbytes: int) -> float:
        """Time to move them back."""
        return self._costs.move(nbytes)
