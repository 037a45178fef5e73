"""The simulator runs the real scheduler, the checker follows its log, and what is broken on purpose is found."""

import itertools
import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from stress.arrivals import ARRIVALS, Arrival, arrival_times, read_trace  # noqa: E402
from stress.checker import Checker, check_log  # noqa: E402
from stress.faults import HOSTILE  # noqa: E402
from stress.metrics import measure  # noqa: E402
from stress.models import MODELS, SimulatedCache, StaticCache  # noqa: E402
from stress.mutants import GOAL, MUTANTS, Mutant, find_mutant, planted  # noqa: E402
from stress.scenario import POLICIES, Scenario, draw_scenario  # noqa: E402
from stress.simulator import Run, simulate  # noqa: E402
from stress.soak import run_seeds, summarise  # noqa: E402
from stress.stats import jain, percentile  # noqa: E402

from qvg_paged import ArgumentError  # noqa: E402
from qvg_paged.scheduler import CacheBackend, ParkingBackend, SchedulerConfig  # noqa: E402

SEEDS = range(12)
BUSY = Scenario(streams=30, load=3.0, pool_streams=2.5, frames=(6, 36))


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [simulate(draw_scenario(seed), seed) for seed in SEEDS]


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.lines]


def test_random_runs_keep_every_invariant_and_drain(runs: list[Run]) -> None:
    for run in runs:
        assert run.drained, f"seed {run.seed}: {run.scenario}"
        assert check_log(run.lines) == [], f"seed {run.seed}"
    assert len({fault for run in runs for fault, _ in run.fired}) >= 15, "faults have to happen to mean anything"
    assert any(record["parked"] for run in runs for record in records(run) if record["kind"] == "plan")


def test_two_hundred_seeds_of_two_thousand_events_keep_every_invariant_and_every_fault_happens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = summarise(list(run_seeds(range(200), 2000, jobs=2)))
    with capsys.disabled():
        sys.stdout.write(f"\n{found['coverage_text']}\n")
    assert found["failures"] == []
    assert found["which"] == [(0, 199)]
    assert found["least_events"] >= 2000
    assert found["never_fired"] == []
    assert set(found["policies"]) == {*POLICIES, *HOSTILE}


def test_a_seed_replays_to_the_same_log_and_another_does_not() -> None:
    first, again, other = (simulate(draw_scenario(3), seed) for seed in (3, 3, 4))
    assert first.digest == again.digest
    assert first.lines == again.lines
    assert first.digest != other.digest


@pytest.mark.parametrize("policy", ["raises", "lies", "sleeps", "evicts-the-leader"])
def test_no_policy_can_break_anything(policy: str) -> None:
    run = simulate(replace(BUSY, policy=policy, config=SchedulerConfig(policy_strikes=1000)), 1)
    assert run.drained
    assert check_log(run.lines) == []
    faults = [record for record in records(run) if record["kind"] == "policy" and record["fault"]]
    assert faults, "the policy was meant to misbehave"


def test_streams_are_parked_and_resumed_and_all_of_them_finish() -> None:
    run = simulate(BUSY, 5)
    plans = [record for record in records(run) if record["kind"] == "plan"]
    assert sum(len(plan["parked"]) for plan in plans) == sum(len(plan["resumed"]) for plan in plans) > 0
    ends = [reason for plan in plans for _, reason in plan["finished"]]
    assert ends == ["completed"] * 30


def test_a_cache_that_cannot_park_gets_reservations_to_completion() -> None:
    run = simulate(replace(BUSY, can_park=False), 5)
    assert records(run)[0]["reservation"] == "to completion"
    assert check_log(run.lines) == []
    assert not any(record["parked"] for record in records(run) if record["kind"] == "plan")


def test_fair_share_gives_weighted_tenants_their_shares_while_all_are_in_line() -> None:
    scenario = Scenario(
        policy="fair-share", streams=160, tenants=4, arrivals="herd", load=50.0, frames=(36, 36), pool_streams=5.0,
        weights=(1.0, 2.0, 3.0, 4.0), config=SchedulerConfig(max_running=4, pool_second_cost=0.0),
    )  # fmt: skip
    run = simulate(scenario, 2)
    checker = Checker()
    shares: list[float] = []
    for line in run.lines:
        checker.feed(line)
        in_line = {s.tenant for s in checker.ledger.live.values() if s.state in ("queued", "parked")}
        if len(in_line) == 4:
            shares = [service / weight for service, weight in checker.services().values()]
    assert checker.finish() == []
    assert min(shares) > 30, "long enough to mean something"
    assert jain(shares) >= 0.98
    assert 0 < checker.service.largest_gap <= 2 * checker.service.unit


def test_first_come_first_served_is_less_fair_than_fair_share() -> None:
    gaps = {}
    for policy in ("fcfs", "fair-share"):
        scenario = Scenario(
            policy=policy, streams=60, tenants=2, arrivals="herd", load=9.0, faults={"flood": 0.05}, pool_streams=3.0,
            config=SchedulerConfig(max_running=3),
        )  # fmt: skip
        run = simulate(scenario, 8)
        assert check_log(run.lines) == []
        gaps[policy] = measure(run.lines).gap
    assert gaps["fair-share"] < gaps["fcfs"]


def test_metrics_add_up_with_the_log() -> None:
    run = simulate(replace(BUSY, fps=2.0, faults={"chunk fails": 0.2, "cancel running": 0.05}), 4)
    metrics = measure(run.lines)
    log = records(run)
    done = sum(sum(n > 0 for n in record["committed"].values()) for record in log if record["kind"] == "report")
    parked = sum(len(record["parked"]) for record in log if record["kind"] == "plan")
    assert 0 < metrics.chunks <= done
    assert metrics.parks == parked
    assert metrics.seconds == run.seconds
    assert len(metrics.first_chunk_seconds) + len(metrics.chunk_seconds) == metrics.chunks
    assert metrics.wasted_chunks > 0
    summary = metrics.summary()
    assert 0 < summary["first_chunk_p50_seconds"] <= summary["first_chunk_p99_seconds"]
    assert 0 <= summary["continuous_play_ratio"] <= 1
    assert 0 < summary["jain"] <= 1
    assert all(isinstance(value, float) for value in summary.values())
    assert set(measure([]).summary().values()) <= {0.0, 1.0}


def test_jain_is_one_for_equals_and_one_over_n_for_a_monopoly() -> None:
    assert jain([2.0] * 5) == pytest.approx(1.0)
    assert jain([7.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) == 1.0
    values = random.sample(range(1000), 101)
    assert percentile(values, 0.5) == statistics.median(values)
    assert percentile(values, 1.0) == max(values)


@pytest.mark.parametrize("kind", sorted(ARRIVALS))
def test_arrivals_ascend_at_the_rate_that_was_asked_for(kind: str) -> None:
    times = arrival_times(kind, Random(1), 2.0, 4000)
    assert times == sorted(times)
    assert times[0] >= 0
    assert 4000 / times[-1] == pytest.approx(2.0, rel=0.5 if kind == "bursts-13" else 0.2)


def test_bursts_are_as_uneven_as_their_name_says() -> None:
    for kind, cv in (("poisson", 1.0), ("bursts-3", 3.0)):
        times = arrival_times(kind, Random(2), 1.0, 20_000)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.15)


def test_unknown_arrivals_and_broken_traces_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="expected one of poisson"):
        arrival_times("never", Random(0), 1.0, 1)
    path = tmp_path / "trace.csv"
    path.write_text("time,tenant,frames\n2.5,b,6\n0.5,a,9\n")
    assert read_trace(path) == [Arrival(0.5, "a", 9), Arrival(2.5, "b", 6)]
    for line in ("x,a,3", "1.0,a", "-1,a,3", "1.0,,3", "1.0,a,0", "nan,a,3"):
        path.write_text(line + "\n")
        with pytest.raises(ArgumentError, match=r"line 1 of trace\.csv"):
            read_trace(path)


def test_a_trace_is_followed() -> None:
    run = simulate(Scenario(trace=(Arrival(0.5, "t0", 6), Arrival(7.5, "t1", 9)), tenants=2), 0)
    submits = [record for record in records(run) if record["kind"] == "submit"]
    assert [(record["tenant"], record["frames"]) for record in submits] == [("t0", 6), ("t1", 9)]
    assert run.drained


@pytest.mark.parametrize("name", sorted(MODELS))
def test_simulated_caches_satisfy_the_protocols_and_answer_like_the_store(name: str) -> None:
    geometry = MODELS[name]
    static = StaticCache(geometry, 200 << 30)
    assert isinstance(static, CacheBackend)
    assert not isinstance(static, ParkingBackend)
    cache = SimulatedCache(geometry, 200 << 30, 1 << 40, Scenario().costs)
    assert isinstance(cache, ParkingBackend)
    worst = cache.demand(geometry.window, 60)
    chunk = cache.frames_per_chunk
    for committed in range(0, 60 - chunk, chunk):
        need = cache.chunk_demand(geometry.window, committed, chunk)
        assert worst.most(need) == worst
    assert cache.can_host([worst]) == cache.can_host([worst], cache.pool_nbytes)
    assert not cache.can_host([worst], cache.demand_nbytes(worst) // 2)
    assert cache.park_seconds(10**10) == cache.resume_seconds(10**10) > cache.park_seconds(0) > 0


def broken(run: Run, at: int, /, **changes: Any) -> list[str]:
    """A log with the record of number `at` changed."""
    lines = list(run.lines)
    lines[at] = json.dumps({**json.loads(lines[at]), **changes})
    return lines


def test_the_checker_does_not_believe_the_log(runs: list[Run]) -> None:
    run = simulate(BUSY, 6)
    log = records(run)
    plan = next(r for r in log if r["kind"] == "plan" and len(r["running"]) > 1 and r["waiting"])
    seq = plan["seq"]
    name, start, count, _ = plan["running"][0]
    pool = log[0]["pool_nbytes"]
    for changes, invariant in (
        ({"v": 2}, "log"),
        ({"seq": 0}, "log"),
        ({"kind": "novel"}, "log"),
        ({"now": -1.0}, "clock"),
        ({"leader": ""}, "leader"),
        ({"leader": "nobody"}, "leader"),
        ({"running": plan["running"][1:]}, "transitions"),
        ({"running": [[name, start, count, pool + 1], *plan["running"][1:]]}, "accounting"),
        ({"running": [[name, start, count + 1, 1], *plan["running"][1:]]}, "frames"),
        ({"waiting": []}, "reasons"),
    ):
        found = {violation.invariant for violation in check_log_until(broken(run, seq, **changes), seq + 1)}
        assert invariant in found, changes
    assert {v.invariant for v in check_log(run.lines[: seq + 1])} == {"drained"}
    parked = [[plan["waiting"][0][0], "parked"]]  # by a plan in which it waits: found, and the rest is checked, too
    assert "transitions" in {v.invariant for v in check_log(broken(run, seq, parked=parked))}
    memory = next(r["seq"] for r in log if r["kind"] == "engine" and r["event"] == "memory")
    assert "memory" in {v.invariant for v in check_log_until(broken(run, memory, fits=False), memory + 1)}
    assert "engine" in {v.invariant for v in check_log_until(broken(run, memory, open=99), memory + 1)}
    assert runs


def check_log_until(lines: list[str], end: int) -> list[Any]:
    checker = Checker()
    for line in lines[:end]:
        checker.feed(line)
    return checker.violations


@pytest.mark.parametrize("mutant", [MUTANTS[0], MUTANTS[4], MUTANTS[14], MUTANTS[19]], ids=lambda m: m.about)
def test_planted_bugs_are_found_and_leave_nothing_behind(mutant: Mutant) -> None:
    before = simulate(GOAL[3], 1).digest
    assert find_mutant(mutant, seeds=4)
    assert simulate(GOAL[3], 1).digest == before


def test_every_planted_bug_still_has_its_place() -> None:
    assert len(MUTANTS) == 25
    for mutant in MUTANTS:
        with planted(mutant):
            pass
    with pytest.raises(LookupError, match="found 0 times"), planted(Mutant("core", "no such text", "", "")):
        pass
