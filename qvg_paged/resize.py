"""The pool gives memory back to the host engine, and takes it again.

Pages move to the lower end of the pool, and its tensor is cut there. Whoever holds the tensor keeps the same object;
its storage is another, so nothing may be in flight.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qvg_paged.budget import Budget, least_demand, object_counts
from qvg_paged.compact import compact, empty_slab, movable
from qvg_paged.errors import ArgumentError, OutOfMemoryError, StateError
from qvg_paged.events import CacheEvent, EventKind, fault_point

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager

__all__ = ["grow_pool", "shrink_pool"]


def shrink_pool(manager: "KVCacheManager", nbytes: int) -> int:
    """See `KVCacheManager.shrink`."""
    _check(manager, nbytes)
    pool, slabs = manager.store.pool, manager.budget.slabs
    wanted = min(slabs.num_slabs, -(-nbytes // slabs.slab_nbytes))
    compact(manager)
    left = slabs.num_slabs - wanted
    chunk = slabs.slabs_for(object_counts(manager.layouts, least_demand(manager.model, manager.config)))
    least = max(slabs.num_slabs - pool.free_nbytes // slabs.slab_nbytes, chunk)
    if left < least:
        free = (slabs.num_slabs - least) * slabs.slab_nbytes
        raise OutOfMemoryError(
            f"shrink: {nbytes} bytes wanted back, {free} can be spared; close, demote or park streams first",
            nbytes,
            free,
        )
    _pack(manager, left)
    fault_point("pool.resize")
    _set_slabs(manager, left)
    return wanted * slabs.slab_nbytes


def grow_pool(manager: "KVCacheManager", nbytes: int) -> int:
    """See `KVCacheManager.grow`."""
    _check(manager, nbytes)
    slabs = manager.budget.slabs
    most = Budget.split(manager.model, manager.config).slabs.num_slabs
    more = min(nbytes // slabs.slab_nbytes, most - slabs.num_slabs)
    fault_point("pool.resize")
    if more:
        _set_slabs(manager, slabs.num_slabs + more)
    return more * slabs.slab_nbytes


def _check(manager: "KVCacheManager", nbytes: int) -> None:
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
        raise ArgumentError(f"nbytes: expected a number of bytes >= 0, got {nbytes!r}")
    busy = [s.id for s in manager.streams.values() if s.chunk or (s.parked is not None and s.parked.incoming)]
    if busy:
        raise StateError(f"pool: expected no open chunk and no stream on its way back, got {busy}")


def _pack(manager: "KVCacheManager", num_slabs: int) -> None:
    """Move everything below that slab, from the highest down; there is room for it."""
    pool, owners = manager.store.pool, movable(manager)
    while True:
        slabs = {pool.slab_of(slot) for slot in pool.live().values()}
        highest = max(slabs, default=0)
        if highest < num_slabs:
            return
        slots = [slot for slot in pool.live().values() if pool.slab_of(slot) == highest]
        empty_slab(manager, highest, slots, owners)


def _set_slabs(manager: "KVCacheManager", num_slabs: int) -> None:
    pool, budget = manager.store.pool, manager.budget
    if manager.device.type == "cuda":
        torch.cuda.synchronize(manager.device)
    pool.resize(num_slabs)
    manager.encoder.guard()
    manager.mover.guard()
    slabs = replace(budget.slabs, num_slabs=num_slabs)
    manager.budget = replace(budget, pool=slabs.nbytes, slabs=slabs)
    change = slabs.nbytes - budget.pool
    manager.send([CacheEvent(EventKind.RESIZE, "", "", (), (), abs(change), "shrunk" if change < 0 else "grown")])
