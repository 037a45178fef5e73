"""What a step of the scheduler takes, with the load of `benchmarks/stress/bounds_time.py`, which has the bounds.

`make bench-tests` times it; `make test` runs the smaller cases untimed, and counts what a step looks at.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from stress.bounds_time import POLICIES, Load, ShortestFirst  # noqa: E402

from qvg_paged.scheduler.entry import Entry  # noqa: E402


@pytest.mark.parametrize("streams", [256, 4096])
@pytest.mark.parametrize("policy", [*POLICIES, ShortestFirst])
def test_deciding_a_step(benchmark: Any, policy: type, streams: int) -> None:
    if streams > 256 and not benchmark.enabled:
        pytest.skip("takes longer to set up than it tells untimed")
    load = Load(policy(), streams)
    rounds = 400 if streams == 256 else 200
    benchmark.pedantic(load.step, setup=lambda: ((load.events(),), {}), rounds=rounds, warmup_rounds=20)
    if benchmark.enabled:
        times = sorted(benchmark.stats.stats.data)
        benchmark.extra_info["p99 in us"] = round(times[int(0.99 * len(times))] * 1e6, 1)
    known = {d.stream_id for d in (*load.plan.running, *load.plan.waiting)}
    assert len(known) > 0.9 * streams
    assert load.plan.running
    assert load.plan.waiting
    assert not load.plan.policy_fault


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_makes_no_more_entries_and_views_with_a_longer_line(
    policy: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    but, view = Entry.but, Entry.__dict__["view"]
    monkeypatch.setattr(Entry, "but", lambda self, **changes: made.append(self.id) or but(self, **changes))
    monkeypatch.setattr(Entry, "view", property(lambda self: made.append(self.id) or view.fget(self)))
    most = []
    for streams in (64, 1024):
        load = Load(policy(), streams)
        counts = []
        for _ in range(20):
            made.clear()
            load.step(load.events())
            counts.append(len(made))
        most.append(max(counts))
    assert most[1] <= 1.25 * most[0] + 16
