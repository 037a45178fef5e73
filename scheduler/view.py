"""Read-only snapshots: all that a policy gets to see."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import inf
from typing import Any

from qvg_paged.scheduler.request import StreamRequest, StreamState

__all__ = ["StreamView", "SystemView", "TenantView", "drafted"]


@dataclass(frozen=True, slots=True)
class StreamView:
    """A stream that waits or runs.

    Attributes:
        request: what was asked for, a copy.
        state: queued, parked or running.
        arrival: serial number of its submission.
        nbytes: pool bytes reserved for it when it runs next.
        worst_nbytes: most pool bytes it will ever hold.
        committed: frames committed.
        since: time since when it has waited, or run without a break; None before the first step that sees it.
        first_chunk: time at which its first chunk was reported, or None.
        parks: how often it was parked.
        priority: its own plus its tenant's.
        deadline_fps: its own or its tenant's play-out rate, or None.
        id, tenant: its name and who pays.
    """

    request: StreamRequest
    state: StreamState
    arrival: int
    nbytes: int
    worst_nbytes: int
    committed: int
    since: float | None
    first_chunk: float | None
    parks: int
    priority: int
    deadline_fps: float | None
    id: str = field(init=False, repr=False, compare=False)
    tenant: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.request.id)
        object.__setattr__(self, "tenant", self.request.tenant)


class _Draft:
    """A `StreamView` that is being filled in."""

    __slots__ = tuple(each.name for each in fields(StreamView))


def drafted(
    request: StreamRequest,
    state: StreamState,
    arrival: int,
    nbytes: int,
    worst_nbytes: int,
    committed: int,
    since: float | None,
    first_chunk: float | None,
    parks: int,
    priority: int,
    deadline_fps: float | None,
    name: str,
    tenant: str,
) -> StreamView:
    """A `StreamView` at a third of its price, which a step may have to pay thousands of times."""
    draft: Any = _Draft()
    draft.request, draft.state, draft.arrival = request, state, arrival
    draft.nbytes, draft.worst_nbytes, draft.committed = nbytes, worst_nbytes, committed
    draft.since, draft.first_chunk, draft.parks = since, first_chunk, parks
    draft.priority, draft.deadline_fps, draft.id, draft.tenant = priority, deadline_fps, name, tenant
    draft.__class__ = StreamView  # of the same layout, and frozen
    view: StreamView = draft
    return view


@dataclass(frozen=True)
class TenantView:
    """A tenant.

    Attributes:
        weight: its share of service.
        service: cost units it has had.
        virtual_time: service by weight; the smallest is due next.
        nbytes: pool bytes its running streams are promised.
        floor_nbytes: what it can claim back from others.
    """

    weight: float
    service: float
    virtual_time: float
    nbytes: int
    floor_nbytes: int


@dataclass(frozen=True)
class SystemView:
    """Everything at the time of a step.

    Attributes:
        now: time of the step.
        seed: the same for every rank and every replay; the only randomness a policy may use.
        pool_nbytes: bytes that may be promised.
        waiting: queued and parked streams in order of arrival.
        running: running streams in order of arrival.
        lines: ids of waiting streams by tenant, in order of arrival; the tenant of the longest in line first.
        parkable: ids of running streams that may be given up.
        tenants: tenants by name.
        dearest_chunk: most cost units that one chunk of one stream has taken.
    """

    now: float
    seed: int
    pool_nbytes: int
    waiting: Sequence[StreamView]
    running: tuple[StreamView, ...]
    lines: Mapping[str, tuple[str, ...]]
    parkable: frozenset[str]
    tenants: Mapping[str, TenantView]
    dearest_chunk: float

    @property
    def waiting_ids(self) -> Set[str]:
        """Ids of `waiting`."""
        return {stream.id for stream in self.waiting}

    @cached_property
    def running_by_tenant(self) -> Mapping[str, int]:
        """How many streams each tenant has in `running`, if any."""
        found: dict[str, int] = {}  # `collections.Counter` at a fifth of its price
        for stream in self.running:
            found[stream.tenant] = found.get(stream.tenant, 0) + 1
        return found

    def waited(self, stream: StreamView) -> float:
        """Seconds since the stream began to wait, or to run."""
        return 0.0 if stream.since is None else self.now - stream.since

    def slack(self, stream: StreamView, startup: float) -> float:
        """Seconds until the viewer of the stream runs out of frames.

        Play-out starts with the first chunk, which is due `startup` seconds after the stream began to wait. A stream
        without a rate has no viewer: infinite.
        """
        if stream.deadline_fps is None:
            return inf
        if stream.first_chunk is None:
            return startup - self.waited(stream)
        return stream.first_chunk + stream.committed / stream.deadline_fps - self.now
