"""What each policy answers, and that no answer, late, wrong or missing, gets past the guard."""

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from types import MappingProxyType
from typing import Any

import pytest
from tiny import WINDOW, make_cache

from qvg_paged import StateError
from qvg_paged.scheduler import (
    FCFS,
    EarliestDeadline,
    FairShare,
    Policy,
    Priority,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    StreamState,
    StreamView,
    SystemView,
    TenantView,
)
from qvg_paged.scheduler.guard import InPlace, PolicyGuard, Recorded, Worker


def stream(name: str, arrival: int, state: StreamState = StreamState.QUEUED, **changes: Any) -> StreamView:
    fields: dict[str, Any] = {
        "nbytes": 1, "worst_nbytes": 2, "committed": 0, "since": 0.0, "first_chunk": None, "parks": 0, "priority": 0,
        "deadline_fps": None, **changes,
    }  # fmt: skip
    request = StreamRequest(name, fields.pop("tenant", "t"), 12, WINDOW)
    return StreamView(request=request, state=state, arrival=arrival, **fields)


def running(name: str, arrival: int, **changes: Any) -> StreamView:
    return stream(name, arrival, StreamState.RUNNING, **changes)


def view(*streams: StreamView, now: float = 10.0, pinned: str = "", **virtual_times: float) -> SystemView:
    tenants = {name: TenantView(1.0, 0.0, value, 0, 0) for name, value in {"t": 0.0, **virtual_times}.items()}
    run = tuple(s for s in streams if s.state is StreamState.RUNNING)
    lines: dict[str, tuple[str, ...]] = {}
    for s in streams:
        if s.state is not StreamState.RUNNING:
            lines[s.tenant] = (*lines.get(s.tenant, ()), s.id)
    return SystemView(
        now=now,
        seed=0,
        pool_nbytes=100,
        waiting=tuple(s for s in streams if s.state is not StreamState.RUNNING),
        running=run,
        lines=MappingProxyType(lines),
        parkable=frozenset(s.id for s in run if s.id not in pinned),
        tenants=MappingProxyType(tenants),
        dearest_chunk=1.0,
    )


def test_first_come_first_served_keeps_the_order_of_arrival_and_gives_nobody_up_by_choice() -> None:
    moment = view(stream("a", 1), stream("b", 2), running("c", 3), running("d", 4), running("e", 5), pinned="d")
    assert FCFS().rank(moment) == ["a", "b"]
    assert FCFS().park(moment, moment.waiting[0]) == []
    assert FCFS().park(moment, None) == ["e", "c"]


def test_priority_goes_before_arrival_and_waiting_raises_it() -> None:
    policy = Priority(aging_seconds=10.0)
    moment = view(
        stream("old", 1, since=0.0), stream("new", 2, since=10.0), stream("urgent", 3, since=10.0, priority=3),
        running("low", 4, priority=-1), running("same", 5), now=20.0,
    )  # fmt: skip
    assert policy.rank(moment) == ["urgent", "old", "new"]
    later = view(*(moment.waiting), now=60.0)
    assert policy.rank(later) == ["urgent", "old", "new"]
    aged = view(stream("old", 1, since=0.0), stream("urgent", 2, since=40.0, priority=3), now=40.0)
    assert policy.rank(aged) == ["old", "urgent"], "four steps of waiting outrank three of priority"
    assert policy.park(moment, moment.waiting[0]) == ["low"]
    assert policy.park(moment, None) == ["low", "same"]


def test_fair_share_takes_turns_by_virtual_time_and_makes_way_only_beyond_its_quantum() -> None:
    policy = FairShare(quantum=2.0)
    moment = view(
        stream("a1", 1, tenant="a"), stream("a2", 2, tenant="a"),
        stream("b1", 3, tenant="b"), stream("c1", 4, tenant="c"),
        running("ahead", 5, tenant="c"), running("further", 6, tenant="d"), running("even", 7, tenant="b"),
        a=0.0, b=0.5, c=2.5, d=4.0,
    )  # fmt: skip
    assert policy.rank(moment) == ["a1", "a2", "b1", "c1"], "b and c run one each already"
    assert policy.park(moment, moment.waiting[0]) == ["further", "ahead"]
    assert policy.park(moment, moment.waiting[2]) == ["further"], "after the next chunk d is at 5, c at 3.5, b at 1.5"
    assert policy.park(moment, None) == ["further", "ahead", "even"]
    edge = view(*moment.waiting, *moment.running, a=0.0, b=0.5, c=2.5, d=3.5)
    assert policy.park(edge, edge.waiting[2]) == [], "ahead by one chunk and the quantum, no more"
    more = view(*moment.waiting, *moment.running, running("second", 8, tenant="d"), a=0.0, b=0.5, c=2.5, d=2.6)
    assert policy.park(more, more.waiting[2]) == ["second", "further"], "two that run count as two chunks"


def test_the_earliest_deadline_is_that_of_the_viewer_who_runs_out_first() -> None:
    policy = EarliestDeadline(startup=2.0, patience=60.0, margin=4.0)
    behind = stream("behind", 1, StreamState.PARKED, first_chunk=0.0, committed=4, deadline_fps=1.0)
    fresh = stream("fresh", 2, since=9.0, deadline_fps=1.0)
    unseen = stream("unseen", 3, since=None)
    rich = running("rich", 4, first_chunk=0.0, committed=40, deadline_fps=1.0)
    poor = running("poor", 5, first_chunk=0.0, committed=12, deadline_fps=1.0)
    free = running("free", 6)
    moment = view(behind, fresh, unseen, rich, poor, free)
    assert moment.slack(behind, 2.0) == -6.0
    assert moment.slack(fresh, 2.0) == 1.0
    assert moment.slack(free, 2.0) == inf
    assert policy.rank(moment) == ["behind", "fresh", "unseen"]
    assert policy.park(moment, behind) == ["free", "rich"]
    assert policy.park(moment, None) == ["free", "rich", "poor"]
    patient = view(stream("patient", 7, since=-50.0), rich)
    assert policy.park(patient, patient.waiting[0]) == ["rich"], "due now, and rich has thirty seconds in hand"
    waited = view(fresh, stream("patient", 7, since=-60.0))
    assert policy.rank(waited) == ["patient", "fresh"], "a stream without a viewer is due after its patience"


def test_snapshots_cannot_be_written_to() -> None:
    moment = view(stream("a", 1))
    with pytest.raises(AttributeError):
        moment.waiting[0].request.tenant = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        moment.tenants["t"] = moment.tenants["t"]  # type: ignore[index]


def test_a_policy_may_ask_what_would_be_at_another_time() -> None:
    scheduler = Scheduler(make_cache())
    scheduler.submit(StreamRequest("a", "t", 12, WINDOW))
    moment = scheduler.snapshot()
    later = replace(moment, now=moment.now + 5.0)
    assert later.now == moment.now + 5.0
    assert [stream.id for stream in later.waiting] == ["a"]


class Scripted(FCFS):
    """Does what a function says."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def rank(self, view: SystemView) -> Sequence[str]:
        return self.answer(view)  # type: ignore[no-any-return]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        assert stream is None
        return self.answer(view)  # type: ignore[no-any-return]


MOMENT = view(stream("a", 1), stream("b", 2), running("c", 3), running("d", 4), pinned="d")


def endless() -> Any:
    while True:
        yield "a"


class MuteError(Exception):
    """Cannot even say what is wrong."""

    def __str__(self) -> str:
        raise ValueError("no text")


def throw(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda _: ["a"], "expected each of the 2 waiting ids once, got 1"),
        (lambda _: ["a", "a"], "named a stream twice"),
        (lambda _: ["a", "x"], "named a stream that is not one of the 2"),
        (lambda _: ["a", None], "something that is not an id"),
        (lambda _: ["a", []], "something that is not an id"),
        (lambda _: endless(), "named a stream twice"),
        (lambda _: None, "raised TypeError"),
        (lambda _: throw(RecursionError("deep")), "raised RecursionError: deep"),
        (lambda _: throw(MuteError()), "raised MuteError: and its message raised, too"),
    ],
)
def test_a_wrong_ranking_is_replaced_reported_and_counted(answer: Any, fault: str) -> None:
    heard: list[tuple[str, Any, str]] = []
    guard = PolicyGuard(Scripted(answer), InPlace(), 5, lambda *what: heard.append(what))
    guard.begin()
    assert guard.rank(MOMENT) == ["a", "b"]
    assert fault in guard.fault
    assert guard.faults == 1
    assert heard == [("rank", None, guard.fault)]
    guard.begin()
    assert guard.fault == ""


@pytest.mark.parametrize("answer", [["d"], ["a"], ["c", "c"]])
def test_a_policy_cannot_give_up_who_is_pinned_or_waits(answer: list[str]) -> None:
    guard = PolicyGuard(Scripted(lambda _: answer), InPlace(), 5)
    assert guard.park(MOMENT, None) == ["c"]
    assert guard.faults == 1
    good = PolicyGuard(Scripted(lambda _: []), InPlace(), 5)
    assert good.park(MOMENT, None) == []
    assert good.faults == 0


def test_a_policy_with_too_many_faults_is_not_asked_again() -> None:
    asked: list[SystemView] = []
    policy = Scripted(lambda view: asked.append(view) or ["x"])
    guard = PolicyGuard(policy, InPlace(), 2)
    for _ in range(4):
        guard.begin()
        assert guard.rank(MOMENT) == ["a", "b"]
    assert guard.disabled
    assert len(asked) == 2


def test_a_worker_answers_in_time_and_a_late_answer_is_dropped() -> None:
    release = threading.Event()
    replies: list[Any] = [["b", "a"], None, ["b", "a"]]

    def answer(_: SystemView) -> Any:
        reply = replies.pop(0)
        if reply is None:
            release.wait(30)
            return ["a", "b"]
        return reply

    worker = Worker(10.0)
    guard = PolicyGuard(Scripted(answer), worker, 9)
    guard.begin()
    assert guard.rank(MOMENT) == ["b", "a"]
    worker.seconds = 0.05
    guard.begin()
    guard.rank(MOMENT)
    assert "took more than the 50 ms" in guard.fault
    guard.begin()
    guard.rank(MOMENT)
    assert "still busy" in guard.fault
    release.set()
    worker.seconds = 10.0
    deadline = time.monotonic() + 30
    while True:
        guard.begin()
        if guard.rank(MOMENT) == ["b", "a"]:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert guard.fault == "", "the late answer was not taken for this one"


def test_the_time_budget_is_that_of_a_step_and_not_of_a_question() -> None:
    worker = Worker(0.001)
    worker.begin()
    worker._left = 0.0
    assert worker.ask(lambda: ["a"], 1) == (None, "had used up the 1 ms of the step")


def test_a_policy_cannot_end_the_worker_and_the_worker_ends_with_its_owner() -> None:
    worker = Worker(10.0)
    worker.begin()
    assert worker.ask(lambda: throw(SystemExit(1)), 1) == (None, "raised SystemExit: 1")
    assert worker.ask(lambda: ["a"], 1) == (["a"], "")
    threads = [thread for thread in threading.enumerate() if thread.name == "policy"]
    assert threads
    gone = weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_recorded_answers_are_repeated_in_order_and_then_run_out() -> None:
    recorded = Recorded([(["b", "a"], ""), (None, "was late")])
    guard = PolicyGuard(FCFS(), recorded, 9)
    guard.begin()
    assert guard.rank(MOMENT) == ["b", "a"]
    guard.rank(MOMENT)
    assert guard.fault == "FCFS.rank was late"
    guard.begin()
    guard.rank(MOMENT)
    assert "no answer in the log" in guard.fault


def test_the_policies_of_the_package_are_policies() -> None:
    policies: list[Policy] = [FCFS(), Priority(), FairShare(), EarliestDeadline()]
    for policy in policies:
        assert sorted(policy.rank(MOMENT)) == ["a", "b"]
        assert set(policy.park(MOMENT, None)) <= MOMENT.parkable


@pytest.mark.parametrize("budget", [None, 10.0])
def test_a_policy_that_calls_the_scheduler_gets_an_error_and_changes_nothing(budget: float | None) -> None:
    caught: list[str] = []

    def meddle(view: SystemView) -> Any:
        for call in (lambda: scheduler.cancel("a"), lambda: scheduler.step(99.0), scheduler.shutdown):
            try:
                call()
            except StateError as error:
                caught.append(str(error))
        return [s.id for s in view.waiting]

    cache = make_cache(pool=30 * (16 << 10), format="dense")
    scheduler = Scheduler(cache, Scripted(meddle), SchedulerConfig(policy_seconds=budget))
    scheduler.submit(StreamRequest("a", "t", 3, WINDOW))
    plan = scheduler.step(0.0)
    assert [decision.stream_id for decision in plan.admitted] == ["a"]
    assert caught == ["scheduler: expected no call from inside a policy; answer from what the view shows"] * 3
    assert scheduler.state("a") is StreamState.RUNNING
