"""What the scheduler takes: decision time at many streams, and the simulator's speed."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import count
from random import Random

from qvg_paged.scheduler import (
    FCFS,
    EarliestDeadline,
    FairShare,
    Outcome,
    Plan,
    Policy,
    Priority,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    StreamView,
    SystemView,
)
from qvg_paged.scheduler.core import decide
from qvg_paged.scheduler.inputs import Cancel, Input, Report, Submit
from stress.bounds import Row
from stress.checker import check_log
from stress.models import MODELS, SimulatedCache, StaticCache
from stress.presets import PRESETS
from stress.scenario import Scenario
from stress.simulator import simulate
from stress.stats import percentile

__all__ = ["POLICIES", "Load", "ShortestFirst", "decision_time", "simulator_speed", "step_times"]

RUNNING = 6
PASSES, TRIES = 3, 3
LIMITS = {256: (250e-6, 1e-3), 4096: (2e-3, 10e-3)}
"""Seconds for built-in policies and for one that ranks everybody, by number of streams."""
POLICIES = (FCFS, Priority, FairShare, EarliestDeadline)


class ShortestFirst:
    """A policy as a user writes it: all waiting streams, by a key of its own."""

    def rank(self, view: SystemView) -> Sequence[str]:
        """The fewest frames to go first."""
        ordered = sorted(view.waiting, key=lambda s: (s.request.frames - s.committed, s.arrival))
        return [stream.id for stream in ordered]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Nobody."""
        del view, stream
        return []


class Load:
    """A core with so many streams of 16 tenants in line, and eight things that happen before every step.

    Six chunks are reported, and two streams come, or one comes and one that waits is given up: as many as end.

    Args:
        policy: whom to ask; one that is not of the package is asked in a worker, as the scheduler does.
        streams: how many there are.
    """

    def __init__(self, policy: Policy, streams: int) -> None:
        self.rng = Random(0)
        geometry = MODELS["self-forcing"]
        books = StaticCache(geometry, 1 << 42)
        worst = books.demand_nbytes(books.demand(geometry.window, 60))
        cache = SimulatedCache(geometry, 64 * worst, 1 << 50, Scenario().costs)
        config = SchedulerConfig(max_running=RUNNING, policy_seconds=1.0)
        scheduler = Scheduler(cache, policy, config)
        self.rules, self.guard, self.state = scheduler._rules, scheduler._guard, scheduler._state
        self.window, self.names, self.now = geometry.window, count(), 0.0
        self.plan = Plan(step=0)
        self.step([self._submit() for _ in range(streams)])

    def _submit(self) -> Submit:
        rng = self.rng
        request = StreamRequest(
            f"s{next(self.names)}", f"t{rng.randrange(16)}", 3 * rng.randint(9, 15), self.window,
            deadline_fps=rng.choice([None, 2.0]), priority=rng.randrange(3),
        )  # fmt: skip
        return Submit(request)

    def events(self) -> list[Input]:
        """What happens next."""
        plan, odd = self.plan, self.plan.step % 2
        report = Report(plan, Outcome({d.stream_id: len(d.frames or ()) for d in plan.running}))
        other = Cancel(self.rng.choice([*self.state.queued])) if odd else self._submit()
        return [report, self._submit(), other]

    def step(self, events: Sequence[Input]) -> float:
        """Take a step; its seconds."""
        return self.timed_step(events, 1)

    def timed_step(self, events: Sequence[Input], tries: int) -> float:
        """Take a step; the seconds of the fastest of several tries, which is what a pure function allows."""
        self.now += 5.0
        before, best = self.state, math.inf
        for _ in range(tries):
            rng = Random(0)
            began = time.perf_counter()
            self.guard.begin()
            self.state, self.plan = decide(self.rules, before, events, self.now, rng, self.guard)
            best = min(best, time.perf_counter() - began)
        return best


def step_times(make: Callable[[], Policy], streams: int, steps: int) -> list[float]:
    """Seconds of each of so many steps, the fastest of several tries in several passes.

    A load takes the same steps in every pass, so that what differs is what else runs on the machine. Python's
    collector comes by in one step of forty and takes a tenth of a millisecond, which the fastest try is spared, too.
    """
    best = [math.inf] * steps
    for _ in range(PASSES):
        load = Load(make(), streams)
        gc.collect()
        gc.freeze()
        try:
            best = [min(seconds, load.timed_step(load.events(), TRIES)) for seconds in best]
        finally:
            gc.unfreeze()
    return best


def decision_time(steps: int = 200) -> list[Row]:
    """The 99th percentile of a step, for each policy and number of streams."""
    rows = []
    for streams, (built_in, custom) in LIMITS.items():
        for make in (*POLICIES, ShortestFirst):
            times = step_times(make, streams, steps)
            limit = custom if make is ShortestFirst else built_in
            name = "a full custom ranking" if limit == custom else make.__name__
            p99, p50 = percentile(times, 0.99), percentile(times, 0.5)
            text = (
                f"median {p50 * 1e6:.0f} us; 8 events a step, applied within that time; "
                f"each the fastest of {PASSES * TRIES} tries, n = {steps}"
            )
            rows.append(
                Row(f"decision, {streams} streams, {name}", f"p99 <= {limit * 1e6:.0f} us", f"{p99 * 1e6:.0f} us",
                    p99 <= limit, text)
            )  # fmt: skip
    return rows


def simulator_speed(seeds: Sequence[int]) -> list[Row]:
    """Virtual seconds per second, checker on."""
    seconds = 0.0
    began = time.perf_counter()
    for seed in seeds:
        run = simulate(PRESETS["steady"], seed)
        assert check_log(run.lines) == []
        seconds += run.seconds
    speed = seconds / (time.perf_counter() - began)
    text = f"100 streams, 4 tenants, {len(seeds)} seeds"
    return [Row("simulator, 100 streams, checker on", ">= 1,000x", f"{speed:,.0f}x", speed >= 1000, text)]
