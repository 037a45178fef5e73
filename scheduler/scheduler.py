"""First come, first served by default: admits what can run to completion, advances streams chunk by chunk."""

import math
from dataclasses import replace
from threading import RLock

from qvg_paged.errors import ArgumentError, StateError
from qvg_paged.manager import KVCacheManager
from qvg_paged.scheduler.core import Entry, admit, after_outcome, after_plan, final, make_plan, snapshots
from qvg_paged.scheduler.plan import Decision, Outcome, Plan, Reason
from qvg_paged.scheduler.policy import FCFS, Policy, ranked
from qvg_paged.scheduler.request import StreamRequest, StreamState

__all__ = ["Scheduler"]

HISTORY = 1024


class Scheduler:
    """Decides; the engine carries out. It promises memory as if every stream of `cache` came through it.

        scheduler.submit(StreamRequest("shot-18", tenant="studio-b", frames=240, window=window))
        while scheduler.busy:
            plan = scheduler.step(time.monotonic())
            ...                                     # close plan.finished, open plan.admitted, run plan.running
            scheduler.update(plan, Outcome(committed={"shot-18": 3}))

    Methods may be called from any thread. Answers about finished streams are kept for the latest 1,024 of them.

    Args:
        cache: whose pool is shared out; only its books are asked, its streams are the engine's.
        policy: who is next.
    """

    def __init__(self, cache: KVCacheManager, policy: Policy | None = None) -> None:
        self._cache = cache
        self._policy = FCFS() if policy is None else policy
        self._entries: dict[str, Entry] = {}
        self._plan: Plan | None = None
        self._arrivals = 0
        self._steps = 0
        self._now = -math.inf
        self._lock = RLock()

    def submit(self, request: StreamRequest) -> Decision:
        """Put a stream in line, or refuse it at once if it could never fit; the answer says which.

        Raises:
            ArgumentError: the id is queued or running.
            ConfigError: the window cannot hold a span.
        """
        with self._lock:
            old = self._entries.get(request.id)
            if old is not None and not old.announced and old.decision.reason is not Reason.TOO_LARGE:
                raise ArgumentError(f"id: expected one that is not in use, got {request.id!r}, {old.state.value}")
            demand = self._cache.demand(request.window, request.frames) * request.branches
            nbytes, pool = self._cache.demand_nbytes(demand), self._cache.budget.pool
            self._arrivals += 1
            text = f"in line; needs {nbytes} bytes of the pool at its worst, {pool} bytes in all"
            entry = Entry(request, demand, nbytes, self._arrivals, Decision(request.id, Reason.QUEUED, text))
            if not self._cache.can_host([demand]):
                text = (
                    f"refused: needs {nbytes} bytes of the pool at its worst, {pool} bytes (in slabs of "
                    f"{self._cache.budget.slabs.slab_nbytes}) are there; shorten the window or raise memory"
                )
                entry = final(entry, StreamState.FAILED, Reason.TOO_LARGE, text)
            self._entries.pop(request.id, None)
            self._entries[request.id] = entry
            return entry.decision

    def step(self, now: float) -> Plan:
        """Decide what happens next.

        Args:
            now: seconds of any clock that does not run backwards.

        Raises:
            StateError: the plan before ran streams and was not reported; report ``Outcome()`` if nothing came of it.
            ArgumentError: the clock ran backwards.
        """
        with self._lock:
            if self._plan is not None and self._plan.running:
                raise StateError(f"step: expected update(plan, outcome) of step {self._plan.step} first")
            if not (math.isfinite(now) and now >= self._now):
                raise ArgumentError(f"now: expected a finite time not before {self._now}, got {now}")
            self._now = now
            self._steps += 1
            order, fault = ranked(self._policy, snapshots(self._entries, now))
            admitted, waiting = admit(self._entries, order, self._cache.can_host, self._cache.budget.pool)
            frames = self._cache.model.frames_per_chunk
            self._plan = make_plan(self._entries, self._steps, admitted, waiting, frames, fault)
            self._entries = after_plan(self._entries, self._plan, now)
            self._forget()
            return self._plan

    def update(self, plan: Plan, outcome: Outcome) -> None:
        """Report what became of the latest plan.

        Raises:
            StateError: `plan` is not the latest, or was reported before; nothing changed.
            ArgumentError: `outcome` does not fit the plan; nothing changed.
        """
        with self._lock:
            if plan is not self._plan:
                raise StateError(f"plan: expected the latest plan, not reported yet, got that of step {plan.step}")
            self._entries = after_outcome(self._entries, plan, outcome)
            self._plan = None

    def cancel(self, stream_id: str) -> Decision:
        """Give a stream up. The next plan tells the engine to close it; one that is final already stays as it is.

        Raises:
            ArgumentError: unknown id.
        """
        with self._lock:
            entry = self._entry(stream_id)
            if not entry.state.is_final:
                text = f"cancelled at frame {entry.committed} of {entry.request.frames}"
                unopened = entry.state is StreamState.QUEUED
                entry = replace(final(entry, StreamState.CANCELLED, Reason.CANCELLED, text), announced=unopened)
                del self._entries[stream_id]
                self._entries[stream_id] = entry
            return entry.decision

    def why(self, stream_id: str) -> Decision:
        """The latest decision about a stream.

        Raises:
            ArgumentError: unknown id.
        """
        with self._lock:
            return self._entry(stream_id).decision

    def state(self, stream_id: str) -> StreamState:
        """Where a stream is.

        Raises:
            ArgumentError: unknown id.
        """
        with self._lock:
            return self._entry(stream_id).state

    def committed(self, stream_id: str) -> int:
        """Frames of a stream committed so far.

        Raises:
            ArgumentError: unknown id.
        """
        with self._lock:
            return self._entry(stream_id).committed

    @property
    def busy(self) -> bool:
        """Whether a further step has something to do or to tell."""
        with self._lock:
            return any(not entry.announced for entry in self._entries.values())

    def _entry(self, stream_id: str) -> Entry:
        if stream_id not in self._entries:
            raise ArgumentError(f"stream_id: expected a submitted stream, got {stream_id!r}")
        return self._entries[stream_id]

    def _forget(self) -> None:
        done = [stream_id for stream_id, entry in self._entries.items() if entry.announced]
        for stream_id in done[: max(0, len(done) - HISTORY)]:
            del self._entries[stream_id]
