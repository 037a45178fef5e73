"""To the byte and to the step: what is promised, charged, remembered and told, with numbers one can check by hand."""

import json
from collections.abc import Sequence
from types import MappingProxyType

import pytest
from test_policies import running, stream, view
from test_pressure import Desk, Gives, Ladder, Shelf, names
from tiny import WINDOW

from qvg_paged import ArgumentError, QualityFloor, Rung
from qvg_paged.scheduler import (
    FCFS,
    EarliestDeadline,
    FairShare,
    Outcome,
    Policy,
    Priority,
    Reason,
    Scheduler,
    StreamRequest,
    StreamState,
    StreamView,
    SystemView,
    TenantSpec,
    TenantView,
)
from qvg_paged.scheduler.guard import InPlace


def weighted(moment: SystemView, **weights: float) -> SystemView:
    """The same moment with tenants of other weights."""
    tenants = dict(moment.tenants)
    for name, weight in weights.items():
        old = tenants.get(name, TenantView(1.0, 0.0, 0.0, 0, 0))
        tenants[name] = TenantView(weight, old.service, old.virtual_time, old.nbytes, old.floor_nbytes)
    object.__setattr__(moment, "tenants", MappingProxyType(tenants))
    return moment


def test_turns_of_a_tenant_come_the_closer_the_more_it_weighs() -> None:
    moment = weighted(
        view(*(stream(f"a{n}", n, tenant="a") for n in (1, 2, 3)), *(stream(f"b{n}", n, tenant="b") for n in (4, 5))),
        a=4.0,
        b=1.0,
    )
    assert FairShare().rank(moment) == ["a1", "b4", "a2", "a3", "b5"], "a at 0, 1/4, 1/2, b at 0 and 1"


def test_what_a_tenant_has_running_counts_as_one_chunk_each_by_weight() -> None:
    streams = [stream("a", 1, tenant="a"), stream("b", 2, tenant="b"), running("r", 3, tenant="a")]
    assert FairShare().rank(view(*streams, a=0.0, b=1.5)) == ["a", "b"], "a has its turn at 1"
    assert FairShare().rank(view(*streams, a=0.0, b=0.9)) == ["b", "a"]
    assert FairShare().rank(weighted(view(*streams, a=0.0, b=0.9), a=2.0)) == ["a", "b"], "and at 1/2 with weight 2"


def test_how_far_ahead_is_too_far_depends_on_both_weights() -> None:
    moment = view(stream("w", 1, tenant="w"), running("r", 2, tenant="r"), w=0.0, r=0.9)
    assert FairShare(quantum=0.5).park(moment, moment.waiting[0]) == ["r"], "1.9 ahead, more than 1.5"
    heavy = weighted(view(*moment.waiting, *moment.running, w=0.0, r=0.2), r=4.0)
    assert FairShare(quantum=0.5).park(heavy, heavy.waiting[0]) == [], "0.45 ahead, less than 1.5 x (1 + 1/4) / 2"
    light = weighted(view(*moment.waiting, *moment.running, w=0.0, r=0.9), w=0.25)
    assert FairShare(quantum=0.5).park(light, light.waiting[0]) == [], "1.9 ahead, less than 1.5 x (4 + 1) / 2"
    mine = weighted(view(*moment.waiting, *moment.running, running("m", 3, tenant="w"), w=0.0, r=3.0), w=0.5)
    assert FairShare(quantum=0.5).park(mine, mine.waiting[0]) == [], "4 against 2: 2 ahead, less than 1.5 x 3 / 2"


def test_of_tenants_equally_far_ahead_the_latest_stream_goes_first() -> None:
    moment = view(
        stream("w", 1, tenant="w"), running("a", 2, tenant="a"), running("b", 3, tenant="b"), w=0.0, a=5.0, b=5.0
    )
    assert FairShare().park(moment, moment.waiting[0]) == ["b", "a"]


def test_slack_is_what_a_viewer_still_has_to_play() -> None:
    moment = view(now=10.0)
    playing = running("p", 1, first_chunk=7.0, committed=12, deadline_fps=2.0)
    assert moment.slack(playing, 1.0) == 3.0, "12 frames at 2 a second last 6 seconds from 7 on"
    waiting = stream("w", 2, since=9.5, deadline_fps=2.0)
    assert moment.slack(waiting, 1.0) == 0.5
    assert moment.waited(stream("unseen", 3, since=None)) == 0.0


def test_a_viewer_with_frames_in_hand_comes_after_one_who_has_run_out() -> None:
    policy = EarliestDeadline()
    rich = stream("rich", 1, StreamState.PARKED, first_chunk=0.0, committed=40, deadline_fps=2.0)
    poor = stream("poor", 2, StreamState.PARKED, first_chunk=0.0, committed=30, deadline_fps=2.0)
    assert policy.key(rich) == 20.0
    assert policy.rank(view(rich, poor)) == ["poor", "rich"]


def test_the_least_a_tenant_can_be_allowed_is_a_byte() -> None:
    assert TenantSpec(ceiling_nbytes=1).ceiling_nbytes == 1
    assert TenantSpec(floor_nbytes=5, ceiling_nbytes=5).ceiling_nbytes == 5
    for fields in ({"ceiling_nbytes": 0}, {"floor_nbytes": 5, "ceiling_nbytes": 4}):
        with pytest.raises(ArgumentError, match="ceiling_nbytes"):
            TenantSpec(**fields)  # type: ignore[arg-type]


def test_newcomers_leave_the_headroom_to_those_who_run_and_nobody_alone_does() -> None:
    desk = Desk(Shelf(10), headroom=0.2)
    desk.submit("alone", 10)
    desk.step()
    assert desk.running() == ["alone"], "a stream may have the whole pool to itself"
    desk = Desk(Shelf(10), headroom=0.2)
    for name in "abcdefghij":
        desk.submit(name, 2)
    desk.step()
    assert desk.running() == list("abcdefgh"), "the ninth would take what is left for the others' next chunks"
    assert desk.scheduler.why("i").text == (
        "needs 1 bytes of the pool for its next chunk; 8 of 10 bytes are promised to 8 running streams"
    )


def test_who_is_admitted_is_told_what_is_promised_with_it() -> None:
    desk = Desk(Shelf(10))
    desk.submit("a", 3)
    desk.submit("b", 3)
    plan = desk.step()
    assert [d.text for d in plan.admitted] == [
        "1 bytes for its next chunk fit: 1 of 10 bytes are promised to 1 streams",
        "1 bytes for its next chunk fit: 2 of 10 bytes are promised to 2 streams",
    ]
    assert [d.text for d in plan.running] == ["frames 0-0 of 3"] * 2


class Newest(FCFS):
    """The latest to arrive is next, and everybody who may makes room for it."""

    def rank(self, view: SystemView) -> Sequence[str]:
        return [other.id for other in reversed(view.waiting)]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        assert stream is None or stream.id not in view.parkable
        return [other.id for other in view.running if other.id in view.parkable]


@pytest.mark.parametrize(("share", "exchanged"), [(0.0, 1), (0.25, 2), (0.5, 3), (1.0, 6)])
def test_a_policy_exchanges_some_of_those_that_run_in_a_step_and_one_in_any_case(share: float, exchanged: int) -> None:
    desk = Desk(Shelf(1000), Newest(), max_running=6, exchange_share=share)
    for name in "abcdef":
        desk.submit(name, 40)
    desk.step()
    for name in "uvwxyz":
        desk.submit(name, 40)
    plan = desk.step()
    assert len(plan.parked) == len(plan.admitted) == exchanged, "of six, who have all finished a chunk"
    assert len(plan.running) == 6
    assert desk.why(names(plan.waiting)[0]) in (Reason.NO_SLOT, Reason.PARKED)


def test_claims_of_floors_are_not_counted_as_exchanges() -> None:
    desk = Desk(Shelf(1000), max_running=4, exchange_share=0.0)
    desk.scheduler.set_tenant("vip", TenantSpec(floor_nbytes=100))
    for name in "abcd":
        desk.submit(name, 40)
    desk.step()
    for name in "xyz":
        desk.submit(name, 3, tenant="vip")
    plan = desk.step()
    assert names(plan.admitted) == ["x", "y", "z"]
    assert len(plan.parked) == 3


class Looks(FCFS):
    """Notes whom it might park when it has to."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, frozenset[str], int]] = []

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        self.seen.append((stream is None, view.parkable, view.pool_nbytes))
        return []


def test_when_memory_is_short_even_those_who_have_just_come_in_may_be_parked() -> None:
    policy = Looks()
    desk = Desk(Shelf(9), policy, min_chunks=5)
    for name in "abc":
        desk.submit(name, 9)
    desk.steps(3)
    desk.scheduler.limit_pool(8)
    desk.step()
    assert policy.seen[-1] == (True, frozenset("abc"), 8), "though none has finished five chunks"
    asked = len(policy.seen)
    desk.submit("new", 9)
    desk.step()
    assert all(forced for forced, *_ in policy.seen[asked:]), "nobody may be asked to make way by choice"


def test_the_snapshot_is_what_a_policy_would_see_if_it_had_to_park() -> None:
    desk = Desk(Shelf(9))
    desk.submit("a", 4)
    desk.submit("b", 4, tenant="u")
    desk.step()
    desk.submit("c", 4)
    moment = desk.scheduler.snapshot()
    assert (moment.now, moment.pool_nbytes) == (1.0, 9)
    assert moment.parkable == frozenset("b"), "a leads"
    assert {name: tenant.nbytes for name, tenant in moment.tenants.items()} == {"t": 2, "u": 2}
    assert len(moment.tenants) == 2
    assert dict(moment.lines) == {"t": ("c",)}
    assert len(moment.lines) == 1
    assert [s.id for s in reversed(moment.waiting)] == ["c"]
    assert moment.waiting[0:1] == (moment.waiting[0],)
    assert "'t'" in repr(moment.tenants)
    assert "'c'" in repr(moment.lines)
    assert "'c'" in repr(moment.waiting)
    assert moment.waiting == tuple(moment.waiting)
    assert moment.waiting != moment.running
    assert moment.waiting != 1
    assert hash(moment.waiting) == hash(tuple(moment.waiting))
    desk.step()
    assert [s.committed for s in moment.running] == [1, 1], "what was seen then stays"


def test_a_stream_that_is_squeezed_gives_up_no_more_than_it_takes_to_hold() -> None:
    desk = Desk(Ladder(100))
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=40))
    for name in "abc":
        desk.submit(name, 20)
    desk.steps(12)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=33))
    plan = desk.step()
    assert names(plan.demoted) == ["c"], "39 bytes are promised; one stream at half gives back 6"
    assert plan.demoted[0].text == "needs 7 bytes of the pool for its next chunk instead of 13"
    assert not plan.parked


def test_it_takes_two_if_one_gives_a_byte_too_little() -> None:
    desk = Desk(Ladder(100))
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=40))
    for name in "abc":
        desk.submit(name, 20)
    desk.steps(12)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=32))
    plan = desk.step()
    assert sorted(names(plan.demoted)) == ["b", "c"]
    assert not plan.parked


def test_streams_with_a_floor_are_not_squeezed_and_newcomers_neither() -> None:
    desk = Desk(Ladder(100))
    desk.submit("fine", 20, quality=QualityFloor(rung=Rung.NONE))
    desk.submit("any", 20)
    desk.steps(10)
    desk.scheduler.limit_pool(17)
    plan = desk.step()
    assert names(plan.demoted) == ["any"], "11 and 6 bytes fit"
    assert desk.running() == ["fine", "any"]


def test_a_tenant_that_comes_back_starts_level_with_those_in_line() -> None:
    desk = Desk(Shelf(1000), FairShare(), max_running=1, pool_second_cost=0.0)
    desk.submit("early", 4, tenant="early")
    desk.steps(5)
    assert desk.scheduler.service("early") == 4.0
    for place in range(3):
        desk.submit(f"busy{place}", 40, tenant="busy")
    desk.steps(12)
    level = desk.scheduler.snapshot().tenants["busy"].virtual_time
    assert level > 4.0
    desk.submit("again", 8, tenant="early")
    desk.submit("waits", 8, tenant="early")
    desk.step()
    came = desk.scheduler.snapshot().tenants["early"].virtual_time
    assert came == pytest.approx(level + 1.0, abs=1.0), "idle time is no credit"


def test_service_is_charged_for_chunks_branches_and_memory_over_time() -> None:
    desk = Desk(Shelf(10), chunk_cost=2.0, pool_second_cost=5.0)
    desk.submit("a", 3, tenant="a")
    desk.submit("b", 3, tenant="b", branches=2)
    desk.step()
    desk.step()
    assert desk.scheduler.service("a") == 2.0 + 5.0 * 1 / 10, "a chunk, and one byte of ten for a second"
    assert desk.scheduler.service("b") == 4.0 + 5.0 * 2 / 10
    assert desk.scheduler.snapshot().dearest_chunk == 5.0


def test_a_long_pause_is_not_charged_beyond_the_longest_charge() -> None:
    desk = Desk(Shelf(10), chunk_cost=0.0, pool_second_cost=10.0, longest_charge=3.0)
    desk.submit("a", 5)
    desk.step()
    desk.now += 100.0
    desk.step()
    assert desk.scheduler.service("t") == 3.0


def test_a_line_of_one_tenant_is_full_at_its_bound_and_not_before() -> None:
    desk = Desk(Shelf(10), max_running=1)
    desk.scheduler.set_tenant("t", TenantSpec(max_queued=2))
    desk.submit("runs", 9)
    desk.step()
    assert [desk.submit(name, 9).reason for name in "abc"] == [Reason.QUEUED, Reason.QUEUED, Reason.QUEUE_FULL]
    assert desk.submit("other", 9, tenant="u").reason is Reason.QUEUED
    assert desk.why("c") is Reason.QUEUE_FULL
    assert desk.scheduler.why("c").text == "refused: tenant 't' has 2 streams in line, as many as it may"


def test_what_runs_and_what_is_parked_can_be_cancelled_and_the_engine_is_told() -> None:
    desk = Desk(Shelf(7))
    for name in "abc":
        desk.submit(name, 6)
    desk.steps(3)
    assert desk.scheduler.state("c") is StreamState.PARKED
    assert desk.scheduler.cancel("b").text == "cancelled at frame 3 of 6"
    assert desk.scheduler.cancel("c").text == "cancelled at frame 2 of 6"
    plan = desk.step()
    assert [(d.stream_id, d.reason) for d in plan.finished] == [("b", Reason.CANCELLED), ("c", Reason.CANCELLED)]
    assert desk.scheduler.cancel("b").reason is Reason.CANCELLED, "again, and nothing happens"
    assert desk.step().finished == ()


def test_after_a_shutdown_everything_is_cancelled_and_nothing_accepted() -> None:
    desk = Desk(Shelf(2))
    for name in "abc":
        desk.submit(name, 2)
    desk.step()
    desk.scheduler.shutdown()
    assert desk.submit("late", 1).reason is Reason.DRAINING
    desk.step()
    assert {desk.why(name) for name in "abc"} == {Reason.CANCELLED}
    assert not desk.scheduler.busy


@pytest.mark.parametrize("policy", [FCFS(), FairShare(), EarliestDeadline(), Gives()])
def test_time_since_when_a_stream_waits_or_runs_is_that_of_the_step_that_moved_it(policy: Policy) -> None:
    desk = Desk(Shelf(7), policy)
    for name in "abc":
        desk.submit(name, 6)
    assert [s.since for s in desk.scheduler.snapshot().waiting] == [None] * 3
    desk.step()
    assert [s.since for s in desk.scheduler.snapshot().running] == [1.0] * 3
    assert [s.first_chunk for s in desk.scheduler.snapshot().running] == [None] * 3
    desk.steps(2)
    moment = desk.scheduler.snapshot()
    assert [s.first_chunk for s in moment.running] == [2.0] * len(moment.running)
    assert [(s.id, s.since, s.parks) for s in moment.waiting] == [("c", 3.0, 1)]


def test_outcomes_are_checked_to_the_frame() -> None:
    desk = Desk(Shelf(10))
    desk.submit("a", 3)
    plan = desk.scheduler.step(1.0)
    for committed in ({"a": 2}, {"a": -1}, {"a": True}, {"b": 0}):
        with pytest.raises(ArgumentError, match=r"outcome\.committed"):
            desk.scheduler.update(plan, Outcome(committed))
    desk.scheduler.update(plan, Outcome({"a": 0}))
    assert desk.scheduler.committed("a") == 0
    plan = desk.scheduler.step(2.0)
    desk.scheduler.update(plan, Outcome({"a": 1}))
    assert desk.scheduler.committed("a") == 1


def told(desk: Desk) -> list[list[str]]:
    """Of whom, and what, the log says that it is new."""
    found: list[list[str]] = json.loads(desk.lines[-2])["waiting"]
    return found


def test_the_log_tells_of_those_in_line_only_what_is_new() -> None:
    desk = Desk(Shelf(100), max_running=1)
    for name in "abcd":
        desk.submit(name, 2)
    desk.step()
    assert told(desk) == [["b", "no slot"], ["c", "behind"], ["d", "behind"]]
    desk.step()
    assert told(desk) == []
    desk.submit("e", 2)
    desk.step()
    assert desk.running() == ["b"]
    assert told(desk) == [["c", "no slot"], ["e", "behind"]]
    desk.scheduler.cancel("c")
    desk.step()
    assert told(desk) == [["d", "no slot"]]
    desk.submit("first", 2, tenant="u")
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=2))
    desk.step()
    assert desk.running() == ["d"]
    assert told(desk) == [["e", "no slot"], ["first", "behind"]]


def test_streams_of_a_tenant_at_its_ceiling_are_told_so_and_those_of_others_are_not() -> None:
    desk = Desk(Shelf(100), FairShare(), overtakes=9)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=4))
    for name in "abcd":
        desk.submit(name, 4)
    desk.submit("other", 4, tenant="u")
    desk.steps(3)
    assert [desk.why(name) for name in "cd"] == [Reason.QUOTA] * 2
    assert desk.scheduler.why("d").text == "a stream of its tenant that is before it in line waits for the quota"
    assert desk.scheduler.why("c").text == "needs 2 bytes; its tenant 't' is promised 3 of 4 bytes"
    assert desk.why("other") is Reason.ADVANCE


@pytest.mark.parametrize("policy", [FCFS(), Priority(), FairShare(), EarliestDeadline()])
def test_a_policy_of_the_package_ranks_everybody_only_where_a_runner_asks_it_to(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(type(policy), "rank", lambda _, view: asked.append(1) or [s.id for s in view.waiting])
    for runner, times in ((None, 0), (InPlace(), 1)):
        scheduler = Scheduler(Shelf(9), policy, runner=runner)
        scheduler.submit(StreamRequest("a", "t", 3, WINDOW))
        assert names(scheduler.step(1.0).admitted) == ["a"]
        assert len(asked) == times


def test_a_tenants_new_rights_are_those_of_its_streams_and_of_nobody_elses() -> None:
    desk = Desk(Shelf(100), Priority(), max_running=1)
    desk.submit("runs", 2)
    desk.step()
    desk.submit("a", 3, tenant="t")
    desk.submit("b", 3, tenant="u")
    desk.step()
    desk.scheduler.set_tenant("u", TenantSpec(priority=5, deadline_fps=4.0))
    seen = {s.id: (s.priority, s.deadline_fps) for s in desk.scheduler.snapshot().waiting}
    assert seen == {"a": (0, None), "b": (5, 4.0)}
    assert names(desk.step().admitted) == ["b"], "whose turn it was not before"


@pytest.mark.parametrize("squeezes", [True, False])
def test_who_is_not_squeezed_for_a_newcomer_may_still_be_parked_for_it(squeezes: bool) -> None:
    desk = Desk(Shelf(3), Gives("a"), squeeze_to_admit=squeezes)
    desk.submit("a", 3)
    desk.steps(2)
    desk.submit("b", 2)
    plan = desk.step()
    assert names(plan.parked) == ["a"]
    assert names(plan.admitted) == ["b"]


def test_one_that_a_lowered_quota_keeps_out_for_good_does_not_keep_its_tenants_other_streams_out() -> None:
    desk = Desk(Shelf(10, host=0), max_running=2)
    desk.submit("runs", 3, tenant="u")
    desk.submit("large", 8)
    desk.submit("small", 2)
    desk.submit("mate", 3)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=8))
    assert names(desk.step().admitted) == ["runs"]
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=4))
    assert names(desk.step().admitted) == ["small"]
    assert [desk.why(name) for name in ("large", "mate")] == [Reason.QUOTA, Reason.QUOTA]
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=8))
    desk.steps(2)
    assert desk.why("large") is Reason.ADVANCE, "its turn comes with the quota"


def test_bytes_saved_by_squeezing_are_no_longer_promised() -> None:
    desk = Desk(Ladder(12))
    for name in "ab":
        desk.submit(name, 12)
    desk.steps(5)
    desk.submit("new", 2)
    plan = desk.step()
    assert names(plan.demoted) == ["b"], "6 and 6 bytes leave none for a third"
    assert plan.admitted[0].text == "1 bytes for its next chunk fit: 10 of 12 bytes are promised to 3 streams"


def test_the_log_says_as_long_as_newcomers_are_held_off() -> None:
    desk = Desk(Shelf(7), hold_steps=2)
    for name in "abc":
        desk.submit(name, 6)
    holds = []
    for _ in range(6):
        desk.step()
        holds.append(json.loads(desk.lines[-2])["hold"])
    assert holds == [False, False, True, True, True, True], "from the step on that parked somebody"


def test_under_a_lowered_quota_those_go_first_who_no_longer_fit_below_it_and_the_others_go_on() -> None:
    desk = Desk(Shelf(20))
    desk.submit("large", 9)
    desk.steps(4)
    desk.submit("small", 9)
    desk.steps(2)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=5))
    plan = desk.step()
    assert names(plan.parked) == ["large"], "it needs 7 bytes"
    assert names(plan.running) == ["small"]
