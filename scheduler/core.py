"""One step as a pure function: state, events, time and randomness in, new state and plan out.

The simulator, a CPU and a GPU run this same code, and every rank of a head-sharded model that is given the same
events computes the same plan. Policies are asked through `advice`, whose answers are checked; in a replay it repeats
those that were logged.

The ladder, where the cache has one: demote, shrink retrieval memory, park, and who does not fit then waits.

Reserved to completion, no admitted stream can run out of memory, so none ever waits for another. Reserved to the next
chunk, every stream that finished a chunk may be parked but one: the leader, and those parked too often keep what they
have until they finish a chunk, which takes no more than they have. So somebody always gets on.
"""

from collections.abc import Sequence
from operator import attrgetter
from random import Random

from qvg_paged.scheduler.admission import admit
from qvg_paged.scheduler.books import Advice, Books
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.inputs import Input, apply
from qvg_paged.scheduler.plan import Plan
from qvg_paged.scheduler.pressure import squeeze
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.state import State

__all__ = ["decide"]

WITHOUT_PROGRESS = attrgetter("progressed", "arrival")


def decide(
    rules: Rules, state: State, events: Sequence[Input], now: float, rng: Random, advice: Advice
) -> tuple[State, Plan]:
    """What happens next.

    Args:
        rules: settings and the cache's arithmetic.
        state: what is known; not changed.
        events: what has happened since the step before.
        now: seconds, not before those of the step before.
        rng: the one source of randomness, advanced by one draw.
        advice: the policy's checked answers.

    Returns:
        The state once the plan is handed out, and the plan.

    Raises:
        ArgumentError: an event does not fit the state.
    """
    state = state.copy()
    for event in events:
        apply(rules, state, event)
    elapsed = now - state.now if state.charges else 0.0
    state.step += 1
    state.now = now
    state.hold = max(0, state.hold - 1)
    _charge(rules, state, min(elapsed, rules.config.longest_charge))
    _note_times(rules, state)
    _lift(state)
    _dismiss_leader(state)
    books = Books(rules, state, now, rng.getrandbits(32), lasting=not advice.keyed)
    squeeze(books, advice)
    admitted, resumed, line = admit(books, advice)
    state.left = frozenset(state.lines)
    state.news = (*books.news, *(decision.stream_id for decision in books.parked))
    _elect_leader(state)
    plan = Plan(
        step=state.step,
        finished=tuple(e.decision for e in state.leaving.values() if not e.decision.reason.is_refusal),
        rejected=tuple(e.decision for e in state.leaving.values() if e.decision.reason.is_refusal),
        demoted=tuple(books.demoted.values()),
        shrunk=tuple(books.shrunk.values()),
        parked=tuple(books.parked),
        resumed=tuple(resumed),
        admitted=tuple(admitted),
        running=_advance(rules, state),
        line=line,
        policy_fault=advice.fault,
        leader=state.leader,
    )
    for entry in tuple(state.leaving.values()):
        state.remember(entry)
    return state, plan


def _charge(rules: Rules, state: State, seconds: float) -> None:
    """Tenants pay for the latest plan: for its chunks, and for holding memory until now."""
    tenants, pool = state.tenants, rules.cache.pool_nbytes
    chunk_cost, held_cost = rules.config.chunk_cost, rules.config.pool_second_cost * seconds
    dearest = state.dearest_chunk
    accounts: dict[str, tuple[float, float]] = {}
    for name, nbytes, chunks in state.charges:
        cost = chunk_cost * chunks + held_cost * nbytes / pool
        dearest = cost if cost > dearest else dearest
        tenant = tenants.get(name)
        if tenant is not None:
            service, virtual_time = accounts.get(name) or (tenant.service, tenant.virtual_time)
            accounts[name] = service + cost, virtual_time + cost / tenant.weight
    state.dearest_chunk = dearest
    for name, (service, virtual_time) in accounts.items():
        tenants[name] = tenants[name].but(service=service, virtual_time=virtual_time)
    state.charges = ()


def _note_times(rules: Rules, state: State) -> None:
    for stream_id in state.fresh:
        state.queued[stream_id] = state.join(rules, state.queued[stream_id].but(since=state.now))
    state.fresh = {}
    for stream_id, entry in state.running.items():
        if entry.chunks and entry.first_chunk is None:
            state.running[stream_id] = entry.but(first_chunk=state.now)


def _lift(state: State) -> None:
    """A tenant that comes back with streams in line starts where those in line are: idle time is no credit.

    Whose line was empty after the latest plan had all it wanted, however little. If that goes for everybody, nobody is
    behind, and all start level.
    """
    tenants = state.tenants
    staying = [tenants[name].virtual_time for name in state.left if name in state.lines]
    level = min(staying) if staying else max([tenant.virtual_time for tenant in tenants.values()], default=0.0)
    floor = state.virtual_floor = max(state.virtual_floor, level)
    for name in state.lines.keys() - state.left:
        if tenants[name].virtual_time < floor:
            tenants[name] = tenants[name].but(virtual_time=floor)


def _dismiss_leader(state: State) -> None:
    entry = state.running.get(state.leader)
    if entry is None or entry.chunks > state.leader_chunks:
        state.leader = ""


def _elect_leader(state: State) -> None:
    """Who has gone longest without finishing a chunk leads."""
    if not state.leader and state.running:
        entry = min(state.running.values(), key=WITHOUT_PROGRESS)
        state.leader, state.leader_chunks = entry.id, entry.chunks


def _advance(rules: Rules, state: State) -> tuple[Decision, ...]:
    """What everybody who runs does next; they are charged for it with the next step."""
    most, told, charges = rules.cache.frames_per_chunk, dict[str, Decision](), []
    for entry in state.by_arrival():
        name, request, start = entry.id, entry.request, entry.committed
        end = min(start + most, request.frames)
        decision = state.advances.get(name)
        if decision is None or decision.frames != range(start, end):
            text = f"frames {start}-{end - 1} of {request.frames}"
            decision = Decision(name, Reason.ADVANCE, text, range(start, end))
        told[name] = decision
        charges.append((entry.tenant, entry.need_nbytes, request.branches))
    state.advances, state.charges = told, tuple(charges)
    return tuple(told.values())
