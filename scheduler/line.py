"""Streams in line, best first, looked at only as far as somebody asks: a step that admits two of thousands sees a few.

Every tenant's streams are kept sorted by a key that does not change while they wait. Which tenant's turn it is comes
from a heap with one item per tenant.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property
from heapq import heapify, heappop, heapreplace
from typing import Protocol

from qvg_paged.scheduler.decision import Decision, Reason

__all__ = ["ByKey", "Group", "Order", "Ranking", "Spot", "Turns", "Waiting"]

Spot = tuple[float, int, str]
"""A stream in its tenant's line: key, arrival, id."""
Turns = Mapping[str, tuple[float, float]]
"""By tenant: when the first of its line has its turn, and how much later each further one."""
Group = tuple[Reason, str]
"""Why many streams wait, in the same words."""


class Order(Protocol):
    """An order of the line, which does not change any more."""

    def walk(self, barred: Set[str] = frozenset()) -> Iterator[tuple[str, str]]:
        """Tenant and id of each stream, best first, but those of tenants that are in `barred` by then."""


class Placed(Protocol):
    """A stream that has a place in line."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def tenant(self) -> str:
        """Who pays."""


class Ranking:
    """An order that somebody has written down.

    Args:
        streams: best first.
    """

    def __init__(self, streams: Sequence[Placed]) -> None:
        self._streams = streams

    def walk(self, barred: Set[str] = frozenset()) -> Iterator[tuple[str, str]]:
        """See `Order.walk`."""
        return ((stream.tenant, stream.id) for stream in self._streams if stream.tenant not in barred)


class ByKey:
    """By key and arrival, or by the turns of tenants.

    Args:
        lines: of each tenant, sorted; nobody changes them any more.
        turns: of tenants, if these decide.
        ahead: who goes before everybody else, as tenant and id; `out` has nothing to do with the line now.
    """

    def __init__(self, lines: Mapping[str, Sequence[Spot]], turns: Turns | None, out: Set[str] = frozenset()) -> None:
        self._lines, self._turns, self._out = lines, turns, out
        self.ahead: Sequence[tuple[str, str]] = ()

    def turn(self, tenant: str, index: int) -> tuple[float, int]:
        """When the stream at a place of a tenant's line has its turn; ties go to whose tenant has waited longest."""
        line = self._lines[tenant]
        if self._turns is None:
            return line[index][:2]
        start, width = self._turns[tenant]
        return start + width * index, line[0][1]

    def turn_of(self, tenant: str, key: float, arrival: int) -> tuple[float, int]:
        """The same of a stream by its key and arrival."""
        return self.turn(tenant, bisect_left(self._lines[tenant], (key, arrival, "")))

    def walk(self, barred: Set[str] = frozenset()) -> Iterator[tuple[str, str]]:
        """See `Order.walk`."""
        yield from (place for place in self.ahead if place[0] not in barred)
        done = self._out | {name for _, name in self.ahead} if self.ahead else self._out
        turns = self._turns
        if turns is None:
            heap = [(*line[0][:2], tenant, 0) for tenant, line in self._lines.items()]
        else:
            heap = [(turns[tenant][0], line[0][1], tenant, 0) for tenant, line in self._lines.items()]
        heapify(heap)
        while heap:
            _, since, tenant, index = heap[0]
            line, after = self._lines[tenant], index + 1
            if tenant in barred:
                heappop(heap)
                continue
            if after == len(line):
                heappop(heap)
            elif turns is None:
                heapreplace(heap, (*line[after][:2], tenant, after))
            else:
                start, width = turns[tenant]
                heapreplace(heap, (start + width * after, since, tenant, after))
            if line[index][2] not in done:
                yield tenant, line[index][2]


class Waiting:
    """What a step decided about everybody in line; written out when somebody asks.

    Args:
        order: of the line.
        told: decisions about single streams; the others wait for what `group` says, or for their tenant's quota.
        group: why most of them wait.
        barred: tenants whose quota is used up, and what their other streams are told.
        left: who has left the line in this step.
        parked: decisions about those who have joined it.
    """

    def __init__(
        self,
        order: Order | None = None,
        told: Mapping[str, Decision] | None = None,
        group: Group = (Reason.BEHIND, ""),
        barred: Mapping[str, Group] | None = None,
        left: Set[str] = frozenset(),
        parked: Sequence[Decision] = (),
    ) -> None:
        self._order, self._told, self._group = order, told or {}, group
        self._barred, self._left, self._parked = barred or {}, left, tuple(parked)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Waiting) and self.decisions == other.decisions

    def __hash__(self) -> int:
        return hash(self.decisions)

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """In the order of the line."""
        if self._order is None:
            return self._parked
        walk = (place for place in self._order.walk() if place[1] not in self._left)
        return (*(self._decision(tenant, name) for tenant, name in walk), *self._parked)

    def _decision(self, tenant: str, name: str) -> Decision:
        return self._told.get(name) or Decision(name, *self._barred.get(tenant, self._group))
