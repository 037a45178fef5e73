"""Policies: who is next, and who makes room. They see snapshots and return ids, and the core checks every answer."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, repeat
from math import inf
from operator import attrgetter
from typing import Protocol, runtime_checkable

from qvg_paged.scheduler.checks import check_number
from qvg_paged.scheduler.request import StreamState
from qvg_paged.scheduler.view import StreamView, SystemView

__all__ = ["FCFS", "EarliestDeadline", "FairShare", "Policy", "Priority"]


ID = attrgetter("id")


@runtime_checkable
class Policy(Protocol):
    """Two questions. A policy can make the system slow, never wrong.

    An exception, a late answer or a wrong one is replaced by that of `FCFS` and reported in ``Plan.policy_fault``;
    after ``SchedulerConfig.policy_strikes`` of these the policy is not asked any more. See docs/policies.md.
    """

    def rank(self, view: SystemView) -> Sequence[str]:
        """Ids of all ``view.waiting`` streams, each once, best first."""
        ...

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Ids out of ``view.parkable``, each once, best first, to make room for others.

        Args:
            view: the moment.
            stream: first in line and does not fit; name whom you would give up for it, or nobody. None: the running
                streams have outgrown the memory; if you name too few, the core goes on with the latest to arrive.
        """
        ...


class FCFS:
    """First come, first served. A large stream at the head of the line holds up smaller ones behind it."""

    def rank(self, view: SystemView) -> Sequence[str]:
        """Order of arrival."""
        return list(map(ID, view.waiting))

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Nobody makes room; if somebody must, the latest to arrive."""
        return [] if stream else [other.id for other in reversed(view.running) if other.id in view.parkable]


class Priority:
    """The most urgent first; waiting makes urgent.

    Args:
        aging_seconds: wait that counts as one step of priority, so that nobody starves; with rising load the wait of a
            stream is bounded by this times the spread of priorities, plus its turn in order of arrival.
    """

    def __init__(self, aging_seconds: float = 30.0) -> None:
        check_number("aging_seconds", aging_seconds, 1e-6, 1e9, "a number from 1e-6 to 1e9")
        self.aging_seconds = aging_seconds

    def rank(self, view: SystemView) -> Sequence[str]:
        """By priority and wait, then arrival."""
        now, pace = view.now, 1 / self.aging_seconds
        urgency = [s.priority - (now if s.since is None else s.since) * pace for s in view.waiting]
        order = sorted(range(len(urgency)), key=urgency.__getitem__, reverse=True)
        return [view.waiting[place].id for place in order]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Streams of lower priority, the lowest and latest first; age does not push anyone out."""
        least = inf if stream is None else stream.priority
        found = [other for other in view.running if other.id in view.parkable and other.priority < least]
        return [other.id for other in sorted(found, key=lambda s: (s.priority, -s.arrival))]


CALM = 4.0
"""Quanta that count as one where a tenant is being caught up with."""


class FairShare:
    """Every tenant gets service in proportion to its weight, whatever the number and size of its streams.

    Service is counted in cost units of chunks and of memory held over time. The tenant with the least of it, by
    weight, is next; one that comes back from idling starts level with those in line.

    Args:
        quantum: chunks (of the dearest kind) by which a tenant must be ahead before its streams make room for another.
            Where streams can be parked, service of two tenants in line never drifts apart by more than twice this and
            the number of streams that run together, in chunks of the dearest kind.
    """

    def __init__(self, quantum: float = 0.5) -> None:
        check_number("quantum", quantum, 0, 1e9, "a number from 0 to 1e9")
        self.quantum = quantum

    def rank(self, view: SystemView) -> Sequence[str]:
        """By the virtual time at which each stream's turn comes, if all before it and those that run take one chunk."""
        step = view.dearest_chunk or 1.0
        running = Counter(stream.tenant for stream in view.running)
        turns: list[float] = []
        ids: list[str] = []
        for name, line in view.lines.items():
            width = step / view.tenants[name].weight
            start = view.tenants[name].virtual_time + width * running.get(name, 0)
            turns += accumulate(repeat(width, len(line) - 1), initial=start)
            ids += line
        return list(map(ids.__getitem__, sorted(range(len(ids)), key=turns.__getitem__)))

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Streams of tenants that are ahead, the furthest first and of its streams the latest.

        A tenant with no more streams running, by weight, than the one that waits is being caught up with anyway: it
        makes way only if it is much further ahead.
        """
        tenants = view.tenants
        due = dict.fromkeys(tenants, -inf)
        if stream is not None:
            owner = tenants[stream.tenant]
            running = Counter(s.tenant for s in view.running)
            mine, step = running[stream.tenant] / owner.weight, self.quantum * view.dearest_chunk / owner.weight
            for name, tenant in tenants.items():
                more = running[name] / tenant.weight > mine
                due[name] = owner.virtual_time + (step if more else CALM * step)
        found = [s for s in view.running if s.id in view.parkable and tenants[s.tenant].virtual_time > due[s.tenant]]
        return [s.id for s in sorted(found, key=lambda s: (-tenants[s.tenant].virtual_time, -s.arrival))]


class EarliestDeadline:
    """Whose viewer runs out of frames first goes first.

    Args:
        startup: seconds in which the first chunk is due.
        patience: seconds after which a stream without a rate counts as due, so that it does not starve.
        margin: seconds of play-out that a running stream must have in hand, beyond those of the waiting one, to make
            room.
    """

    def __init__(self, startup: float = 2.0, patience: float = 60.0, margin: float = 4.0) -> None:
        for name, value in (("startup", startup), ("patience", patience), ("margin", margin)):
            check_number(name, value, 0, 1e9, "a number from 0 to 1e9")
        self.startup = startup
        self.patience = patience
        self.margin = margin

    def rank(self, view: SystemView) -> Sequence[str]:
        """By slack, then arrival."""
        now, startup, patience = view.now, self.startup, self.patience
        due = [
            (now if s.since is None else s.since) + (patience if s.deadline_fps is None else startup)
            if s.first_chunk is None or s.deadline_fps is None
            else s.first_chunk + s.committed / s.deadline_fps
            for s in view.waiting
        ]
        return [view.waiting[place].id for place in sorted(range(len(due)), key=due.__getitem__)]

    def _due(self, view: SystemView, stream: StreamView) -> float:
        slack = view.slack(stream, self.startup)
        if slack == inf and stream.state is not StreamState.RUNNING:
            return self.patience - view.waited(stream)
        return slack

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Streams with slack to spare, the most of it first."""
        least = -inf if stream is None else max(self._due(view, stream), 0.0) + self.margin
        found = [(self._due(view, s), s) for s in view.running if s.id in view.parkable]
        ordered = sorted(found, key=lambda item: (-item[0], -item[1].arrival))
        return [s.id for slack, s in ordered if slack > least]
