"""Begin of chunks: check, make room for all of them, then reserve; all or none."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from qvg_paged.budget import object_counts
from qvg_paged.chunk import Chunk
from qvg_paged.compact import make_room_for
from qvg_paged.errors import ArgumentError
from qvg_paged.events import EventKind, fault_point
from qvg_paged.kernels.block_table import NO_CODEBOOK, BlockTable
from qvg_paged.page import DENSE_FORMAT, QUANTISED_FORMAT
from qvg_paged.scratch import ScratchWriter
from qvg_paged.timeline import Demand

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager
    from qvg_paged.stream import Stream

__all__ = ["Need", "begin_chunks"]

FARTHEST = torch.finfo(torch.float32).max
"""Block tables hold positions in float32."""
Need = tuple[int, int, int, int]
"""Of a chunk: its frames, the spans its commit closes, frames and format of these."""


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
    make_room_for(manager, _counts(manager, count, plans))
    try:
        return [_begin(manager, plan, count, overrides) for plan in plans]
    except BaseException:
        manager.abort_all([stream.chunk for stream in streams if stream.chunk is not None])
        raise


class _Plan(NamedTuple):
    """What the next chunk of a stream sees, and how many spans its commit will close."""

    stream: "Stream"
    visible: tuple[int, ...]
    closing: int


def _plan(manager: "KVCacheManager", stream: "Stream", count: int, retrieve: Sequence[int]) -> _Plan:
    if stream.manager is not manager:
        raise ArgumentError(f"streams: expected streams of this manager, got {stream.id!r} of another")
    if stream.closed or stream.parked is not None or stream.chunk is not None:
        stream.require_idle()
    return _Plan(stream, stream.visible(retrieve), stream.timeline.closing(stream.committed, count))


def _counts(manager: "KVCacheManager", count: int, plans: list[_Plan]) -> Mapping[int, int]:
    """Pool objects by size that these chunks need, and what is kept free for demotion."""
    if len(plans) != 1:
        return _counted(manager, [_need(count, plan) for plan in plans])
    need = _need(count, plans[0])
    counts = manager.needs.get(need)
    if counts is None:
        counts = manager.needs[need] = _counted(manager, [need])
    return counts


def _need(count: int, plan: _Plan) -> Need:
    if not plan.closing:
        return count, 0, 0, QUANTISED_FORMAT
    timeline = plan.stream.timeline
    return count, plan.closing, timeline.closing_frames, timeline.closing_format


def _counted(manager: "KVCacheManager", needs: Iterable[Need]) -> Mapping[int, int]:
    total = manager.budget.reserve
    for frames, spans, span_frames, fmt in needs:
        pages = spans * span_frames
        total += Demand(frames, pages, spans) if fmt == QUANTISED_FORMAT else Demand(frames, 0, spans, pages)
    return {size: count for size, count in object_counts(manager.layouts, total).items() if count}


def _begin(manager: "KVCacheManager", plan: _Plan, count: int, positions: Mapping[int, float]) -> Chunk:
    stream, visible, closing = plan
    frames = range(stream.committed, stream.committed + count)
    fault_point("chunk.reserve")
    _, _, span_frames, fmt = _need(count, plan)
    reservation = manager.store.reserve(stream.tenant, count, closing, span_frames, fmt)
    manager.encoder.order_after()
    pages = [*stream.seen(visible), *reservation.scratch]
    where: tuple[float, ...] = (*visible, *frames)
    if positions:
        where = tuple([positions.get(frame, frame) for frame in (*visible, *frames)])
    table = BlockTable.of_one(
        tuple([page.id for page in pages]),
        tuple([NO_CODEBOOK if page.codebook is None else page.codebook.id for page in pages]),
        tuple([page.format for page in pages]),
        where,
        manager.device,
    )
    writer = ScratchWriter(manager.store.pool, manager.layouts[DENSE_FORMAT], reservation.scratch)
    chunk = stream.chunk = Chunk(stream, frames, visible, table, reservation, writer)
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
