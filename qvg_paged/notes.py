"""What a manager counts and tells: events are made only if somebody listens."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from qvg_paged.events import CacheEvent, EventKind, Tally
from qvg_paged.page import Page

if TYPE_CHECKING:
    from qvg_paged.stream import Stream

__all__ = ["Change", "Notes", "event", "freed"]

Change = tuple[EventKind, Sequence[int], Sequence[Page]]
"""What happened to which frames of a stream, and the pages that hold or held them."""


class Notes:
    """Counts and the sink of events; to be told once the books have changed.

    Attributes:
        tally: the counts.
        silent: whether there is no sink; then `tally` is all there is to tell.
    """

    def __init__(self, sink: Callable[[CacheEvent], None] | None) -> None:
        self.tally = Tally()
        self._counts = self.tally.counts
        self.silent = sink is None
        self._sink = sink

    def tell(self, stream: "Stream", changes: Sequence[Change], gone: Sequence[Page] = (), returned: int = 0) -> None:
        """Changes of a stream, and then that letting go of the pages `gone` has `returned` so many bytes."""
        if self.silent:
            for kind, frames, pages in changes:
                counts = self._counts[kind]
                counts[0] += 1
                counts[1] += len(frames)
                counts[2] += _nbytes(pages)
            if returned:
                self.tally.count(EventKind.FREE, 0, returned)
            return
        events = [event(kind, stream, frames, pages) for kind, frames, pages in changes]
        self.send([*events, *freed(stream.tenant, gone, returned)])

    def send(self, events: list[CacheEvent]) -> None:
        """Events that are there already."""
        for each in events:
            self.tally.note(each)
        if self._sink is not None:
            for each in events:
                self._sink(each)


def event(kind: EventKind, stream: "Stream", frames: Iterable[int], pages: Sequence[Page]) -> CacheEvent:
    """An event about pages of a stream."""
    names = tuple(page.id for page in pages)
    return CacheEvent(kind, stream.tenant, stream.id, tuple(frames), names, _nbytes(pages))


def freed(tenant: str, pages: Sequence[Page], returned: int) -> list[CacheEvent]:
    """The event of memory that went back to the pool, if any did: that of those pages that have no owner left."""
    if not returned:
        return []
    return [CacheEvent(EventKind.FREE, tenant, "", (), tuple(page.id for page in pages if not page.owners), returned)]


def _nbytes(pages: Sequence[Page]) -> int:
    """Bytes of pages, in order of frames, and of their codebooks: those of a span are neighbours."""
    nbytes, book = 0, None
    for page in pages:
        nbytes += page.nbytes
        if page.codebook is not book:
            book = page.codebook
            if book is not None:
                nbytes += book.nbytes
    return nbytes
