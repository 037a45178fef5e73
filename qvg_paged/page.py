"""Pages and codebooks as objects with owners: who holds a page, and which codebook it needs."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from qvg_paged.budget import object_counts
from qvg_paged.errors import IntegrityError
from qvg_paged.fence import Fence
from qvg_paged.kernels.block_table import NO_CODEBOOK
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.pool import SlabPool, Slot
from qvg_paged.slabs import PLACE
from qvg_paged.timeline import Demand

__all__ = ["DENSE_FORMAT", "QUANTISED_FORMAT", "Codebook", "Page", "PageStore"]

DENSE_FORMAT = 0
QUANTISED_FORMAT = 1


class Stored:
    """An object in the pool: where it lies, and whose it is. `id` is its name in block tables."""

    __slots__ = ("handle", "id", "nbytes", "tenant")

    def __init__(self, handle: int, nbytes: int, tenant: str) -> None:
        self.handle = handle
        self.id = handle >> PLACE
        self.nbytes = nbytes
        self.tenant = tenant

    @property
    def slot(self) -> Slot:
        """Its memory."""
        return Slot(self.id, self.nbytes, self.tenant, self.handle)

    @slot.setter
    def slot(self, slot: Slot) -> None:
        """Say where the object has moved."""
        self.id, self.nbytes, self.tenant, self.handle = slot


class Codebook(Stored):
    """Centroids and balancing vectors of a span, all layers; lives as long as a page of the span does."""

    __slots__ = ("pages",)

    def __init__(self, handle: int, nbytes: int, tenant: str, pages: int = 0) -> None:
        super().__init__(handle, nbytes, tenant)
        self.pages = pages

    @classmethod
    def at(cls, slot: Slot, pages: int = 0) -> "Codebook":
        """A codebook in that memory."""
        return cls(slot.generation, slot.nbytes, slot.tenant, pages)


class Page(Stored):
    """One frame in one format. `owners` counts streams and open chunks that hold it, `demotions` how often the frame
    was stored more cheaply than its window says."""

    __slots__ = ("codebook", "demotions", "format", "owners")

    def __init__(
        self, handle: int, nbytes: int, tenant: str, fmt: int, codebook: Codebook | None = None, demotions: int = 0
    ) -> None:
        self.handle = handle
        self.id = handle >> PLACE
        self.nbytes = nbytes
        self.tenant = tenant
        self.format = fmt
        self.codebook = codebook
        self.owners = 1
        self.demotions = demotions

    @classmethod
    def at(cls, slot: Slot, fmt: int, codebook: Codebook | None = None, demotions: int = 0) -> "Page":
        """A page in that memory."""
        return cls(slot.generation, slot.nbytes, slot.tenant, fmt, codebook, demotions)

    @property
    def codebook_id(self) -> int:
        """Id of the codebook in block tables, -1 without."""
        return self.codebook.id if self.codebook else NO_CODEBOOK


class Reservation(NamedTuple):
    """What an open chunk may need until it is committed: scratch pages, and pages and codebooks of closing spans."""

    scratch: list[Page]
    spans: Sequence[list[Page]] = ()

    @property
    def pages(self) -> list[Page]:
        """All reserved pages."""
        if not self.spans:
            return self.scratch
        pages = [*self.scratch]
        for span in self.spans:
            pages += span
        return pages


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
        taken = self._pages(DENSE_FORMAT, scratch, tenant, None)
        if not spans:
            return Reservation(taken)
        groups = []
        try:
            for _ in range(spans):
                size = self.layouts[fmt].codebook_nbytes
                codebook = Codebook(self.pool.take(size, 1, tenant)[0], size, tenant) if size else None
                try:
                    group = self._pages(fmt, span_frames, tenant, codebook)
                except BaseException:
                    if codebook:
                        self.pool.give_back(size, [codebook.handle], tenant, self.pool.fence())
                    raise
                groups.append(group)
                taken += group
        except BaseException:
            self.release(taken, self.pool.fence())
            raise
        return Reservation(taken[:scratch], groups)

    def _pages(self, fmt: int, count: int, tenant: str, codebook: Codebook | None) -> list[Page]:
        nbytes = self.layouts[fmt].page_nbytes
        handles = self.pool.take(nbytes, count, tenant)
        if codebook:
            codebook.pages = count
        return [Page(handle, nbytes, tenant, fmt, codebook) for handle in handles]

    def successors(self, pages: list[Page], fmt: int, tenant: str) -> list[Page]:
        """A page in `fmt` for each of `pages`, under the same codebook.

        Raises:
            OutOfMemoryError: they do not fit; nothing stays allocated.
        """
        nbytes = self.layouts[fmt].page_nbytes
        handles = self.pool.take(nbytes, len(pages), tenant)
        for page in pages:
            if page.codebook:
                page.codebook.pages += 1
        return [
            Page(handle, nbytes, tenant, fmt, page.codebook, page.demotions + 1)
            for handle, page in zip(handles, pages, strict=True)
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
                self.pool.free(slot, self.pool.fence())
            raise
        return [taken[size].pop() for size in sizes]

    def retain(self, pages: list[Page]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self.pool.check(page.slot)
        for page in pages:
            page.owners += 1

    def release(self, pages: Sequence[Page], fence: Fence) -> int:
        """Take an owner from each page, all of one tenant; bytes returned to the pool, reusable behind `fence`.

        Raises:
            StaleHandleError: one was returned before; nothing changed.
        """
        if not pages:
            return 0
        tenant = pages[0].tenant
        self.pool.check_handles([page.handle for page in pages], tenant)
        returned: dict[int, list[int]] = {}
        for page in pages:
            page.owners -= 1
            if page.owners:
                continue
            if page.nbytes in returned:
                returned[page.nbytes].append(page.handle)
            else:
                returned[page.nbytes] = [page.handle]
            codebook = page.codebook
            if codebook is not None:
                codebook.pages -= 1
                if not codebook.pages:
                    returned.setdefault(codebook.nbytes, []).append(codebook.handle)
        total = 0
        for nbytes, handles in returned.items():
            self.pool.take_back(nbytes, handles, tenant, fence)
            total += nbytes * len(handles)
        return total

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
