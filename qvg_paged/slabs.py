"""How a pool is cut into slabs, and how a place in it is named.

A handle is one integer: the place (in units of `GRANULE` bytes) above; below, the sum of the place and of the number of
the call that took it, which is the generation. So handles sort by address, no two allocations have the same one, those
of neighbours are a range, and Python hashes them to neighbours in a set.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qvg_paged.errors import ConfigError
from qvg_paged.kernels.layout import GRANULE, align

__all__ = ["GENERATIONS", "PLACE", "STRIDE", "SlabGeometry", "Slot", "by_slab", "byte_runs", "place_runs"]

PLACE = 33
"""Bits below the place: ``handle >> PLACE`` is the id of a slot. Handles in a pool of up to 256 GiB are of 63 bits, and
a range of those is made faster than one of longer integers."""
GENERATIONS = 1 << 32
"""Calls until a generation comes again."""
STRIDE = (1 << PLACE) + 1
"""From a handle to that of the next granule, if both were taken together."""


class Slot(NamedTuple):
    """Memory of one object. A reused address is another slot: its generation differs.

    Attributes:
        id: offset in the pool in units of `GRANULE` bytes.
        nbytes: size.
        tenant: who may read it.
        generation: the handle: unlike that of any other slot, earlier or later.
    """

    id: int
    nbytes: int
    tenant: str
    generation: int


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
    return _joined((slot.id * GRANULE, slot.id * GRANULE + slot.nbytes) for slot in sorted(slots, key=lambda s: s.id))


def place_runs(handles: Sequence[int], units: int, slab_units: int = 1, rest: int = 0) -> list[tuple[int, int]]:
    """The same for sorted handles of objects of `units` granules, in granules. Neighbours, too, are objects between
    which a slab ends with `rest` granules that hold none.
    """
    if not handles:
        return []
    first, end = handles[0] >> PLACE, (handles[-1] >> PLACE) + units
    between = rest * ((end - 1) // slab_units - first // slab_units) if rest else 0
    if end - first == len(handles) * units + between:  # no gap, as they mostly come
        return [(first, end)]
    runs: list[tuple[int, int]] = []
    end = first
    for handle in handles:
        start = handle >> PLACE
        if start != end and (start != end + rest or start % slab_units):
            runs.append((first, end))
            first = start
        end = start + units
    return [*runs, (first, end)]


def _joined(stretches: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for start, stop in stretches:
        first = runs.pop()[0] if runs and runs[-1][1] == start else start
        runs.append((first, stop))
    return runs


def by_slab(handles: list[int], slab_units: int) -> Iterator[tuple[int, list[int]]]:
    """Each slab in which some of these sorted handles lie, and those of them."""
    start = 0
    while start < len(handles):
        slab = (handles[start] >> PLACE) // slab_units
        end = bisect_left(handles, (slab + 1) * slab_units << PLACE, start)
        yield slab, handles[start:end]
        start = end
