"""All that the scheduler knows, as values: a step copies the state and replaces entries, it never changes one."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

from qvg_paged.errors import ArgumentError
from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler.backend import CacheBackend, LadderBackend, ParkingBackend
from qvg_paged.scheduler.checks import shown
from qvg_paged.scheduler.config import Reservation, SchedulerConfig
from qvg_paged.scheduler.plan import Decision, Reason
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.tenant import Tenant
from qvg_paged.scheduler.view import StreamView
from qvg_paged.timeline import Demand

__all__ = ["Entry", "Rules", "State", "total"]

HISTORY = 1024
ARRIVAL = attrgetter("arrival")


@dataclass(frozen=True)
class Entry:
    """All that is known of a stream.

    Attributes:
        request: what was asked for; `shown` is the copy that policies get.
        priority, deadline_fps: its own and its tenant's, put together.
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
        squeeze: how far it was squeezed, or None.
    """

    request: StreamRequest
    shown: StreamRequest
    worst: Demand
    worst_nbytes: int
    need: Demand
    need_nbytes: int
    arrival: int
    decision: Decision
    priority: int = 0
    deadline_fps: float | None = None
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
    squeeze: Squeeze | None = None

    @property
    def id(self) -> str:
        """Its name."""
        return self.request.id

    @property
    def tenant(self) -> str:
        """Who pays."""
        return self.request.tenant

    @cached_property
    def view(self) -> StreamView:
        """What policies see of it."""
        return StreamView(
            request=self.shown,
            state=self.state,
            arrival=self.arrival,
            nbytes=self.need_nbytes,
            worst_nbytes=self.worst_nbytes,
            committed=self.committed,
            since=self.since,
            first_chunk=self.first_chunk,
            parks=self.parks,
            priority=self.priority,
            deadline_fps=self.deadline_fps,
        )

    def but(self, **changes: Any) -> "Entry":
        """A copy with some fields changed: `dataclasses.replace` at a fifth of its price."""
        other = object.__new__(Entry)
        fields = other.__dict__
        fields.update(self.__dict__)
        fields.pop("view", None)
        fields.update(changes)
        return other

    def under(self, tenant: Tenant) -> "Entry":
        """The same with the tenant's priority and play-out rate."""
        request, spec = self.request, tenant.spec
        return self.but(
            priority=request.priority + spec.priority, deadline_fps=request.deadline_fps or spec.deadline_fps
        )


def total(entries: Iterable[Entry]) -> Demand:
    """What is reserved for them together."""
    dense = quantised = codebooks = demoted = 0
    for entry in entries:
        dense += entry.need.dense_pages
        quantised += entry.need.quantised_pages
        codebooks += entry.need.codebooks
        demoted += entry.need.demoted_pages
    return Demand(dense, quantised, codebooks, demoted)


@dataclass(frozen=True)
class Rules:
    """What does not change: the settings and the cache's arithmetic."""

    config: SchedulerConfig
    cache: CacheBackend

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

    def need(self, entry: Entry, backed: bool) -> Entry:
        """The entry with what must be reserved for it to run next."""
        if self.parking is None or not backed:
            demand, nbytes = entry.worst, entry.worst_nbytes
        else:
            request = entry.request
            frames = min(self.cache.frames_per_chunk, request.frames - entry.committed)
            if self.ladder is None or entry.squeeze is None:
                demand = self.parking.chunk_demand(request.window, entry.committed, frames)
            else:
                demand = self.ladder.squeezed_demand(request.window, entry.committed, frames, entry.squeeze)
            demand *= request.branches
            nbytes = self.cache.demand_nbytes(demand)
        return entry.but(need=demand, need_nbytes=nbytes, backed=backed)


@dataclass
class State:
    """Streams by what they do, tenants, counters. Functions that change it are given a copy.

    Attributes:
        queued, running, parked: streams by id; `queued` in order of arrival.
        lines: ids of queued and parked streams by tenant, in order of arrival; no tenant without any.
        fresh: ids of queued streams that no step has seen.
        news: ids of waiting streams about which the latest step decided something else than the one before.
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
    lines: dict[str, dict[str, int]] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    news: tuple[str, ...] = ()
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

    def copy(self) -> "State":
        """A state that can be changed without this one noticing."""
        other = copy.copy(self)
        for name in ("queued", "running", "parked", "leaving", "done", "tenants"):
            setattr(other, name, dict(getattr(self, name)))
        other.lines = {name: dict(line) for name, line in self.lines.items()}
        return other

    def find(self, stream_id: str) -> Entry | None:
        """The stream of that name."""
        for group in (self.running, self.queued, self.parked, self.leaving, self.done):
            if stream_id in group:
                return group[stream_id]
        return None

    def named(self, stream_id: str) -> Entry:
        """The stream of that name.

        Raises:
            ArgumentError: there is none.
        """
        entry = self.find(stream_id) if isinstance(stream_id, str) else None
        if entry is None:
            raise ArgumentError(f"stream_id: expected a submitted stream, got {shown(stream_id)}")
        return entry

    def waiting(self) -> list[Entry]:
        """Queued and parked streams in order of arrival."""
        if not self.parked:
            return list(self.queued.values())
        return sorted((*self.queued.values(), *self.parked.values()), key=ARRIVAL)

    def enqueue(self, entry: Entry) -> None:
        """Put a new stream in line."""
        self.queued[entry.id] = entry
        self.fresh += (entry.id,)
        self.lines.setdefault(entry.tenant, {})[entry.id] = entry.arrival

    def park(self, entry: Entry) -> None:
        """Move a running stream to its old place in line."""
        del self.running[entry.id]
        self.parked[entry.id] = entry
        line = {**self.lines.get(entry.tenant, {}), entry.id: entry.arrival}
        self.lines[entry.tenant] = dict(sorted(line.items(), key=_place))

    def start(self, entry: Entry) -> None:
        """Move a waiting stream to those that run."""
        self._leave_line(entry)
        self.running[entry.id] = entry

    def _leave_line(self, entry: Entry) -> None:
        if self.queued.pop(entry.id, None) is None and self.parked.pop(entry.id, None) is None:
            return
        line = self.lines[entry.tenant]
        del line[entry.id]
        if not line:
            del self.lines[entry.tenant]

    def keep(self, entry: Entry) -> None:
        """Replace a waiting stream by its newer version."""
        (self.queued if entry.id in self.queued else self.parked)[entry.id] = entry

    def by_arrival(self) -> list[Entry]:
        """Running streams in order of arrival."""
        return sorted(self.running.values(), key=ARRIVAL)

    def end(self, entry: Entry, state: StreamState, reason: Reason, text: str, *, announced: bool = False) -> Entry:
        """Move a stream to a final state; what it held is free again once a plan has told of it."""
        if entry.id in self.running or entry.id in self.parked:
            self.hold = 0
        self.running.pop(entry.id, None)
        self._leave_line(entry)
        entry = entry.but(state=state, decision=Decision(entry.id, reason, text))
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


def _place(item: tuple[str, int]) -> int:
    return item[1]
