"""Where live streams are and why, kept up with the log: a plan is checked at the price of what it changes."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

__all__ = ["FINAL", "Places", "Stream"]

FINAL = ("finished", "failed", "cancelled", "refused")


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
class Places:
    """Live streams by what they do.

    Attributes:
        running, waiting: by name; of those that wait, `parked` have run.
        reasons: who waits for each reason.
        tenants: how many of each tenant wait.
        worst, backed: bytes of all live streams at their worst, and of those for whom the host has room set aside.
    """

    running: dict[str, Stream] = field(default_factory=dict)
    waiting: dict[str, Stream] = field(default_factory=dict)
    parked: dict[str, Stream] = field(default_factory=dict)
    reasons: dict[str, dict[str, Stream]] = field(default_factory=lambda: defaultdict(dict))
    tenants: Counter[str] = field(default_factory=Counter)
    worst: int = 0
    backed: int = 0

    def join(self, name: str, stream: Stream) -> None:
        """A stream is accepted."""
        self.worst += stream.worst
        self._wait(name, stream)

    def start(self, name: str, *, room: int) -> None:
        """It runs; the first time, it is settled whether the host, which has `room`, has a place for it."""
        stream = self.waiting.get(name)
        if stream is None:
            return
        self._stop_waiting(name, stream)
        if self.parked.pop(name, None) is None:
            stream.backed = self.backed + stream.worst <= room
            self.backed += stream.backed * stream.worst
        self.running[name] = stream

    def park(self, name: str, reason: str) -> None:
        """It waits to go on; who does not run stays where it is, which is for others to find."""
        stream = self.running.pop(name, None)
        if stream is not None:
            stream.reason = reason
            self.parked[name] = stream
            self._wait(name, stream)

    def tell(self, name: str, reason: str) -> None:
        """It waits for another reason."""
        stream = self.waiting[name]
        if stream.reason != reason:
            del self.reasons[stream.reason][name]
            self.reasons[reason][name] = stream
            stream.reason = reason

    def leave(self, name: str, stream: Stream) -> None:
        """It is final."""
        self.worst -= stream.worst
        self.backed -= stream.backed * stream.worst
        if self.running.pop(name, None) is None:
            self.parked.pop(name, None)
            self._stop_waiting(name, stream)

    def _wait(self, name: str, stream: Stream) -> None:
        self.waiting[name] = self.reasons[stream.reason][name] = stream
        self.tenants[stream.tenant] += 1

    def _stop_waiting(self, name: str, stream: Stream) -> None:
        del self.waiting[name], self.reasons[stream.reason][name]
        self.tenants[stream.tenant] -= 1
        if not self.tenants[stream.tenant]:
            del self.tenants[stream.tenant]
