"""What the checker knows from the lines it has read: streams, tenants, promises. Nothing here trusts a plan."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FINAL", "Ledger", "Stream", "Tenant", "Violation"]

FINAL = ("finished", "failed", "cancelled", "refused")


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
class Stream:
    """A stream, as the log tells its story.

    Attributes:
        worst: bytes at its worst; `nbytes` are those promised now.
        reason: why it is where it is; `ending` why it ended, until a plan has told so.
        chunks_before: chunks finished when it last began to run.
        stalls: parks since its latest chunk.
        spent: cost units it has taken.
        backed: whether the host had room for it at its worst, beside those who have it set aside, when it was admitted;
            who was admitted without keeps its worst case until it ends.
        rung, kept: how cheaply it is stored, and how many frames it keeps for retrieval; `lowest` and `least_kept` are
            its floors.
    """

    tenant: str
    frames: int
    branches: int
    worst: int
    state: str = "queued"
    reason: str = "queued"
    committed: int = 0
    chunks: int = 0
    chunks_before: int = 0
    stalls: int = 0
    ending: str = ""
    nbytes: int = 0
    spent: float = 0.0
    backed: bool = False
    rung: int = 0
    kept: int = 0
    lowest: int = 0
    least_kept: int = 0


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
        streams: all there ever were; `live` are those that are not final, `untold` those whose end no plan has told.
        planned: first frame and number of frames of each stream of the latest plan; `held` its promises as tenant,
            stream, bytes and branches.
        limit: bytes that may be promised if less than the pool.
        reserve: bytes that the cache promises to nobody.
        open: the first record.
    """

    violations: list[Violation] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    live: dict[str, Stream] = field(default_factory=dict)
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

    def within(self, *states: str) -> dict[str, Stream]:
        """Live streams in any of these states."""
        return {name: s for name, s in self.live.items() if s.state in states}

    def end(self, name: str, state: str, ending: str) -> None:
        """A stream became final."""
        stream = self.streams[name]
        stream.state, stream.ending = state, ending
        self.live.pop(name, None)
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

    def back(self, stream: Stream) -> None:
        """A stream is admitted: whether host memory is set aside for it, as it stays."""
        claimed = sum([other.worst for other in self.live.values() if other.backed])
        stream.backed = self.parks and claimed + stream.worst <= self.open["host_nbytes"]

    def roomy(self) -> bool:
        """Whether the host has room for all streams at their worst, so that everyone can be parked."""
        return self.parks and sum([s.worst for s in self.live.values()]) <= self.open["host_nbytes"]

    def tenant_nbytes(self) -> dict[str, int]:
        """Bytes promised to each tenant."""
        held: dict[str, int] = defaultdict(int)
        for tenant, _, nbytes, _ in self.held:
            held[tenant] += nbytes
        return held
