"""Runs the scheduler, as it is, against a simulated engine on a virtual clock.

Everything random comes from the seed, and everything that happens is written to one event log: the scheduler's own
records, and those of the engine (kind ``engine``: what it opened, parked, resumed and closed, the memory it found in
use, the time). A run has two phases: with faults while streams arrive, then without, until everything has drained.
"""

import heapq
import math
import time
from collections import deque
from dataclasses import replace
from random import Random
from typing import Any

from qvg_paged.config import QualityFloor, Rung
from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler import DecisionLog, Outcome, Plan, Policy, Scheduler, StreamRequest, load_policy
from qvg_paged.scheduler.backend import LadderBackend
from qvg_paged.timeline import Demand
from stress.arrivals import Arrival, arrival_times
from stress.faults import HOSTILE, VirtualClock, VirtualRunner
from stress.injector import Injector
from stress.ladder_cache import LADDERS, LadderCache
from stress.models import MODELS, SimulatedCache, StaticCache
from stress.run import Run
from stress.scenario import Scenario, tenant_specs

__all__ = ["Run", "Simulator", "simulate"]

TAILS = QualityFloor(rung=Rung.TAIL, retrieval_frames=4)
FLOORS = (QualityFloor(), QualityFloor(), TAILS, QualityFloor(rung=Rung.NONE))
"""What streams of a scenario with a ladder put up with, if they vary."""
MORE = 8
"""Streams that come at a time once the scenario's own have come and too little has happened."""
OWN = ("fcfs", "priority", "fair-share", "earliest-deadline")


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
        self.told = 0.0
        self.result = Run(scenario, seed)
        self.log = DecisionLog(self.result.lines.append)
        self.geometry = MODELS[scenario.model]
        self.cache = self._make_cache()
        runner = None if scenario.policy in OWN else VirtualRunner(self.clock, 0.005)
        self.scheduler = Scheduler(
            self.cache, self._make_policy(), scenario.config, seed=seed, log=self.log, runner=runner
        )
        self.note("reserve", ("nbytes", self.cache.demand_nbytes(self._reserve())))
        self.set_tenants()
        self.requests: dict[str, StreamRequest] = {}
        self.open: dict[str, int] = {}
        self.on_host: set[str] = set()
        self.squeezed: dict[str, Squeeze] = {}
        self.leaving: list[tuple[float, str]] = []
        self.gone: deque[str] = deque(maxlen=8)
        self.serial = 0
        self.moved_nbytes = 0
        self.faults = Injector(self)
        self.arrivals = self._make_arrivals(0.0, scenario.streams)

    def _make_cache(self) -> StaticCache:
        scenario = self.scenario
        kept, cheapest = LADDERS.get(scenario.ladder, ("qvg4-int2", None))
        roomy = StaticCache(self.geometry, 1 << 42, kept, cheapest)
        longest = roomy.demand_nbytes(roomy.demand(scenario.window, scenario.frames[1]))
        least = 8 * max(layout.page_nbytes + layout.codebook_nbytes for layout in roomy.layouts)
        pool = max(int(scenario.pool_streams * longest), least)
        if not scenario.can_park:
            return StaticCache(self.geometry, pool)
        host = int(scenario.host_streams * longest)
        if not scenario.ladder:
            return SimulatedCache(self.geometry, pool, host, scenario.costs)
        return LadderCache(self.geometry, pool, host, scenario.costs, scenario.ladder)

    def _reserve(self) -> Demand:
        """What the cache keeps free for demotion."""
        return self.cache.reserve if isinstance(self.cache, LadderCache) else Demand()

    def _make_policy(self) -> Policy:
        if self.scenario.policy in HOSTILE:
            return HOSTILE[self.scenario.policy](Random(self.rng.random()), self.clock)
        return load_policy(self.scenario.policy)

    def _make_arrivals(self, start: float, count: int) -> list[Arrival]:
        """The latest first."""
        scenario, rng = self.scenario, self.rng
        if scenario.trace:
            return sorted(scenario.trace, key=lambda arrival: arrival.at)[::-1] if start == 0.0 else []
        times = arrival_times(scenario.arrivals, rng, scenario.rate, count)
        names = [f"t{rng.randrange(scenario.tenants)}" for _ in times]
        chunk = self.geometry.model.frames_per_chunk if scenario.whole_chunks else 1
        frames = [-(-rng.randint(*scenario.frames) // chunk) * chunk for _ in times]
        return [Arrival(start + at, *rest) for at, *rest in zip(times, names, frames, strict=True)][::-1]

    def set_tenants(self) -> None:
        """Give every tenant the rights of the scenario."""
        for name, spec in tenant_specs(self.scenario, self.cache.pool_nbytes).items():
            self.scheduler.set_tenant(name, spec)

    def run(self) -> Run:
        """Until everything has drained, or too many steps have passed."""
        result, most = self.result, self.scenario.most_steps
        while result.steps < most:
            if self.faults.active and (not self.arrivals or 0 < self.scenario.least_events <= result.events):
                self._more_or_calm()
            if not self.arrivals and not self.scheduler.busy:
                break
            self._arrive()
            if not self.scheduler.busy:
                self.clock.now = self.arrivals[-1].at
                continue
            self.faults.inject(None)
            self._carry_out(self._step())
        self.note("end")
        result.drained = not self.scheduler.busy and not self.open and not self.on_host
        result.digest, result.seconds = self.log.digest, self.clock.now
        return result

    def _more_or_calm(self) -> None:
        """The arrivals are over: more of them if too little has happened, else no more of them and of faults."""
        self.arrivals = []
        if self.result.events < self.scenario.least_events:
            self.arrivals = self._make_arrivals(self.clock.now, MORE)
        if not self.arrivals:
            self.faults.stop()

    def _arrive(self) -> None:
        while self.leaving and self.leaving[0][0] <= self.clock.now:
            _, name = heapq.heappop(self.leaving)
            if name in self.requests:
                self.scheduler.cancel(name)
                self.result.events += 1
        while self.arrivals and self.arrivals[-1].at <= self.clock.now:
            arrival = self.arrivals.pop()
            self.note("arrive", ("at", arrival.at))
            name = self.submit(arrival.tenant, arrival.frames)
            if arrival.patience is not None:
                heapq.heappush(self.leaving, (arrival.at + arrival.patience, name))

    def submit(self, tenant: str, frames: int, **changes: Any) -> str:
        """A request of the scenario's kind; its name."""
        self.serial += 1
        self.result.events += 1
        rng, scenario = self.rng, self.scenario
        request = StreamRequest(
            f"s{self.serial}",
            tenant,
            frames,
            scenario.window,
            deadline_fps=scenario.fps,
            priority=rng.choice([0, 0, 0, 1, 5]) if scenario.varied else 0,
            branches=rng.choice([1, 1, 1, 2]) if scenario.varied and scenario.pool_streams > 2 else 1,
            quality=rng.choice(FLOORS) if scenario.varied and scenario.ladder else QualityFloor(),
        )
        request = replace(request, **changes) if changes else request
        self.requests[request.id] = request
        self.scheduler.submit(request)
        return request.id

    def _step(self) -> Plan:
        self.told = max(self.told, self.clock.now + self.skew)  # a clock that stalls does not run backwards
        began = time.perf_counter()
        plan = self.scheduler.step(self.told)
        self.result.decision_seconds.append(time.perf_counter() - began)
        self.result.steps += 1
        told = (plan.finished, plan.rejected, plan.parked, plan.resumed, plan.admitted, plan.running)
        self.result.events += sum(map(len, told))
        return plan

    def _carry_out(self, plan: Plan) -> None:
        """What an engine does with a plan, and what can go wrong while it does."""
        for decision in (*plan.finished, *plan.rejected):
            self._close(decision.stream_id)
        committed = {decision.stream_id: len(decision.frames or ()) for decision in plan.running}
        failed = self.faults.break_chunks(plan, committed)
        seconds = self._squeeze(plan) + self._move(plan)
        self._note_memory(plan)
        self._generate(plan)
        self.clock.now += seconds + self.scenario.costs.batch(len(plan.running))
        if not plan.running:
            self._wait()
        self.faults.inject(plan)
        if plan.running or plan.parked:
            self.scheduler.update(plan, Outcome(committed, failed))
        self.faults.misreport(plan)
        for stream_id, frames in committed.items():
            self.open[stream_id] += frames
        self.note("clock", ("t", self.clock.now), ("moved", seconds), ("moved_nbytes", self.moved_nbytes))

    def _close(self, name: str) -> None:
        """A stream is over."""
        self.open.pop(name, None)
        self.on_host.discard(name)
        self.squeezed.pop(name, None)
        del self.requests[name]
        self.gone.append(name)

    def _generate(self, plan: Plan) -> None:
        """The work, of which the simulation has none."""

    def _squeeze(self, plan: Plan) -> float:
        """Store streams more cheaply; the seconds that it takes."""
        seconds = 0.0
        for decision in (*plan.demoted, *plan.shrunk):
            assert decision.squeeze is not None
            before = self._demand(decision.stream_id).dense_pages
            self.squeezed[decision.stream_id] = decision.squeeze
            fewer = before - self._demand(decision.stream_id).dense_pages
            seconds += self.scenario.costs.squeeze(max(0, fewer) * self.geometry.model.frame_nbytes)
        return seconds

    def _move(self, plan: Plan) -> float:
        """Park, resume and open; the seconds that the transfers take."""
        costs, moved = self.scenario.costs, []
        for decision in plan.parked:
            moved.append(self.cache.demand_nbytes(self._demand(decision.stream_id)))
            del self.open[decision.stream_id]
            self.on_host.add(decision.stream_id)
        for decision in plan.resumed:
            self.on_host.remove(decision.stream_id)
        for decision in (*plan.resumed, *plan.admitted):
            self.open[decision.stream_id] = self.scheduler.committed(decision.stream_id)
        moved += [self.cache.demand_nbytes(self._demand(decision.stream_id)) for decision in plan.resumed]
        self.moved_nbytes += sum(moved)
        return math.fsum(map(costs.move, moved))  # `sum` rounds otherwise from Python 3.12 on

    def _wait(self) -> None:
        """Nothing runs: until the next arrival, but not for ever."""
        until = self.arrivals[-1].at if self.arrivals else self.clock.now + 1.0
        self.clock.now = max(self.clock.now + 0.1, min(until, self.clock.now + 1.0))

    def _demand(self, name: str) -> Demand:
        request, committed = self.requests[name], self.open[name]
        frames = max(1, min(self.cache.frames_per_chunk, request.frames - committed))
        now = self.squeezed.get(name)
        if now is None:
            return self.cache.occupied(request.window, committed, frames) * request.branches
        assert isinstance(self.cache, LadderBackend)
        return self.cache.squeezed_demand(request.window, committed, frames, now) * request.branches

    def _note_memory(self, plan: Plan) -> None:
        """Whether the open chunks fit the pool: what the real store would find out the hard way."""
        used = Demand()
        for decision in plan.running:
            used += self._demand(decision.stream_id)
        fits = self.cache.can_host([used])
        self.note("memory", ("fits", fits), ("open", len(self.open)), ("used", self.cache.by_format(used)))

    def note(self, event: str, *fields: tuple[str, Any]) -> None:
        """Write a record of the engine."""
        self.log.append({"kind": "engine", "event": event, **dict(fields)})
