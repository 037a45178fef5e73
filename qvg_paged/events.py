"""What the store tells the outside (one event sink, counts) and lets tests break (named fault points)."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from qvg_paged.errors import (
    ArgumentError,
    CorruptedError,
    IntegrityError,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
)

__all__ = [
    "CHUNK_FAULT_POINTS",
    "FAULT_POINTS",
    "TIER_FAULT_POINTS",
    "CacheEvent",
    "EventKind",
    "Tally",
    "fault_point",
    "inject_fault",
]


class EventKind(Enum):
    """What happened to pages."""

    ALLOCATE = "allocate"
    """Pages were taken from the pool for a chunk (scratch, and pages of a span that will close)."""
    COMMIT = "commit"
    """A chunk's frames became history."""
    PUBLISH = "publish"
    """A span's quantised pages replaced its dense ones."""
    EVICT = "evict"
    """Frames left the window."""
    FREE = "free"
    """Memory went back to the pool."""
    DEMOTE = "demote"
    """Frames are stored more cheaply, for good; `detail` says from which format to which."""
    PARK = "park"
    """A stream left the pool; `detail` says for which tier."""
    RESUME = "resume"
    """A stream came back; `detail` says from which tier."""
    RESIZE = "resize"
    """The pool gave memory back to the host engine, or got it back."""

    __hash__ = object.__hash__  # each is one object; the enumeration's own hash is a call of its name's, at every count


@dataclass(frozen=True)
class CacheEvent:
    """One change of the store.

    Attributes:
        kind: what happened.
        tenant: owner of the pages.
        stream: stream id; empty where memory is returned.
        frames: frames concerned, if any.
        pages: page ids concerned.
        nbytes: bytes of these pages and of codebooks that came or went with them.
        detail: formats or tier, where the kind has one.
    """

    kind: EventKind
    tenant: str
    stream: str
    frames: tuple[int, ...]
    pages: tuple[int, ...]
    nbytes: int
    detail: str = ""


class Tally:
    """Counts since a manager was made. As a context manager it counts the failures that pass through it.

    Attributes:
        events, frames, nbytes: events, frames and bytes by kind.
        counts: events, frames and bytes of each kind.
        failures: out of memory, NaN in a chunk, wrong books, a damaged copy, a failing disk; by class of the error.
    """

    COUNTED = (OutOfMemoryError, NonFiniteError, IntegrityError, CorruptedError, StorageError)

    def __init__(self) -> None:
        self.counts = {kind: [0, 0, 0] for kind in EventKind}
        self.failures: Counter[type[BaseException]] = Counter()

    def note(self, event: CacheEvent) -> None:
        """Count an event."""
        self.count(event.kind, len(event.frames), event.nbytes)

    def count(self, kind: EventKind, frames: int, nbytes: int) -> None:
        """Count an event of which nobody wants to hear more."""
        counts = self.counts[kind]
        counts[0] += 1
        counts[1] += frames
        counts[2] += nbytes

    def _column(self, index: int) -> Counter[EventKind]:
        return Counter({kind: counts[index] for kind, counts in self.counts.items() if counts[0]})

    @property
    def events(self) -> Counter[EventKind]:
        """Events by kind."""
        return self._column(0)

    @property
    def frames(self) -> Counter[EventKind]:
        """Their frames."""
        return self._column(1)

    @property
    def nbytes(self) -> Counter[EventKind]:
        """Their bytes."""
        return self._column(2)

    def fail(self, error: BaseException) -> None:
        """Count a failure."""
        for counted in self.COUNTED:
            if isinstance(error, counted):
                self.failures[counted] += 1

    def copy(self) -> "Tally":
        """The counts of the moment."""
        other = Tally()
        other.counts = {kind: [*counts] for kind, counts in self.counts.items()}
        other.failures = Counter(self.failures)
        return other

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, *__: object) -> None:
        if error is not None:
            self.fail(error)


CHUNK_FAULT_POINTS = (
    "pool.allocate",
    "chunk.reserve",
    "chunk.write",
    "commit.check",
    "encode.layer",
    "encode.publish",
    "stream.evict",
    "stream.fork",
)
"""Fault points of a chunk, in the order of its life."""

TIER_FAULT_POINTS = (
    "pool.compact",
    "pool.resize",
    "demote.reserve",
    "demote.layer",
    "demote.publish",
    "host.allocate",
    "park.copy",
    "park.publish",
    "disk.open",
    "disk.write",
    "disk.sync",
    "disk.rename",
    "disk.published",
    "disk.read",
    "resume.reserve",
    "resume.copy",
    "resume.verify",
    "resume.publish",
)
"""Fault points of the ladder."""

FAULT_POINTS = CHUNK_FAULT_POINTS + TIER_FAULT_POINTS
"""Names accepted by `inject_fault`."""

_armed: dict[str, Callable[[], None]] = {}


def fault_point(name: str) -> None:
    """Mark a place where a test may fail the store."""
    if _armed and name in _armed:
        _armed[name]()


@contextmanager
def inject_fault(name: str, error: BaseException, *, skip: int = 0) -> Iterator[list[int]]:
    """Raise `error` at the fault point `name` on its call number `skip` (from 0), once.

    Yields a list that holds the number of calls seen so far in its only element.

    Raises:
        ArgumentError: unknown point; the message lists the known ones.
    """
    if name not in FAULT_POINTS:
        raise ArgumentError(f"name: expected one of {', '.join(FAULT_POINTS)}, got {name!r}")
    seen = [0]

    def fire() -> None:
        seen[0] += 1
        if seen[0] == skip + 1:
            raise error

    _armed[name] = fire
    try:
        yield seen
    finally:
        del _armed[name]
