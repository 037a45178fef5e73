"""Books of slabs: which size each is cut for, which places are free, which came back."""

import heapq
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from qvg_paged.errors import IntegrityError
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.slabs import PLACE, SlabGeometry, Slot, place_runs

__all__ = ["SizeClass", "SlabBooks"]


class SizeClass:
    """Slabs cut for one object size.

    Attributes:
        nbytes, units: size of an object in bytes and granules.
        slots: objects per slab.
        slab_units, rest: granules of a slab, and of what is left of it behind the last object, which is nobody's.
        free: for each of its slabs where it has room: handles of the past, the next place to be given out last.
        with_room: its slabs that have a free slot, ascending.
        free_slots: free slots of all its slabs.
        returned: handles that came back; still to be overwritten.
    """

    __slots__ = ("free", "free_slots", "nbytes", "rest", "returned", "slab_units", "slots", "units", "with_room")

    def __init__(self, nbytes: int, slab_nbytes: int) -> None:
        self.nbytes = nbytes
        self.units = nbytes // GRANULE
        self.slots = slab_nbytes // nbytes
        self.slab_units = slab_nbytes // GRANULE
        self.rest = self.slab_units - self.slots * self.units
        self.free: dict[int, list[int]] = {}
        self.with_room: list[int] = []
        self.free_slots = 0
        self.returned: list[int] = []

    def cut(self, slab: int) -> list[int]:
        """Handles of a slab that is cut for this size, highest place first; they were never given out."""
        first, step = slab * self.slab_units << PLACE, self.units << PLACE
        return list(range(first + (self.slots - 1) * step, first - 1, -step))

    def stretches(self, handles: Sequence[int]) -> list[tuple[int, int]]:
        """First granule and end of each stretch of memory that sorted handles fill, rests of slabs included."""
        return place_runs(handles, self.units, self.slab_units, self.rest)


class SlabBooks:
    """Places by size, without their memory and without those who hold them.

    Attributes:
        geometry: how the pool is cut.
        used_nbytes: bytes of places that are not free.
        peak_nbytes: the most that has been.
    """

    def __init__(self, geometry: SlabGeometry, sizes: Iterable[int]) -> None:
        self.geometry = geometry
        self.slab_nbytes = geometry.slab_nbytes
        self.num_slabs = geometry.num_slabs
        self._slab_units = self.slab_nbytes // GRANULE
        self._free_slabs = list(range(self.num_slabs))
        self._classes = {size: SizeClass(size, self.slab_nbytes) for size in sorted(set(sizes))}
        self._cut: dict[int, SizeClass] = {}
        self.used_nbytes = 0
        self.peak_nbytes = 0

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

    def slab_of(self, slot: Slot) -> int:
        """Index of the slab that holds it."""
        return slot.id // self._slab_units

    def _lowest(self, kind: SizeClass, count: int) -> list[int]:
        """Places, by handles of the past, in the lowest slabs of a size that have room, a slab at a time."""
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
        kind.free[slab] = kind.cut(slab)
        kind.with_room.append(slab)
        kind.free_slots += kind.slots
        self._cut[slab] = kind

    def _put_back(self, slab: int, kind: SizeClass, handles: list[int]) -> None:
        room = kind.free[slab]
        if not room:
            insort(kind.with_room, slab)
        room += reversed(handles)
        if len(room) > len(handles):
            room.sort(reverse=True)  # neighbours together: one operation overwrites or checks them
        kind.free_slots += len(handles)
        self.used_nbytes -= len(handles) * kind.nbytes
        if len(room) == kind.slots:
            del self._cut[slab], kind.free[slab]
            kind.with_room.remove(slab)
            kind.free_slots -= kind.slots
            heapq.heappush(self._free_slabs, slab)

    def _recut(self, num_slabs: int) -> None:
        """Forget the slabs from there on, which are free, or add as many."""
        before, self.num_slabs = self.num_slabs, num_slabs
        self._free_slabs = [slab for slab in self._free_slabs if slab < num_slabs] + list(range(before, num_slabs))
        heapq.heapify(self._free_slabs)
        self.geometry = SlabGeometry(self.slab_nbytes, num_slabs)

    def _check(self, taken_handles: Iterable[int]) -> None:
        """Raise `IntegrityError` unless every place is free, came back or has one of these handles, and only that."""
        if len(set(self._free_slabs)) != len(self._free_slabs):
            raise IntegrityError("pool: a slab is twice in the free list")
        taken_of: dict[int, list[int]] = {}
        for handle in chain(taken_handles, *(kind.returned for kind in self._classes.values())):
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
