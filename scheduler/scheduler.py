"""The scheduler as an object: holds the state, asks the core, guards the policy, keeps the log."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from random import Random

from qvg_paged.errors import ArgumentError, StateError
from qvg_paged.scheduler.backend import CacheBackend
from qvg_paged.scheduler.books import Books
from qvg_paged.scheduler.checks import check_integer, check_kind, check_number, shown
from qvg_paged.scheduler.config import Reservation, SchedulerConfig
from qvg_paged.scheduler.core import decide
from qvg_paged.scheduler.decision import Decision
from qvg_paged.scheduler.entry import Entry
from qvg_paged.scheduler.guard import InPlace, OutsideLock, PolicyGuard, Runner, Worker
from qvg_paged.scheduler.inputs import Cancel, Drain, Input, LimitPool, Report, SetTenant, Shutdown, Submit, apply
from qvg_paged.scheduler.log import DecisionLog, describe_input, describe_plan
from qvg_paged.scheduler.observer import Observer, Observers
from qvg_paged.scheduler.plan import Outcome, Plan
from qvg_paged.scheduler.policy import FCFS, EarliestDeadline, FairShare, KeyedPolicy, Policy, Priority
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.state import State
from qvg_paged.scheduler.tenant import TenantSpec
from qvg_paged.scheduler.view import SystemView

__all__ = ["Scheduler"]

MAX_SEED = 1 << 64
LONGEST = 1e15
OWN = (FCFS, Priority, FairShare, EarliestDeadline)


class Scheduler:
    """Decides; the engine carries out. It promises memory as if every stream of `cache` came through it.

        scheduler.submit(StreamRequest("shot-18", tenant="studio-b", frames=240, window=window))
        while scheduler.busy:
            plan = scheduler.step(time.monotonic())
            ...                          # close plan.finished, park plan.parked, resume, open plan.admitted, run
            scheduler.update(plan, Outcome(committed={"shot-18": 3}))

    Over a cache that can park streams (`ParkingBackend`), memory is promised to the next chunk boundary and streams
    may be parked there; over one that cannot, or with ``no_preemption=True``, to completion, and nobody is parked.
    `reservation` says which.

    Threads: methods may be called from any thread; one lock makes them one after the other. `step` and `update` come
    in pairs from whoever drives the engine, the rest at any time in between. A foreign policy runs in a thread of its
    own and must not call the scheduler (`StateError` inside the policy). Answers about finished streams are kept for
    the latest 1,024 of them.

    Args:
        cache: whose pool is shared out; only its books are asked, its streams are the engine's.
        policy: who is next, and who makes room.
        config: everything else.
        seed: of the one random generator; ranks and replays that share it plan alike.
        log: gets every input and every decision.
        runner: where the policy is asked; None for this thread if the policy is of this package, else a worker.
    """

    def __init__(
        self,
        cache: CacheBackend,
        policy: Policy | None = None,
        config: SchedulerConfig | None = None,
        *,
        seed: int = 0,
        log: DecisionLog | None = None,
        runner: Runner | None = None,
    ) -> None:
        policy = FCFS() if policy is None else policy
        config = SchedulerConfig() if config is None else config
        check_kind("cache", cache, CacheBackend)
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise ArgumentError(f"policy: expected an object with rank and park, got {shown(policy)}")
        check_kind("config", config, SchedulerConfig)
        check_integer("seed", seed, -MAX_SEED, MAX_SEED)
        own: KeyedPolicy | None = policy if type(policy) in OWN else None  # type: ignore[assignment]
        self._foreign = own is None
        trusted = own if runner is None else None
        self._rules = Rules(config, cache) if trusted is None else Rules(config, cache, trusted.key)
        if runner is None:
            budget = config.policy_seconds
            runner = Worker(budget) if self._foreign and budget is not None else InPlace()
        self._guard = PolicyGuard(policy, runner, config.policy_strikes, self._heard, trusted=trusted)
        self._state = State()
        self._plan: Plan | None = None
        self._rng = Random(seed)
        self._log = log
        self._lock = OutsideLock()
        self._observers = Observers()
        self._write(
            {
                "kind": "open",
                "seed": seed,
                "policy": type(policy).__name__,
                "policy_settings": _settings(policy),
                "reservation": self.reservation.value,
                "pool_nbytes": cache.pool_nbytes,
                "host_nbytes": self._rules.parking.host_nbytes if self._rules.parking else 0,
                "frames_per_chunk": cache.frames_per_chunk,
                "config": asdict(config),
            }
        )

    @property
    def reservation(self) -> Reservation:
        """How far ahead memory is promised: to completion if the cache cannot park streams."""
        return self._rules.reservation

    @property
    def policy_faults(self) -> int:
        """Wrong, late or missing answers of the policy so far."""
        return self._guard.faults

    @property
    def policy_disabled(self) -> bool:
        """Whether the policy had too many faults and `FCFS` has taken over."""
        return self._guard.disabled

    def submit(self, request: StreamRequest) -> Decision:
        """Put a stream in line, or refuse it at once, for instance if it could never fit; the answer says which.

        Raises:
            ArgumentError: the id is queued, running or parked.
            ConfigError: the window cannot hold a span.
        """
        return self._single(Submit(request))

    def cancel(self, stream_id: str) -> Decision:
        """Give a stream up. The next plan tells the engine to close it; one that is final already stays as it is.

        Raises:
            ArgumentError: unknown id.
        """
        return self._single(Cancel(stream_id))

    def set_tenant(self, name: str, spec: TenantSpec) -> None:
        """Set or change a tenant's rights. Memory above a lowered ceiling is taken back at the next chunk boundaries.

        Raises:
            ArgumentError: the floors of all tenants exceed the pool, or there are too many tenants.
        """
        self._apply(SetTenant(name, spec))

    def limit_pool(self, nbytes: int | None) -> None:
        """Promise at most `nbytes` of the pool from the next step on, as far as running streams can be parked.

        Args:
            nbytes: bytes that may stay in use; None for all of the pool.

        Raises:
            ArgumentError: not within the pool.
        """
        self._apply(LimitPool(nbytes))

    def drain(self) -> None:
        """Refuse new requests; those that are in go on to their ends."""
        self._apply(Drain())

    def shutdown(self) -> None:
        """Refuse new requests and cancel all streams; the next plan tells the engine to close them."""
        self._apply(Shutdown())

    def step(self, now: float) -> Plan:
        """Decide what happens next.

        Args:
            now: seconds of any clock that does not run backwards.

        Raises:
            StateError: the plan before ran streams and was not reported; report ``Outcome()`` if nothing came of it.
            ArgumentError: the clock ran backwards.
        """
        with self._lock:
            if self._plan is not None and (self._plan.running or self._plan.parked):
                raise StateError(f"step: expected update(plan, outcome) of step {self._plan.step} first")
            earliest = max(self._state.now, -LONGEST)
            check_number("now", now, earliest, LONGEST, f"a finite time not before {self._state.now}")
            began = time.perf_counter() if self._observers else 0.0
            self._guard.begin()
            self._state, self._plan = decide(self._rules, self._state, (), now, self._rng, self._guard)
            if self._observers:
                self._observers.planned(self._plan, self._state, time.perf_counter() - began)
            if self._log is not None:
                self._log.append(describe_plan(self._state, self._plan))
            return self._plan

    def update(self, plan: Plan, outcome: Outcome) -> None:
        """Report what became of the latest plan.

        Raises:
            StateError: `plan` is not the latest, or was reported before; nothing changed.
            ArgumentError: `outcome` does not fit the plan; nothing changed.
        """
        with self._lock:
            check_kind("plan", plan, Plan)
            if plan is not self._plan:
                raise StateError(f"plan: expected the latest plan, not reported yet, got that of step {plan.step}")
            self._apply(Report(plan, outcome))
            self._plan = None

    def why(self, stream_id: str) -> Decision:
        """The latest decision about a stream.

        Raises:
            ArgumentError: unknown id.
        """
        with self._lock:
            return self._state.decision(self._state.named(stream_id))

    def state(self, stream_id: str) -> StreamState:
        """Where a stream is.

        Raises:
            ArgumentError: unknown id.
        """
        return self._entry(stream_id).state

    def committed(self, stream_id: str) -> int:
        """Frames of a stream committed so far.

        Raises:
            ArgumentError: unknown id.
        """
        return self._entry(stream_id).committed

    def request(self, stream_id: str) -> StreamRequest:
        """What was asked for.

        Raises:
            ArgumentError: unknown id.
        """
        return self._entry(stream_id).request

    def service(self, tenant: str) -> float:
        """Cost units a tenant has had.

        Raises:
            ArgumentError: unknown tenant.
        """
        with self._lock:
            if not isinstance(tenant, str) or tenant not in self._state.tenants:
                raise ArgumentError(f"tenant: expected one that is configured or has streams, got {shown(tenant)}")
            return self._state.tenants[tenant].service

    def snapshot(self) -> SystemView:
        """What a policy would see now, at the time of the latest step."""
        with self._lock:
            now = self._state.now if math.isfinite(self._state.now) else 0.0
            return Books(self._rules, self._state, now, 0).view(forced=True)

    def observe(self, observer: Observer) -> None:
        """Tell `observer` of every input and every plan from now on. What it raises is logged, not passed on."""
        with self._lock:
            self._observers.add(observer)

    @property
    def observer_faults(self) -> int:
        """How often an observer raised."""
        return self._observers.faults

    @property
    def policy_name(self) -> str:
        """Class of the policy."""
        return self._guard.name

    @property
    def busy(self) -> bool:
        """Whether a further step has something to do or to tell."""
        with self._lock:
            state = self._state
            return bool(state.queued or state.running or state.parked or state.leaving)

    def _entry(self, stream_id: str) -> Entry:
        with self._lock:
            return self._state.named(stream_id)

    def _single(self, event: Input) -> Decision:
        decision = self._apply(event)
        assert decision is not None
        return decision

    def _apply(self, event: Input) -> Decision | None:
        with self._lock:
            decision = apply(self._rules, self._state, event)
            if self._log is not None:
                record = describe_input(event, decision)
                if isinstance(event, Submit):
                    record["nbytes"] = self._entry(event.request.id).worst_nbytes
                self._log.append(record)
            if self._observers:
                self._observers.answered(event, decision, self._state)
            return decision

    def _heard(self, hook: str, answer: Sequence[str] | None, fault: str) -> None:
        if self._foreign or fault:
            self._write({"kind": "policy", "hook": hook, "answer": answer, "fault": fault})

    def _write(self, record: dict[str, object]) -> None:
        if self._log is not None:
            self._log.append(record)


def _settings(policy: Policy) -> dict[str, float]:
    """Public numbers of a policy, for the log."""
    values = getattr(policy, "__dict__", {}).items()
    return {name: value for name, value in values if name[0] != "_" and type(value) in (int, float)}
