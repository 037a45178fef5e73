"""What the checker knows from the lines it has read: streams, tenants, promises. Nothing here trusts a plan."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from stress.places import FINAL, Places, Stream

__all__ = ["FINAL", "Ledger", "Stream", "Tenant", "Violation"]


@dataclass(frozen=True)
class Violation:
    """Something that must not happen.

    Attributes:
        invariant: its name.
        seq: line of the log.
        text: what happened.
    """

    invariant: str
    seq: int
    text: str


@dataclass
class Tenant:
    """A tenant: rights, floors of quality, cost units, and for how many plans it has claimed its floor in vain."""

    ceiling: int | None = None
    floor: int = 0
    weight: float = 1.0
    service: float = 0.0
    claiming: int = 0
    lowest: int = 2
    least_kept: int = 0


@dataclass
class Ledger:
    """State of a log up to a line.

    Attributes:
        violations: what was found.
        streams: all there ever were; `live` are those that are not final, by `places`, `untold` those whose end no plan
            has told.
        planned: first frame and number of frames of each stream of the latest plan; `held` its promises as tenant,
            stream, bytes and branches.
        limit: bytes that may be promised if less than the pool.
        reserve: bytes that the cache promises to nobody.
        open: the first record.
    """

    violations: list[Violation] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    live: dict[str, Stream] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    untold: dict[str, Stream] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=lambda: defaultdict(Tenant))
    seq: int = -1
    now: float = float("-inf")
    leader: str = ""
    leader_chunks: int = 0
    limit: int | None = None
    reserve: int = 0
    open: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, tuple[int, int]] = field(default_factory=dict)
    held: list[tuple[str, str, int, int]] = field(default_factory=list)

    def expect(self, invariant: str, holds: bool, text: str) -> None:
        """Note a violation unless it holds."""
        if not holds:
            self.violations.append(Violation(invariant, self.seq, text))

    def accept(self, name: str, stream: Stream) -> None:
        """A stream joins the line."""
        if name in self.live:
            self.places.leave(name, self.live[name])
        self.live[name] = stream
        self.places.join(name, stream)

    def end(self, name: str, state: str, ending: str) -> None:
        """A stream became final."""
        stream = self.streams[name]
        stream.state, stream.ending = state, ending
        if self.live.pop(name, None) is not None:
            self.places.leave(name, stream)
        if ending:
            self.untold[name] = stream

    @property
    def parks(self) -> bool:
        """Whether streams may be parked at all."""
        return self.open.get("reservation") == "next chunk"

    def pinned(self, name: str) -> bool:
        """Whether it may have been impossible to park a running stream."""
        stream = self.streams[name]
        stuck = name == self.leader and stream.chunks == self.leader_chunks and stream.chunks != stream.chunks_before
        return stuck or stream.stalls >= self.open["config"]["max_parks"] or not stream.backed

    @property
    def host_nbytes(self) -> int:
        """Room on the host for streams that are parked."""
        return int(self.open["host_nbytes"]) if self.parks else -1

    def roomy(self) -> bool:
        """Whether the host has room for all streams at their worst, so that everyone can be parked."""
        return self.places.worst <= self.host_nbytes

    def tenant_nbytes(self) -> dict[str, int]:
        """Bytes promised to each tenant."""
        held: dict[str, int] = defaultdict(int)
        for tenant, _, nbytes, _ in self.held:
            held[tenant] += nbytes
        return held
