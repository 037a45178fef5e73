"""Where the bytes are: a snapshot of a manager's books."""

from collections.abc import Iterable
from dataclasses import dataclass

from qvg_paged.budget import Budget
from qvg_paged.events import Tally
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.page import Codebook, Page
from qvg_paged.pool import SlabPool

__all__ = ["CODEBOOKS", "CacheStats", "ObjectStats", "StreamStats", "cache_stats", "object_stats", "stream_stats"]

CODEBOOKS = "codebooks"
"""Name of codebooks beside the names of page formats."""


@dataclass(frozen=True)
class StreamStats:
    """Bytes and frames of one stream; shared pages count in every stream that holds them.

    Attributes:
        tenant: owner.
        committed: frames committed so far.
        stored_frames: frames still stored.
        quantised_frames: of these, quantised ones.
        page_nbytes: pages.
        codebook_nbytes: codebooks.
        dense_nbytes: what the stored frames would take unquantised.
    """

    tenant: str
    committed: int
    stored_frames: int
    quantised_frames: int
    page_nbytes: int
    codebook_nbytes: int
    dense_nbytes: int

    @property
    def nbytes(self) -> int:
        """Pages and codebooks."""
        return self.page_nbytes + self.codebook_nbytes


@dataclass(frozen=True)
class ObjectStats:
    """Pool objects of one kind; those that forks share count once.

    Attributes:
        count: how many.
        nbytes: their bytes.
        capacity: how many an otherwise empty pool holds.
    """

    count: int
    nbytes: int
    capacity: int


@dataclass(frozen=True)
class CacheStats:
    """Bytes of a manager.

    Attributes:
        budget: how the memory is split.
        used_nbytes: pages and codebooks in the pool now, open chunks included.
        peak_nbytes: the most that has been.
        free_nbytes: slabs that no object size holds.
        tenant_nbytes: `used_nbytes` by tenant, memory on its way back excluded.
        streams: per stream.
        tenant_objects: pages and codebooks by tenant.
        objects: pages by name of their format, and codebooks.
        tally: counts since the manager was made.
        host_nbytes, disk_nbytes: bytes of parked streams on the host and in files.
    """

    budget: Budget
    used_nbytes: int
    peak_nbytes: int
    free_nbytes: int
    tenant_nbytes: dict[str, int]
    streams: dict[str, StreamStats]
    tenant_objects: dict[str, int]
    objects: dict[str, ObjectStats]
    tally: Tally
    host_nbytes: int = 0
    disk_nbytes: int = 0

    @property
    def peak_total_nbytes(self) -> int:
        """Peak of pages and codebooks plus everything the manager holds besides."""
        return self.peak_nbytes + self.budget.total - self.budget.pool


def stream_stats(tenant: str, committed: int, pages: Iterable[Page], dense_page_nbytes: int) -> StreamStats:
    """Books of one stream."""
    stored = list(pages)
    books: set[Codebook] = {page.codebook for page in stored if page.codebook}
    return StreamStats(
        tenant=tenant,
        committed=committed,
        stored_frames=len(stored),
        quantised_frames=sum(1 for page in stored if page.format),
        page_nbytes=sum(page.nbytes for page in stored),
        codebook_nbytes=sum(book.nbytes for book in books),
        dense_nbytes=len(stored) * dense_page_nbytes,
    )


def object_stats(budget: Budget, layouts: Iterable[PageLayout], pages: Iterable[Page]) -> dict[str, ObjectStats]:
    """Pool objects by kind; a page may be named several times."""
    unique = {id(page): page for page in pages}.values()
    books = {page.codebook for page in unique if page.codebook}

    def kind(nbytes: int, found: list[int]) -> ObjectStats:
        per_slab = budget.slabs.slab_nbytes // nbytes if nbytes else 0
        return ObjectStats(len(found), sum(found), per_slab * budget.slabs.num_slabs)

    stats = {}
    largest = 0
    for index, layout in enumerate(layouts):
        stats[layout.format.name] = kind(layout.page_nbytes, [p.nbytes for p in unique if p.format == index])
        largest = max(largest, layout.codebook_nbytes)
    return {**stats, CODEBOOKS: kind(largest, [book.nbytes for book in books])}


def cache_stats(
    budget: Budget, pool: SlabPool, streams: dict[str, StreamStats], objects: dict[str, ObjectStats], tally: Tally
) -> CacheStats:
    """Books of a manager."""
    tenants: dict[str, int] = {}
    counts: dict[str, int] = {}
    for slot in pool.live().values():
        tenants[slot.tenant] = tenants.get(slot.tenant, 0) + slot.nbytes
        counts[slot.tenant] = counts.get(slot.tenant, 0) + 1
    return CacheStats(
        budget=budget,
        used_nbytes=pool.used_nbytes,
        peak_nbytes=pool.peak_nbytes,
        free_nbytes=pool.free_nbytes,
        tenant_nbytes=tenants,
        streams=streams,
        tenant_objects=counts,
        objects=objects,
        tally=tally.copy(),
    )
