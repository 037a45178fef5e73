"""Streams out of the pool and back, byte for byte.

    park      digests on the device; bytes to the host or to a file; complete there; only then out of the pool
    resume    room in the pool; bytes back; digests on the device again; only then visible

A page that forks share stays in the pool while another of them is resident; the parked one has bytes of its own, and
pages of its own when it comes back. A stream may have two copies (host and disk): what one has lost the other gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from qvg_paged.budget import object_counts
from qvg_paged.compact import make_room_for
from qvg_paged.errors import ArgumentError, CorruptedError, OutOfMemoryError, StateError, StorageError
from qvg_paged.events import CacheEvent, EventKind, fault_point
from qvg_paged.fence import Fence
from qvg_paged.host import Extent
from qvg_paged.image import Image
from qvg_paged.kernels.digest import digest_ranges, start_digests
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.page import Page
from qvg_paged.pool import Slot
from qvg_paged.transfer import Runs

if TYPE_CHECKING:
    from qvg_paged.disk import Container
    from qvg_paged.manager import KVCacheManager
    from qvg_paged.stream import Stream

__all__ = ["Parked", "Tier", "cancel_prefetch", "discard", "park_stream", "prefetch_stream", "resume_stream"]


class Tier(Enum):
    """Where a parked stream is."""

    HOST = "host"
    """In pinned memory of the host."""
    DISK = "disk"
    """In a file."""


@dataclass
class Incoming:
    """A stream on its way back: pages that are being filled, and the mark behind the copies."""

    pages: dict[int, Page]
    slots: list[Slot]
    tier: Tier
    filled: Fence


@dataclass
class Parked:
    """A stream outside the pool.

    Attributes:
        image: what it consists of.
        host: where its bytes are on the host, or None.
        disk: the file they are in, or None.
        incoming: its pages, if it is being brought back.
    """

    image: Image
    host: list[Extent] | None = None
    disk: "Container | None" = None
    incoming: Incoming | None = None

    @property
    def tier(self) -> Tier:
        """The fastest copy."""
        return Tier.DISK if self.host is None else Tier.HOST

    def quality(self) -> list[tuple[int, int, int]]:
        """Frame, format and demotions of each stored frame."""
        return [(record.frame, record.format, record.demotions) for record in self.image.pages]


def park_stream(manager: "KVCacheManager", stream: "Stream", tier: Tier | None) -> Tier:
    """See `Stream.park`."""
    if tier is not None and not isinstance(tier, Tier):
        raise ArgumentError(f"tier: expected a Tier or None, got {tier!r}")
    if stream.closed or stream.chunk is not None:
        stream.require_idle()
    if stream.parked is not None:
        return _move_down(manager, stream, stream.parked, tier)
    manager.encoder.order_after()
    image, slots = Image.of(stream.committed, stream.timeline, stream.pages)
    starts = [slot.id * GRANULE for slot in slots]
    digests = start_digests(manager.store.pool.buffer, starts, image.sizes)
    parked = _store(manager, stream, image, digests, Runs(slots), tier)
    try:
        fault_point("park.publish")
    except BaseException:
        _drop(manager, parked)
        raise
    pages, stream.pages, stream.parked = list(stream.pages.values()), {}, parked
    freed = manager.release(stream.tenant, pages)
    manager.send([_event(EventKind.PARK, stream, image, parked.tier), *freed])
    return parked.tier


def _store(
    manager: "KVCacheManager",
    stream: "Stream",
    image: Image,
    digests: Callable[[], list[int]],
    runs: Runs,
    tier: Tier | None,
) -> Parked:
    """The image's bytes on the tier wanted, or on the first that has room; copies to the host follow its digests."""
    if tier is not Tier.DISK:
        try:
            return _on_host(manager, image, digests, runs)
        except OutOfMemoryError:
            if tier is Tier.HOST or manager.disk is None:
                raise

    def read(start: int, piece: torch.Tensor) -> None:
        manager.mover.out(runs, start, piece)
        manager.mover.fence().wait()

    image = image.with_digests(digests())
    return Parked(image, disk=_to_disk(manager, stream, image, read))


def _on_host(manager: "KVCacheManager", image: Image, digests: Callable[[], list[int]], runs: Runs) -> Parked:
    extents = _to_host(manager, runs)
    try:
        return Parked(image.with_digests(digests()), host=extents)
    except BaseException:
        manager.host.free(extents)
        raise


def _to_host(manager: "KVCacheManager", runs: Runs) -> list[Extent]:
    arena, mover = manager.host, manager.mover
    _make_host_room(manager, runs.nbytes)
    extents = arena.allocate(runs.nbytes)
    try:
        fault_point("park.copy")
        start = 0
        for extent in extents:
            mover.out(runs, start, arena.bytes_of(extent))
            start += extent.nbytes
    except BaseException:
        mover.fence().wait()
        arena.free(extents)
        raise
    mover.fence().wait()
    return extents


def _make_host_room(manager: "KVCacheManager", nbytes: int) -> None:
    """Give up host copies of streams that are on the disk as well, if that is enough."""
    arena = manager.host
    double = [s.parked for s in manager.streams.values() if s.parked and s.parked.host is not None and s.parked.disk]
    spare = sum(parked.image.nbytes for parked in double if not parked.incoming)
    if arena.nbytes - arena.used_nbytes + spare < nbytes:
        return
    for parked in double:
        if arena.nbytes - arena.used_nbytes < nbytes and not parked.incoming and parked.host is not None:
            arena.free(parked.host)
            parked.host = None


def _to_disk(
    manager: "KVCacheManager", stream: "Stream", image: Image, read: Callable[[int, torch.Tensor], None]
) -> "Container":
    if manager.disk is None:
        raise StorageError("park: expected disk_path and disk_memory in CacheConfig, got a manager without a disk")
    return manager.disk.write(stream.id, stream.tenant, image, read)


def _move_down(manager: "KVCacheManager", stream: "Stream", parked: Parked, tier: Tier | None) -> Tier:
    """From the host to the disk; the host copy stays until its room is needed."""
    if tier is Tier.DISK and parked.disk is None:
        assert parked.host is not None
        cancel_prefetch(manager, stream)
        pieces = [manager.host.bytes_of(extent) for extent in parked.host]

        def read(start: int, piece: torch.Tensor) -> None:
            place = 0
            for source in pieces:
                first, last = max(start, place), min(start + piece.numel(), place + source.numel())
                if first < last:
                    piece[first - start : last - start].copy_(source[first - place : last - place])
                place += source.numel()

        parked.disk = _to_disk(manager, stream, parked.image, read)
        manager.send([_event(EventKind.PARK, stream, parked.image, Tier.DISK)])
    return parked.tier


def prefetch_stream(manager: "KVCacheManager", stream: "Stream") -> None:
    """See `Stream.prefetch_resume`."""
    parked = _require_parked(stream)
    if parked.incoming is None:
        with manager.mover.beside():
            parked.incoming = _bring(manager, stream, parked, staged=False)


def resume_stream(manager: "KVCacheManager", stream: "Stream") -> Tier:
    """See `Stream.resume`."""
    parked = _require_parked(stream)
    problems: list[str] = []
    while True:
        incoming = parked.incoming or _bring(manager, stream, parked, staged=True)
        parked.incoming = incoming
        incoming.filled.order_after()
        try:
            fault_point("resume.verify")
            damaged = _damaged(manager, parked.image, incoming)
            fault_point("resume.publish")
        except BaseException:
            cancel_prefetch(manager, stream)
            raise
        if not damaged:
            break
        cancel_prefetch(manager, stream)
        problems.append(f"{damaged} of {len(parked.image.sizes)} objects on the {incoming.tier.value}")
        _lose_host_copy(manager, stream, parked, ", ".join(problems))
    stream.pages, stream.parked = incoming.pages, None
    manager.send([_event(EventKind.RESUME, stream, parked.image, incoming.tier)])
    _drop(manager, parked)
    return incoming.tier


def _bring(manager: "KVCacheManager", stream: "Stream", parked: Parked, *, staged: bool) -> Incoming:
    """Take room in the pool and launch the copies; the pages hold nothing before `filled`, nor before verification."""
    image, pool = parked.image, manager.store.pool
    make_room_for(manager, image.counts + object_counts(manager.layouts, manager.budget.reserve))
    fault_point("resume.reserve")
    slots = manager.store.slots(image.sizes, stream.tenant)
    runs = Runs(slots)
    try:
        fault_point("resume.copy")
        tier = _fill(manager, parked, runs, staged)
    except BaseException:
        fence = manager.encoder.fence()
        for slot in slots:
            pool.free(slot, fence)
        raise
    return Incoming(image.build(slots), slots, tier, manager.mover.fence())


def _fill(manager: "KVCacheManager", parked: Parked, runs: Runs, staged: bool) -> Tier:
    mover = manager.mover
    if parked.host is not None:
        start = 0
        for extent in parked.host:
            mover.into(runs, start, manager.host.bytes_of(extent), staged=staged)
            start += extent.nbytes
        return Tier.HOST
    assert parked.disk is not None
    assert manager.disk is not None

    def write(start: int, piece: torch.Tensor) -> None:
        mover.into(runs, start, piece, staged=staged)
        mover.fence().wait()

    manager.disk.read(parked.disk, write)
    return Tier.DISK


def _damaged(manager: "KVCacheManager", image: Image, incoming: Incoming) -> int:
    """Objects whose bytes are not those that left."""
    starts = [slot.id * GRANULE for slot in incoming.slots]
    found = digest_ranges(manager.store.pool.buffer, starts, image.sizes)
    return sum(one != other for one, other in zip(found, image.digests, strict=True))


def _lose_host_copy(manager: "KVCacheManager", stream: "Stream", parked: Parked, problems: str) -> None:
    """Give up the damaged host copy, which is the one that was taken, if there is another on the disk."""
    if parked.host is None or parked.disk is None:
        raise CorruptedError(
            f"resume: expected the bytes that were parked of stream {stream.id!r}, got others in {problems}; "
            "no intact copy is left, close the stream"
        )
    manager.host.free(parked.host)
    parked.host = None


def cancel_prefetch(manager: "KVCacheManager", stream: "Stream") -> None:
    """Give the pages of a stream on its way back to the pool; it stays parked."""
    parked = stream.parked
    if parked is not None and parked.incoming is not None:
        incoming, parked.incoming = parked.incoming, None
        incoming.filled.order_after()
        manager.send(manager.release(stream.tenant, list(incoming.pages.values())))


def discard(manager: "KVCacheManager", stream: "Stream") -> None:
    """Throw a parked stream away."""
    cancel_prefetch(manager, stream)
    if stream.parked is not None:
        _drop(manager, stream.parked)
        stream.parked = None


def _drop(manager: "KVCacheManager", parked: Parked) -> None:
    """Return the host memory and the file of an image that nobody needs any more."""
    if parked.host is not None:
        manager.mover.fence().wait()
        manager.host.free(parked.host)
        parked.host = None
    if parked.disk is not None and manager.disk is not None:
        manager.disk.remove(parked.disk)
        parked.disk = None


def _require_parked(stream: "Stream") -> Parked:
    if stream.closed or stream.parked is None:
        state = "closed" if stream.closed else "in the pool"
        raise StateError(f"stream: expected a parked stream, {stream.id!r} is {state}")
    parked: Parked = stream.parked
    return parked


def _event(kind: EventKind, stream: "Stream", image: Image, tier: Tier) -> CacheEvent:
    frames = tuple(record.frame for record in image.pages)
    return CacheEvent(kind, stream.tenant, stream.id, frames, (), image.nbytes, tier.value)
