"""One byte budget for objects of a few sizes: equal slabs, each cut for one size at a time.

A slab is the unit that moves between sizes; inside a slab all slots are equal, so a page is contiguous and one int32
names it. New objects take places of their size that came back, then fill its lowest slab that has room, and a size
takes a further slab only when it has no free place left. Therefore a size that never holds more than n objects never
holds more than ``ceil(n / slots per slab)`` slabs, whatever the order of frees: admission by worst case cannot be
broken by fragmentation.

Objects are integers here (handles, see `slabs`), taken and given back as slices of lists: what a page costs is a few
operations of the interpreter's own, not an object with a place in a table. What comes back stays with its size until
somebody needs slabs; it is overwritten when it is taken again, or when its slab is handed on.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch

from qvg_paged.config import FreeFill
from qvg_paged.errors import OutOfMemoryError, StaleHandleError
from qvg_paged.events import fault_point
from qvg_paged.fence import Fence
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.slab_books import SizeClass, SlabBooks
from qvg_paged.slab_memory import SlabMemory
from qvg_paged.slabs import GENERATIONS, PLACE, STRIDE, SlabGeometry, Slot, by_slab, byte_runs, place_runs

__all__ = ["SlabGeometry", "SlabPool", "Slot", "byte_runs"]

NONE: frozenset[int] = frozenset()
RANGE = 8
"""Handles from which on asking for a range pays."""


class SlabPool(SlabBooks, SlabMemory):
    """Allocator over one preallocated uint8 tensor; sizes are declared at creation.

    Attributes:
        buffer: the pool's bytes, ``[num_slabs * slab_nbytes]`` uint8.
        used_nbytes: bytes of live and of returned but not yet reusable objects.
        peak_nbytes: the most `used_nbytes` has been.
    """

    def __init__(
        self, geometry: SlabGeometry, sizes: Iterable[int], device: torch.device, fill: FreeFill = FreeFill.ZERO
    ) -> None:
        SlabBooks.__init__(self, geometry, sizes)
        SlabMemory.__init__(self, geometry.nbytes, device, fill)
        self._filled = Fence.record(self._device)
        self._generation = 0
        self._live: dict[str, set[int]] = {}
        self._pending: list[tuple[Fence, SizeClass, Sequence[int]]] = []

    def require(self, counts: Mapping[int, int]) -> None:
        """See to it that `counts` objects by size find room, taking back returned memory if that is what it takes.

        Raises:
            OutOfMemoryError: they do not fit; nothing changed.
        """
        missing = self._missing_slabs(counts)
        for wait in (False, True):
            if missing > 0:
                self.reclaim(wait=wait)
                missing = self._missing_slabs(counts)
        if missing > 0:
            requested = sum(size * count for size, count in counts.items())
            raise OutOfMemoryError(
                f"pool exhausted: {requested} bytes requested, {missing} slabs of {self.slab_nbytes} bytes short of "
                f"{self.num_slabs}; close a stream, shorten windows or wait",
                requested,
                self.free_nbytes,
            )

    def allocate(self, nbytes: int, count: int, tenant: str) -> list[Slot]:
        """`count` slots of `nbytes`, all or none.

        Raises:
            OutOfMemoryError: they do not fit; nothing changed.
        """
        return [Slot(handle >> PLACE, nbytes, tenant, handle) for handle in self.take(nbytes, count, tenant)]

    def take(self, nbytes: int, count: int, tenant: str) -> list[int]:
        """`allocate`, but handles only, ascending."""
        fault_point("pool.allocate")
        kind = self._classes[nbytes]
        if count > kind.free_slots + len(kind.returned):
            self._settle(wait=False)
            self.require({nbytes: count})
        fresh = count - len(kind.returned)
        if fresh > 0 and self.used_nbytes + fresh * nbytes > self.peak_nbytes:
            self.reclaim(wait=False)  # what is only on its way back makes no peak
        places = kind.returned[-count:] if count else []
        del kind.returned[len(kind.returned) - len(places) :]
        places.sort()
        self._overwrite(kind.stretches(places))
        if len(places) < count:
            self._filled.order_after()
            places = sorted(places + self._lowest(kind, count - len(places)))
        handles = self._named(places, kind.units)
        live = self._live.get(tenant)
        if live is None:
            live = self._live[tenant] = set()
        live.update(handles)
        return handles

    def _named(self, places: list[int], units: int) -> list[int]:
        """Handles of places that are taken now, given as sorted handles of the past. Those of neighbours are a range,
        which costs less than a handle each.
        """
        self._generation = generation = (self._generation + 1) % GENERATIONS
        if len(places) >= RANGE:
            first, last = places[0] >> PLACE, places[-1] >> PLACE
            if last - first == (len(places) - 1) * units:
                return list(range(first * STRIDE + generation, last * STRIDE + generation + 1, units * STRIDE))
        return [(handle >> PLACE) * STRIDE + generation for handle in places]

    def live(self) -> dict[int, Slot]:
        """Slots in use, by id."""
        slots = (self._slot(handle, tenant) for tenant, handles in self._live.items() for handle in handles)
        return {slot.id: slot for slot in slots}

    def _slot(self, handle: int, tenant: str) -> Slot:
        place = handle >> PLACE
        return Slot(place, self._cut[place // self._slab_units].nbytes, tenant, handle)

    def check(self, slot: Slot) -> None:
        """Raise `StaleHandleError` unless `slot` is live."""
        self.check_handles([slot.generation], slot.tenant)

    def check_handles(self, handles: Sequence[int], tenant: str) -> None:
        """Raise `StaleHandleError` unless all are live and the tenant's."""
        live = self._live.get(tenant, NONE)
        if not live.issuperset(handles):
            stale = next(handle for handle in handles if handle not in live)
            raise StaleHandleError(f"slot: id {stale >> PLACE}, generation {stale} was returned to the pool")

    def free(self, slot: Slot, fence: Fence) -> None:
        """Return `slot`; it is overwritten and reused once `fence` has passed.

        Raises:
            StaleHandleError: it was returned before.
        """
        self.give_back(slot.nbytes, [slot.generation], slot.tenant, fence)

    def give_back(self, nbytes: int, handles: Sequence[int], tenant: str, fence: Fence) -> None:
        """`free` for a tenant's objects of one size, each given once: all or none.

        Raises:
            StaleHandleError: one was returned before; nothing changed.
        """
        self.check_handles(handles, tenant)
        if handles:
            self.take_back(nbytes, handles, tenant, fence)

    def take_back(self, nbytes: int, handles: Sequence[int], tenant: str, fence: Fence) -> None:
        """`give_back` of handles, one at least, that were checked."""
        live = self._live[tenant]
        live.difference_update(handles)
        if not live:
            del self._live[tenant]
        if fence.passed():
            self._came_back(self._classes[nbytes], handles)
        else:
            self._pending.append((fence, self._classes[nbytes], handles))

    def _came_back(self, kind: SizeClass, handles: Sequence[int]) -> None:
        kind.returned += handles
        if self._fill:
            self._overwrite(kind.stretches(sorted(handles)))  # poison is for who still reads them

    def _settle(self, *, wait: bool) -> None:
        """Note whose fences have passed; with `wait`, order later work behind the others."""
        waiting = []
        for fence, kind, handles in self._pending:
            passed = fence.passed()
            if not passed and wait:
                fence.order_after()
            if passed or wait:
                self._came_back(kind, handles)
            else:
                waiting.append((fence, kind, handles))
        self._pending = waiting

    def reclaim(self, *, wait: bool) -> None:
        """Make returned places free whose fence has passed; with `wait`, order later work behind the others."""
        if self._pending:
            self._settle(wait=wait)
        kinds = [kind for kind in self._classes.values() if kind.returned]
        if not kinds:
            return
        # Whoever reclaims may be on another stream than whoever filled last or writes next: `take` waits for this.
        self._filled.order_after()
        for kind in kinds:
            handles, kind.returned = sorted(kind.returned), []
            self._overwrite(kind.stretches(handles))
            for slab, group in by_slab(handles, self._slab_units):
                self._put_back(slab, kind, group)
        self._filled = self.fence()

    def fence(self) -> Fence:
        """A fence behind what was launched on the current stream: for places that were taken and are not wanted."""
        return Fence.record(self._device)

    def resize(self, num_slabs: int) -> None:
        """Cut the pool, whose slabs from there on are free, or make it longer. The buffer stays the same tensor.

        Nothing may be in flight: its memory is another afterwards.
        """
        self._resize_buffer(num_slabs * self.slab_nbytes)
        self._filled = self.fence()
        self._recut(num_slabs)

    def bytes_of(self, slot: Slot) -> torch.Tensor:
        """The slot's bytes, ``[nbytes]`` uint8, writable."""
        start = slot.id * GRANULE
        return self.buffer[start : start + slot.nbytes]

    def stretches(self, nbytes: int, handles: Sequence[int]) -> list[tuple[int, int]]:
        """First granule and end of each stretch of memory that sorted handles of objects of one size fill. What lies
        between these and is nobody's may be in it if it holds zeros.
        """
        kind = self._classes[nbytes]
        return place_runs(handles, kind.units) if self._fill else kind.stretches(handles)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every byte is accounted for exactly once."""
        self._check(chain(*self._live.values(), *(handles for _, _, handles in self._pending)))
