"""The upper rungs of the ladder: running streams are stored more cheaply before anybody is parked or waits."""

from collections.abc import Callable, Sequence

from qvg_paged.ladder import Relief, Squeeze
from qvg_paged.scheduler.backend import LadderBackend
from qvg_paged.scheduler.books import Books
from qvg_paged.scheduler.entry import Entry
from qvg_paged.timeline import Demand

__all__ = ["relieve", "relieve_pool", "relieve_tenant"]


def relieve_pool(books: Books, first: Sequence[Entry] = (), wanted: Entry | None = None) -> bool:
    """Make all that runs, and `wanted` besides, fit; those in `first` go down before the latest to arrive."""
    named = {entry.id for entry in first}
    rest = [entry for entry in reversed(books.state.by_arrival()) if entry.id not in named]
    order = [books.state.running[entry.id] for entry in first if entry.id in books.state.running]
    return relieve(books, order + rest, lambda demand, _: books.fits(wanted, running=demand))


def relieve_tenant(books: Books, tenant: str, excess: int) -> bool:
    """Make a tenant's streams hold `excess` bytes less."""
    order = [entry for entry in reversed(books.state.by_arrival()) if entry.tenant == tenant]
    return relieve(books, order, lambda _, saved: saved >= excess)


def relieve(books: Books, order: Sequence[Entry], enough: Callable[[Demand, int], bool]) -> bool:
    """Relieve streams one after the other, and kind by kind, until it is enough; nothing unless it can be.

    Args:
        books: what is promised.
        order: running streams.
        enough: says so of what would be promised to all running streams, and of the bytes that were saved.
    """
    ladder = books.rules.ladder
    if ladder is None:
        return False
    demand, saved = books.demand, 0
    for entry in order:
        lowest = entry
        for relief in Relief:
            lowest = _after(books, ladder, lowest, relief) or lowest
        demand, saved = demand - entry.need + lowest.need, saved + entry.need_nbytes - lowest.need_nbytes
    if not saved or not enough(demand, saved):
        return False
    done, saved = False, 0
    for relief in Relief:
        for entry in order:
            old = books.state.running[entry.id]
            new = None if done else _after(books, ladder, old, relief)
            if new is not None:
                books.lower(new, relief)
                saved += old.need_nbytes - new.need_nbytes
                done = enough(books.demand, saved)
    return done


def _after(books: Books, ladder: LadderBackend, entry: Entry, relief: Relief) -> Entry | None:
    """The entry once relieved, if it may be and needs less for its next chunk."""
    request = entry.request
    fresh = entry.progressed == books.state.step  # comes in with this plan, and may come with bytes of a dearer rung
    if fresh or not entry.backed:
        return None
    floor = request.quality.stricter(books.state.tenants[entry.tenant].spec.quality)
    now = entry.squeeze or Squeeze()
    squeeze = ladder.lowered(request.window, request.frames, floor, now, entry.committed, relief)
    if squeeze is None:
        return None
    new = books.rules.need(entry, True, squeeze=squeeze)
    return new if new.need_nbytes < entry.need_nbytes else None
