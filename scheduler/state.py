"""All that the scheduler knows, as values: a step copies the state and replaces entries, it never changes one."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from qvg_paged.scheduler.backend import CacheBackend, ParkingBackend
from qvg_paged.scheduler.config import Reservation, SchedulerConfig
from qvg_paged.scheduler.plan import Decision, Reason
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.tenant import Tenant
from qvg_paged.scheduler.view import StreamView
from qvg_paged.timeline import Demand

__all__ = ["Entry", "Rules", "State", "total"]

HISTORY = 1024


@dataclass(frozen=True)
class Entry:
    """All that is known of a stream.

    Attributes:
        request: what was asked for; `shown` is the copy that policies get.
        worst, worst_nbytes: pool objects at its worst, all branches, and their bytes.
        need, need_nbytes: what is reserved when it runs next.
        arrival: serial number of its submission.
        decision: the latest decision about it.
        state: where it is.
        committed: frames committed.
        chunks: chunks finished; `chunks_before` is their number when it last began to run.
        since: time since when it has waited or run.
        first_chunk: time at which its first chunk was reported.
        parks: how often it was parked; `stalls` counts those since its latest finished chunk.
        backed: whether host memory is set aside for it, without which it is never parked.
        overtaken: how many streams went before it although it was first in line.
        progressed: step at which it last finished a chunk or began to run.
    """

    request: StreamRequest
    shown: StreamRequest
    worst: Demand
    worst_nbytes: int
    need: Demand
    need_nbytes: int
    arrival: int
    decision: Decision
    state: StreamState = StreamState.QUEUED
    committed: int = 0
    chunks: int = 0
    chunks_before: int = 0
    since: float | None = None
    first_chunk: float | None = None
    parks: int = 0
    stalls: int = 0
    backed: bool = False
    overtaken: int = 0
    progressed: int = 0

    @property
    def id(self) -> str:
        """Its name."""
        return self.request.id

    @property
    def tenant(self) -> str:
        """Who pays."""
        return self.request.tenant


def total(entries: Iterable[Entry]) -> Demand:
    """What is reserved for them together."""
    dense = quantised = codebooks = 0
    for entry in entries:
        dense += entry.need.dense_pages
        quantised += entry.need.quantised_pages
        codebooks += entry.need.codebooks
    return Demand(dense, quantised, codebooks)


@dataclass(frozen=True)
class Rules:
    """What does not change: the settings and the cache's arithmetic."""

    config: SchedulerConfig
    cache: CacheBackend

    @property
    def parking(self) -> ParkingBackend | None:
        """The cache, if it can park and may."""
        cache = self.cache
        return cache if not self.config.no_preemption and isinstance(cache, ParkingBackend) else None

    @property
    def reservation(self) -> Reservation:
        """How far ahead memory is promised."""
        return Reservation.NEXT_CHUNK if self.parking else Reservation.TO_COMPLETION

    def need(self, entry: Entry, backed: bool) -> Entry:
        """The entry with what must be reserved for it to run next."""
        if self.parking is None or not backed:
            demand, nbytes = entry.worst, entry.worst_nbytes
        else:
            request = entry.request
            frames = min(self.cache.frames_per_chunk, request.frames - entry.committed)
            demand = self.parking.chunk_demand(request.window, entry.committed, frames) * request.branches
            nbytes = self.cache.demand_nbytes(demand)
        return replace(entry, need=demand, need_nbytes=nbytes, backed=backed)


@dataclass
class State:
    """Streams by what they do, tenants, counters. Functions that change it are given a copy.

    Attributes:
        queued, running, parked: streams by id; `queued` in order of arrival.
        leaving: final ones that no plan has told of yet.
        done: final ones, oldest first.
        tenants: by name.
        limit: bytes that may be promised if less than the pool.
        leader: running stream that may not be parked; `leader_chunks` is how many chunks it had finished then.
        hold: steps for which admission pauses because someone had to be parked.
        draining: whether new requests are refused.
        virtual_floor: least virtual time of tenants in line, never falling.
        dearest_chunk: most a chunk of one stream has cost.
        charges: tenant, bytes and chunks of each stream of the latest plan, to be charged at the next step.
    """

    queued: dict[str, Entry] = field(default_factory=dict)
    running: dict[str, Entry] = field(default_factory=dict)
    parked: dict[str, Entry] = field(default_factory=dict)
    leaving: dict[str, Entry] = field(default_factory=dict)
    done: dict[str, Entry] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    limit: int | None = None
    leader: str = ""
    leader_chunks: int = 0
    hold: int = 0
    draining: bool = False
    virtual_floor: float = 0.0
    dearest_chunk: float = 0.0
    charges: tuple[tuple[str, int, int], ...] = ()
    arrivals: int = 0
    step: int = 0
    now: float = -math.inf
    views: dict[str, tuple[Entry, StreamView]] = field(default_factory=dict)

    def copy(self) -> "State":
        """A state that can be changed without this one noticing."""
        other = copy.copy(self)
        for name in ("queued", "running", "parked", "leaving", "done", "tenants"):
            setattr(other, name, dict(getattr(self, name)))
        return other

    def find(self, stream_id: str) -> Entry | None:
        """The stream of that name."""
        for group in (self.running, self.queued, self.parked, self.leaving, self.done):
            if stream_id in group:
                return group[stream_id]
        return None

    def waiting(self) -> list[Entry]:
        """Queued and parked streams in order of arrival."""
        if not self.parked:
            return list(self.queued.values())
        return sorted((*self.queued.values(), *self.parked.values()), key=_arrival)

    def by_arrival(self) -> list[Entry]:
        """Running streams in order of arrival."""
        return sorted(self.running.values(), key=_arrival)

    def end(self, entry: Entry, state: StreamState, reason: Reason, text: str, *, announced: bool = False) -> Entry:
        """Move a stream to a final state; what it held is free again once a plan has told of it."""
        if entry.id in self.running or entry.id in self.parked:
            self.hold = 0
        for group in (self.queued, self.running, self.parked):
            group.pop(entry.id, None)
        self.views.pop(entry.id, None)
        entry = replace(entry, state=state, decision=Decision(entry.id, reason, text))
        if announced:
            self.remember(entry)
        else:
            self.leaving[entry.id] = entry
        return entry

    def remember(self, entry: Entry) -> None:
        """Keep a final entry for questions, the latest 1,024 of them."""
        self.leaving.pop(entry.id, None)
        self.done.pop(entry.id, None)
        self.done[entry.id] = entry
        while len(self.done) > HISTORY:
            del self.done[next(iter(self.done))]


def _arrival(entry: Entry) -> int:
    return entry.arrival
