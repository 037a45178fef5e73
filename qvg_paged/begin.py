"""Begin of chunks: check, make room for all of them, then reserve; all or none."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qvg_paged.budget import object_counts
from qvg_paged.chunk import Chunk
from qvg_paged.compact import make_room_for
from qvg_paged.errors import ArgumentError
from qvg_paged.events import EventKind, fault_point
from qvg_paged.page import QUANTISED_FORMAT
from qvg_paged.timeline import Demand

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager
    from qvg_paged.stream import Stream

__all__ = ["Need", "begin_chunks"]

FARTHEST = torch.finfo(torch.float32).max
"""Block tables hold positions in float32."""
Need = tuple[int, int, int, int]
"""Of a chunk: its frames, the spans its commit closes, frames and format of these."""
_Plan = tuple["Stream", Need, tuple[int, ...] | None]
"""A stream, what its next chunk needs, and the frames that the chunk sees if it has asked for some."""


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
    if len(streams) > 1 and len(set(streams)) != len(streams):
        raise ArgumentError("streams: expected each stream once")
    overrides = _check_positions(positions) if positions else {}
    plans = [_plan(manager, stream, count, retrieve) for stream in streams]
    make_room_for(manager, _counts(manager, plans))
    try:
        return [_begin(manager, plan, overrides) for plan in plans]
    except BaseException:
        manager.abort_all([stream.chunk for stream in streams if stream.chunk is not None])
        raise


def _plan(manager: "KVCacheManager", stream: "Stream", count: int, retrieve: Sequence[int]) -> _Plan:
    if stream.manager is not manager:
        raise ArgumentError(f"streams: expected streams of this manager, got {stream.id!r} of another")
    if stream.closed or stream.parked is not None or stream.chunk is not None:
        stream.require_idle()
    timeline = stream.timeline
    closing = timeline.closing(stream.committed, count)
    need = (count, 0, 0, QUANTISED_FORMAT)
    if closing:
        need = (count, closing, timeline.closing_frames, timeline.closing_format)
    return stream, need, stream.visible(retrieve) if retrieve else None


def _counts(manager: "KVCacheManager", plans: list[_Plan]) -> Mapping[int, int]:
    """Pool objects by size that these chunks need, and what is kept free for demotion."""
    if len(plans) != 1:
        return _counted(manager, [need for _, need, _ in plans])
    need = plans[0][1]
    counts = manager.needs.get(need)
    if counts is None:
        counts = manager.needs[need] = _counted(manager, [need])
    return counts


def _counted(manager: "KVCacheManager", needs: Iterable[Need]) -> Mapping[int, int]:
    total = manager.budget.reserve
    for frames, spans, span_frames, fmt in needs:
        pages = spans * span_frames
        total += Demand(frames, pages, spans) if fmt == QUANTISED_FORMAT else Demand(frames, 0, spans, pages)
    return {size: count for size, count in object_counts(manager.layouts, total).items() if count}


def _begin(manager: "KVCacheManager", plan: _Plan, positions: Mapping[int, float]) -> Chunk:
    stream, need, visible = plan
    frames = range(stream.committed, stream.committed + need[0])
    fault_point("chunk.reserve")
    reservation = manager.store.reserve(stream.tenant, *need)
    manager.encoder.order_after()
    chunk = stream.chunk = Chunk(stream, frames, reservation, visible, positions)
    manager.notes.tell(stream, [(EventKind.ALLOCATE, frames, reservation.pages)])
    return chunk


def _check_positions(positions: Mapping[int, float] | None) -> dict[int, float]:
    try:
        values = {frame: float(position) for frame, position in (positions or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"positions: expected a mapping from frame to position, got {positions!r}") from error
    if not all(abs(position) <= FARTHEST for position in values.values()):
        raise ArgumentError(f"positions: expected finite float32 numbers, got {values}")
    return values
