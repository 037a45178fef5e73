"""Read-only snapshots: all that a policy gets to see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from qvg_paged.scheduler.request import StreamRequest, StreamState

__all__ = ["StreamView", "SystemView", "TenantView"]


@dataclass(frozen=True)
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

    @property
    def id(self) -> str:
        """Its name."""
        return self.request.id

    @property
    def tenant(self) -> str:
        """Who pays."""
        return self.request.tenant


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
