"""What a step of the scheduler takes, for `make bench-tests`; `make test` runs the smaller cases once, untimed.

256 and 4,096 streams of 16 tenants over a pool that holds a few of them; between two steps up to eight things happen:
four chunks are reported, two streams are cancelled and two come. The bound at the 99th percentile is 250 us and 2 ms
for policies of the package, 1 and 10 ms for a policy that ranks every stream itself.
"""

import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from stress.models import MODELS, Costs, SimulatedCache  # noqa: E402

from qvg_paged.scheduler import (  # noqa: E402
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

GEOMETRY = next(iter(MODELS.values()))


class ShortestFirst:
    """A policy of one's own, which ranks every stream in line."""

    def rank(self, view: SystemView) -> Sequence[str]:
        return [s.id for s in sorted(view.waiting, key=lambda s: (s.request.frames - s.committed, s.arrival))]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        return [] if stream else [other.id for other in view.running if other.id in view.parkable]


class Load:
    """A scheduler with so many streams, and what happens to it between two steps."""

    def __init__(self, policy: Policy, streams: int) -> None:
        self.rng = Random(0)
        longest = SimulatedCache(GEOMETRY, 1 << 42, 0, Costs())
        nbytes = longest.demand_nbytes(longest.demand(GEOMETRY.window, 60))
        cache = SimulatedCache(GEOMETRY, 6 * nbytes, streams * nbytes, Costs())
        self.scheduler = Scheduler(cache, policy, SchedulerConfig(policy_seconds=None, max_running=4), seed=1)
        self.names = count()
        self.now = 0.0
        for _ in range(streams):
            self.submit()
        self.plan: Plan = self.scheduler.step(self.now)

    def submit(self) -> None:
        name = f"s{next(self.names)}"
        request = StreamRequest(
            name, f"t{self.rng.randrange(16)}", self.rng.randint(30, 60), GEOMETRY.window,
            deadline_fps=self.rng.choice([None, 16.0]), priority=self.rng.randrange(3),
        )  # fmt: skip
        self.scheduler.submit(request)

    def happen(self) -> tuple[tuple[float], dict[str, Any]]:
        """Chunks are reported, two streams in line are cancelled, two come, and one for each that finished."""
        self.scheduler.update(self.plan, Outcome({d.stream_id: len(d.frames or ()) for d in self.plan.running}))
        for decision in self.rng.sample(self.plan.waiting, 2):
            self.scheduler.cancel(decision.stream_id)
        for _ in range(2 + len(self.plan.finished)):
            self.submit()
        self.now += 1.0
        return (self.now,), {}

    def step(self, now: float) -> None:
        self.plan = self.scheduler.step(now)


@pytest.mark.parametrize("streams", [256, 4096])
@pytest.mark.parametrize("policy", [FCFS, Priority, FairShare, EarliestDeadline, ShortestFirst])
def test_deciding_a_step(benchmark: Any, policy: type, streams: int) -> None:
    if streams > 256 and not benchmark.enabled:
        pytest.skip("takes longer to set up than it tells untimed")
    load = Load(policy(), streams)
    rounds = 400 if streams == 256 else 200
    benchmark.pedantic(load.step, setup=load.happen, rounds=rounds, warmup_rounds=20)
    if benchmark.enabled:
        times = sorted(benchmark.stats.stats.data)
        benchmark.extra_info["p99 in us"] = round(times[int(0.99 * len(times))] * 1e6, 1)
    known = {d.stream_id for d in (*load.plan.running, *load.plan.waiting)}
    assert len(known) > 0.9 * streams
    assert load.plan.running
    assert load.plan.waiting
    assert not load.plan.policy_fault
