"""All that the scheduler knows, as values: a step copies the state and replaces entries, it never changes one."""

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler.checks import shown
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.entry import ARRIVAL, Entry
from qvg_paged.scheduler.history import History
from qvg_paged.scheduler.line import Group, Spot
from qvg_paged.scheduler.request import StreamState
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.tenant import Tenant

__all__ = ["BEHIND", "HISTORY", "QUOTA", "State"]

HISTORY = 1024
BEHIND: Group = (Reason.BEHIND, "the first in line does not fit yet, and nobody overtakes it")
QUOTA: Group = (Reason.QUOTA, "a stream of its tenant that is before it in line waits for the quota")


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
        advances: what running streams do next, by the latest plan.
        news: ids of waiting streams about which the latest step decided something else than the one before.
        leaving: final ones that no plan has told of yet.
        done: final ones, the latest 1,024 of them.
        tenants: by name; `has_floors`, `has_ceilings` say whether any of them has one (`note_rights`).
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
    advances: Mapping[str, Decision] = field(default_factory=dict)
    news: tuple[str, ...] = ()
    leaving: dict[str, Entry] = field(default_factory=dict)
    done: History = field(default_factory=lambda: History(HISTORY))
    tenants: dict[str, Tenant] = field(default_factory=dict)
    has_floors: bool = False
    has_ceilings: bool = False
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

    def note_rights(self) -> None:
        """Tenants have come, gone or changed."""
        specs = [tenant.spec for tenant in self.tenants.values()]
        self.has_floors = any(spec.floor_nbytes for spec in specs)
        self.has_ceilings = any(spec.ceiling_nbytes is not None for spec in specs)

    def decision(self, entry: Entry) -> Decision:
        """The latest decision about a stream."""
        if entry.state is StreamState.RUNNING:
            return self.advances[entry.id]
        if entry.id in self.apart or entry.state.is_final:
            return entry.decision
        return Decision(entry.id, *self.barred.get(entry.tenant, self.group))

    def find(self, stream_id: str) -> Entry | None:
        """The stream of that name."""
        for group in (self.running, self.queued, self.parked, self.leaving):
            if stream_id in group:
                return group[stream_id]
        return self.done.get(stream_id)

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

    def end(
        self, entry: Entry, state: StreamState, reason: Reason, text: str, *, announced: bool = False, **changes: Any
    ) -> Entry:
        """Move a stream, changed, to a final state; what it held is free again once a plan has told of it."""
        if entry.id in self.running or entry.id in self.parked:
            self.hold = 0
        self.running.pop(entry.id, None)
        self._leave_line(entry)
        entry = entry.but(state=state, decision=Decision(entry.id, reason, text), **changes)
        if announced:
            self.remember(entry)
        else:
            self.leaving[entry.id] = entry
        return entry

    def remember(self, entry: Entry) -> None:
        """Keep a final entry for questions."""
        self.leaving.pop(entry.id, None)
        self.done = self.done.without(entry.id).added(entry)

    def forget(self, stream_id: str) -> None:
        """A name is used anew."""
        self.done = self.done.without(stream_id)
