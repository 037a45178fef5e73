"""One byte budget for objects of a few sizes: equal slabs, each cut for one size at a time.

A slab is the unit that moves between sizes; inside a slab all slots are equal, so a page is contiguous and one int32
names it. New objects fill the lowest slab of their size that has room, and a size takes a further slab only when it
has no free slot left. Therefore a size that never holds more than n objects never holds more than
``ceil(n / slots per slab)`` slabs, whatever the order of frees: admission by worst case cannot be broken by
fragmentation.
"""

import bisect
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch

from qvg_paged.config import FreeFill
from qvg_paged.errors import ConfigError, IntegrityError, OutOfMemoryError, StaleHandleError
from qvg_paged.events import fault_point
from qvg_paged.fence import Fence
from qvg_paged.kernels.layout import GRANULE, align

__all__ = ["SlabGeometry", "SlabPool", "Slot", "byte_runs"]


class Slot(NamedTuple):
    """Memory of one object. A reused address is another slot: its generation differs.

    Attributes:
        id: offset in the pool in units of `GRANULE` bytes.
        nbytes: size.
        tenant: who may read it.
        generation: serial number of the allocation.
    """

    id: int
    nbytes: int
    tenant: str
    generation: int


_new_slot: Callable[[type[Slot], Iterable[object]], Slot] = tuple.__new__
"""`Slot._make` without its checks: a page is a fraction of a microsecond."""


@dataclass(frozen=True)
class SlabGeometry:
    """How a pool of a given size is cut.

    Attributes:
        slab_nbytes: bytes of a slab, a multiple of `GRANULE`.
        num_slabs: slabs in the pool.
    """

    slab_nbytes: int
    num_slabs: int

    @classmethod
    def choose(cls, sizes: Iterable[int], pool_nbytes: int) -> "SlabGeometry":
        """The slab size that wastes least: rounding inside slabs, partly filled slabs, and the pool's remainder.

        Four partly filled slabs per size is what streams leave that come and go without admission; tests/test_pool.py
        measures it.

        Raises:
            ConfigError: the pool cannot hold one slab for each size.
        """
        sizes = sorted(set(sizes))
        candidates = {align(size * count, GRANULE) for size in sizes for count in range(1, 65)}
        usable = [c for c in candidates if c >= sizes[-1] and c * len(sizes) <= pool_nbytes]
        if not usable:
            raise ConfigError(
                f"memory: expected a pool of at least {sizes[-1] * len(sizes)} bytes (a slab for each of the object "
                f"sizes {sizes}), got {max(pool_nbytes, 0)} after staging and workspace; give the manager more"
            )

        def waste(slab: int) -> float:
            rounding = sum(1 - (slab // size) * size / slab for size in sizes) / len(sizes)
            return rounding + 4 * len(sizes) * slab / pool_nbytes + (pool_nbytes % slab) / pool_nbytes

        slab = min(usable, key=lambda nbytes: (waste(nbytes), nbytes))
        return cls(slab, pool_nbytes // slab)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.slab_nbytes * self.num_slabs

    def slabs_for(self, counts: Mapping[int, int]) -> int:
        """Slabs that `counts` objects (by size) need at most, whatever the order of frees."""
        return sum(-(-count // (self.slab_nbytes // size)) for size, count in counts.items() if count)


def byte_runs(slots: Iterable[Slot]) -> list[tuple[int, int]]:
    """First byte and end of each stretch of memory that `slots` fill: one operation for neighbours."""
    runs: list[tuple[int, int]] = []
    for slot in sorted(slots, key=lambda slot: slot.id):
        start = slot.id * GRANULE
        first = runs.pop()[0] if runs and runs[-1][1] == start else start
        runs.append((first, start + slot.nbytes))
    return runs


class _SizeClass:
    """Slabs cut for one object size."""

    def __init__(self, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes
        self.slots = slots
        self.free: dict[int, list[int]] = {}
        self.with_room: list[int] = []
        self.free_slots = 0


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
        self.buffer = torch.empty(geometry.nbytes, dtype=torch.uint8, device=device)
        self._fill = 0xFF if fill is FreeFill.POISON else 0
        self.buffer.fill_(self._fill)
        self._filled = Fence.record(device)
        self._free_slabs = list(range(self.num_slabs))
        self._classes = {size: _SizeClass(size, self.slab_nbytes // size) for size in sorted(set(sizes))}
        self._live: dict[int, Slot] = {}
        self._pending: list[tuple[Fence, Slot]] = []
        self._serial = 0
        self.used_nbytes = 0
        self.peak_nbytes = 0

    def _missing_slabs(self, counts: Mapping[int, int]) -> int:
        needed = 0
        for size, count in counts.items():
            kind = self._classes[size]
            needed += -(-max(0, count - kind.free_slots) // kind.slots)
        return needed - len(self._free_slabs)

    @property
    def free_nbytes(self) -> int:
        """Bytes in slabs that no size holds."""
        return len(self._free_slabs) * self.slab_nbytes

    def room(self, nbytes: int) -> int:
        """Free slots in slabs that hold objects of `nbytes`."""
        return self._classes[nbytes].free_slots

    def require(self, counts: Mapping[int, int]) -> None:
        """Make room for `counts` objects by size, taking back returned memory if that is what it takes.

        Raises:
            OutOfMemoryError: they do not fit; nothing changed.
        """
        counts = {size: count for size, count in counts.items() if count}
        self.reclaim(wait=False)
        if self._missing_slabs(counts) > 0:
            self.reclaim(wait=True)
        missing = self._missing_slabs(counts)
        if missing > 0:
            requested = sum(size * count for size, count in counts.items())
            raise OutOfMemoryError(
                f"pool exhausted: {requested} bytes requested, {missing} slabs of {self.slab_nbytes} bytes short of "
                f"{self.num_slabs}; close a stream, shorten windows or wait",
                requested,
                self.free_nbytes,
            )
        self._filled.order_after()

    def allocate(self, nbytes: int, count: int, tenant: str) -> list[Slot]:
        """`count` slots of `nbytes`, all or none.

        Raises:
            OutOfMemoryError: they do not fit; nothing changed.
        """
        fault_point("pool.allocate")
        kind = self._classes[nbytes]
        if self._pending or kind.free_slots < count:
            self.require({nbytes: count})
        else:
            self._filled.order_after()
        ids = self._take(kind, count)
        serials = range(self._serial + 1, self._serial + count + 1)
        fields = zip(ids, repeat(nbytes), repeat(tenant), serials, strict=False)
        slots = list(map(_new_slot, repeat(Slot), fields))
        self._serial += count
        self._live.update(zip(ids, slots, strict=True))
        self.used_nbytes += count * nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
        return slots

    def _take(self, kind: _SizeClass, count: int) -> list[int]:
        """Ids of the lowest free slots of a size, a slab at a time."""
        ids: list[int] = []
        unit, slab_units = kind.nbytes // GRANULE, self.slab_nbytes // GRANULE
        while len(ids) < count:
            if not kind.with_room:
                slab = heapq.heappop(self._free_slabs)
                if kind.slots <= count - len(ids):  # all of it: no list of what is left
                    kind.free[slab] = []
                    ids += range(slab * slab_units, slab * slab_units + kind.slots * unit, unit)
                    continue
                kind.free[slab] = list(range(kind.slots - 1, -1, -1))
                kind.with_room.append(slab)
                kind.free_slots += kind.slots
            slab = kind.with_room[0]
            room = kind.free[slab]
            taken = room[len(ids) - count :]
            del room[len(ids) - count :]
            if not room:
                kind.with_room.pop(0)
            kind.free_slots -= len(taken)
            first = slab * slab_units
            ids += [first + index * unit for index in reversed(taken)]
        return ids

    def live(self) -> dict[int, Slot]:
        """Slots in use, by id."""
        return dict(self._live)

    def check(self, slot: Slot) -> None:
        """Raise `StaleHandleError` unless `slot` is live."""
        if self._live.get(slot.id) is not slot:
            raise StaleHandleError(f"slot: id {slot.id}, generation {slot.generation} was returned to the pool")

    def free(self, slot: Slot, fence: Fence) -> None:
        """Return `slot`; it is overwritten and reused once `fence` has passed.

        Raises:
            StaleHandleError: it was returned before.
        """
        self.free_all([slot], fence)

    def free_all(self, slots: Sequence[Slot], fence: Fence) -> None:
        """Return several slots at once, each given once: all or none.

        Raises:
            StaleHandleError: one was returned before; nothing changed.
        """
        live = self._live
        for slot in slots:
            if live.get(slot.id) is not slot:
                self.check(slot)
        for slot in slots:
            del live[slot.id]
        self._pending += zip(repeat(fence), slots)

    def reclaim(self, *, wait: bool) -> None:
        """Take back returned slots whose fence has passed; with `wait`, order later work behind the others."""
        if not self._pending:
            return
        ready, waiting = [], []
        for fence, slot in self._pending:
            if fence.passed():
                ready.append(slot)
            elif wait:
                fence.order_after()
                ready.append(slot)
            else:
                waiting.append((fence, slot))
        self._pending = waiting
        if not ready:
            return
        # Whoever reclaims may be on another stream than whoever filled last or writes next: `require` waits for this.
        self._filled.order_after()
        for start, stop in byte_runs(ready):
            self.buffer[start:stop].fill_(self._fill)
        self._put_back(ready)
        self._filled = Fence.record(self.buffer.device)

    def _put_back(self, slots: list[Slot]) -> None:
        slab_units, found = self.slab_nbytes // GRANULE, dict[int, list[Slot]]()
        for slot in slots:
            found.setdefault(slot.id // slab_units, []).append(slot)
        for slab, returned in found.items():
            kind = self._classes[returned[0].nbytes]
            room, first, unit = kind.free[slab], slab * slab_units, kind.nbytes // GRANULE
            if not room:
                bisect.insort(kind.with_room, slab)
            room += [(slot.id - first) // unit for slot in returned]
            kind.free_slots += len(returned)
            self.used_nbytes -= len(returned) * kind.nbytes
            if len(room) == kind.slots:
                del kind.free[slab]
                kind.with_room.remove(slab)
                kind.free_slots -= kind.slots
                heapq.heappush(self._free_slabs, slab)

    def resize(self, num_slabs: int) -> None:
        """Cut the pool, whose slabs from there on are free, or make it longer. The buffer stays the same tensor.

        Nothing may be in flight: its memory is another afterwards.
        """
        before, nbytes = self.num_slabs, num_slabs * self.slab_nbytes
        other = torch.empty(nbytes, dtype=torch.uint8, device=self.buffer.device)
        kept = min(nbytes, self.buffer.numel())
        other[:kept] = self.buffer[:kept]
        other[kept:] = self._fill
        self.buffer.set_(other.untyped_storage(), 0, other.shape, other.stride())
        self._free_slabs = [slab for slab in self._free_slabs if slab < num_slabs] + list(range(before, num_slabs))
        heapq.heapify(self._free_slabs)
        self._filled = Fence.record(self.buffer.device)
        self.geometry = SlabGeometry(self.slab_nbytes, num_slabs)
        self.num_slabs = num_slabs

    def bytes_of(self, slot: Slot) -> torch.Tensor:
        """The slot's bytes, ``[nbytes]`` uint8, writable."""
        start = slot.id * GRANULE
        return self.buffer[start : start + slot.nbytes]

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every byte is accounted for exactly once."""
        owner: dict[int, int] = dict.fromkeys(self._free_slabs, 0)
        if len(owner) != len(self._free_slabs):
            raise IntegrityError("pool: a slab is twice in the free list")
        objects = list(self._live.values()) + [slot for _, slot in self._pending]
        taken_of: dict[int, list[Slot]] = {}
        for slot in objects:
            taken_of.setdefault(self.slab_of(slot), []).append(slot)
        for kind in self._classes.values():
            if kind.with_room != sorted(slab for slab, room in kind.free.items() if room):
                raise IntegrityError(f"pool: slabs with room of size {kind.nbytes} are listed wrongly")
            if kind.free_slots != sum(len(room) for room in kind.free.values()):
                raise IntegrityError(f"pool: free slot count of size {kind.nbytes} is {kind.free_slots}")
            for slab, room in kind.free.items():
                if slab in owner:
                    raise IntegrityError(f"pool: slab {slab} has two owners")
                owner[slab] = kind.nbytes
                slots = taken_of.pop(slab, [])
                taken = {slot.id * GRANULE % self.slab_nbytes // kind.nbytes for slot in slots}
                if any(slot.nbytes != kind.nbytes for slot in slots) or len(taken) != len(slots):
                    raise IntegrityError(f"pool: slab {slab} holds objects of another size or twice the same slot")
                if taken & set(room) or len(taken) + len(room) != kind.slots or len(set(room)) != len(room):
                    raise IntegrityError(f"pool: slots of slab {slab} do not add up")
        if taken_of:
            raise IntegrityError(f"pool: objects lie in slabs {sorted(taken_of)}, which no size holds")
        if sorted(owner) != list(range(self.num_slabs)):
            raise IntegrityError(f"pool: {self.num_slabs - len(owner)} slabs are lost")
        if self.used_nbytes != sum(slot.nbytes for slot in objects):
            raise IntegrityError(f"pool: used_nbytes is {self.used_nbytes}, objects hold otherwise")

    def slab_of(self, slot: Slot) -> int:
        """Index of the slab that holds it."""
        return slot.id * GRANULE // self.slab_nbytes
