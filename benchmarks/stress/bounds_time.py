"""What the scheduler takes: decision time at many streams, and the simulator's speed."""

import gc
import time
from collections.abc import Sequence
from random import Random

from qvg_paged.scheduler import (
    FCFS,
    EarliestDeadline,
    FairShare,
    Outcome,
    Policy,
    Priority,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    StreamView,
    SystemView,
    TenantSpec,
)
from qvg_paged.scheduler.core import decide
from stress.bounds import Row
from stress.checker import check_log
from stress.models import MODELS, SimulatedCache, StaticCache
from stress.presets import PRESETS
from stress.scenario import Scenario
from stress.simulator import simulate
from stress.stats import percentile

__all__ = ["decision_time", "simulator_speed"]

EVENTS = 8
REPEATS = 5
LIMITS = {256: (250e-6, 1e-3), 4096: (2e-3, 10e-3)}
"""Seconds for built-in policies and for one that ranks everybody, by number of streams."""


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


def _measure(policy: Policy, streams: int, steps: int) -> list[float]:
    """Seconds of each step, with eight chunks reported before each.

    A step is a pure function of the state, so each is taken a few times and the fastest counts: other programs on the
    machine would be measured else.
    """
    geometry = MODELS["self-forcing"]
    books = StaticCache(geometry, 1 << 42)
    worst = books.demand_nbytes(books.demand(geometry.window, 60))
    cache = SimulatedCache(geometry, 64 * worst, 1 << 50, Scenario().costs)
    config = SchedulerConfig(max_running=EVENTS, default_tenant=TenantSpec(max_queued=10_000), policy_seconds=1.0)
    scheduler = Scheduler(cache, policy, config)
    for place in range(streams):
        frames = 30 + 3 * (place * 7 % 11)  # not all end at once
        request = StreamRequest(
            f"s{place}", f"t{place % 8}", frames, geometry.window, deadline_fps=2.0, priority=place % 3
        )
        scheduler.submit(request)
    found: list[float] = []
    gc.collect()
    gc.freeze()
    for step in range(steps):
        found.append(min(_step(scheduler, 5.0 * step) for _ in range(REPEATS)))
        plan = scheduler.step(5.0 * step)
        scheduler.update(plan, Outcome({d.stream_id: len(d.frames or ()) for d in plan.running}))
        for decision in plan.finished:  # as many come as go
            scheduler.submit(StreamRequest(f"n{step}-{decision.stream_id}", "t0", 60, geometry.window))
    gc.unfreeze()
    return found


def _step(scheduler: Scheduler, now: float) -> float:
    """Seconds of the next step, which is not taken; what the step before has prepared is forgotten."""
    state = scheduler._state
    for entry in (*state.running.values(), *(state.queued[name] for name in state.fresh if name in state.queued)):
        entry.__dict__.pop("view", None)
    began = time.perf_counter()
    scheduler._guard.begin()
    decide(scheduler._rules, state, (), now, Random(0), scheduler._guard)
    return time.perf_counter() - began


def decision_time(steps: int = 120) -> list[Row]:
    """The 99th percentile of a step, for each policy and number of streams."""
    rows = []
    for streams, (built_in, custom) in LIMITS.items():
        for policy in (FCFS(), Priority(), FairShare(), EarliestDeadline(), ShortestFirst()):
            times = _measure(policy, streams, steps)
            limit = custom if isinstance(policy, ShortestFirst) else built_in
            name = "a full custom ranking" if limit == custom else type(policy).__name__
            p99, p50 = percentile(times, 0.99), percentile(times, 0.5)
            text = f"median {p50 * 1e6:.0f} us; 8 chunks per step, fastest of {REPEATS} tries each, n = {steps}"
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
