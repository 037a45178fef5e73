"""Commit of chunks: check, encode what is full, then change the books in one go that cannot fail."""

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

import torch

from qvg_paged.chunk import Chunk, ChunkState
from qvg_paged.errors import NonFiniteError, StateError
from qvg_paged.events import EventKind, fault_point
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.page import DENSE_FORMAT, Page
from qvg_paged.pool import byte_runs

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager
    from qvg_paged.stream import Stream

__all__ = ["commit_chunks"]


def commit_chunks(manager: "KVCacheManager", chunks: Sequence[Chunk]) -> None:
    """See `KVCacheManager.commit`: the host waits for the device once, whatever the number of chunks."""
    for chunk in chunks:
        missing = [layer for layer, written in enumerate(chunk.written) if not written]
        if missing:
            raise StateError(f"commit: expected K and V in every layer, layers {missing} were never written")
    try:
        fault_point("commit.check")
        broken = _not_finite(manager, chunks)
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
    stream = chunk.stream
    dense = {**stream.pages, **dict(zip(chunk.frames, chunk.reservation.scratch, strict=True))}
    first = stream.timeline.closed_spans(stream.committed)
    closing = [stream.timeline.span(first + index) for index in range(len(chunk.reservation.spans))]
    try:
        for span, quantised in zip(closing, chunk.reservation.spans, strict=True):
            manager.encoder.encode([dense[frame] for frame in span], quantised)
        fault_point("encode.publish")
        fault_point("stream.evict")
    except BaseException:
        manager.abort(chunk)
        raise
    manager.finish(chunk, ChunkState.COMMITTED)
    stream.pages = dense
    stream.committed = chunk.frames.stop
    events = [manager.event(EventKind.COMMIT, stream, chunk.frames, chunk.reservation.scratch)]
    leaving: list[Page] = []
    for span, quantised in zip(closing, chunk.reservation.spans, strict=True):
        leaving += [dense[frame] for frame in span]
        stream.pages.update(zip(span, quantised, strict=True))
        for page in quantised:
            page.demotions = int(stream.rung > 0)
        events.append(manager.event(EventKind.PUBLISH, stream, span, quantised))
    gone = _evict(stream)
    if gone:
        events.append(manager.event(EventKind.EVICT, stream, gone, list(gone.values())))
    manager.send([*events, *manager.release(stream.tenant, leaving + list(gone.values()))])


def _not_finite(manager: "KVCacheManager", chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks with NaN or infinity: a reduction per stretch of scratch, whose ends are NaN if any value is."""
    layout, buffer = manager.layouts[DENSE_FORMAT], manager.store.pool.buffer
    payload = layout.num_layers * layout.layer_nbytes
    owners: list[Chunk] = []
    ends: list[torch.Tensor] = []
    for chunk in chunks:
        slots = [page.slot for page in chunk.reservation.scratch]
        whole = payload == layout.page_nbytes  # what follows the payload of a page is nobody's
        stretches = byte_runs(slots) if whole else [(s.id * GRANULE, s.id * GRANULE + payload) for s in slots]
        for start, stop in stretches:
            ends += buffer[start:stop].view(manager.model.dtype).aminmax()
            owners.append(chunk)
    found = torch.stack(ends).tolist()
    finite = (isfinite(low) and isfinite(high) for low, high in zip(found[::2], found[1::2], strict=True))
    broken = {id(chunk) for chunk, good in zip(owners, finite, strict=True) if not good}
    return [chunk for chunk in chunks if id(chunk) in broken]


def _evict(stream: "Stream") -> dict[int, Page]:
    """Take frames that left the window out of the stream; their pages, still to be released."""
    kept = set(stream.timeline.kept(stream.committed))
    return {frame: stream.pages.pop(frame) for frame in list(stream.pages) if frame not in kept}
