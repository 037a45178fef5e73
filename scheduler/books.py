"""What a step is decided with: the books of what is promised, and a policy's advice."""

from collections.abc import Sequence
from typing import Protocol

from qvg_paged.ladder import Relief
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.entry import Entry, total
from qvg_paged.scheduler.line import Turns
from qvg_paged.scheduler.request import StreamState
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.snapshot import Moment
from qvg_paged.scheduler.state import State
from qvg_paged.scheduler.view import StreamView, SystemView
from qvg_paged.timeline import Demand

__all__ = ["Advice", "Books"]


class Advice(Protocol):
    """A policy's answers, checked: whatever the policy does, these are valid."""

    @property
    def fault(self) -> str:
        """What was wrong with them in this step, or empty."""

    @property
    def keyed(self) -> bool:
        """Whether the key of the rules, and `turns`, are all that is to be known of the order."""

    @property
    def by_turns(self) -> bool:
        """Whether `turns` decide; else the key is everything."""

    def turns(self, view: SystemView) -> Turns:
        """Turns of the tenants in line."""

    def rank(self, view: SystemView) -> Sequence[str]:
        """Ids of all waiting streams, best first."""

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Ids out of ``view.parkable`` to be given up for `stream`, or because memory is short (None), best first."""


class Books:
    """What is promised while a step is decided.

    Attributes:
        limit: bytes that may be promised.
        demand, nbytes: to all running streams.
        by_tenant: bytes by tenant; `counts` are its running streams, if it has any.
        has_floors, has_ceilings: whether any tenant has one.
        demoted, shrunk: decisions about streams that were squeezed in this step, by id.
        parked: decisions about streams that were parked in this step.
        news: waiting streams about which something else was decided than before.
        exchanges: streams for which the policy had others parked in this step.

    Args:
        rules, state, now, seed: of the step.
        lasting: whether a policy may look at a view later.
    """

    def __init__(self, rules: Rules, state: State, now: float, seed: int, *, lasting: bool = True) -> None:
        self.rules, self.state, self.now, self.seed = rules, state, now, seed
        self.limit = rules.cache.pool_nbytes if state.limit is None else state.limit
        running = state.running.values()
        self.demand = total(running)
        self.by_tenant = by_tenant = dict[str, int]()
        self.counts = counts = dict[str, int]()
        for entry in running:
            tenant = entry.tenant
            by_tenant[tenant] = by_tenant.get(tenant, 0) + entry.need_nbytes
            counts[tenant] = counts.get(tenant, 0) + 1
        self.nbytes = sum(by_tenant.values())
        self.demoted: dict[str, Decision] = {}
        self.shrunk: dict[str, Decision] = {}
        self.parked: list[Decision] = []
        self.news: list[str] = []
        self._misfits: dict[int, Demand] = {}
        self._shortages: dict[tuple[int, bool], tuple[Reason, str]] = {}
        self._backing: tuple[int, bool] | None = None
        self._fitting: Demand | None = None
        self.exchanges = 0
        self._view: Moment | None = None
        self._lasting = lasting
        self._slots = rules.config.max_running
        self.has_floors, self.has_ceilings = state.has_floors, state.has_ceilings

    def view(self, *, forced: bool) -> SystemView:
        """What the policy sees now."""
        if forced:
            return self._look(forced=True)
        if self._view is None:
            self._view = self._look(forced=False)
        return self._view

    def _look(self, *, forced: bool) -> Moment:
        held = self.by_tenant, self.counts
        return Moment.of(self.rules, self.state, self.now, self.seed, held, forced=forced, lasting=self._lasting)

    @property
    def is_full(self) -> bool:
        """Whether as many streams run as may."""
        slots = self._slots
        return slots is not None and len(self.state.running) >= slots

    def held(self, tenant: str) -> int:
        """Bytes promised to a tenant's running streams."""
        return self.by_tenant.get(tenant, 0)

    def fits(self, entry: Entry | None = None, without: int = 0, *, running: Demand | None = None) -> bool:
        """Whether what runs, and `entry` besides, fits the pool or what may be used of it.

        `running` is what is promised to running streams if not `demand`, `without` so many of them.
        """
        demands = [self.demand if running is None else running]
        room = self.limit
        if entry is not None:
            demands.append(entry.need)
            others = len(self.state.running) - without
            if self.rules.parking is not None and others:
                room -= int(room * self.rules.config.headroom)
        if room == self.rules.cache.pool_nbytes:
            return self.rules.cache.can_host(demands)
        return self.rules.cache.can_host(demands, room)

    def is_misfit(self, entry: Entry) -> bool:
        """Whether what the entry needs has not fit beside what was promised then, and so does not beside more.

        By identity: streams of one kind share what they need.
        """
        return id(entry.need) in self._misfits

    def vouch(self, entry: Entry) -> None:
        """Take it from the caller, who has asked, that the entry fits now."""
        self._fitting = entry.need

    def has_room(self, entry: Entry) -> bool:
        """Whether what runs fits, and the entry besides."""
        return entry.need is self._fitting or (not self.is_misfit(entry) and self.fits(entry))

    def shortage(self, entry: Entry) -> tuple[Reason, str]:
        """That an entry does not fit; said once for all that need as much."""
        self._misfits[id(entry.need)] = entry.need
        found = self._shortages.get((entry.need_nbytes, entry.backed))
        if found is None:
            text = (
                f"needs {entry.need_nbytes} bytes of the pool {self.horizon(entry)}; {self.nbytes} of {self.limit} "
                f"bytes are promised to {len(self.state.running)} running streams"
            )
            found = self._shortages[entry.need_nbytes, entry.backed] = Reason.NO_MEMORY, text
        return found

    def horizon(self, entry: Entry) -> str:
        """How far ahead memory is promised to an entry."""
        return "at its worst" if self.rules.parking is None or not entry.backed else "for its next chunk"

    @property
    def backing(self) -> int:
        """Bytes on the host that are set aside for those who run or are parked."""
        return self._backed()[0]

    @property
    def all_backed(self) -> bool:
        """Whether all of them can be parked."""
        return self._backed()[1]

    def _backed(self) -> tuple[int, bool]:
        if self._backing is None:
            live = [*self.state.running.values(), *self.state.parked.values()]
            nbytes = [entry.worst_nbytes for entry in live if entry.backed]
            self._backing = sum(nbytes), len(nbytes) == len(live)
        return self._backing

    def _changed(self) -> None:
        """What was seen and said of what is promised holds no more."""
        self._view = None
        self._shortages.clear()
        self._fitting = None

    def add(self, entry: Entry) -> None:
        """Promise an entry what it needs next."""
        self._changed()
        if self._backing is not None and entry.state is StreamState.QUEUED:
            nbytes, everybody = self._backing
            self._backing = nbytes + entry.worst_nbytes * entry.backed, everybody and entry.backed
        self.demand += entry.need
        self.nbytes += entry.need_nbytes
        self.by_tenant[entry.tenant] = self.held(entry.tenant) + entry.need_nbytes
        self.counts[entry.tenant] = self.counts.get(entry.tenant, 0) + 1

    def lower(self, entry: Entry, relief: Relief) -> None:
        """Store a running stream more cheaply: `entry` is what it is from now on."""
        self._changed()
        self._misfits.clear()
        old = self.state.running[entry.id]
        self.demand = self.demand - old.need + entry.need
        self.nbytes += entry.need_nbytes - old.need_nbytes
        self.by_tenant[entry.tenant] += entry.need_nbytes - old.need_nbytes
        self.state.running[entry.id] = entry
        reason, told = (Reason.SHRUNK, self.shrunk) if relief is Relief.RETRIEVAL else (Reason.DEMOTED, self.demoted)
        text = f"needs {entry.need_nbytes} bytes of the pool for its next chunk instead of {old.need_nbytes}"
        told[entry.id] = Decision(entry.id, reason, text, squeeze=entry.squeeze)

    def park(self, entry: Entry, reason: Reason, text: str) -> None:
        """Move a running stream to the line."""
        self._changed()
        self._misfits.clear()
        self.demand -= entry.need
        self.nbytes -= entry.need_nbytes
        self.by_tenant[entry.tenant] -= entry.need_nbytes
        self.counts[entry.tenant] -= 1
        if not self.counts[entry.tenant]:
            del self.counts[entry.tenant]
        decision = Decision(entry.id, reason, text)
        self.state.park(
            self.rules,
            entry.but(
                state=StreamState.PARKED,
                decision=decision,
                parks=entry.parks + 1,
                stalls=entry.stalls + 1,
                since=self.now,
            ),
        )
        self.parked.append(decision)
