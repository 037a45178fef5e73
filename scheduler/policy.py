"""Policies: who is next, and who makes room. They see snapshots and return ids, and the core checks every answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

from qvg_paged.scheduler.checks import check_number
from qvg_paged.scheduler.line import ByKey, Turns
from qvg_paged.scheduler.request import StreamState
from qvg_paged.scheduler.view import StreamView, SystemView

__all__ = ["FCFS", "EarliestDeadline", "FairShare", "KeyedPolicy", "Policy", "Priority"]

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


class KeyedPolicy(Policy, Protocol):
    """A policy of this package: its order is that of a key which does not change while a stream waits.

    So a step looks at the head of the line only. `rank` answers the same, at the price of a look at everybody.
    """

    def key(self, stream: Any) -> float:
        """Place of a stream (`StreamView`, or the scheduler's own entry) in its tenant's line, before arrival."""
        ...


class _ByKey:
    """What policies whose key is everything have in common."""

    def key(self, stream: Any) -> float:
        """See `KeyedPolicy.key`: none, so that arrival is everything."""
        del stream
        return 0.0

    def rank(self, view: SystemView) -> Sequence[str]:
        """By key, then arrival."""
        return list(map(ID, sorted(view.waiting, key=self.key)))


class FCFS(_ByKey):
    """First come, first served. A large stream at the head of the line holds up smaller ones behind it."""

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Nobody makes room; if somebody must, the latest to arrive."""
        return [] if stream else [other.id for other in reversed(view.running) if other.id in view.parkable]


@dataclass(frozen=True)
class Priority(_ByKey):
    """The most urgent first; waiting makes urgent.

    Args:
        aging_seconds: wait that counts as one step of priority, so that nobody starves; with rising load the wait of a
            stream is bounded by this times the spread of priorities, plus its turn in order of arrival.
    """

    aging_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_number("aging_seconds", self.aging_seconds, 1e-6, 1e9, "a number from 1e-6 to 1e9")

    def key(self, stream: Any) -> float:
        """All age alike, so that what counts is since when: by that and priority."""
        return float((inf if stream.since is None else stream.since) * (1 / self.aging_seconds) - stream.priority)

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Streams of lower priority, the lowest and latest first; age does not push anyone out."""
        least = inf if stream is None else stream.priority
        found = [other for other in view.running if other.id in view.parkable and other.priority < least]
        return [other.id for other in sorted(found, key=lambda s: (s.priority, -s.arrival))]


@dataclass(frozen=True)
class FairShare:
    """Every tenant gets service in proportion to its weight, whatever the number and size of its streams.

    Service is counted in cost units of chunks and of memory held over time. The tenant with the least of it, by
    weight, is next; one that comes back from idling starts level with those in line, and after a time in which nobody
    had to wait all do.

    Args:
        quantum: a stream makes room for another tenant's if its own tenant would be further ahead than one chunk (of
            the dearest kind) and this part of one, once those that run have finished their next. Where streams can be
            parked, service of two tenants in line never drifts apart by more than twice this and the number of streams
            that run together, in chunks of the dearest kind.
    """

    quantum: float = 0.5

    def __post_init__(self) -> None:
        check_number("quantum", self.quantum, 0, 1e9, "a number from 0 to 1e9")

    def key(self, stream: Any) -> float:
        """None: streams of one tenant come in order of arrival."""
        del stream
        return 0.0

    def turns(self, view: SystemView) -> Turns:
        """By the virtual time at which each stream's turn comes, if all before it and those that run take one chunk."""
        step = view.dearest_chunk or 1.0
        turns = {name: (tenant.virtual_time, step / tenant.weight) for name, tenant in view.tenants.items()}
        for name, count in view.running_by_tenant.items():
            start, width = turns[name]
            turns[name] = start + width * count, width
        return turns

    def rank(self, view: SystemView) -> Sequence[str]:
        """In the order of turns."""
        arrival = {stream.id: stream.arrival for stream in view.waiting}
        lines = {name: [(0.0, arrival[stream], stream) for stream in line] for name, line in view.lines.items()}
        return [stream for _, stream in ByKey(lines, self.turns(view)).walk()]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Streams of tenants that will be ahead after the next chunk: the furthest tenant's first, the latest of each.

        What runs counts as served: a tenant that has been behind and is catching up with many streams stops in time.
        """
        tenants, step = view.tenants, view.dearest_chunk
        running = view.running_by_tenant
        ahead: dict[str, float] = {}
        mine, width = -inf, 0.0
        if stream is not None:
            owner = tenants[stream.tenant]
            width = step / owner.weight
            mine = owner.virtual_time + width * running.get(stream.tenant, 0)
        slack = 1 + self.quantum
        for name, count in running.items():
            tenant = tenants[name]
            theirs = step / tenant.weight
            end = tenant.virtual_time + theirs * count
            if end - mine > slack * (width + theirs) / 2:
                ahead[name] = -end
        if not ahead:
            return []
        parkable = view.parkable
        found = [other for other in view.running if other.tenant in ahead and other.id in parkable]
        return [other.id for other in sorted(found, key=lambda other: (ahead[other.tenant], -other.arrival))]


@dataclass(frozen=True)
class EarliestDeadline(_ByKey):
    """Whose viewer runs out of frames first goes first.

    Args:
        startup: seconds in which the first chunk is due.
        patience: seconds after which a stream without a rate counts as due, so that it does not starve.
        margin: seconds of play-out that a running stream must have in hand, beyond those of the waiting one, to make
            room.
    """

    startup: float = 2.0
    patience: float = 60.0
    margin: float = 4.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value, 0, 1e9, "a number from 0 to 1e9")

    def key(self, stream: Any) -> float:
        """Slack shrinks alike for all who wait, so that what counts is when it ends."""
        if stream.deadline_fps is not None and stream.first_chunk is not None:
            return float(stream.first_chunk + stream.committed / stream.deadline_fps)
        since = inf if stream.since is None else stream.since
        return float(since + (self.patience if stream.deadline_fps is None else self.startup))

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
