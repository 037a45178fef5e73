"""Pages and codebooks as objects with owners: who holds a page, and which codebook it needs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qvg_paged.budget import object_counts
from qvg_paged.errors import IntegrityError
from qvg_paged.fence import Fence
from qvg_paged.kernels.block_table import NO_CODEBOOK
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.pool import SlabPool, Slot
from qvg_paged.timeline import Demand

__all__ = ["DENSE_FORMAT", "QUANTISED_FORMAT", "Codebook", "Page", "PageStore"]

DENSE_FORMAT = 0
QUANTISED_FORMAT = 1


@dataclass(eq=False, slots=True)
class Codebook:
    """Centroids and balancing vectors of a span, all layers; lives as long as a page of the span does."""

    slot: Slot
    pages: int = 0


@dataclass(eq=False, slots=True)
class Page:
    """One frame in one format. `owners` counts streams and open chunks that hold it, `demotions` how often the frame
    was stored more cheaply than its window says."""

    slot: Slot
    format: int
    codebook: Codebook | None = None
    owners: int = 1
    demotions: int = 0

    @property
    def id(self) -> int:
        """Id in block tables."""
        return self.slot.id

    @property
    def codebook_id(self) -> int:
        """Id of the codebook in block tables, -1 without."""
        return self.codebook.slot.id if self.codebook else NO_CODEBOOK


@dataclass(frozen=True)
class Reservation:
    """What an open chunk may need until it is committed: scratch pages, and pages and codebooks of closing spans."""

    scratch: list[Page]
    spans: list[list[Page]] = field(default_factory=list)

    @property
    def pages(self) -> list[Page]:
        """All reserved pages."""
        return [*self.scratch, *(page for span in self.spans for page in span)]


class PageStore:
    """Allocates pages and codebooks from the pool and returns them when their last owner lets go."""

    def __init__(self, pool: SlabPool, layouts: tuple[PageLayout, ...]) -> None:
        self.pool = pool
        self.layouts = layouts

    def require(self, demand: Demand) -> None:
        """Make room for new objects or raise `OutOfMemoryError`, changing nothing."""
        self.pool.require(object_counts(self.layouts, demand))

    def reserve(
        self, tenant: str, scratch: int, spans: int, span_frames: int, fmt: int = QUANTISED_FORMAT
    ) -> Reservation:
        """Take everything a chunk needs, its spans in `fmt`; call `require` before.

        Raises:
            OutOfMemoryError: it does not fit; nothing stays allocated.
        """
        taken: list[Page] = []
        try:
            taken += self._pages(DENSE_FORMAT, scratch, tenant, None)
            groups = []
            for _ in range(spans):
                size = self.layouts[fmt].codebook_nbytes
                codebook = Codebook(self.pool.allocate(size, 1, tenant)[0]) if size else None
                try:
                    group = self._pages(fmt, span_frames, tenant, codebook)
                except BaseException:
                    if codebook:
                        self.pool.free(codebook.slot, Fence())
                    raise
                groups.append(group)
                taken += group
        except BaseException:
            self.release(taken, Fence())
            raise
        return Reservation(taken[:scratch], groups)

    def _pages(self, fmt: int, count: int, tenant: str, codebook: Codebook | None) -> list[Page]:
        slots = self.pool.allocate(self.layouts[fmt].page_nbytes, count, tenant)
        if codebook:
            codebook.pages = count
        return [Page(slot, fmt, codebook) for slot in slots]

    def successors(self, pages: list[Page], fmt: int, tenant: str) -> list[Page]:
        """A page in `fmt` for each of `pages`, under the same codebook.

        Raises:
            OutOfMemoryError: they do not fit; nothing stays allocated.
        """
        slots = self.pool.allocate(self.layouts[fmt].page_nbytes, len(pages), tenant)
        for page in pages:
            if page.codebook:
                page.codebook.pages += 1
        return [
            Page(slot, fmt, page.codebook, demotions=page.demotions + 1)
            for slot, page in zip(slots, pages, strict=True)
        ]

    def slots(self, sizes: Sequence[int], tenant: str) -> list[Slot]:
        """A slot of each size, in order.

        Raises:
            OutOfMemoryError: they do not fit; nothing stays allocated.
        """
        taken: dict[int, list[Slot]] = {}
        try:
            for size, count in Counter(sizes).items():
                taken[size] = self.pool.allocate(size, count, tenant)[::-1]
        except BaseException:
            for slot in (slot for found in taken.values() for slot in found):
                self.pool.free(slot, Fence())
            raise
        return [taken[size].pop() for size in sizes]

    def retain(self, pages: list[Page]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self.pool.check(page.slot)
        for page in pages:
            page.owners += 1

    def release(self, pages: list[Page], fence: Fence) -> int:
        """Take an owner from each page; bytes returned to the pool, reusable once `fence` has passed."""
        returned = 0
        for page in pages:
            self.pool.check(page.slot)
            page.owners -= 1
            if page.owners:
                continue
            self.pool.free(page.slot, fence)
            returned += page.slot.nbytes
            codebook = page.codebook
            if codebook:
                codebook.pages -= 1
                if not codebook.pages:
                    self.pool.free(codebook.slot, fence)
                    returned += codebook.slot.nbytes
        return returned

    def check_integrity(self, held: list[Page]) -> None:
        """Raise `IntegrityError` unless `held`, a page per owner, explains every owner, codebook and byte."""
        self.pool.check_integrity()
        owners: dict[int, int] = {}
        for page in held:
            self.pool.check(page.slot)
            owners[id(page)] = owners.get(id(page), 0) + 1
        unique = {id(page): page for page in held}
        users = Counter(page.codebook for page in unique.values() if page.codebook)
        live: dict[int, Slot] = {}
        for key, page in unique.items():
            if page.owners != owners[key]:
                raise IntegrityError(f"page {page.id}: owners is {page.owners}, but {owners[key]} hold it")
            live[page.slot.id] = page.slot
            if page.codebook:
                self.pool.check(page.codebook.slot)
                if page.codebook.pages != users[page.codebook]:
                    raise IntegrityError(
                        f"codebook {page.codebook_id}: counts {page.codebook.pages} pages, has {users[page.codebook]}"
                    )
                live[page.codebook.slot.id] = page.codebook.slot
        if live != self.pool.live():
            raise IntegrityError("pool: live slots are not those that pages and codebooks hold")
