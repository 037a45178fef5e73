"""All that the scheduler knows, as values: a step copies the state and replaces entries, it never changes one."""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any

from qvg_paged.config import Window
from qvg_paged.errors import ArgumentError
from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler.backend import CacheBackend, LadderBackend, ParkingBackend
from qvg_paged.scheduler.checks import shown
from qvg_paged.scheduler.config import Reservation, SchedulerConfig
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.line import Group, Spot
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.tenant import Tenant
from qvg_paged.scheduler.view import StreamView, drafted
from qvg_paged.timeline import Demand

__all__ = ["BEHIND", "QUOTA", "Entry", "Rules", "State", "total"]

HISTORY = 1024
REMEMBERED = 1 << 14
"""Chunks whose demand is not reckoned anew."""
BEHIND: Group = (Reason.BEHIND, "the first in line does not fit yet, and nobody overtakes it")
QUOTA: Group = (Reason.QUOTA, "a stream of its tenant that is before it in line waits for the quota")
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
        decision: the latest decision about it alone; `State.decision` has what it was told with others.
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
        key: its place in its tenant's line, before arrival.
        id, tenant: its name and who pays, as in the request, but found at once.
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
    key: float = 0.0
    id: str = field(init=False, repr=False, compare=False)
    tenant: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.__dict__.update(id=self.request.id, tenant=self.request.tenant)

    @property
    def view(self) -> StreamView:
        """What policies see of it, made once (`cached_property` takes a lock)."""
        found: StreamView | None = self.__dict__.get("_view")
        if found is not None:
            return found
        self.__dict__["_view"] = view = drafted(
            self.shown,
            self.state,
            self.arrival,
            self.need_nbytes,
            self.worst_nbytes,
            self.committed,
            self.since,
            self.first_chunk,
            self.parks,
            self.priority,
            self.deadline_fps,
            self.id,
            self.tenant,
        )
        return view

    def but(self, **changes: Any) -> "Entry":
        """A copy with some fields changed: `dataclasses.replace` at a fifth of its price."""
        fields = self.__dict__ | changes
        if "_view" in fields:
            del fields["_view"]
        other = object.__new__(Entry)
        object.__setattr__(other, "__dict__", fields)
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
        committed = entry.committed if committed is None else committed
        if self.parking is None or not backed:
            demand, nbytes = entry.worst, entry.worst_nbytes
        else:
            request = entry.request
            frames = min(self.cache.frames_per_chunk, request.frames - committed)
            squeeze = changes.get("squeeze", entry.squeeze)
            demand, nbytes = self._for_chunk(request.window, committed, frames, squeeze, request.branches)
        return entry.but(need=demand, need_nbytes=nbytes, backed=backed, committed=committed, **changes)

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


@dataclass
class State:
    """Streams by what they do, tenants, counters. Functions that change it are given a copy.

    Attributes:
        queued, running, parked: streams by id; `queued` in order of arrival.
        lines: queued and parked streams by tenant, sorted; no tenant without any, and none that is in `fresh`.
        fresh: ids of queued streams that no step has seen.
        apart: ids of waiting streams to which `Entry.decision` applies; to the others what their tenant's or
            everybody's `group` is told.
        group: why most streams wait; `barred` why those of some tenants do.
        news: ids of waiting streams about which the latest step decided something else than the one before.
        leaving: final ones that no plan has told of yet.
        done: final ones, oldest first.
        tenants: by name.
        limit: bytes that may be promised if less than the pool.
        leader: running stream that may not be parked; `leader_chunks` is how many chunks it had finished then.
        hold: steps for which admission pauses because someone had to be parked.
        draining: whether new requests are refused.
        left: tenants that the latest plan left in line.
        virtual_floor: virtual time of the tenant in line that is furthest behind, or of the one that is furthest ahead
            while nobody is in line; never falling.
        dearest_chunk: most a chunk of one stream has cost.
        charges: tenant, bytes and chunks of each stream of the latest plan, to be charged at the next step.
    """

    queued: dict[str, Entry] = field(default_factory=dict)
    running: dict[str, Entry] = field(default_factory=dict)
    parked: dict[str, Entry] = field(default_factory=dict)
    lines: dict[str, list[Spot]] = field(default_factory=dict)
    fresh: dict[str, None] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    group: Group = BEHIND
    barred: Mapping[str, Group] = field(default_factory=dict)
    news: tuple[str, ...] = ()
    leaving: dict[str, Entry] = field(default_factory=dict)
    done: dict[str, Entry] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    limit: int | None = None
    leader: str = ""
    leader_chunks: int = 0
    hold: int = 0
    draining: bool = False
    left: frozenset[str] = frozenset()
    virtual_floor: float = 0.0
    dearest_chunk: float = 0.0
    charges: tuple[tuple[str, int, int], ...] = ()
    arrivals: int = 0
    step: int = 0
    now: float = -math.inf
    _own: set[str] = field(default_factory=set, repr=False, compare=False)

    def copy(self) -> "State":
        """A state that can be changed without this one noticing."""
        other = object.__new__(State)  # `copy.copy` at a third of its price
        other.__dict__.update(self.__dict__)
        other.queued, other.running, other.parked = self.queued.copy(), self.running.copy(), self.parked.copy()
        other.leaving, other.tenants, other.fresh = self.leaving.copy(), self.tenants.copy(), self.fresh.copy()
        other.apart = self.apart.copy()
        other.lines = self.still_lines()
        other._own = set()
        return other

    def still_lines(self) -> dict[str, list[Spot]]:
        """The lines as they are now and stay: whoever changes one from here on makes a copy first."""
        self._own.clear()
        return dict(self.lines)

    def decision(self, entry: Entry) -> Decision:
        """The latest decision about a stream."""
        if entry.id in self.apart or entry.state not in (StreamState.QUEUED, StreamState.PARKED):
            return entry.decision
        return Decision(entry.id, *self.barred.get(entry.tenant, self.group))

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

    def enqueue(self, entry: Entry) -> None:
        """Accept a new stream, which joins the line with the next step."""
        self.queued[entry.id] = entry
        self.fresh[entry.id] = None
        self.apart.add(entry.id)

    def park(self, rules: Rules, entry: Entry) -> None:
        """Move a running stream to its old place in line."""
        del self.running[entry.id]
        self.apart.add(entry.id)
        self.parked[entry.id] = self.join(rules, entry)

    def join(self, rules: Rules, entry: Entry) -> Entry:
        """Put a stream in line; the entry with its key."""
        key = rules.key(entry)
        entry = entry if key == entry.key else entry.but(key=key)
        insort(self._line(entry.tenant), (entry.key, entry.arrival, entry.id))
        return entry

    def sort(self, rules: Rules, tenant: str) -> None:
        """Put a tenant's streams in line anew, since their keys have changed."""
        entries = [self.queued.get(name) or self.parked[name] for *_, name in self.lines.pop(tenant, ())]
        for entry in entries:
            self.keep(self.join(rules, entry))

    def _line(self, tenant: str) -> list[Spot]:
        """A tenant's line, to be changed."""
        if tenant not in self._own:
            self._own.add(tenant)
            self.lines[tenant] = list(self.lines.get(tenant, ()))
        return self.lines.setdefault(tenant, [])

    def start(self, entry: Entry) -> None:
        """Move a waiting stream to those that run."""
        self._leave_line(entry)
        self.running[entry.id] = entry

    def _leave_line(self, entry: Entry) -> None:
        if self.queued.pop(entry.id, None) is None and self.parked.pop(entry.id, None) is None:
            return
        if entry.id in self.fresh:
            del self.fresh[entry.id]
            return
        line = self._line(entry.tenant)
        del line[bisect_left(line, (entry.key, entry.arrival, ""))]
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
        self.forget(entry.id)
        self._done()[entry.id] = entry
        if len(self.done) > HISTORY:
            del self.done[next(iter(self.done))]

    def forget(self, stream_id: str) -> None:
        """A name is used anew."""
        if stream_id in self.done:
            del self._done()[stream_id]

    def _done(self) -> dict[str, Entry]:
        """Final entries, to be changed."""
        if "" not in self._own:  # no tenant has that name
            self._own.add("")
            self.done = dict(self.done)
        return self.done
