"""Runs the scheduler, as it is, against a simulated engine on a virtual clock.

Everything random comes from the seed, and everything that happens is written to one event log: the scheduler's own
records, and those of the engine (kind ``engine``: what it opened, parked, resumed and closed, the memory it found in
use, the time). A run has two phases: with faults while streams arrive, then without, until everything has drained.
"""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler import (
    FCFS,
    DecisionLog,
    EarliestDeadline,
    FairShare,
    Outcome,
    Plan,
    Policy,
    Priority,
    Scheduler,
    StreamRequest,
    StreamState,
    TenantSpec,
)
from qvg_paged.timeline import Demand
from stress.arrivals import arrival_times
from stress.faults import HOSTILE, VirtualClock, VirtualRunner
from stress.models import MODELS, SimulatedCache, StaticCache
from stress.scenario import Scenario

__all__ = ["Run", "Simulator", "simulate"]

OWN = {"fcfs": FCFS, "priority": Priority, "fair share": FairShare, "earliest deadline": EarliestDeadline}
MOST_STEPS = 10_000


@dataclass
class Run:
    """What came of a run.

    Attributes:
        scenario, seed: what was run.
        lines: the event log.
        digest: its hash.
        steps: plans made.
        fired: how often each fault happened, by state of the stream that it hit ("" for none).
        decision_seconds: real time that each step took.
        seconds: virtual time of the run.
        drained: whether every stream came to an end.
    """

    scenario: Scenario
    seed: int
    lines: list[str] = field(default_factory=list)
    digest: str = ""
    steps: int = 0
    fired: Counter[tuple[str, str]] = field(default_factory=Counter)
    decision_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    drained: bool = False


def simulate(scenario: Scenario, seed: int) -> Run:
    """Run it."""
    return Simulator(scenario, seed).run()


class Simulator:
    """One run in progress.

    Args:
        scenario: what to run.
        seed: of everything random.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.rng = Random(seed)
        self.clock = VirtualClock()
        self.skew = 0.0
        self.result = Run(scenario, seed)
        self.log = DecisionLog(self.result.lines.append)
        self.geometry = MODELS[scenario.model]
        self.cache = self._make_cache()
        runner = VirtualRunner(self.clock, 0.005) if scenario.policy in HOSTILE else None
        self.scheduler = Scheduler(
            self.cache, self._make_policy(), scenario.config, seed=seed, log=self.log, runner=runner
        )
        self.arrivals = self._make_arrivals()
        self.requests: dict[str, StreamRequest] = {}
        self.open: dict[str, int] = {}
        self.on_host: set[str] = set()
        self.faulty = True
        self.serial = 0

    def _make_cache(self) -> StaticCache:
        scenario = self.scenario
        roomy = StaticCache(self.geometry, 1 << 42)
        longest = roomy.demand_nbytes(roomy.demand(self.geometry.window, scenario.frames[1]))
        least = 8 * max(layout.page_nbytes + layout.codebook_nbytes for layout in roomy.layouts)
        pool = max(int(scenario.pool_streams * longest), least)
        if not scenario.can_park:
            return StaticCache(self.geometry, pool)
        return SimulatedCache(self.geometry, pool, int(scenario.host_streams * longest), scenario.costs)

    def _make_policy(self) -> Policy:
        if self.scenario.policy in HOSTILE:
            return HOSTILE[self.scenario.policy](Random(self.rng.random()), self.clock)
        return OWN[self.scenario.policy]()

    def _make_arrivals(self) -> list[tuple[float, str, int]]:
        scenario, rng = self.scenario, self.rng
        self._set_tenants()
        if scenario.trace:
            return list(reversed(scenario.trace))
        chunks = sum(scenario.frames) / 2 / self.geometry.model.frames_per_chunk
        seconds = chunks * (scenario.costs.chunk_more + scenario.costs.chunk / max(scenario.pool_streams, 1))
        times = arrival_times(scenario.arrivals, rng, scenario.load / seconds, scenario.streams)
        names = [f"t{rng.randrange(scenario.tenants)}" for _ in times]
        return [(at, name, rng.randint(*scenario.frames)) for at, name in zip(times, names, strict=True)][::-1]

    def _set_tenants(self) -> None:
        scenario, pool = self.scenario, self.cache.pool_nbytes
        for index in range(scenario.tenants):
            self.scheduler.set_tenant(
                f"t{index}",
                TenantSpec(
                    weight=scenario.weights[index % len(scenario.weights)],
                    ceiling_nbytes=None if scenario.ceiling is None else int(scenario.ceiling * pool),
                    floor_nbytes=int(scenario.floor * pool) if index == 0 else 0,
                    max_queued=scenario.config.default_tenant.max_queued,
                ),
            )

    def run(self) -> Run:
        """Until everything has drained, or 10,000 steps have passed."""
        result = self.result
        while (self.arrivals or self.scheduler.busy) and result.steps < MOST_STEPS:
            if self.faulty and not self.arrivals:
                self._end_faults()
            self._arrive()
            if not self.scheduler.busy:
                self.clock.now = self.arrivals[-1][0]
                continue
            self._inject(between=True)
            plan = self._step()
            self._carry_out(plan)
        self._note("end")
        result.drained = not self.scheduler.busy and not self.open and not self.on_host
        result.digest, result.seconds = self.log.digest, self.clock.now
        return result

    def _end_faults(self) -> None:
        """Faults stop; memory and quotas are as in the beginning."""
        self.faulty = False
        self.scheduler.limit_pool(None)
        self._set_tenants()

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[-1][0] <= self.clock.now:
            at, tenant, frames = self.arrivals.pop()
            self._note("arrive", ("at", at))
            self._submit(tenant, frames)

    def _submit(self, tenant: str, frames: int, **changes: Any) -> None:
        self.serial += 1
        request = StreamRequest(
            f"s{self.serial}",
            tenant,
            frames,
            self.geometry.window,
            deadline_fps=self.scenario.fps,
            priority=self.rng.choice([0, 0, 0, 1, 5]),
            branches=self.rng.choice([1, 1, 1, 2]) if self.scenario.pool_streams > 2 else 1,
        )
        request = replace(request, **changes)
        self.requests[request.id] = request
        self.scheduler.submit(request)

    def _step(self) -> Plan:
        skew = self.skew
        began = time.perf_counter()
        plan = self.scheduler.step(self.clock.now + skew)
        self.result.decision_seconds.append(time.perf_counter() - began)
        self.result.steps += 1
        return plan

    def _carry_out(self, plan: Plan) -> None:
        """What an engine does with a plan, and what can go wrong while it does."""
        seconds = 0.0
        for decision in plan.finished:
            self.open.pop(decision.stream_id, None)
            self.on_host.discard(decision.stream_id)
        for decision in plan.parked:
            seconds += self.scenario.costs.move(self._resident(decision.stream_id))
            self.open.pop(decision.stream_id)
            self.on_host.add(decision.stream_id)
        for decision in plan.resumed:
            self.on_host.remove(decision.stream_id)
        for decision in (*plan.resumed, *plan.admitted):
            self.open[decision.stream_id] = self.scheduler.committed(decision.stream_id)
        seconds += sum(self.scenario.costs.move(self._resident(d.stream_id)) for d in plan.resumed)
        self._note("memory", ("fits", self._fits(plan)), ("open", len(self.open)))
        committed = {decision.stream_id: len(decision.frames or ()) for decision in plan.running}
        failed: dict[str, str] = {}
        if self.faulty:
            self._fail(plan, committed, failed)
        self.clock.now += seconds + self.scenario.costs.batch(len(plan.running))
        if not plan.running:
            self._wait()
        self._inject(between=False)
        if plan.running or plan.parked:
            self.scheduler.update(plan, Outcome(committed, failed))
        for stream_id, frames in committed.items():
            self.open[stream_id] += frames
        self._note("clock", ("t", self.clock.now), ("moved", seconds))

    def _wait(self) -> None:
        """Nothing runs: until the next arrival, but not for ever."""
        until = self.arrivals[-1][0] if self.arrivals else self.clock.now + 1.0
        self.clock.now = max(self.clock.now + 0.1, min(until, self.clock.now + 1.0))

    def _resident(self, stream_id: str) -> int:
        request = self.requests[stream_id]
        return self.cache.demand_nbytes(self._demand(request, self.scheduler.committed(stream_id)))

    def _demand(self, request: StreamRequest, committed: int) -> Demand:
        frames = max(1, min(self.cache.frames_per_chunk, request.frames - committed))
        return self.cache.occupied(request.window, committed, frames) * request.branches

    def _fits(self, plan: Plan) -> bool:
        """Whether the open chunks fit the pool: what the real store would find out the hard way."""
        ids = [decision.stream_id for decision in plan.running]
        return self.cache.can_host([self._demand(self.requests[name], self.open[name]) for name in ids])

    def _note(self, event: str, *fields: tuple[str, Any]) -> None:
        self.log.append({"kind": "engine", "event": event, **dict(fields)})

    def _draw(self, fault: str) -> bool:
        return self.faulty and self.rng.random() < self.scenario.faults.get(fault, 0.0)

    def _hit(self, fault: str, stream_id: str = "") -> None:
        self.result.fired[fault, self.scheduler.state(stream_id).value if stream_id else ""] += 1

    def _fail(self, plan: Plan, committed: dict[str, int], failed: dict[str, str]) -> None:
        """Chunks that come to nothing and streams that break."""
        names = sorted(committed)
        if names and self._draw("out of memory"):
            for name in names[self.rng.randrange(len(names)) :]:
                self._hit("out of memory", name)
                committed[name] = 0
        for fault in ("chunk fails", "stream fails"):
            if names and self._draw(fault):
                name = self.rng.choice(names)
                self._hit(fault, name)
                committed[name] = 0
                if fault == "stream fails":
                    failed[name] = "broken\n"
        if plan.parked and self._draw("park fails"):
            name = plan.parked[0].stream_id
            self._hit("park fails", name)
            failed[name] = "host memory"

    def _inject(self, *, between: bool) -> None:
        """Faults that come from outside, between two plans or while one is carried out."""
        if not self.faulty:
            return
        self._cancel_some()
        self._change_some()
        if self._draw("duplicate id") and self.scheduler.busy:
            self._expect_refusal("duplicate id")
        if self._draw("too large"):
            self._hit("too large")
            self._submit("t0", self.scenario.frames[1], branches=10_000)
        if self._draw("flood"):
            self._hit("flood")
            for _ in range(30):
                self._submit("flooder", self.scenario.frames[0])
        if self._draw("fill and squeeze"):
            self._hit("fill and squeeze")
            for _ in range(3):
                self._submit("squeezer", self.scenario.frames[1], branches=1)
        if between:
            self._turn_the_clock()

    def _expect_refusal(self, fault: str) -> None:
        alive = [name for name in self.requests if name in self.open]
        if alive:
            self._hit(fault, alive[0])
            try:
                self.scheduler.submit(self.requests[alive[0]])
            except ArgumentError:
                return
            raise AssertionError(f"{alive[0]} was accepted twice")

    def _cancel_some(self) -> None:
        states = {
            "cancel queued": (StreamState.QUEUED,),
            "cancel running": (StreamState.RUNNING,),
            "cancel parked": (StreamState.PARKED,),
            "cancel final": (StreamState.FINISHED, StreamState.FAILED, StreamState.CANCELLED),
        }
        for fault, wanted in states.items():
            if self._draw(fault):
                names = [name for name in self.requests if self._state(name) in wanted]
                if names:
                    name = self.rng.choice(names)
                    self._hit(fault, name)
                    self.scheduler.cancel(name)
        if self._draw("cancel unknown"):
            self._hit("cancel unknown")
            try:
                self.scheduler.cancel("nobody")
            except ArgumentError:
                return
            raise AssertionError("a stream that never was could be cancelled")

    def _state(self, name: str) -> StreamState | None:
        try:
            return self.scheduler.state(name)
        except ArgumentError:
            return None

    def _change_some(self) -> None:
        pool = self.cache.pool_nbytes
        if self._draw("pool shrinks"):
            self._hit("pool shrinks")
            self.scheduler.limit_pool(self.rng.choice([None, pool // 2, int(pool * 0.8), pool]))
        for fault in ("quota changes", "weight changes"):
            if self._draw(fault):
                self._hit(fault)
                index = self.rng.randrange(self.scenario.tenants)
                weight = self.rng.choice([0.5, 1.0, 3.0]) if fault == "weight changes" else 1.0
                ceiling = self.rng.choice([None, pool // 3, pool]) if fault == "quota changes" else None
                self.scheduler.set_tenant(f"t{index}", TenantSpec(weight=weight, ceiling_nbytes=ceiling))

    def _turn_the_clock(self) -> None:
        if self._draw("clock forward"):
            self._hit("clock forward")
            self.skew += 3600.0
        if self._draw("clock stalls"):
            self._hit("clock stalls")
            self.skew -= min(self.skew, 0.5)
        if self._draw("clock backward") and self.result.steps:
            self._hit("clock backward")
            try:
                self.scheduler.step(-1.0)
            except ArgumentError:
                return
            raise AssertionError("time ran backwards and nobody noticed")
