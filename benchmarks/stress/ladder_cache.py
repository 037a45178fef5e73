"""Books of a pool whose streams can be stored more cheaply while they run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from qvg_paged.budget import demotion_reserve, object_counts, stream_timeline
from qvg_paged.config import CacheConfig, ModelSpec, QualityFloor, Rung, Window
from qvg_paged.ladder import Relief, Squeeze, SqueezedTimeline, lowered, squeeze
from qvg_paged.timeline import Demand, Timeline
from stress.models import Costs, Geometry, SimulatedCache

__all__ = ["LADDERS", "LadderCache"]

LADDERS = {"tails": ("qvg4-int2", "qvg4-int2"), "spans": ("qvg-int4", "qvg-int2")}
"""By name: the format of quantised pages, and what they are demoted to; the same for dense tails only."""


@cache
def _timeline(config: CacheConfig, model: ModelSpec, window: Window, now: Squeeze) -> Timeline:
    return squeeze(stream_timeline(config, now.window(window)), now.rung, now.since, model)


class LadderCache(SimulatedCache):
    """A simulated cache with the whole ladder, by the arithmetic of `TieredCache`.

    Args:
        geometry, pool_nbytes, host_nbytes, costs: as of a `SimulatedCache`.
        ladder: name in `LADDERS`.

    Attributes:
        reserve: what is kept free for demotion.
    """

    def __init__(self, geometry: Geometry, pool_nbytes: int, host_nbytes: int, costs: Costs, ladder: str) -> None:
        kept, cheapest = LADDERS[ladder]
        super().__init__(geometry, pool_nbytes, host_nbytes, costs, format=kept, demote_to=cheapest)
        self.reserve = demotion_reserve(geometry.model, self.config)
        self._worst = cache(self._worst_demand)

    def demand(self, window: Window, frames: int | None = None) -> Demand:
        """Most of each kind of pool object that a stream of `frames` frames ever holds."""
        return self._worst(window, frames, Rung.NONE)

    def _worst_demand(self, window: Window, frames: int | None, rung: Rung) -> Demand:
        timeline = _timeline(self.config, self.geometry.model, window, Squeeze(rung))
        worst = timeline.worst_demand(self.frames_per_chunk, frames)
        if isinstance(timeline, SqueezedTimeline):  # a later grid of short spans may leave as many frames over
            worst = replace(worst, dense_pages=worst.dense_pages + timeline.cell_frames - 1)
        return worst

    def can_host(self, demands: Sequence[Demand], nbytes: int | None = None) -> bool:
        """Whether these demands fit together beside what is kept free for demotion."""
        return super().can_host([*demands, self.reserve], nbytes)

    def occupied(self, window: Window, committed: int, frames: int, now: Squeeze | None = None) -> Demand:
        """What the engine uses of the pool while a chunk is open."""
        return self.squeezed_demand(window, committed, frames, now or Squeeze())

    def squeezed_demand(self, window: Window, committed: int, frames: int, now: Squeeze) -> Demand:
        """`chunk_demand` of a stream that was squeezed."""
        return _timeline(self.config, self.geometry.model, window, now).demand(committed, frames)

    def lowered(
        self, window: Window, frames: int, floor: QualityFloor, now: Squeeze, committed: int, relief: Relief
    ) -> Squeeze | None:
        """What a stream is after that relief; None where it may not have it, or could need more memory some day."""
        after = lowered(self.config, window, floor, now, committed, relief)
        if after is None or after.rung is now.rung:
            return after
        before, worst = (self._worst(window, frames, rung) for rung in (Rung.NONE, after.rung))
        larger = self.demand_nbytes(worst) > self.demand_nbytes(before)
        need, have = (self.slabs.slabs_for(object_counts(self.layouts, demand)) for demand in (worst, before))
        return None if larger or need > have else after
