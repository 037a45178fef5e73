"""What does not change while a scheduler runs: settings, the cache's arithmetic, the policy's key."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from qvg_paged.config import Window
from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler.backend import CacheBackend, LadderBackend, ParkingBackend
from qvg_paged.scheduler.config import Reservation, SchedulerConfig
from qvg_paged.scheduler.entry import Entry
from qvg_paged.timeline import Demand

__all__ = ["Rules"]

REMEMBERED = 1 << 14
"""Chunks, and streams, whose demand is not reckoned anew."""


@dataclass(frozen=True)
class Rules:
    """What does not change: the settings, the cache's arithmetic, and the policy's key if it has one.

    Attributes:
        key: see `KeyedPolicy.key`; by arrival alone where the policy ranks everybody itself.
    """

    config: SchedulerConfig
    cache: CacheBackend
    key: Callable[[Entry], float] = lambda _: 0.0

    @cached_property
    def parking(self) -> ParkingBackend | None:
        """The cache, if it can park and may."""
        cache = self.cache
        return cache if not self.config.no_preemption and isinstance(cache, ParkingBackend) else None

    @cached_property
    def ladder(self) -> LadderBackend | None:
        """The cache, if it can store streams more cheaply and take memory back."""
        return self.parking if isinstance(self.parking, LadderBackend) else None

    @property
    def reservation(self) -> Reservation:
        """How far ahead memory is promised."""
        return Reservation.NEXT_CHUNK if self.parking else Reservation.TO_COMPLETION

    def need(self, entry: Entry, backed: bool, *, committed: int | None = None, **changes: Any) -> Entry:
        """The entry, changed, with what must be reserved for it to run next."""
        if committed is None:
            committed = entry.committed
        if self.parking is None or not backed:
            demand, nbytes = entry.worst, entry.worst_nbytes
        else:
            request = entry.request
            frames = min(self.cache.frames_per_chunk, request.frames - committed)
            squeeze = changes.get("squeeze", entry.squeeze)
            demand, nbytes = self._for_chunk(request.window, committed, frames, squeeze, request.branches)
        changes["need"], changes["need_nbytes"], changes["backed"] = demand, nbytes, backed
        changes["committed"] = committed
        return entry.changed(changes)

    @cached_property
    def worst(self) -> Callable[[Window, int, int], tuple[Demand, int]]:
        """Pool objects and bytes of a stream of that window, frames and branches at its worst; remembered."""
        cache = self.cache

        def reckon(window: Window, frames: int, branches: int) -> tuple[Demand, int]:
            demand = cache.demand(window, frames) * branches
            return demand, cache.demand_nbytes(demand)

        return lru_cache(REMEMBERED)(reckon)

    @cached_property
    def _for_chunk(self) -> Callable[[Window, int, int, Squeeze | None, int], tuple[Demand, int]]:
        """Pool objects and bytes while a chunk is open; the same for all streams of a length, so remembered."""
        cache, parking, ladder = self.cache, self.parking, self.ladder
        assert parking is not None

        def reckon(
            window: Window, committed: int, frames: int, squeeze: Squeeze | None, branches: int
        ) -> tuple[Demand, int]:
            if ladder is None or squeeze is None:
                demand = parking.chunk_demand(window, committed, frames) * branches
            else:
                demand = ladder.squeezed_demand(window, committed, frames, squeeze) * branches
            return demand, cache.demand_nbytes(demand)

        return lru_cache(REMEMBERED)(reckon)
