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

import heapq
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from qvg_paged.config import FreeFill
from qvg_paged.errors import IntegrityError, OutOfMemoryError, StaleHandleError
from qvg_paged.events import fault_point
from qvg_paged.fence import Fence
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.slabs import PLACE, SizeClass, SlabGeometry, Slot, by_slab, byte_runs, place_runs

__all__ = ["SlabGeometry", "SlabPool", "Slot", "byte_runs"]

NONE: frozenset[int] = frozenset()


class SlabPool:
    """Allocator over one preallocated uint8 tensor; sizes are declared at creation.

    Attributes:
        buffer: the pool's bytes, ``[num_slabs * slab_nbytes]`` uint8.
        used_nbytes: bytes of live and of returned but not yet reusable objects.
        peak_nbytes: the most `used_nbytes` has been.
    """

    def __init__(
        self, geometry: SlabGeometry, sizes: Iterable[int], device: torch.device, fill: FreeFill = FreeFill.ZERO
    ) -> None:
        self.geometry = geometry
        self.slab_nbytes = geometry.slab_nbytes
        self.num_slabs = geometry.num_slabs
        self._slab_units = self.slab_nbytes // GRANULE
        self._device = torch.device(device)
        self.buffer = torch.empty(geometry.nbytes, dtype=torch.uint8, device=device)
        self._fill = 0xFF if fill is FreeFill.POISON else 0
        self.buffer.fill_(self._fill)
        self._filled = Fence.record(self._device)
        self._look()
        self._free_slabs = list(range(self.num_slabs))
        self._uncut: dict[int, tuple[SizeClass, list[int]]] = {}
        self._classes = {size: SizeClass(size, self.slab_nbytes // size) for size in sorted(set(sizes))}
        self._cut: dict[int, SizeClass] = {}
        self._live: dict[str, set[int]] = {}
        self._pending: list[tuple[Fence, SizeClass, Sequence[int]]] = []
        self.used_nbytes = 0
        self.peak_nbytes = 0

    def _look(self) -> None:
        """The buffer as others need it, again whenever its memory is another."""
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self._bytes: Any = self.buffer.numpy() if self._device.type == "cpu" else self.buffer

    def _missing_slabs(self, counts: Mapping[int, int]) -> int:
        needed = 0
        for size, count in counts.items():
            kind = self._classes[size]
            short = count - kind.free_slots - len(kind.returned)
            if short > 0:
                needed += -(-short // kind.slots)
        return needed - len(self._free_slabs)

    @property
    def free_nbytes(self) -> int:
        """Bytes in slabs that no size holds."""
        return len(self._free_slabs) * self.slab_nbytes

    def room(self, nbytes: int) -> int:
        """Free slots in slabs that hold objects of `nbytes`."""
        return self._classes[nbytes].free_slots

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
        handles = self._recycled(kind, count)
        if len(handles) < count:
            handles = sorted(handles + self._lowest(kind, count - len(handles)))
        live = self._live.get(tenant)
        if live is None:
            live = self._live[tenant] = set()
        live.update(handles)
        return handles

    def _recycled(self, kind: SizeClass, count: int) -> list[int]:
        """Up to `count` handles in places that came back, overwritten now."""
        if not kind.returned or not count:
            return []
        places = kind.returned[-count:]
        del kind.returned[-count:]
        places.sort()
        self._overwrite(place_runs(places, kind.units))
        return [handle + 1 for handle in places]

    def _lowest(self, kind: SizeClass, count: int) -> list[int]:
        """Handles from the lowest slabs of a size that have room, a slab at a time."""
        self._filled.order_after()
        handles: list[int] = []
        while (missing := count - len(handles)) > 0:
            if not kind.with_room:
                self._cut_slab(kind)
            room = kind.free[kind.with_room[0]]
            taken = room[-missing:]
            del room[-missing:]
            if not room:
                kind.with_room.pop(0)
            taken.reverse()
            handles += taken
        kind.free_slots -= count
        self.used_nbytes += count * kind.nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
        return handles

    def _cut_slab(self, kind: SizeClass) -> None:
        slab = heapq.heappop(self._free_slabs)
        kind.free[slab] = kind.cut(slab, self._slab_units, self._uncut.pop(slab, None))
        kind.with_room.append(slab)
        kind.free_slots += kind.slots
        self._cut[slab] = kind

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
            self._overwrite(place_runs(sorted(handles), kind.units))  # poison is for who still reads them

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
        # Whoever reclaims may be on another stream than whoever filled last or writes next: `_lowest` waits for this.
        self._filled.order_after()
        for kind in kinds:
            handles, kind.returned = sorted(kind.returned), []
            self._overwrite(place_runs(handles, kind.units))
            for slab, group in by_slab(handles, self._slab_units):
                self._put_back(slab, kind, group)
        self._filled = self.fence()

    def fence(self) -> Fence:
        """A fence behind what was launched on the current stream: for places that were taken and are not wanted."""
        return Fence.record(self._device)

    def _overwrite(self, runs: Iterable[tuple[int, int]]) -> None:
        for start, stop in runs:
            self._bytes[start * GRANULE : stop * GRANULE] = self._fill

    def _put_back(self, slab: int, kind: SizeClass, handles: list[int]) -> None:
        room = kind.free[slab]
        if not room:
            insort(kind.with_room, slab)
        room += [handle + 1 for handle in reversed(handles)]
        if len(room) > len(handles):
            room.sort(reverse=True)  # neighbours together: one operation overwrites or checks them
        kind.free_slots += len(handles)
        self.used_nbytes -= len(handles) * kind.nbytes
        if len(room) == kind.slots:
            del self._cut[slab], kind.free[slab]
            kind.with_room.remove(slab)
            kind.free_slots -= kind.slots
            self._uncut[slab] = (kind, room)
            heapq.heappush(self._free_slabs, slab)

    def resize(self, num_slabs: int) -> None:
        """Cut the pool, whose slabs from there on are free, or make it longer. The buffer stays the same tensor.

        Nothing may be in flight: its memory is another afterwards.
        """
        before, nbytes = self.num_slabs, num_slabs * self.slab_nbytes
        other = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        kept = min(nbytes, self.buffer.numel())
        other[:kept] = self.buffer[:kept]
        other[kept:] = self._fill
        self.buffer.set_(other.untyped_storage(), 0, other.shape, other.stride())
        self._look()
        self._free_slabs = [slab for slab in self._free_slabs if slab < num_slabs] + list(range(before, num_slabs))
        heapq.heapify(self._free_slabs)
        self._filled = Fence.record(self._device)
        self.geometry = SlabGeometry(self.slab_nbytes, num_slabs)
        self.num_slabs = num_slabs

    def bytes_of(self, slot: Slot) -> torch.Tensor:
        """The slot's bytes, ``[nbytes]`` uint8, writable."""
        start = slot.id * GRANULE
        return self.buffer[start : start + slot.nbytes]

    def viewed(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole pool in another dtype."""
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self.buffer.view(dtype)
        return view

    def slab_of(self, slot: Slot) -> int:
        """Index of the slab that holds it."""
        return slot.id // self._slab_units

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every byte is accounted for exactly once."""
        if len(set(self._free_slabs)) != len(self._free_slabs):
            raise IntegrityError("pool: a slab is twice in the free list")
        taken_of: dict[int, list[int]] = {}
        groups: list[Iterable[int]] = [*self._live.values(), *(handles for _, _, handles in self._pending)]
        for handle in chain(*groups, *(kind.returned for kind in self._classes.values())):
            taken_of.setdefault((handle >> PLACE) // self._slab_units, []).append(handle >> PLACE)
        owner = set(self._free_slabs)
        used = 0
        for kind in self._classes.values():
            if kind.with_room != sorted(slab for slab, room in kind.free.items() if room):
                raise IntegrityError(f"pool: slabs with room of size {kind.nbytes} are listed wrongly")
            if kind.free_slots != sum(len(room) for room in kind.free.values()):
                raise IntegrityError(f"pool: free slot count of size {kind.nbytes} is {kind.free_slots}")
            for slab, room in kind.free.items():
                if slab in owner or self._cut.get(slab) is not kind:
                    raise IntegrityError(f"pool: slab {slab} has two owners")
                owner.add(slab)
                taken = taken_of.pop(slab, [])
                places = sorted([*taken, *(handle >> PLACE for handle in room)])
                first = slab * self._slab_units
                if places != list(range(first, first + kind.slots * kind.units, kind.units)):
                    raise IntegrityError(f"pool: slots of slab {slab} do not add up")
                used += len(taken) * kind.nbytes
        if taken_of:
            raise IntegrityError(f"pool: objects lie in slabs {sorted(taken_of)}, which no size holds")
        if sorted(owner) != list(range(self.num_slabs)):
            raise IntegrityError(f"pool: {self.num_slabs - len(owner)} slabs are lost")
        if self.used_nbytes != used:
            raise IntegrityError(f"pool: used_nbytes is {self.used_nbytes}, objects hold otherwise")
