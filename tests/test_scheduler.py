"""Admission, order, reasons and the policy seam; then whole runs against a real pool."""

import random
from collections.abc import Sequence

import pytest
from tiny import WINDOW, grow, make_cache

from qvg_paged import ArgumentError, ConfigError, KVCacheManager, StateError, Stream, Window
from qvg_paged.scheduler import (
    Decision,
    Outcome,
    Plan,
    Reason,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    StreamState,
    StreamView,
    SystemView,
)


@pytest.fixture(scope="module")
def cache() -> KVCacheManager:
    """A pool of unquantised pages of 16 KiB that holds two streams of 11 frames and not three."""
    cache = make_cache(pool=30 * (16 << 10), format="dense")
    demand = cache.demand(WINDOW, 12)
    assert cache.can_host([demand] * 2)
    assert not cache.can_host([demand] * 3)
    return cache


def request(name: str, frames: int = 12, **changes: object) -> StreamRequest:
    return StreamRequest(name, "t", frames, WINDOW, **changes)  # type: ignore[arg-type]


def ids(decisions: Sequence[Decision]) -> list[str]:
    return [decision.stream_id for decision in decisions]


def carry_out(scheduler: Scheduler, plan: Plan) -> None:
    scheduler.update(plan, Outcome(committed={d.stream_id: len(d.frames or ()) for d in plan.running}))


def test_streams_are_admitted_in_order_of_arrival_while_their_worst_cases_fit(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    assert [scheduler.submit(request(name)).reason for name in "abcd"] == [Reason.QUEUED] * 4
    plan = scheduler.step(0.0)
    assert (ids(plan.admitted), ids(plan.running), ids(plan.waiting)) == (["a", "b"], ["a", "b"], ["c", "d"])
    assert [decision.reason for decision in plan.waiting] == [Reason.NO_MEMORY, Reason.BEHIND]
    assert "first in line" in plan.waiting[1].text
    assert f"{2 * cache.demand_nbytes(cache.demand(WINDOW, 12))} of {cache.budget.pool} bytes" in plan.waiting[0].text
    assert scheduler.why("c") == plan.waiting[0]
    assert scheduler.state("d") is StreamState.QUEUED


def test_nobody_overtakes_a_large_stream_at_the_head_of_the_line(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.submit(request("a"))
    scheduler.submit(request("large", branches=2))
    scheduler.submit(request("small", frames=1))
    plan = scheduler.step(0.0)
    assert ids(plan.admitted) == ["a"]
    assert {d.stream_id: d.reason for d in plan.waiting} == {"large": Reason.NO_MEMORY, "small": Reason.BEHIND}


def test_streams_advance_chunk_by_chunk_and_the_last_chunk_is_shorter(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.submit(request("a", frames=7))
    seen = []
    while scheduler.busy:
        plan = scheduler.step(float(len(seen)))
        seen += [decision.frames for decision in plan.running]
        if plan.running:
            assert plan.running[0].reason is Reason.ADVANCE
        carry_out(scheduler, plan)
    assert seen == [range(3), range(3, 6), range(6, 7)]
    assert scheduler.state("a") is StreamState.FINISHED
    assert scheduler.why("a").reason is Reason.COMPLETED
    assert scheduler.committed("a") == 7


def test_a_finished_stream_is_announced_with_the_plan_that_gives_its_memory_away(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    for name, frames in (("a", 7), ("b", 12), ("c", 12)):
        scheduler.submit(request(name, frames))
    for now in range(3):
        plan = scheduler.step(float(now))
        assert ids(plan.running) == ["a", "b"]
        carry_out(scheduler, plan)
    second = scheduler.step(3.0)
    assert ids(second.finished) == ["a"]
    assert ids(second.admitted) == ["c"]
    assert ids(second.running) == ["b", "c"]


def test_a_request_that_can_never_fit_is_refused_at_once_with_both_sizes(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    window = Window(recent_frames=1000)
    needed = cache.demand_nbytes(cache.demand(window, 1000))
    answer = scheduler.submit(StreamRequest("huge", "t", 1000, window))
    assert answer.reason is Reason.TOO_LARGE
    assert f"needs {needed} bytes" in answer.text
    assert f"{cache.budget.pool} bytes" in answer.text
    assert scheduler.state("huge") is StreamState.FAILED
    assert scheduler.submit(request("huge")).reason is Reason.QUEUED, "a smaller request may take its name at once"
    scheduler.submit(StreamRequest("vast", "t", 1000, window))
    plan = scheduler.step(0.0)
    assert ids(plan.rejected) == ["vast"]
    assert ids(plan.admitted) == ["huge"]
    assert plan.finished == ()


def test_branches_are_admitted_together_or_not_at_all(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    assert scheduler.submit(request("three", branches=3)).reason is Reason.TOO_LARGE
    assert scheduler.submit(request("two", branches=2)).reason is Reason.QUEUED
    scheduler.submit(request("one"))
    plan = scheduler.step(0.0)
    assert ids(plan.admitted) == ["two"]
    assert ids(plan.waiting) == ["one"]


def test_a_failed_stream_leaves_and_the_others_go_on(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    for name in "abc":
        scheduler.submit(request(name))
    plan = scheduler.step(0.0)
    scheduler.update(plan, Outcome(committed={"b": 3}, failed={"a": "NaN at layer 3"}))
    assert scheduler.state("a") is StreamState.FAILED
    assert scheduler.why("a") == Decision("a", Reason.FAILED, "failed at frame 0 of 12: NaN at layer 3")
    plan = scheduler.step(1.0)
    assert ids(plan.finished) == ["a"]
    assert ids(plan.running) == ["b", "c"]


def test_a_chunk_that_committed_nothing_is_planned_again(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.submit(request("a"))
    scheduler.update(scheduler.step(0.0), Outcome())
    plan = scheduler.step(1.0)
    assert plan.running[0].frames == range(3)
    scheduler.update(plan, Outcome(committed={"a": 2}))
    assert scheduler.step(2.0).running[0].frames == range(2, 5)


def test_cancelling_a_waiting_stream_ends_it_silently_and_a_running_one_with_the_next_plan(
    cache: KVCacheManager,
) -> None:
    scheduler = Scheduler(cache)
    for name in "abc":
        scheduler.submit(request(name))
    plan = scheduler.step(0.0)
    assert scheduler.cancel("c").reason is Reason.CANCELLED
    assert scheduler.cancel("a").reason is Reason.CANCELLED
    carry_out(scheduler, plan)
    assert scheduler.state("a") is StreamState.CANCELLED, "what is reported of a cancelled stream comes too late"
    assert scheduler.committed("a") == 0
    assert scheduler.cancel("a").text == "cancelled at frame 0 of 12"
    plan = scheduler.step(1.0)
    assert ids(plan.finished) == ["a"]
    assert ids(plan.running) == ["b"]
    assert ids(plan.waiting) == []


def test_a_name_is_free_again_once_its_end_was_announced(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.submit(request("a", frames=3))
    with pytest.raises(ArgumentError, match="id: expected one that is not in use"):
        scheduler.submit(request("a"))
    carry_out(scheduler, scheduler.step(0.0))
    with pytest.raises(ArgumentError, match="finished"):
        scheduler.submit(request("a"))
    carry_out(scheduler, scheduler.step(1.0))
    assert scheduler.submit(request("a")).reason is Reason.QUEUED


def test_every_unfinished_stream_is_running_or_waiting_with_a_reason(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    names = [f"s{i}" for i in range(9)]
    for name in names:
        scheduler.submit(request(name, frames=4))
    now = 0.0
    while scheduler.busy:
        plan = scheduler.step(now)
        open_now = {name for name in names if not scheduler.state(name).is_final}
        assert set(ids(plan.running)) | set(ids(plan.waiting)) == open_now
        assert all(decision.text for decision in (*plan.running, *plan.waiting, *plan.admitted, *plan.finished))
        carry_out(scheduler, plan)
        now += 1.0
    assert {scheduler.state(name) for name in names} == {StreamState.FINISHED}


class Ordered:
    """Answers whatever it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.view: SystemView | None = None

    def rank(self, view: SystemView) -> Sequence[str]:
        self.view = view
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        raise AssertionError(f"nobody can be parked, asked at {view.now} for {stream}")

    def seen(self) -> list[tuple[str, int, float]]:
        assert self.view is not None
        return [(stream.id, stream.arrival, self.view.waited(stream)) for stream in self.view.waiting]


IN_PLACE = SchedulerConfig(policy_seconds=None)


def test_a_policy_decides_the_order_and_sees_snapshots(cache: KVCacheManager) -> None:
    policy = Ordered(["c", "a", "b"])
    scheduler = Scheduler(cache, policy, IN_PLACE)
    for name in "abc":
        scheduler.submit(request(name, priority=1, deadline_fps=12.0))
    plan = scheduler.step(5.0)
    assert ids(plan.admitted) == ["c", "a"]
    assert plan.policy_fault == ""
    assert policy.seen() == [("a", 1, 0.0), ("b", 2, 0.0), ("c", 3, 0.0)]
    policy.answer = ["b"]
    carry_out(scheduler, plan)
    scheduler.step(7.5)
    assert policy.seen() == [("b", 2, 2.5)]
    assert policy.view is not None
    assert policy.view.waiting[0].nbytes == cache.demand_nbytes(cache.demand(WINDOW, 12))


@pytest.mark.parametrize(
    "answer",
    [["a"], ["a", "b", "b"], ["a", "b", "x"], [], None, ["a", "b", []], ValueError("broken"), ["c", "b", "a", "a"]],
)
def test_a_wrong_answer_of_a_policy_is_replaced_by_order_of_arrival_and_reported(
    cache: KVCacheManager, answer: object
) -> None:
    scheduler = Scheduler(cache, Ordered(answer), IN_PLACE)
    for name in "abc":
        scheduler.submit(request(name))
    plan = scheduler.step(0.0)
    assert ids(plan.admitted) == ["a", "b"]
    assert plan.policy_fault.startswith("Ordered.rank")


def test_outcomes_that_do_not_fit_the_plan_are_errors_and_change_nothing(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    for name in "ab":
        scheduler.submit(request(name))
    plan = scheduler.step(0.0)
    for outcome, message in (
        (Outcome(committed={"x": 1}), r"outcome.committed: .*\['x'\]"),
        (Outcome(failed={"x": "?"}), r"outcome.failed: .*\['x'\]"),
        (Outcome(committed={"a": 4}), r"outcome.committed\['a'\]: expected 0 to 3 frames, got 4"),
        (Outcome(committed={"a": -1}), "expected 0 to 3"),
        (Outcome(committed={"b": True}), "expected 0 to 3"),
        (Outcome(committed={"b": 1.0}), "expected 0 to 3"),  # type: ignore[dict-item]
    ):
        with pytest.raises(ArgumentError, match=message):
            scheduler.update(plan, outcome)
        assert [scheduler.committed(name) for name in "ab"] == [0, 0]
    carry_out(scheduler, plan)
    with pytest.raises(StateError, match="latest plan"):
        carry_out(scheduler, plan)


def test_a_plan_must_be_reported_before_the_next_step(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.step(0.0)
    scheduler.step(0.0)
    scheduler.submit(request("a"))
    plan = scheduler.step(0.0)
    with pytest.raises(StateError, match="step 3"):
        scheduler.step(1.0)
    scheduler.update(plan, Outcome())
    scheduler.step(1.0)


def test_a_clock_that_runs_backwards_is_an_error(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.step(3.0)
    for now in (2.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="now"):
            scheduler.step(now)


def test_unknown_streams_are_errors(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    for ask in (scheduler.why, scheduler.state, scheduler.committed, scheduler.cancel):
        with pytest.raises(ArgumentError, match="expected a submitted stream, got 'x'"):
            ask("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "id: expected"),
        ({"tenant": 3}, "tenant: expected"),
        ({"frames": 0}, "frames: expected an integer >= 1, got 0"),
        ({"frames": 2.0}, "frames"),
        ({"frames": True}, "frames"),
        ({"branches": 0}, "branches"),
        ({"deadline_fps": 0.0}, "deadline_fps"),
        ({"deadline_fps": float("nan")}, "deadline_fps"),
    ],
)
def test_bad_requests_name_the_argument(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"id": "a", "tenant": "t", "frames": 3, "window": WINDOW, **changes}
    with pytest.raises(ArgumentError, match=message):
        StreamRequest(**fields)  # type: ignore[arg-type]


def test_a_window_that_cannot_hold_a_span_is_an_error_at_submission() -> None:
    scheduler = Scheduler(make_cache())
    with pytest.raises(ConfigError, match="span_frames"):
        scheduler.submit(StreamRequest("a", "t", 8, Window(recent_frames=1)))
    assert not scheduler.busy


def test_only_the_latest_finished_streams_are_remembered(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.submit(request("long", frames=12))
    for i in range(1030):
        scheduler.submit(request(f"s{i}", frames=1))
        scheduler.cancel(f"s{i}")
    scheduler.update(scheduler.step(0.0), Outcome(failed={"long": "gone"}))
    scheduler.step(1.0)
    assert scheduler.why("long").reason is Reason.FAILED
    with pytest.raises(ArgumentError):
        scheduler.why("s0")
    assert scheduler.why("s1029").reason is Reason.CANCELLED


@pytest.mark.parametrize("seed", range(3))
def test_admitted_streams_never_run_out_of_memory_and_all_finish(seed: int) -> None:
    """Random requests on a pool for about two of them: every begin_chunk of every plan must succeed."""
    rng = random.Random(seed)
    cache = make_cache(pool=600 << 10)
    scheduler = Scheduler(cache)
    windows = [Window(sink_frames=rng.randint(0, 2), recent_frames=rng.randint(4, 9)) for _ in range(3)]
    todo = [StreamRequest(f"s{i}", f"t{i % 2}", rng.randint(1, 20), rng.choice(windows)) for i in range(8)]
    accepted = {r.id for r in todo if scheduler.submit(r).reason is Reason.QUEUED}
    requests = {r.id: r for r in todo}
    streams: dict[str, Stream] = {}
    steps, waits = 0, 0
    while scheduler.busy:
        plan = scheduler.step(float(steps))
        for decision in plan.finished:
            streams.pop(decision.stream_id).close()
        for decision in plan.admitted:
            wanted = requests[decision.stream_id]
            streams[wanted.id] = cache.open(wanted.id, tenant=wanted.tenant, window=wanted.window)
        for decision in rng.sample(plan.running, len(plan.running)):
            grow(streams[decision.stream_id], len(decision.frames or ()))
        carry_out(scheduler, plan)
        steps += 1
        waits += len(plan.waiting)
    assert len(accepted) >= 6
    assert waits > 0, "the pool was meant to be scarce"
    assert {name for name in requests if scheduler.state(name) is StreamState.FINISHED} == accepted
    assert cache.stats().used_nbytes == 0
    cache.check_integrity()
