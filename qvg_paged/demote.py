"""The first rungs of the ladder: streams are stored more cheaply, span by span, and never go back.

Rule for pages that forks share. A quantised page is demoted once for all who hold it and may go that far: whose
quality floor allows it and who have no open chunk; the others keep the page as it is. A dense page is the tail of
every holder by itself: whoever is squeezed gets the quantised one (streams squeezed in the same call share it), and
the dense one stays until the last holder lets go.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qvg_paged.compact import make_room
from qvg_paged.config import Rung
from qvg_paged.errors import ArgumentError, QualityFloorError
from qvg_paged.events import CacheEvent, EventKind, fault_point
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.kernels.requantise import requantise_part
from qvg_paged.ladder import SqueezedTimeline, deepest_rung, least_retrieval, squeeze
from qvg_paged.page import DENSE_FORMAT, QUANTISED_FORMAT, Page
from qvg_paged.timeline import Demand, Timeline

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager
    from qvg_paged.stream import Stream

__all__ = ["FrameQuality", "demote_streams", "ledger", "shrink_retrieval"]

DEMOTED_FORMAT = 2


@dataclass(frozen=True)
class FrameQuality:
    """How a stored frame is kept.

    Attributes:
        format: name of its format.
        demotions: how often it was stored more cheaply than its window says; never undone.
        bits: stored bits per element of K and V, codebooks left out.
    """

    format: str
    demotions: int
    bits: float


def ledger(manager: "KVCacheManager", stream: "Stream") -> dict[int, FrameQuality]:
    """See `Stream.ledger`."""
    part = manager.layouts[0].key
    elements = 2 * manager.model.num_layers * part.tokens * part.heads * part.head_dim
    kept = stream.parked.quality() if stream.parked else [(f, p.format, p.demotions) for f, p in stream.pages.items()]
    layouts = manager.layouts
    return {
        frame: FrameQuality(layouts[fmt].format.name, demotions, layouts[fmt].page_payload_nbytes * 8 / elements)
        for frame, fmt, demotions in kept
    }


def demote_streams(manager: "KVCacheManager", streams: "Sequence[Stream]", rung: Rung) -> int:
    """See `KVCacheManager.demote`."""
    if not isinstance(rung, Rung):
        raise ArgumentError(f"rung: expected a Rung, got {rung!r}")
    for stream in streams:
        _check(manager, stream, rung)
    shared: dict[tuple[Page, ...], list[Page]] = {}
    returned = 0
    for stream in streams:
        if rung >= Rung.TAIL:
            returned += _squeeze_tail(manager, stream, shared)
        if rung >= Rung.SPANS and stream.rung < Rung.SPANS:
            returned += _demote_spans(manager, stream)
    return returned


def _check(manager: "KVCacheManager", stream: "Stream", rung: Rung) -> None:
    if stream.manager is not manager:
        raise ArgumentError(f"streams: expected streams of this manager, got {stream.id!r} of another")
    stream.require_idle()
    lowest = deepest_rung(manager.config, stream.quality_floor)
    if rung > lowest:
        raise QualityFloorError(
            f"rung: expected at most {lowest.name} for stream {stream.id!r} of tenant {stream.tenant!r}, "
            f"got {rung.name}; its quality floor, its tenant's or demote_to={_name(manager)} allows no more"
        )


def _name(manager: "KVCacheManager") -> str:
    target = manager.config.demote_to
    return "None" if target is None else repr(getattr(target, "name", target))


def _squeeze_tail(manager: "KVCacheManager", stream: "Stream", shared: dict[tuple[Page, ...], list[Page]]) -> int:
    """Quantise the dense tail in cells, those too that an error left out; from now on commits do so by themselves."""
    new = squeeze(stream.timeline, Rung.TAIL, stream.committed, manager.model)
    returned = 0
    for frames in _dense_cells(stream, new):
        dense = [stream.pages[frame] for frame in frames]
        quantised = shared.get(tuple(dense))
        if quantised is None:
            quantised = shared[tuple(dense)] = _encode_cell(manager, stream, dense)
        else:
            manager.store.retain(quantised)
        stream.timeline = new  # by the old rules a commit would take these pages for dense ones
        stream.pages.update(zip(frames, quantised, strict=True))
        returned += _tell(manager, stream, list(frames), quantised, dense)
    stream.timeline = new
    return returned


def _dense_cells(stream: "Stream", timeline: Timeline) -> list[range]:
    """Full cells whose frames are all there and still dense."""
    first = timeline.regular_spans if isinstance(timeline, SqueezedTimeline) else 0
    cells = map(timeline.span, range(first, timeline.closed_spans(stream.committed)))

    def is_dense(frame: int) -> bool:
        return frame in stream.pages and stream.pages[frame].format == DENSE_FORMAT

    return [frames for frames in cells if all(map(is_dense, frames))]


def _encode_cell(manager: "KVCacheManager", stream: "Stream", dense: list[Page]) -> list[Page]:
    make_room(manager, Demand(0, len(dense), 1))
    fault_point("demote.reserve")
    (quantised,) = manager.store.reserve(stream.tenant, 0, 1, len(dense)).spans
    try:
        manager.encoder.encode(dense, quantised)
        fault_point("demote.publish")
    except BaseException:
        manager.store.release(quantised, manager.encoder.fence())
        raise
    for page in quantised:
        page.demotions = 1
    return quantised


def _demote_spans(manager: "KVCacheManager", stream: "Stream") -> int:
    """Requantise the residual of all quantised pages; each span is demoted or is as it was."""
    spans: dict[int, list[int]] = defaultdict(list)
    for frame, page in stream.pages.items():
        if page.format == QUANTISED_FORMAT:
            spans[page.codebook_id if page.codebook else -1 - frame].append(frame)
    batch = min(manager.model.frames_per_chunk, manager.config.span_frames)
    returned = 0
    for frames in list(spans.values()):
        for start in range(0, len(frames), batch):
            returned += _demote_pages(manager, stream, frames[start : start + batch])
    stream.timeline = squeeze(stream.timeline, Rung.SPANS, stream.committed, manager.model)
    return returned


def _demote_pages(manager: "KVCacheManager", stream: "Stream", frames: list[int]) -> int:
    pages = [stream.pages[frame] for frame in frames]
    make_room(manager, Demand(demoted_pages=len(pages)))
    fault_point("demote.reserve")
    demoted = manager.store.successors(pages, DEMOTED_FORMAT, stream.tenant)
    try:
        _requantise(manager, pages, demoted)
        fault_point("demote.publish")
    except BaseException:
        manager.store.release(demoted, manager.encoder.fence())
        raise
    returned = _tell(manager, stream, frames, demoted, pages, publish=True)
    for other in _willing_sharers(manager, stream):
        both = [(frame, page) for frame, page in other.pages.items() if any(page is old for old in pages)]
        for frame, page in both:
            new = demoted[[page is old for old in pages].index(True)]
            manager.store.retain([new])
            returned += _tell(manager, other, [frame], [new], [page], publish=True)
    return returned


def _requantise(manager: "KVCacheManager", pages: list[Page], demoted: list[Page]) -> None:
    source, target = manager.layouts[QUANTISED_FORMAT], manager.layouts[DEMOTED_FORMAT]
    buffer, ids = manager.store.pool.buffer, [page.id for page in pages]
    starts = [page.id * GRANULE for page in demoted]
    with manager.encoder.side_stream():
        for layer in range(source.num_layers):
            fault_point("demote.layer")
            for one, other, begin, end in (
                (source.key, target.key, source.key_offset(layer), target.key_offset(layer)),
                (source.value, target.value, source.value_offset(layer), target.value_offset(layer)),
            ):
                requantise_part(buffer, one, other, ids, begin, [start + end for start in starts])


def _willing_sharers(manager: "KVCacheManager", stream: "Stream") -> "list[Stream]":
    return [
        other
        for other in manager.streams.values()
        if other is not stream
        and other.chunk is None
        and other.tenant == stream.tenant
        and deepest_rung(manager.config, other.quality_floor) >= Rung.SPANS
    ]


def _tell(
    manager: "KVCacheManager",
    stream: "Stream",
    frames: list[int],
    new: list[Page],
    old: list[Page],
    *,
    publish: bool = False,
) -> int:
    """Let go of the old pages and tell the event sink; bytes that went back to the pool."""
    if publish:
        stream.pages.update(zip(frames, new, strict=True))
    names = [manager.layouts[page.format].format.name for page in (old[0], new[0])]
    event = replace(manager.event(EventKind.DEMOTE, stream, frames, new), detail=" -> ".join(names))
    freed = manager.release(stream.tenant, old)
    manager.send([event, *freed])
    return sum(item.nbytes for item in freed)


def shrink_retrieval(manager: "KVCacheManager", stream: "Stream", frames: int) -> int:
    """See `Stream.shrink_retrieval`."""
    stream.require_idle()
    window = stream.window
    if isinstance(frames, bool) or not isinstance(frames, int) or not 0 <= frames <= window.retrieval_frames:
        raise ArgumentError(
            f"frames: expected 0 to {window.retrieval_frames}, what the stream keeps past its visible frames, "
            f"got {frames!r}"
        )
    least = min(stream.quality_floor.retrieval_frames, window.retrieval_frames)
    if frames < least:
        raise QualityFloorError(
            f"frames: expected at least {least} for stream {stream.id!r} of tenant {stream.tenant!r}, got {frames}; "
            "its quality floor or its tenant's allows no fewer"
        )
    needed = least_retrieval(manager.config, window)
    if frames < needed:
        raise ArgumentError(
            f"frames: expected at least {needed}, so that spans fill before their frames leave the window, got {frames}"
        )
    fault_point("stream.evict")
    stream.timeline = replace(stream.timeline, window=replace(window, retrieval_frames=frames))
    kept = set(stream.timeline.kept(stream.committed))
    gone = {frame: stream.pages.pop(frame) for frame in list(stream.pages) if frame not in kept}
    events: list[CacheEvent] = []
    if gone:
        events.append(manager.event(EventKind.EVICT, stream, gone, list(gone.values())))
    freed = manager.release(stream.tenant, list(gone.values()))
    manager.send([*events, *freed])
    return sum(item.nbytes for item in freed)
