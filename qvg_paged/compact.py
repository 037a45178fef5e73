"""Compaction: when bytes are free but scattered over partly filled slabs, pages move together and slabs come free.

Ids of pages are fixed while a chunk that may read them is open or a copy into them is under way, so only pages and
codebooks whose streams have no open chunk and are not being resumed move. After a compaction without open chunks a
size holds no more slabs than its objects fill.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qvg_paged.budget import object_counts
from qvg_paged.errors import OutOfMemoryError
from qvg_paged.events import fault_point
from qvg_paged.page import Codebook, Page
from qvg_paged.pool import SlabPool, Slot
from qvg_paged.timeline import Demand

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager

__all__ = ["compact", "empty_slab", "make_room", "make_room_for", "movable"]


def make_room(manager: "KVCacheManager", demand: Demand) -> None:
    """Make room for new objects, moving pages together if that is what it takes.

    Raises:
        OutOfMemoryError: they do not fit; no stream has changed.
    """
    make_room_for(manager, object_counts(manager.layouts, demand))


def make_room_for(manager: "KVCacheManager", counts: Mapping[int, int]) -> None:
    """The same for objects by size."""
    pool = manager.store.pool
    try:
        pool.require(counts)
    except OutOfMemoryError:
        if not compact(manager):
            raise
        pool.require(counts)


def compact(manager: "KVCacheManager") -> int:
    """Empty as many partly filled slabs as can be; how many."""
    pool = manager.store.pool
    pool.reclaim(wait=True)
    owners = movable(manager)
    by_slab: dict[tuple[int, int], list[Slot]] = defaultdict(list)
    for slot in pool.live().values():
        by_slab[slot.nbytes, pool.slab_of(slot)].append(slot)
    emptied = 0
    for (nbytes, slab), slots in sorted(by_slab.items(), key=lambda item: (len(item[1]), -item[0][1])):
        elsewhere = pool.room(nbytes) - (pool.slab_nbytes // nbytes - len(slots))
        if len(slots) <= elsewhere and all(slot.id in owners for slot in slots):
            empty_slab(manager, slab, slots, owners)
            emptied += 1
    if emptied:
        pool.reclaim(wait=True)
    return emptied


def movable(manager: "KVCacheManager") -> dict[int, Page | Codebook]:
    """What may move, by id of its slot."""
    fixed: set[Page | Codebook] = set()
    found: dict[int, Page | Codebook] = {}
    for stream in manager.streams.values():
        for page in stream.held():
            things: list[Page | Codebook] = [page, page.codebook] if page.codebook else [page]
            for thing in things:
                found[thing.slot.id] = thing
            if stream.chunk is not None or stream.parked is not None:
                fixed.update(things)
    return {slot_id: thing for slot_id, thing in found.items() if thing not in fixed}


def empty_slab(manager: "KVCacheManager", slab: int, slots: list[Slot], owners: dict[int, Page | Codebook]) -> None:
    """Move everything out of a slab; it is free once what was launched so far is done."""
    pool = manager.store.pool
    fault_point("pool.compact")
    targets = _targets(pool, slab, slots)
    with manager.encoder.side_stream():
        for old, new in zip(slots, targets, strict=True):
            pool.bytes_of(new).copy_(pool.bytes_of(old))
    for old, new in zip(slots, targets, strict=True):
        owner = owners.pop(old.id)
        owner.slot = new
        owners[new.id] = owner
    fence = manager.encoder.fence()
    for old in slots:
        pool.free(old, fence)
    pool.reclaim(wait=True)


def _targets(pool: SlabPool, slab: int, slots: list[Slot]) -> list[Slot]:
    """A place outside the slab for each of its objects."""
    inside: list[Slot] = []
    outside: list[Slot] = []
    try:
        for slot in slots:
            while True:
                found = pool.allocate(slot.nbytes, 1, slot.tenant)[0]
                if pool.slab_of(found) != slab:
                    break
                inside.append(found)
            outside.append(found)
    except BaseException:
        inside += outside
        raise
    finally:
        for slot in inside:
            pool.free(slot, pool.fence())
    return outside
