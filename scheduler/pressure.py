"""Who makes room when what runs no longer fits the pool, or a tenant its ceiling."""

from collections.abc import Iterable

from qvg_paged.scheduler.books import Advice, Books
from qvg_paged.scheduler.decision import Reason
from qvg_paged.scheduler.entry import Entry
from qvg_paged.scheduler.relief import relieve_pool, relieve_tenant
from qvg_paged.scheduler.snapshot import parkable

__all__ = ["squeeze"]


def squeeze(books: Books, advice: Advice) -> None:
    """Make what runs fit the pool, or what is left of it, and every tenant its ceiling, as far as may be.

    Streams are stored more cheaply if that is enough; else one is parked, and so on.
    """
    state = books.state
    if books.rules.parking is None:
        return
    over = [tenant for tenant in books.by_tenant if _excess(books, tenant) > 0] if books.has_ceilings else []
    if not over and books.fits():
        return
    order = _by_default(books, advice.park(books.view(forced=True), None))
    for tenant in over:
        ceiling = state.tenants[tenant].spec.ceiling_nbytes or 0
        for entry in _hopeless_first(order, ceiling):
            if _excess(books, tenant) <= 0 or relieve_tenant(books, tenant, _excess(books, tenant)):
                break
            if entry.tenant == tenant and entry.id in state.running:
                books.park(entry, Reason.SQUEEZED, f"tenant {tenant!r} may hold {ceiling} bytes of the pool")
    order.sort(key=lambda entry: _within_floor(books, entry))
    order = [entry for entry in order if entry.id in state.running]
    while not books.fits() and not relieve_pool(books, order) and order:
        books.park(state.running[order.pop(0).id], Reason.SQUEEZED, _too_much(books))
        state.hold = books.rules.config.hold_steps


def _hopeless_first(order: Iterable[Entry], ceiling: int) -> list[Entry]:
    """Who does not fit below the ceiling even alone goes before those who do."""
    return sorted(order, key=lambda entry: entry.need_nbytes <= ceiling)


def _too_much(books: Books) -> str:
    return f"what runs needs more than {books.limit} bytes of the pool"


def _excess(books: Books, tenant: str) -> int:
    ceiling = books.state.tenants[tenant].spec.ceiling_nbytes
    return 0 if ceiling is None else books.held(tenant) - ceiling


def _within_floor(books: Books, entry: Entry) -> bool:
    floor = books.state.tenants[entry.tenant].spec.floor_nbytes
    return books.held(entry.tenant) - entry.need_nbytes < floor


def _by_default(books: Books, wanted: Iterable[str]) -> list[Entry]:
    """All that may be parked: first those the policy names, then the latest to arrive."""
    running = books.state.running
    first = [running[stream_id] for stream_id in wanted]
    named = {entry.id for entry in first}
    others = parkable(books.rules, books.state, forced=True) - named
    rest = [entry for entry in reversed(books.state.by_arrival()) if entry.id in others]
    return first + rest
