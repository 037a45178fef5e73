"""A stream outside the pool, as a value: which objects it has, in which order their bytes follow each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qvg_paged.page import Codebook, Page
from qvg_paged.pool import Slot
from qvg_paged.timeline import Timeline

__all__ = ["Image", "PageRecord"]

NO_BOOK = -1


@dataclass(frozen=True)
class PageRecord:
    """A stored frame.

    Attributes:
        frame: its index in the stream.
        format: index of its layout.
        place: index of its page among the image's objects.
        book: index of its codebook among them, -1 without.
        demotions: how often it was stored more cheaply than its window says.
    """

    frame: int
    format: int
    place: int
    book: int
    demotions: int


@dataclass(frozen=True)
class Image:
    """Everything that makes a stream: its bytes are those of its objects, one after the other.

    Attributes:
        committed: frames committed.
        timeline: rules of the stream.
        pages: stored frames, ascending.
        sizes: bytes of each object (page or codebook).
        digests: 64-bit digest of each object, computed on the device before the bytes left it.
    """

    committed: int
    timeline: Timeline
    pages: tuple[PageRecord, ...]
    sizes: tuple[int, ...]
    digests: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return sum(self.sizes)

    def with_digests(self, digests: Sequence[int]) -> "Image":
        """The same image, sealed."""
        return replace(self, digests=tuple(digests))

    @property
    def counts(self) -> Counter[int]:
        """Objects by size."""
        return Counter(self.sizes)

    @classmethod
    def of(cls, committed: int, timeline: Timeline, pages: Mapping[int, Page]) -> "tuple[Image, list[Slot]]":
        """The image of a stream, without digests, and the slot of each object: in order of address."""
        slots = {page.slot.id: page.slot for page in pages.values()}
        slots |= {page.codebook.slot.id: page.codebook.slot for page in pages.values() if page.codebook}
        order = sorted(slots)
        place = {slot_id: index for index, slot_id in enumerate(order)}
        records = tuple(
            PageRecord(frame, page.format, place[page.id], place.get(page.codebook_id, NO_BOOK), page.demotions)
            for frame, page in sorted(pages.items())
        )
        sizes = tuple(slots[slot_id].nbytes for slot_id in order)
        return cls(committed, timeline, records, sizes), [slots[slot_id] for slot_id in order]

    def build(self, slots: list[Slot]) -> dict[int, Page]:
        """Pages and codebooks in other slots."""
        books: dict[int, Codebook] = {}
        for record in self.pages:
            if record.book != NO_BOOK:
                books.setdefault(record.book, Codebook.at(slots[record.book])).pages += 1
        return {
            record.frame: Page.at(slots[record.place], record.format, books.get(record.book), record.demotions)
            for record in self.pages
        }
