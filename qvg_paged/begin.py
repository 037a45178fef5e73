"""Begin of chunks: check, make room for all of them, then reserve; all or none."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qvg_paged.chunk import Chunk
from qvg_paged.compact import make_room
from qvg_paged.errors import ArgumentError, StateError
from qvg_paged.events import EventKind, fault_point
from qvg_paged.kernels.block_table import NO_CODEBOOK, BlockTable
from qvg_paged.page import DENSE_FORMAT, QUANTISED_FORMAT
from qvg_paged.scratch import ScratchWriter
from qvg_paged.timeline import Demand, Timeline

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager
    from qvg_paged.stream import Stream

__all__ = ["begin_chunks"]


def begin_chunks(
    manager: "KVCacheManager",
    streams: "Sequence[Stream]",
    frames: int | None,
    retrieve: Sequence[int],
    positions: Mapping[int, float] | None,
) -> list[Chunk]:
    """See `KVCacheManager.begin_chunks`."""
    most = manager.model.frames_per_chunk
    count = most if frames is None else frames
    if not isinstance(count, int) or not 1 <= count <= most:
        raise ArgumentError(f"frames: expected 1 to frames_per_chunk={most}, got {count}")
    if len(set(streams)) != len(streams):
        raise ArgumentError("streams: expected each stream once")
    overrides = _check_positions(positions)
    visible = [_ready(manager, stream, retrieve) for stream in streams]
    spans = [_closing_spans(stream, count) for stream in streams]
    needs = [_demand(stream.timeline, count, closing) for stream, closing in zip(streams, spans, strict=True)]
    make_room(manager, sum(needs, manager.budget.reserve))
    try:
        return [
            _begin(manager, stream, count, frames_seen, closing, overrides)
            for stream, frames_seen, closing in zip(streams, visible, spans, strict=True)
        ]
    except BaseException:
        manager.abort_all([stream.chunk for stream in streams if stream.chunk is not None])
        raise


def _ready(manager: "KVCacheManager", stream: "Stream", retrieve: Sequence[int]) -> tuple[int, ...]:
    if stream.manager is not manager:
        raise ArgumentError(f"streams: expected streams of this manager, got {stream.id!r} of another")
    stream.require_open()
    if stream.chunk is not None:
        raise StateError(f"stream: {stream.id!r} has an open chunk; commit or abort it first")
    return stream.visible(retrieve)


def _closing_spans(stream: "Stream", frames: int) -> int:
    timeline = stream.timeline
    return timeline.closed_spans(stream.committed + frames) - timeline.closed_spans(stream.committed)


def _demand(timeline: Timeline, frames: int, closing: int) -> Demand:
    pages = closing * timeline.closing_frames
    if timeline.closing_format == QUANTISED_FORMAT:
        return Demand(frames, pages, closing)
    return Demand(frames, 0, closing, pages)


def _begin(
    manager: "KVCacheManager",
    stream: "Stream",
    count: int,
    visible: tuple[int, ...],
    closing: int,
    positions: Mapping[int, float],
) -> Chunk:
    frames = range(stream.committed, stream.committed + count)
    fault_point("chunk.reserve")
    timeline = stream.timeline
    reservation = manager.store.reserve(stream.tenant, count, closing, timeline.closing_frames, timeline.closing_format)
    manager.encoder.order_after()
    pages = [stream.pages[frame] for frame in visible] + reservation.scratch
    where = map(float, (*visible, *frames))
    table = BlockTable(
        pages=tuple([page.slot.id for page in pages]),
        codebooks=tuple([page.codebook.slot.id if page.codebook else NO_CODEBOOK for page in pages]),
        formats=tuple([page.format for page in pages]),
        positions=tuple(where if not positions else (positions.get(int(frame), frame) for frame in where)),
        indptr=(0, len(pages)),
        device=manager.device,
    )
    writer = ScratchWriter(manager.store.pool.buffer, manager.layouts[DENSE_FORMAT], reservation.scratch)
    chunk = stream.chunk = Chunk(stream, frames, visible, table, reservation, writer)
    manager.send([manager.event(EventKind.ALLOCATE, stream, frames, reservation.pages)])
    return chunk


def _check_positions(positions: Mapping[int, float] | None) -> dict[int, float]:
    try:
        values = {frame: float(position) for frame, position in (positions or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"positions: expected a mapping from frame to position, got {positions!r}") from error
    if not all(map(math.isfinite, values.values())):
        raise ArgumentError(f"positions: expected finite numbers, got {values}")
    return values
