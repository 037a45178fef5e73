"""Commit of chunks: check, encode what is full, then change the books in one go that cannot fail."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvg_paged.chunk import Chunk, ChunkState
from qvg_paged.closing import encode_closing
from qvg_paged.errors import NonFiniteError, StateError
from qvg_paged.events import EventKind, fault_point
from qvg_paged.notes import Change
from qvg_paged.page import Page

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager

__all__ = ["commit_chunks"]


def commit_chunks(manager: "KVCacheManager", chunks: Sequence[Chunk]) -> None:
    """See `KVCacheManager.commit`: the host waits for the device once, whatever the number of chunks."""
    for chunk in chunks:
        if not all(chunk.written):
            missing = [layer for layer, written in enumerate(chunk.written) if not written]
            raise StateError(f"commit: expected K and V in every layer, layers {missing} were never written")
    try:
        fault_point("commit.check")
        broken = manager.finite.broken(chunks)
    except BaseException:
        for chunk in chunks:
            manager.abort(chunk)
        raise
    if broken:
        for chunk in broken:
            manager.abort(chunk)
        names = ", ".join(f"frames {c.frames.start}-{c.frames.stop - 1} of stream {c.stream.id!r}" for c in broken)
        fate = "the chunk was aborted" if len(broken) == 1 else "these chunks were aborted"
        raise NonFiniteError(f"commit: expected finite K and V, {names} hold NaN or infinity; {fate}")
    for chunk in chunks:
        _commit(manager, chunk)


def _commit(manager: "KVCacheManager", chunk: Chunk) -> None:
    """Whatever fails before the books change aborts the chunk and leaves the stream as it was."""
    stream, frames, pages = chunk.stream, chunk.frames, chunk.stream.pages
    scratch, quantised = chunk.reservation
    try:
        closing = encode_closing(manager, chunk) if quantised else []
        fault_point("encode.publish")
        fault_point("stream.evict")
    except BaseException:
        manager.abort(chunk)
        raise
    manager.finish(chunk, ChunkState.COMMITTED)
    pages.update(zip(frames, scratch, strict=True))
    changes: list[Change] = [(EventKind.COMMIT, frames, scratch)]
    gone: list[Page] = []
    for span, new in zip(closing, quantised, strict=True):
        gone += [pages[frame] for frame in span]
        pages.update(zip(span, new, strict=True))
        for page in new:
            page.demotions = int(stream.rung > 0)
        changes.append((EventKind.PUBLISH, span, new))
    leaving = stream.timeline.leaving(stream.committed, frames.stop)
    stream.committed = frames.stop
    if leaving:
        evicted = [pages.pop(frame) for frame in leaving]
        changes.append((EventKind.EVICT, leaving, evicted))
        gone += evicted
    returned = manager.store.release(gone, manager.encoder.fence_of_spans()) if gone else 0
    manager.notes.tell(stream, changes, gone, returned)
