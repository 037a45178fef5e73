"""The rules as pure functions of entries: no clock, no cache, no side effects.

Admission counts every running stream at its worst, to completion. Since the pool never holds more slabs than those
worst cases need, no admitted stream can run out of memory, so none ever waits for another: there is no deadlock.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler.plan import Decision, Outcome, Plan, Reason
from qvg_paged.scheduler.request import StreamRequest, StreamState, WaitingStream
from qvg_paged.timeline import Demand

__all__ = ["Entries", "Entry", "admit", "after_outcome", "after_plan", "make_plan", "snapshots"]


@dataclass(frozen=True)
class Entry:
    """All that is known of a stream.

    Attributes:
        request: what was asked for.
        demand: pool objects at its worst, all branches.
        nbytes: their bytes.
        arrival: serial number of its submission.
        decision: the latest decision about it.
        state: where it is.
        committed: frames committed.
        first_seen: time of the first step that saw it, or None.
        announced: for a final state: whether a plan has told the engine.
    """

    request: StreamRequest
    demand: Demand
    nbytes: int
    arrival: int
    decision: Decision
    state: StreamState = StreamState.QUEUED
    committed: int = 0
    first_seen: float | None = None
    announced: bool = False


Entries = Mapping[str, Entry]
"""Streams by id, in order of arrival; final ones that a plan has announced come last."""


def _in(entries: Entries, state: StreamState) -> list[Entry]:
    return [entry for entry in entries.values() if entry.state is state]


def snapshots(entries: Entries, now: float) -> list[WaitingStream]:
    """The queued streams as a policy sees them, in order of arrival."""
    return [
        WaitingStream(entry.request, entry.arrival, now - (now if entry.first_seen is None else entry.first_seen),
                      entry.nbytes)
        for entry in _in(entries, StreamState.QUEUED)
    ]  # fmt: skip


def admit(
    entries: Entries, order: Sequence[str], can_host: Callable[[Sequence[Demand]], bool], pool_nbytes: int
) -> tuple[list[Decision], list[Decision]]:
    """Who of the queued streams, taken in `order`, is admitted now, and why the others wait."""
    running = _in(entries, StreamState.RUNNING)
    total = sum((entry.demand for entry in running), Demand())
    promised = sum(entry.nbytes for entry in running)
    count = len(running)
    admitted: list[Decision] = []
    for place, stream_id in enumerate(order):
        entry = entries[stream_id]
        if not can_host([total, entry.demand]):
            text = (
                f"needs {entry.nbytes} bytes of the pool at its worst; {promised} of {pool_nbytes} bytes are promised "
                f"to {count} running streams"
            )
            behind = f"{stream_id!r} is first in line and does not fit yet"
            return admitted, [
                Decision(stream_id, Reason.NO_MEMORY, text),
                *(Decision(other, Reason.BEHIND, behind) for other in order[place + 1 :]),
            ]
        total, promised, count = total + entry.demand, promised + entry.nbytes, count + 1
        text = (
            f"{entry.nbytes} bytes at its worst fit: {promised} of {pool_nbytes} bytes are promised to {count} streams"
        )
        admitted.append(Decision(stream_id, Reason.ADMITTED, text))
    return admitted, []


def _advance(entry: Entry, chunk_frames: int) -> Decision:
    frames = range(entry.committed, min(entry.committed + chunk_frames, entry.request.frames))
    text = f"frames {frames.start}-{frames.stop - 1} of {entry.request.frames}"
    return Decision(entry.request.id, Reason.ADVANCE, text, frames)


def make_plan(
    entries: Entries, step: int, admitted: list[Decision], waiting: list[Decision], chunk_frames: int, fault: str
) -> Plan:
    """The plan of a step, given who is admitted and who waits."""
    new = {decision.stream_id for decision in admitted}
    leaving = [entry for entry in entries.values() if entry.state.is_final and not entry.announced]
    return Plan(
        step=step,
        finished=tuple(e.decision for e in leaving if e.decision.reason is not Reason.TOO_LARGE),
        rejected=tuple(e.decision for e in leaving if e.decision.reason is Reason.TOO_LARGE),
        admitted=tuple(admitted),
        running=tuple(
            _advance(entry, chunk_frames)
            for entry in entries.values()
            if entry.state is StreamState.RUNNING or entry.request.id in new
        ),
        waiting=tuple(waiting),
        policy_fault=fault,
    )


def after_plan(entries: Entries, plan: Plan, now: float) -> dict[str, Entry]:
    """Entries once `plan` is handed out; streams it announces as final move to the end."""
    result = dict(entries)
    for decision in (*plan.finished, *plan.rejected):
        result[decision.stream_id] = replace(result.pop(decision.stream_id), announced=True)
    for decision in plan.running:
        entry = result[decision.stream_id]
        result[decision.stream_id] = replace(entry, decision=decision, state=StreamState.RUNNING)
    for decision in plan.waiting:
        entry = result[decision.stream_id]
        seen = now if entry.first_seen is None else entry.first_seen
        result[decision.stream_id] = replace(entry, decision=decision, first_seen=seen)
    return result


def after_outcome(entries: Entries, plan: Plan, outcome: Outcome) -> dict[str, Entry]:
    """Entries once `plan` was carried out; what is said of a stream cancelled meanwhile is ignored.

    Raises:
        ArgumentError: the outcome does not fit the plan; the message says where.
    """
    _check_outcome(plan, outcome)
    result = dict(entries)
    for decision in plan.running:
        entry = entries[decision.stream_id]
        if entry.state is not StreamState.RUNNING:
            continue
        committed = entry.committed + outcome.committed.get(decision.stream_id, 0)
        entry = replace(entry, committed=committed)
        if decision.stream_id in outcome.failed:
            text = f"failed at frame {committed} of {entry.request.frames}: {outcome.failed[decision.stream_id]}"
            entry = final(entry, StreamState.FAILED, Reason.FAILED, text)
        elif committed == entry.request.frames:
            entry = final(entry, StreamState.FINISHED, Reason.COMPLETED, f"all {committed} frames are committed")
        result[decision.stream_id] = entry
    return result


def final(entry: Entry, state: StreamState, reason: Reason, text: str) -> Entry:
    """The entry in a final state."""
    return replace(entry, state=state, decision=Decision(entry.request.id, reason, text))


def _check_outcome(plan: Plan, outcome: Outcome) -> None:
    planned = {decision.stream_id: len(decision.frames or ()) for decision in plan.running}
    for name, ids in (("committed", outcome.committed), ("failed", outcome.failed)):
        unknown = sorted(set(ids) - set(planned))
        if unknown:
            raise ArgumentError(f"outcome.{name}: expected running streams of the plan, got {unknown}")
    for stream_id, frames in outcome.committed.items():
        if isinstance(frames, bool) or not isinstance(frames, int) or not 0 <= frames <= planned[stream_id]:
            raise ArgumentError(
                f"outcome.committed[{stream_id!r}]: expected 0 to {planned[stream_id]} frames, got {frames!r}"
            )
