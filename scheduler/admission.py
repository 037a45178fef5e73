"""Who gets in, and who makes way for them: one pass over the line, on the books of one step."""

from collections.abc import Iterator, Mapping, Set
from math import ceil
from typing import Any

from qvg_paged.scheduler.books import Advice, Books
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.entry import Entry
from qvg_paged.scheduler.line import ByKey, Group, Order, Ranking, Waiting
from qvg_paged.scheduler.relief import relieve_pool
from qvg_paged.scheduler.request import StreamState
from qvg_paged.scheduler.state import BEHIND, QUOTA, State
from qvg_paged.timeline import Demand

__all__ = ["admit"]


def admit(books: Books, advice: Advice) -> tuple[list[Decision], list[Decision], Waiting]:
    """Who is admitted, who is resumed and why the others wait.

    The line is looked at until somebody in it does not fit and may not be overtaken (any more): all behind are told the
    same, and those who were told so before are not touched.
    """
    state, rules = books.state, books.rules
    if not state.queued and not state.parked:
        state.apart, state.group, state.barred = set(), BEHIND, {}
        return [], [], Waiting()
    order = _order(books, advice)
    admitted: list[Decision] = []
    resumed: list[Decision] = []
    told: dict[str, Decision] = {}
    barred: dict[str, Group] = {}
    group = BEHIND
    first: Entry | None = None
    gate: Entry | None = None  # stops newcomers, but not the parked ones that it waits for
    queued, parked, overtakes = state.queued, state.parked, rules.config.overtakes
    for _, stream_id in order.walk(barred.keys()):
        if first is not None and (first.overtaken >= overtakes or books.is_full):
            break
        entry = queued.get(stream_id) or parked[stream_id]
        if gate is not None and entry.state is StreamState.QUEUED:
            continue
        ready = rules.need(entry, False) if entry.backed and not _is_backed(books, entry) else entry
        blocked = _obstacle(books, ready)
        if blocked is not None and first is None and _is_scarcity(blocked[0]):
            squeezed = blocked[0] is Reason.NO_MEMORY and _squeeze_for(books, ready)
            if squeezed or _make_way(books, advice, ready):
                blocked = _obstacle(books, ready)
        if blocked is None:
            (resumed if entry.state is StreamState.PARKED else admitted).append(_start(books, ready))
            first = first and _overtaken(state, first)
            continue
        if blocked[0] is Reason.HOLD_OFF:  # parked ones come first on hold, so only newcomers follow
            group = blocked
            break
        told[stream_id] = _wait(books, entry, *blocked)
        if blocked[0] is Reason.QUOTA:
            barred.update(_mates(books, ready))
        elif blocked[0] is Reason.NO_HOST_MEMORY:
            gate = entry
        elif first is None:
            first = entry
    if not state.parked:
        state.hold = 0
    _settle(books, told, group, barred)
    left = {decision.stream_id for decision in (*admitted, *resumed)}
    return admitted, resumed, Waiting(order, told, group, barred, left, books.parked)


def _order(books: Books, advice: Advice) -> Order:
    """The line in the policy's order, after those that a floor entitles; on hold, parked ones come first."""
    state = books.state
    out = {decision.stream_id for decision in books.parked}
    if advice.keyed:
        turns = advice.turns(books.view(forced=False)) if advice.by_turns else None
        order = ByKey(state.still_lines(), turns, out)
        if state.hold or books.has_floors:
            ahead = sorted(_ahead(books, out), key=lambda entry: _rank_ahead(books, order, entry))
            order.ahead = [(entry.tenant, entry.id) for entry in ahead]
        return order
    known = {**state.queued, **state.parked} if state.parked else state.queued
    ranked = advice.rank(books.view(forced=False))
    line = [known[name] for name in ranked if name not in out] if out else list(map(known.__getitem__, ranked))
    if state.hold:
        line.sort(key=lambda entry: entry.state is StreamState.QUEUED)
    if books.has_floors:
        line.sort(key=lambda entry: not _is_claim(books, entry))
    return Ranking(line)


def _ahead(books: Books, out: Set[str]) -> Iterator[Entry]:
    """Who has a claim, and on hold the parked ones besides."""
    state = books.state
    if state.hold:
        yield from (entry for entry in state.parked.values() if entry.id not in out)
    for name, line in state.lines.items() if books.has_floors else ():
        if books.held(name) < state.tenants[name].spec.floor_nbytes:
            entries = [state.queued.get(stream_id) or state.parked[stream_id] for *_, stream_id in line]
            seen = out if not state.hold else out | state.parked.keys()
            yield from (entry for entry in entries if entry.id not in seen and _is_claim(books, entry))


def _rank_ahead(books: Books, order: ByKey, entry: Entry) -> tuple[bool, bool, tuple[float, int]]:
    claim = books.has_floors and _is_claim(books, entry)
    newcomer = bool(books.state.hold) and entry.state is StreamState.QUEUED
    return not claim, newcomer, order.turn_of(entry.tenant, entry.key, entry.arrival)


def _is_claim(books: Books, entry: Entry) -> bool:
    return books.held(entry.tenant) + entry.need_nbytes <= books.state.tenants[entry.tenant].spec.floor_nbytes


def _overtaken(state: State, first: Entry) -> Entry:
    group = state.queued if first.id in state.queued else state.parked
    state.keep(group[first.id].but(overtaken=first.overtaken + 1))
    return group[first.id]


def _is_scarcity(reason: Reason) -> bool:
    return reason in (Reason.NO_MEMORY, Reason.NO_SLOT)


def _mates(books: Books, entry: Entry) -> dict[str, Group]:
    """Whose streams wait with one that waits for its quota: nobody's if the quota has become too small for it."""
    ceiling = books.state.tenants[entry.tenant].spec.ceiling_nbytes
    return {entry.tenant: QUOTA} if ceiling is not None and entry.need_nbytes <= ceiling else {}


def _obstacle(books: Books, entry: Entry) -> tuple[Reason, str] | None:
    """Why an entry cannot run now."""
    return _rights(books, entry) or _room(books, entry)


def _rights(books: Books, entry: Entry) -> tuple[Reason, str] | None:
    state = books.state
    if books.has_ceilings:
        ceiling = state.tenants[entry.tenant].spec.ceiling_nbytes
        held = books.held(entry.tenant)
        if ceiling is not None and held + entry.need_nbytes > ceiling:
            return Reason.QUOTA, (
                f"needs {entry.need_nbytes} bytes; its tenant {entry.tenant!r} is promised {held} of {ceiling} bytes"
            )
    held_off = state.hold and state.parked and entry.state is StreamState.QUEUED and state.running
    if held_off and not (books.has_floors and _is_claim(books, entry)):
        return Reason.HOLD_OFF, "streams are parked for want of memory; they come first"
    return None


def _room(books: Books, entry: Entry) -> tuple[Reason, str] | None:
    state = books.state
    if books.is_full:
        return Reason.NO_SLOT, f"{len(state.running)} streams run, as many as may"
    if not books.has_room(entry):
        return books.shortage(entry)
    if books.has_floors and not _leaves_floors(books, entry):
        return Reason.FLOOR, f"needs {entry.need_nbytes} bytes; what is free is promised to other tenants' floors"
    if entry.state is StreamState.QUEUED and not _is_safe(books, entry) and _is_anybody_due(books):
        return Reason.NO_HOST_MEMORY, f"may hold {entry.worst_nbytes} bytes, for which the host has no room left"
    return None


def _leaves_floors(books: Books, entry: Entry) -> bool:
    """Whether the floors of other tenants stay free, unless nothing runs at all and the first in line would starve.

    Where streams can be parked, a floor is claimed back instead.
    """
    if books.rules.parking is not None or not books.state.running:
        return True
    unfilled = sum(
        max(0, tenant.spec.floor_nbytes - books.held(name))
        for name, tenant in books.state.tenants.items()
        if name != entry.tenant
    )
    return books.nbytes + entry.need_nbytes + unfilled <= books.limit


def _is_backed(books: Books, entry: Entry) -> bool:
    """Whether the host has room for the stream at its worst, beside all that may be parked already."""
    if entry.state is StreamState.PARKED:
        return True
    return books.backing + entry.worst_nbytes <= (books.rules.parking.host_nbytes if books.rules.parking else 0)


def _is_safe(books: Books, entry: Entry) -> bool:
    """Whether the streams that can never be parked, and any one of the others, will always fit together."""
    if books.rules.parking is None or (entry.backed and books.all_backed):
        return True
    live = [entry, *books.state.running.values(), *books.state.parked.values()]
    fixed = [other.worst for other in live if not other.backed]
    largest = Demand()
    for other in live:
        if other.backed:
            largest = largest.most(other.worst)
    return books.rules.cache.can_host([*fixed, largest])


def _is_anybody_due(books: Books) -> bool:
    """Whether somebody runs or may come back; parked streams that their quotas keep out hold up nobody else."""
    return bool(books.state.running) or any(_rights(books, entry) is None for entry in books.state.parked.values())


def _squeeze_for(books: Books, entry: Entry) -> bool:
    """Store running streams more cheaply, so that the first in line fits."""
    if not books.rules.config.squeeze_to_admit or not (entry.state is StreamState.PARKED or _is_safe(books, entry)):
        return False
    return relieve_pool(books, wanted=entry)


def _make_way(books: Books, advice: Advice, entry: Entry) -> bool:
    """Park what the policy, or the floor of the entry's tenant, gives up for it; nothing unless it is enough.

    A policy may exchange some streams a step, not all at once: transfers are spread, and nothing thrashes.
    """
    if books.rules.parking is None:
        return False
    claim = books.has_floors and _is_claim(books, entry)
    if not claim and books.exchanges >= max(1, ceil(books.rules.config.exchange_share * len(books.state.running))):
        return False
    view = books.view(forced=False)
    if not view.parkable or not (entry.state is StreamState.PARKED or _is_safe(books, entry)):
        return False
    asking: Any = entry if advice.keyed else entry.view  # policies of this package ask for nothing that differs
    wanted = [books.state.running[name] for name in advice.park(view, asking)]
    if claim:
        named = {other.id for other in wanted}
        rest = [other for other in reversed(books.state.by_arrival()) if other.id in view.parkable - named]
        wanted += [other for other in rest if other.tenant != entry.tenant]
    held, running = dict(books.by_tenant), books.demand
    victims: list[Entry] = []
    for other in wanted:
        floor = books.state.tenants[other.tenant].spec.floor_nbytes
        if other.tenant != entry.tenant and held[other.tenant] - other.need_nbytes < floor:
            continue
        held[other.tenant] -= other.need_nbytes
        running -= other.need
        victims.append(other)
        if books.fits(entry, len(victims), running=running):
            break
    else:
        return False
    text = f"made room for {entry.id!r}" + (", whose tenant has a floor" if claim else "")
    for other in victims:
        books.park(other, Reason.PARKED, text)
    books.vouch(entry)
    books.exchanges += not claim
    return True


def _start(books: Books, entry: Entry) -> Decision:
    state = books.state
    resumed = entry.state is StreamState.PARKED
    books.add(entry)
    text = (
        f"{entry.need_nbytes} bytes {books.horizon(entry)} fit: {books.nbytes} of {books.limit} bytes are "
        f"promised to {len(state.running) + 1} streams"
    )
    decision = Decision(entry.id, Reason.RESUMED if resumed else Reason.ADMITTED, text)
    state.start(
        entry.but(
            decision=decision,
            state=StreamState.RUNNING,
            chunks_before=entry.chunks,
            since=books.now,
            overtaken=0,
            progressed=state.step,
        )
    )
    return decision


def _wait(books: Books, entry: Entry, reason: Reason, text: str) -> Decision:
    """The decision that a stream waits; the old one if it says the same."""
    decision = books.state.decision(entry)
    if decision.reason is not reason or decision.text != text:
        decision = Decision(entry.id, reason, text)
        books.news.append(entry.id)
    if entry.decision is not decision:
        books.state.keep(entry.but(decision=decision))
    return decision


def _settle(books: Books, told: Mapping[str, Decision], group: Group, barred: Mapping[str, Group]) -> None:
    """Note what those in line are told whom nobody looked at, and to whom of them it is new."""
    state = books.state
    apart = {*told, *[decision.stream_id for decision in books.parked]}
    news: list[tuple[int, str]] = []
    for stream_id in state.apart - apart:
        entry = state.queued.get(stream_id) or state.parked.get(stream_id)
        if entry is not None and (entry.decision.reason, entry.decision.text) != barred.get(entry.tenant, group):
            news.append((entry.arrival, stream_id))
    maybe = state.lines if group != state.group else barred.keys() ^ state.barred.keys()
    known = apart | state.apart
    for name in [name for name in maybe if barred.get(name, group) != state.barred.get(name, state.group)]:
        news += [spot[1:] for spot in state.lines.get(name, ()) if spot[2] not in known]
    books.news += [stream_id for _, stream_id in sorted(news)]
    state.apart, state.group, state.barred = apart, group, barred
