"""What may happen to a scheduler between two plans, and what each of these things does to its state."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from qvg_paged.config import Window
from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler.checks import check_kind, check_name, one_line, shown
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.entry import Entry
from qvg_paged.scheduler.plan import Outcome, Plan
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.state import HISTORY, State
from qvg_paged.scheduler.tenant import Tenant, TenantSpec

__all__ = ["Cancel", "Drain", "Input", "LimitPool", "Report", "SetTenant", "Shutdown", "Submit", "apply"]


@dataclass(frozen=True)
class Submit:
    """A request came in."""

    request: StreamRequest


@dataclass(frozen=True)
class Cancel:
    """The caller gave a stream up."""

    stream_id: str


@dataclass(frozen=True)
class SetTenant:
    """A tenant's rights were set or changed."""

    name: str
    spec: TenantSpec


@dataclass(frozen=True)
class LimitPool:
    """The host engine wants memory back (bytes that may stay), or returns it (None)."""

    nbytes: int | None


@dataclass(frozen=True)
class Drain:
    """No new requests; those that are in go on."""


@dataclass(frozen=True)
class Shutdown:
    """No new requests, and all streams are cancelled."""


@dataclass(frozen=True)
class Report:
    """The engine carried a plan out."""

    plan: Plan
    outcome: Outcome


Input = Submit | Cancel | SetTenant | LimitPool | Drain | Shutdown | Report


def apply(rules: Rules, state: State, event: Input) -> Decision | None:
    """Change `state`; the decision about a single stream, if the event is about one.

    Raises:
        ArgumentError: the event does not fit the state, which is unchanged.
    """
    match event:
        case Submit():
            return _submit(rules, state, event.request)
        case Cancel():
            return _cancel(state, event.stream_id)
        case SetTenant():
            _set_tenant(rules, state, event.name, event.spec)
        case LimitPool():
            _limit(rules, state, event.nbytes)
        case Drain():
            state.draining = True
        case Shutdown():
            state.draining = True
            for entry in (*state.queued.values(), *state.running.values(), *state.parked.values()):
                _cancel(state, entry.id)
        case Report():
            _report(rules, state, event.plan, event.outcome)
        case _:
            raise ArgumentError(f"event: expected an input of a scheduler, got {shown(event)}")
    return None


def _submit(rules: Rules, state: State, request: StreamRequest) -> Decision:
    check_kind("request", request, StreamRequest)
    old = state.find(request.id)
    if old is not None and request.id not in state.done and not old.decision.reason.is_refusal:
        raise ArgumentError(f"id: expected one that is not in use, got {request.id!r}, {old.state.value}")
    cache = rules.cache
    worst, nbytes = rules.worst(request.window, request.frames, request.branches)
    text = f"in line; needs {nbytes} bytes of the pool at its worst, {cache.pool_nbytes} bytes in all"
    decision = Decision(request.id, Reason.QUEUED, text)
    state.leaving.pop(request.id, None)
    state.forget(request.id)
    state.arrivals += 1
    entry = Entry(request, _copied(request), worst, nbytes, state.arrivals, decision)
    refusal = _refusal(rules, state, entry)
    if refusal is not None:
        reason, text = refusal
        quiet = len(state.leaving) >= HISTORY
        return state.end(entry, StreamState.FAILED, reason, f"refused: {text}", announced=quiet).decision
    if request.tenant not in state.tenants:
        state.tenants[request.tenant] = Tenant(rules.config.default_tenant)
        state.note_rights()
    standing = entry.standing(state.tenants[request.tenant])
    state.enqueue(rules.need(entry, rules.parking is not None, **standing))
    return decision


def _copied(request: StreamRequest) -> StreamRequest:
    """One that policies may see: a request they could reach into would reach into the books."""
    shown, window = object.__new__(StreamRequest), object.__new__(Window)
    window.__dict__.update(request.window.__dict__)
    shown.__dict__.update(request.__dict__, window=window)
    return shown


def _refusal(rules: Rules, state: State, entry: Entry) -> tuple[Reason, str] | None:
    if state.draining:
        return Reason.DRAINING, "the scheduler accepts no new streams"
    cache, tenant = rules.cache, state.tenants.get(entry.tenant)
    if not cache.can_host([entry.worst]):
        return Reason.TOO_LARGE, (
            f"needs {entry.worst_nbytes} bytes of the pool at its worst, {cache.pool_nbytes} bytes are there; shorten "
            "the window or raise memory"
        )
    spec = tenant.spec if tenant else rules.config.default_tenant
    if spec.ceiling_nbytes is not None and entry.worst_nbytes > spec.ceiling_nbytes:
        return Reason.TOO_LARGE, (
            f"needs {entry.worst_nbytes} bytes of the pool at its worst, its tenant {entry.tenant!r} may hold "
            f"{spec.ceiling_nbytes} bytes; shorten the window or raise the tenant's ceiling"
        )
    in_line = len(state.lines.get(entry.tenant, ())) + len(state.fresh)
    if in_line >= spec.max_queued:
        in_line = sum(other.tenant == entry.tenant for other in state.queued.values())
    if in_line >= spec.max_queued:
        return Reason.QUEUE_FULL, f"tenant {entry.tenant!r} has {in_line} streams in line, as many as it may"
    if tenant is None and not _make_room(rules, state):
        return Reason.QUEUE_FULL, f"there are {len(state.tenants)} tenants, as many as there may be"
    return None


def _make_room(rules: Rules, state: State) -> bool:
    """Forget tenants that nobody configured and that have no streams, if there are too many."""
    if len(state.tenants) >= rules.config.max_tenants:
        groups = (state.queued, state.running, state.parked)
        busy = {entry.tenant for group in groups for entry in group.values()}
        state.tenants = {name: t for name, t in state.tenants.items() if t.configured or name in busy}
        state.left = state.left.intersection(state.tenants)
        state.note_rights()
    return len(state.tenants) < rules.config.max_tenants


def _cancel(state: State, stream_id: str) -> Decision:
    entry = state.named(stream_id)
    if not entry.state.is_final:
        text = f"cancelled at frame {entry.committed} of {entry.request.frames}"
        unopened = entry.state is StreamState.QUEUED
        entry = state.end(entry, StreamState.CANCELLED, Reason.CANCELLED, text, announced=unopened)
    return entry.decision


def _set_tenant(rules: Rules, state: State, name: str, spec: TenantSpec) -> None:
    check_name("tenant", name)
    check_kind("spec", spec, TenantSpec)
    old = state.tenants.get(name)
    others = sum(t.spec.floor_nbytes for other, t in state.tenants.items() if other != name)
    room = rules.cache.pool_nbytes - others
    if spec.floor_nbytes > room:
        raise ArgumentError(
            f"floor_nbytes: expected at most {room} bytes, what the other tenants' floors leave of the pool, "
            f"got {spec.floor_nbytes}"
        )
    if old is None and not _make_room(rules, state):
        raise ArgumentError(f"tenant: expected at most {rules.config.max_tenants} tenants, got one more, {name!r}")
    if old is None:
        old = Tenant(spec)
    state.tenants[name] = tenant = replace(old, spec=spec, configured=True)
    state.note_rights()
    for group in (state.queued, state.running, state.parked):
        theirs = [entry for entry in group.values() if entry.tenant == name]
        group.update({entry.id: entry.but(**entry.standing(tenant)) for entry in theirs})
    state.sort(rules, name)


def _limit(rules: Rules, state: State, nbytes: int | None) -> None:
    pool = rules.cache.pool_nbytes
    if nbytes is not None and (isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes <= pool):
        raise ArgumentError(f"nbytes: expected None or 0 to {pool} bytes, got {shown(nbytes)}")
    state.limit = None if nbytes == pool else nbytes


def _report(rules: Rules, state: State, plan: Plan, outcome: Outcome) -> None:
    _check_outcome(plan, outcome)
    for decision in plan.running:
        entry = state.running.get(decision.stream_id)
        if entry is None:
            continue
        frames = outcome.committed.get(decision.stream_id, 0)
        committed = entry.committed + frames
        if entry.id in outcome.failed:
            _fail(state, entry.but(committed=committed, chunks=entry.chunks + bool(frames)), outcome.failed)
        elif committed == entry.request.frames:
            text, chunks = f"all {committed} frames are committed", entry.chunks + 1
            state.end(entry, StreamState.FINISHED, Reason.COMPLETED, text, committed=committed, chunks=chunks)
        elif frames:
            state.running[entry.id] = rules.need(
                entry, entry.backed, committed=committed, chunks=entry.chunks + 1, stalls=0, progressed=state.step
            )
    for decision in plan.parked:
        entry = state.parked.get(decision.stream_id)
        if entry is not None and entry.id in outcome.failed:
            _fail(state, entry, outcome.failed)


def _fail(state: State, entry: Entry, failed: Mapping[str, str]) -> None:
    text = f"failed at frame {entry.committed} of {entry.request.frames}: {one_line(failed[entry.id])}"
    state.end(entry, StreamState.FAILED, Reason.FAILED, text)


def _check_outcome(plan: Plan, outcome: Outcome) -> None:
    check_kind("outcome", outcome, Outcome)
    check_kind("outcome.committed", outcome.committed, Mapping)
    check_kind("outcome.failed", outcome.failed, Mapping)
    planned = {decision.stream_id: len(decision.frames or ()) for decision in plan.running}
    _check_names("committed", outcome.committed, planned.keys())
    if outcome.failed:
        _check_names("failed", outcome.failed, {*planned, *[decision.stream_id for decision in plan.parked]})
    for stream_id, frames in outcome.committed.items():
        if isinstance(frames, bool) or not isinstance(frames, int) or not 0 <= frames <= planned[stream_id]:
            most = planned[stream_id]
            raise ArgumentError(f"outcome.committed[{stream_id!r}]: expected 0 to {most} frames, got {shown(frames)}")
    for stream_id, text in outcome.failed.items():
        if not isinstance(text, str):
            raise ArgumentError(f"outcome.failed[{stream_id!r}]: expected what went wrong in words, got {shown(text)}")


def _check_names(name: str, told: Mapping[str, object], known: Set[str]) -> None:
    if not told.keys() <= known:
        unknown = sorted(map(shown, told.keys() - known))
        raise ArgumentError(f"outcome.{name}: expected running streams of the plan, got [{', '.join(unknown)}]")
