"""Who waits, who makes room and who is parked, one rule at a time, over books that can be reckoned by hand.

On a `Shelf` a frame is a page of one byte: a stream of n frames holds at most n bytes, and its next chunk needs the
frames it has and those of the chunk.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from tiny import WINDOW

from qvg_paged import ArgumentError, Demand, QualityFloor, Rung, Window
from qvg_paged.ladder import Relief, Squeeze
from qvg_paged.scheduler import (
    FCFS,
    Decision,
    DecisionLog,
    FairShare,
    Outcome,
    ParkingBackend,
    Plan,
    Policy,
    Priority,
    Reason,
    Reservation,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    StreamState,
    StreamView,
    SystemView,
    TenantSpec,
)
from qvg_paged.scheduler.core import decide
from qvg_paged.scheduler.guard import InPlace, PolicyGuard, Recorded
from qvg_paged.scheduler.inputs import Cancel, Drain, LimitPool, SetTenant, Shutdown, Submit
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.state import State


class Board:
    """A pool of so many pages that cannot park."""

    frames_per_chunk = 1

    def __init__(self, pool: int) -> None:
        self.pool_nbytes = pool

    def demand(self, window: Window, frames: int | None = None) -> Demand:
        assert window
        return Demand(frames or 0)

    def demand_nbytes(self, demand: Demand) -> int:
        return demand.dense_pages

    def can_host(self, demands: Sequence[Demand], nbytes: int | None = None) -> bool:
        return sum(self.demand_nbytes(demand) for demand in demands) <= (self.pool_nbytes if nbytes is None else nbytes)


class Shelf(Board):
    """One that can."""

    def __init__(self, pool: int, host: int = 1000) -> None:
        super().__init__(pool)
        self.host_nbytes = host

    def chunk_demand(self, window: Window, committed: int, frames: int) -> Demand:
        assert window
        return Demand(committed + frames)

    def park_seconds(self, nbytes: int) -> float:
        return float(nbytes)

    def resume_seconds(self, nbytes: int) -> float:
        return float(nbytes)


class Ladder(Shelf):
    """One on which a stream can be squeezed once, to half."""

    def squeezed_demand(self, window: Window, committed: int, frames: int, squeeze: Squeeze) -> Demand:
        assert window
        return Demand((committed + frames + 1) // 2 if squeeze.rung is Rung.TAIL else committed + frames)

    def lowered(
        self, window: Window, frames: int, floor: QualityFloor, now: Squeeze, committed: int, relief: Relief
    ) -> Squeeze | None:
        assert window
        assert committed <= frames
        may = relief is Relief.TAIL and now.rung is Rung.NONE and floor.rung is not Rung.NONE
        return Squeeze(Rung.TAIL) if may else None


class Desk:
    """A scheduler with an engine that always succeeds."""

    def __init__(self, cache: Board, policy: Policy | None = None, **config: Any) -> None:
        self.lines: list[str] = []
        settings = SchedulerConfig(**{"headroom": 0.0, "policy_seconds": None, **config})
        self.scheduler = Scheduler(cache, policy, settings, log=DecisionLog(self.lines.append))
        self.now = 0.0
        self.plan = Plan(step=0)

    def submit(self, name: str, frames: int, tenant: str = "t", **changes: Any) -> Decision:
        return self.scheduler.submit(StreamRequest(name, tenant, frames, WINDOW, **changes))

    def step(self, **failed: str) -> Plan:
        """One step; every running stream that does not fail commits its chunk."""
        self.now += 1.0
        self.plan = plan = self.scheduler.step(self.now)
        committed = {d.stream_id: len(d.frames or ()) for d in plan.running if d.stream_id not in failed}
        self.scheduler.update(plan, Outcome(committed, failed))
        return plan

    def steps(self, count: int) -> Plan:
        for _ in range(count):
            self.step()
        return self.plan

    def why(self, name: str) -> Reason:
        return self.scheduler.why(name).reason

    def running(self) -> list[str]:
        return names(self.plan.running)


def names(decisions: Sequence[Decision]) -> list[str]:
    return [decision.stream_id for decision in decisions]


class Gives(FCFS):
    """First come first served, and these make room whenever somebody asks."""

    def __init__(self, *victims: str) -> None:
        self.victims = victims

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        del stream
        return [name for name in self.victims if name in view.parkable]


def test_the_books_of_this_test_are_backends() -> None:
    assert isinstance(Shelf(1), ParkingBackend)
    assert not isinstance(Board(1), ParkingBackend)
    assert Scheduler(Shelf(1)).reservation is Reservation.NEXT_CHUNK
    assert Scheduler(Board(1)).reservation is Reservation.TO_COMPLETION
    config = SchedulerConfig(no_preemption=True)
    assert Scheduler(Shelf(1), config=config).reservation is Reservation.TO_COMPLETION


def test_streams_that_outgrow_the_pool_are_parked_the_latest_first_and_never_the_leader() -> None:
    desk = Desk(Shelf(7))
    for name in "abc":
        desk.submit(name, 6)
    assert names(desk.step().admitted) == ["a", "b", "c"]
    desk.step()
    plan = desk.step()
    assert plan.leader == "a"
    assert [(d.stream_id, d.reason) for d in plan.parked] == [("c", Reason.SQUEEZED)]
    assert plan.parked[0].text == "what runs needs more than 7 bytes of the pool"
    assert desk.running() == ["a", "b"]
    assert desk.scheduler.state("c") is StreamState.PARKED
    while desk.scheduler.busy:
        desk.step()
    assert {desk.why(name) for name in "abc"} == {Reason.COMPLETED}


def test_after_someone_was_parked_newcomers_hold_off_until_the_parked_are_back() -> None:
    desk = Desk(Shelf(7), hold_steps=3)
    for name in "abc":
        desk.submit(name, 6)
    desk.steps(3)
    desk.submit("new", 1)
    desk.submit("newer", 1)
    desk.step()
    assert [desk.why(name) for name in ("new", "newer")] == [Reason.HOLD_OFF] * 2
    assert desk.scheduler.why("new").text == "streams are parked for want of memory; they come first"
    desk.scheduler.cancel("a")
    desk.step()
    assert desk.scheduler.state("c") is StreamState.RUNNING


def test_a_floor_is_a_claim_even_while_newcomers_hold_off() -> None:
    desk = Desk(Shelf(7), hold_steps=9)
    desk.scheduler.set_tenant("vip", TenantSpec(floor_nbytes=2))
    for name in "abc":
        desk.submit(name, 6)
    desk.steps(3)
    desk.submit("v", 1, "vip")
    desk.submit("new", 1)
    plan = desk.step()
    assert names(plan.admitted) == ["v"]
    assert desk.scheduler.state("new") is StreamState.QUEUED


def test_a_quota_holds_back_its_tenant_and_nobody_else() -> None:
    desk = Desk(Shelf(20))
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=6))
    for name in ("a", "b", "c"):
        desk.submit(name, 6)
    desk.step()
    assert desk.running() == ["a", "b", "c"], "for now they need little"
    desk.step()
    plan = desk.step()
    assert [d.text for d in plan.parked] == ["tenant 't' may hold 6 bytes of the pool"]
    assert plan.parked[0].reason is Reason.SQUEEZED
    desk.submit("d", 6)
    desk.submit("e", 6)
    desk.submit("other", 6, "u")
    plan = desk.step()
    assert "other" in names(plan.admitted)
    waiting = {decision.stream_id: decision for decision in plan.waiting}
    assert {name: waiting[name].reason for name in "de"} == {"d": Reason.QUOTA, "e": Reason.QUOTA}
    assert waiting["e"].text == "a stream of its tenant that is before it in line waits for the quota"


def test_a_lowered_quota_takes_memory_back_at_the_next_step_until_it_holds() -> None:
    desk = Desk(Shelf(100))
    for name in "abcd":
        desk.submit(name, 8)
    desk.submit("other", 8, "u")
    desk.steps(3)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=9))
    plan = desk.step()
    assert names(plan.parked) == ["d", "c"]
    assert desk.running() == ["a", "b", "other"]


def test_the_leader_keeps_what_it_has_even_above_its_quota_until_it_has_finished_a_chunk() -> None:
    desk = Desk(Shelf(100))
    desk.submit("a", 50)
    desk.steps(3)
    plan = desk.scheduler.step(4.0)
    desk.scheduler.update(plan, Outcome())
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=2))
    plan = desk.scheduler.step(5.0)
    assert (plan.leader, plan.parked) == ("a", ())
    desk.scheduler.update(plan, Outcome({"a": 1}))
    assert names(desk.scheduler.step(6.0).parked) == ["a"]


def test_a_smaller_pool_parks_streams_within_their_tenants_floors_last() -> None:
    desk = Desk(Shelf(30))
    desk.scheduler.set_tenant("vip", TenantSpec(floor_nbytes=6))
    desk.submit("a", 10)
    desk.submit("b", 10)
    desk.submit("v", 10, "vip")
    desk.steps(3)
    desk.scheduler.limit_pool(9)
    plan = desk.step()
    assert names(plan.parked) == ["b"], "the latest to arrive is within its tenant's floor"
    assert desk.running() == ["a", "v"]
    desk.scheduler.limit_pool(None)
    assert "b" in names(desk.step().resumed)


def test_over_a_cache_that_cannot_park_floors_stay_free_unless_nothing_runs() -> None:
    desk = Desk(Board(10))
    desk.scheduler.set_tenant("vip", TenantSpec(floor_nbytes=6))
    desk.submit("large", 8)
    desk.submit("small", 2)
    plan = desk.step()
    assert names(plan.admitted) == ["large"], "nothing runs, so it would starve otherwise"
    desk.steps(8)
    desk.submit("first", 4)
    desk.step()
    desk.submit("second", 2)
    plan = desk.step()
    assert plan.waiting[0].reason is Reason.FLOOR
    assert plan.waiting[0].text == "needs 2 bytes; what is free is promised to other tenants' floors"
    desk.submit("v", 6, "vip")
    assert "v" in names(desk.step().admitted)


def test_a_tenant_claims_its_floor_back_from_others_whatever_the_policy_says() -> None:
    desk = Desk(Shelf(6))
    desk.scheduler.set_tenant("vip", TenantSpec(floor_nbytes=3))
    for name in "abc":
        desk.submit(name, 3)
    desk.step()
    desk.submit("v", 3, "vip")
    plan = desk.step()
    assert names(plan.admitted) == ["v"]
    assert names(plan.parked) == ["c"]
    assert plan.parked[0].reason is Reason.PARKED
    assert plan.parked[0].text == "made room for 'v', whose tenant has a floor"


def test_nobody_is_parked_for_another_tenant_below_the_floor_of_its_own() -> None:
    desk = Desk(Shelf(6), Gives("a", "b"))
    desk.scheduler.set_tenant("t", TenantSpec(floor_nbytes=6))
    desk.submit("a", 3)
    desk.submit("b", 3)
    desk.steps(2)
    desk.submit("u1", 3, "u")
    plan = desk.step()
    assert plan.parked == ()
    assert plan.waiting[0].reason is Reason.NO_MEMORY


def test_a_policy_parks_whom_it_names_but_only_after_a_chunk() -> None:
    desk = Desk(Shelf(4), Gives("b"), min_chunks=2)
    desk.submit("a", 4)
    desk.submit("b", 4)
    desk.submit("c", 4)
    desk.step()
    desk.scheduler.cancel("c")
    desk.submit("d", 1)
    plan = desk.step()
    assert plan.parked == ()
    assert plan.waiting[0].stream_id == "d"


def test_a_stream_that_was_parked_too_often_without_a_chunk_keeps_its_place() -> None:
    """Two slots; the policy gives up b whenever somebody asks, and b never commits."""
    desk = Desk(Shelf(100), Gives("b"), max_running=2, max_parks=2, min_chunks=1)
    desk.submit("a", 90)
    desk.submit("b", 90)
    desk.step()
    parks = 0
    for turn in range(12):
        desk.submit(f"n{turn}", 1)
        desk.now += 1.0
        plan = desk.scheduler.step(desk.now)
        parks += names(plan.parked).count("b")
        committed = {d.stream_id: 1 for d in plan.running if d.stream_id != "b"}
        desk.scheduler.update(plan, Outcome(committed))
    assert parks <= 2
    assert desk.scheduler.committed("b") <= 2


def test_squeezed_too_often_a_stream_cannot_be_squeezed_again_before_it_finishes_a_chunk() -> None:
    desk = Desk(Shelf(20), max_parks=1)
    desk.submit("a", 18)
    desk.submit("b", 18)
    desk.steps(2)
    desk.scheduler.limit_pool(3)
    assert names(desk.step().parked) == ["b"]
    desk.scheduler.limit_pool(None)
    plan = desk.scheduler.step(desk.now + 1)
    assert names(plan.resumed) == ["b"]
    desk.scheduler.update(plan, Outcome({"a": 1}))
    desk.scheduler.limit_pool(3)
    plan = desk.scheduler.step(desk.now + 2)
    assert "b" not in names(plan.parked), "it has not finished a chunk since"
    desk.scheduler.update(plan, Outcome())


def test_a_newcomer_that_the_host_has_no_room_for_waits_and_lets_the_parked_pass() -> None:
    desk = Desk(Shelf(8, host=12))
    desk.submit("a", 6)
    desk.submit("b", 6)
    desk.steps(5)
    assert desk.scheduler.state("b") is StreamState.PARKED
    desk.submit("c", 6)
    desk.submit("d", 6)
    while desk.scheduler.state("b") is StreamState.PARKED:
        plan = desk.step()
    reasons = {decision.stream_id: decision.reason for decision in plan.waiting}
    assert set(reasons) <= {"c", "d"}
    while desk.scheduler.busy:
        desk.step()
    assert {desk.why(name) for name in "abcd"} == {Reason.COMPLETED}


def test_without_room_on_the_host_nobody_can_be_parked_so_worst_cases_are_promised() -> None:
    desk = Desk(Shelf(10, host=0))
    for name in "abc":
        desk.submit(name, 4)
    plan = desk.step()
    assert names(plan.admitted) == ["a", "b"]
    assert plan.waiting[0].reason is Reason.NO_MEMORY
    assert "at its worst" in plan.waiting[0].text


def test_one_that_may_never_be_parked_must_fit_beside_the_largest_that_may() -> None:
    desk = Desk(Shelf(10, host=8))
    desk.submit("a", 8)
    desk.step()
    desk.submit("b", 3)
    desk.submit("c", 1)
    plan = desk.step()
    assert [decision.reason for decision in plan.waiting] == [Reason.NO_HOST_MEMORY, Reason.BEHIND]
    assert plan.waiting[0].text == "may hold 3 bytes, for which the host has no room left"
    desk.scheduler.cancel("b")
    assert names(desk.step().admitted) == ["c"], "two bytes stay free for ever"


def test_parked_streams_pass_a_newcomer_before_them_that_waits_for_room_on_the_host() -> None:
    desk = Desk(Shelf(10, host=8), Priority(), hold_steps=0)
    desk.submit("a", 8)
    desk.steps(2)
    desk.scheduler.limit_pool(0)
    assert names(desk.step().parked) == ["a"]
    desk.scheduler.limit_pool(None)
    desk.submit("b", 3, priority=9)
    plan = desk.step()
    assert names(plan.resumed) == ["a"]
    assert [(decision.stream_id, decision.reason) for decision in plan.waiting] == [("b", Reason.NO_HOST_MEMORY)]


def test_streams_that_need_as_much_are_told_the_same_and_another_what_it_needs() -> None:
    desk = Desk(Board(10), overtakes=2)
    desk.submit("a", 6)
    for name, frames in (("b", 8), ("c", 8), ("d", 9)):
        desk.submit(name, frames)
    told = [decision.text.partition(" bytes of the pool")[0] for decision in desk.step().waiting]
    assert told == ["needs 8", "needs 8", "needs 9"]


@pytest.mark.parametrize("overtakes", [0, 2])
def test_only_so_many_streams_overtake_one_that_does_not_fit(overtakes: int) -> None:
    desk = Desk(Board(10), overtakes=overtakes)
    desk.submit("a", 6)
    desk.submit("large", 8)
    for name in ("s1", "s2", "s3"):
        desk.submit(name, 1)
    plan = desk.step()
    assert names(plan.admitted) == ["a", "s1", "s2"][: 1 + overtakes]
    assert plan.waiting[0].stream_id == "large"
    assert {decision.reason for decision in plan.waiting[1:]} == {Reason.BEHIND}
    if overtakes:
        desk.submit("s4", 1)
        assert names(desk.step().admitted) == [], "it was overtaken twice already"


def test_of_two_that_do_not_fit_the_first_in_line_is_the_one_that_counts_who_overtakes() -> None:
    desk = Desk(Board(10), overtakes=2)
    desk.submit("a", 6)
    for name, frames in (("large", 8), ("larger", 9), ("s1", 1)):
        desk.submit(name, frames)
    plan = desk.step()
    assert names(plan.admitted) == ["a", "s1"]
    assert [(d.stream_id, d.reason) for d in plan.waiting] == [
        ("large", Reason.NO_MEMORY), ("larger", Reason.NO_MEMORY),
    ]  # fmt: skip


def test_a_parked_stream_can_be_overtaken_too() -> None:
    desk = Desk(Shelf(8), overtakes=1, hold_steps=0)
    desk.submit("a", 7)
    desk.submit("b", 7)
    desk.steps(5)
    assert desk.scheduler.state("b") is StreamState.PARKED
    desk.submit("s1", 1)
    desk.submit("s2", 1)
    plan = desk.step()
    assert names(plan.admitted) == ["s1"]
    assert desk.why("s2") is Reason.BEHIND


def test_what_cannot_be_parked_is_not_squeezed_either_and_the_others_are() -> None:
    desk = Desk(Ladder(8, host=6))
    desk.submit("a", 6)
    desk.submit("b", 2)
    desk.step()
    desk.scheduler.update(desk.scheduler.step(2.0), Outcome({"a": 1}))
    desk.scheduler.limit_pool(4)
    plan = desk.scheduler.step(3.0)
    assert [(d.stream_id, d.reason) for d in plan.demoted] == [("a", Reason.DEMOTED)]
    assert plan.demoted[0].text == "needs 2 bytes of the pool for its next chunk instead of 3"
    assert (plan.parked, names(plan.running)) == ((), ["a", "b"])


def test_as_many_run_as_there_are_slots() -> None:
    desk = Desk(Shelf(100), max_running=1)
    desk.submit("a", 2)
    desk.submit("b", 2)
    plan = desk.step()
    assert plan.waiting[0].reason is Reason.NO_SLOT
    assert plan.waiting[0].text == "1 streams run, as many as may"


def test_a_parked_stream_that_fails_is_over_and_one_that_was_cancelled_stays_so() -> None:
    desk = Desk(Shelf(7))
    for name in "abc":
        desk.submit(name, 6)
    desk.steps(2)
    plan = desk.scheduler.step(9.0)
    assert names(plan.parked) == ["c"]
    desk.scheduler.update(plan, Outcome({"a": 1, "b": 1}, {"c": "the host is full"}))
    assert desk.scheduler.why("c").text == "failed at frame 2 of 6: the host is full"
    other = Desk(Shelf(7))
    for name in "abc":
        other.submit(name, 6)
    other.steps(2)
    plan = other.scheduler.step(9.0)
    other.scheduler.cancel("c")
    other.scheduler.update(plan, Outcome(failed={"c": "too late"}))
    assert other.why("c") is Reason.CANCELLED


def test_requests_beyond_a_quota_a_queue_or_the_number_of_tenants_are_refused_at_once() -> None:
    desk = Desk(Shelf(20), max_tenants=2, default_tenant=TenantSpec(ceiling_nbytes=10, max_queued=2))
    answer = desk.submit("big", 11)
    assert answer.reason is Reason.TOO_LARGE
    assert "its tenant 't' may hold 10 bytes; shorten the window or raise the tenant's ceiling" in answer.text
    assert [desk.submit(name, 1).reason for name in "abc"] == [Reason.QUEUED, Reason.QUEUED, Reason.QUEUE_FULL]
    assert desk.submit("u1", 1, "u").reason is Reason.QUEUED
    answer = desk.submit("v1", 1, "v")
    assert answer.reason is Reason.QUEUE_FULL
    assert answer.text == "refused: there are 2 tenants, as many as there may be"
    with pytest.raises(ArgumentError, match="tenant: expected at most 2 tenants, got one more, 'w'"):
        desk.scheduler.set_tenant("w", TenantSpec())
    desk.steps(3)
    assert desk.submit("v1", 1, "v").reason is Reason.QUEUED, "tenants without streams were forgotten"
    with pytest.raises(ArgumentError, match="configured or has streams, got 't'"):
        desk.scheduler.service("t")


def test_a_tenant_that_is_forgotten_before_it_is_charged_owes_nothing() -> None:
    desk = Desk(Shelf(20), max_tenants=1)
    desk.submit("a", 5)
    plan = desk.scheduler.step(1.0)
    desk.scheduler.cancel("a")
    assert desk.submit("u1", 1, "u").reason is Reason.QUEUED
    desk.scheduler.update(plan, Outcome())
    plan = desk.scheduler.step(2.0)
    assert names(plan.finished) == ["a"]
    assert names(plan.admitted) == ["u1"]


def test_floors_cannot_exceed_the_pool() -> None:
    desk = Desk(Shelf(10))
    desk.scheduler.set_tenant("a", TenantSpec(floor_nbytes=6))
    with pytest.raises(ArgumentError, match=r"floor_nbytes: expected at most 4 bytes, .* got 5"):
        desk.scheduler.set_tenant("b", TenantSpec(floor_nbytes=5))
    desk.scheduler.set_tenant("a", TenantSpec(floor_nbytes=5))
    desk.scheduler.set_tenant("b", TenantSpec(floor_nbytes=5))


def test_every_kind_of_input_is_a_line_of_the_log() -> None:
    desk = Desk(Shelf(10))
    desk.submit("a", 3)
    desk.scheduler.set_tenant("t", TenantSpec(weight=2.0))
    desk.scheduler.limit_pool(8)
    desk.step()
    desk.scheduler.cancel("a")
    desk.scheduler.drain()
    desk.scheduler.shutdown()
    told = [json.loads(line) for line in desk.lines]
    kinds = ["open", "submit", "tenant", "limit", "plan", "report", "cancel", "drain", "shutdown"]
    assert [record["kind"] for record in told] == kinds
    assert (told[2]["weight"], told[3]["nbytes"], told[5]["committed"]) == (2.0, 8, {"a": 1})


def test_the_step_is_a_pure_function_of_state_inputs_time_and_randomness() -> None:
    rules = Rules(SchedulerConfig(), Shelf(10))
    request = StreamRequest("a", "t", 3, WINDOW)
    events = [Submit(request), SetTenant("t", TenantSpec(weight=3.0)), LimitPool(9), Submit(replace(request, id="b")),
              Cancel("b"), Drain()]  # fmt: skip
    guard = PolicyGuard(FCFS(), InPlace(), 5)
    state = State()
    results = [decide(rules, state, events, 1.0, Random(7), guard) for _ in range(2)]
    assert results[0][1] == results[1][1]
    assert names(results[0][1].admitted) == ["a"]
    assert (state.step, state.queued, state.tenants, state.draining) == (0, {}, {}, False), "the state is as it was"
    after, plan = decide(rules, results[0][0], [Shutdown()], 2.0, Random(7), guard)
    assert names(plan.finished) == ["a"]
    assert not after.running
    with pytest.raises(ArgumentError, match="event: expected an input of a scheduler, got 'submit'"):
        decide(rules, state, ["submit"], 1.0, Random(7), guard)  # type: ignore[list-item]


def test_a_replay_repeats_the_answers_of_a_policy_that_is_not_asked_again() -> None:
    class Backwards(FCFS):
        def rank(self, view: SystemView) -> Sequence[str]:
            return [stream.id for stream in reversed(view.waiting)]

    def run(policy: Policy, runner: Any) -> tuple[list[str], str, list[str]]:
        lines: list[str] = []
        log = DecisionLog(lines.append)
        scheduler = Scheduler(Shelf(4), policy, SchedulerConfig(policy_seconds=None), log=log, runner=runner)
        for name in "abc":
            scheduler.submit(StreamRequest(name, "t", 3, WINDOW))
        plan = scheduler.step(1.0)
        return names(plan.admitted), log.digest, lines

    admitted, digest, lines = run(Backwards(), None)
    answers = [(record["answer"], record["fault"]) for record in map(json.loads, lines) if record["kind"] == "policy"]
    assert admitted[0] == "c"
    assert run(Backwards(), Recorded(answers))[:2] == (admitted, digest)


def test_answers_of_a_policy_of_the_package_are_not_logged_wherever_it_is_asked() -> None:
    kinds: list[list[str]] = []
    for runner in (None, InPlace()):
        lines: list[str] = []
        scheduler = Scheduler(Shelf(4), FairShare(), log=DecisionLog(lines.append), runner=runner)
        scheduler.submit(StreamRequest("a", "t", 3, WINDOW))
        assert names(scheduler.step(1.0).admitted) == ["a"]
        kinds.append([json.loads(line)["kind"] for line in lines])
    assert kinds == [["open", "submit", "plan"]] * 2


def test_a_wrong_policy_needs_no_log() -> None:
    class Wrong(FCFS):
        def rank(self, view: SystemView) -> Sequence[str]:
            return [view.waiting[0].id] * 2

    scheduler = Scheduler(Shelf(4), Wrong(), SchedulerConfig(policy_seconds=None))
    scheduler.submit(StreamRequest("a", "t", 3, WINDOW))
    plan = scheduler.step(1.0)
    assert names(plan.admitted) == ["a"]
    assert plan.policy_fault == "Wrong.rank named a stream twice"


def test_fair_share_over_books_is_fair() -> None:
    desk = Desk(Shelf(12), FairShare(quantum=1.0), pool_second_cost=0.0)
    for index in range(30):
        desk.submit(f"a{index}", 2, "a")
        desk.submit(f"b{index}", 2, "b")
    desk.steps(12)
    assert abs(desk.scheduler.service("a") - desk.scheduler.service("b")) <= 6
