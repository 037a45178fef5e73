"""Bad input of every kind at the scheduler's boundary: a typed error, and nothing changed."""

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WINDOW, make_cache

from qvg_paged import ArgumentError, KVCacheManager, QvgPagedError, StateError, Window
from qvg_paged.scheduler import (
    AsyncScheduler,
    DecisionLog,
    EarliestDeadline,
    FairShare,
    Outcome,
    Plan,
    Priority,
    Reason,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    TenantSpec,
)
from qvg_paged.scheduler.checks import shown

NAN, INF = float("nan"), float("inf")


class Rude:
    """Cannot be shown, compared, hashed or asked whether it is true."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    def __bool__(self) -> bool:
        raise RuntimeError("no")


class Alias(str):
    """A string that is equal to everything."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True


NO_COUNTS = [0, -1, (1 << 31) + 1, 1 << 63, 10**5000, 3.0, True, "16", None, NAN, Rude(), []]
NO_NUMBERS = [NAN, INF, -INF, -1, 10**400, -(10**400), "1", True, Rude(), [], 1j]
NO_NAMES = ["", "x" * 257, "x" * 10_000_000, None, 7, b"id", ["a"], Rude(), Alias("a")]
GOOD_NAMES = ["\x00", "a\nb", "\udc80", "../../etc/passwd", "%s%n", "{}", "\x1b[31m", " ", "x" * 256]


@pytest.fixture(scope="module")
def cache() -> KVCacheManager:
    return make_cache(pool=30 * (16 << 10), format="dense")


@pytest.fixture
def watched(cache: KVCacheManager) -> tuple[Scheduler, Callable[[], object]]:
    """A scheduler with a stream that runs and one that waits, and everything about it that a caller could notice."""
    log = DecisionLog()
    scheduler = Scheduler(cache, config=SchedulerConfig(max_running=1), log=log)
    for name in "ab":
        scheduler.submit(StreamRequest(name, "t", 12, WINDOW))
    scheduler.step(1.0)

    def look() -> object:
        view = scheduler.snapshot()
        return log.digest, log.lines, view.waiting, view.running, dict(view.tenants), view.pool_nbytes

    return scheduler, look


def request(**changes: Any) -> StreamRequest:
    return StreamRequest(**{"id": "a", "tenant": "t", "frames": 3, "window": WINDOW, **changes})


BAD_FIELDS = [
    *((StreamRequest, name, value) for name in ("frames", "branches") for value in NO_COUNTS),
    *((StreamRequest, name, value) for name in ("id", "tenant") for value in NO_NAMES),
    *((StreamRequest, "deadline_fps", value) for value in [*NO_NUMBERS, 0, 0.0, 1e9, 5e-324]),
    *((StreamRequest, "priority", value) for value in [1.0, True, None, "1", 1 << 32, -(1 << 32), 10**5000, Rude()]),
    *((StreamRequest, "window", value) for value in [None, {}, 8, Rude()]),
    *((TenantSpec, "weight", value) for value in [*NO_NUMBERS, 0, 1e308, 1e-300]),
    *((TenantSpec, "floor_nbytes", value) for value in [-1, 1.0, True, None, 1 << 64, Rude()]),
    *((TenantSpec, "ceiling_nbytes", value) for value in [0, -1, 1.0, True, 1 << 64, Rude()]),
    *((TenantSpec, "max_queued", value) for value in [-1, 1.0, None, Rude()]),
    *((TenantSpec, "priority", value) for value in [1.0, None, 1 << 32]),
    *((TenantSpec, "deadline_fps", value) for value in [*NO_NUMBERS, 0, 1e9]),
    *((SchedulerConfig, name, value) for name in ("max_parks", "min_chunks", "max_tenants", "policy_strikes")
      for value in NO_COUNTS),
    *((SchedulerConfig, name, value) for name in ("overtakes", "hold_steps") for value in NO_COUNTS[1:]),
    *((SchedulerConfig, "max_running", value) for value in NO_COUNTS if value is not None),
    *((SchedulerConfig, "headroom", value) for value in [*NO_NUMBERS, 1, 1.5]),
    *((SchedulerConfig, name, value) for name in ("chunk_cost", "pool_second_cost", "longest_charge")
      for value in [*NO_NUMBERS, None]),
    *((SchedulerConfig, "policy_seconds", value) for value in [*NO_NUMBERS, 0]),
    *((SchedulerConfig, "no_preemption", value) for value in [1, "no", None]),
    *((SchedulerConfig, "default_tenant", value) for value in [None, {}, 1]),
    *((Priority, "aging_seconds", value) for value in [*NO_NUMBERS, 0, None]),
    *((FairShare, "quantum", value) for value in [*NO_NUMBERS, None]),
    *((EarliestDeadline, name, value) for name in ("startup", "patience", "margin") for value in [*NO_NUMBERS, None]),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD_FIELDS)))
def test_a_bad_field_is_an_error_that_names_it_in_one_short_line(index: int) -> None:
    kind, name, value = BAD_FIELDS[index]
    base: dict[str, Any] = {}
    if kind is StreamRequest:
        base = {"id": "a", "tenant": "t", "frames": 3, "window": WINDOW}
    with pytest.raises(ArgumentError) as caught:
        kind(**{**base, name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}: expected ")
    assert ", got " in text
    assert len(text) < 400
    assert text.isprintable()


def test_a_floor_above_its_ceiling_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="ceiling_nbytes: expected an integer >= 10, got 9"):
        TenantSpec(floor_nbytes=10, ceiling_nbytes=9)


def test_settings_that_do_not_exist_are_errors_and_not_ignored() -> None:
    for kind in (SchedulerConfig, TenantSpec, FairShare):
        with pytest.raises(TypeError, match="unexpected keyword"):
            kind(quantumm=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_may_be_any_text_and_every_line_of_the_log_stays_a_line(cache: KVCacheManager, name: str) -> None:
    lines: list[str] = []
    scheduler = Scheduler(cache, log=DecisionLog(lines.append))
    scheduler.submit(StreamRequest(name, name, 3, WINDOW))
    plan = scheduler.step(0.0)
    scheduler.update(plan, Outcome(failed={name: f"what\n{name * 1000}"}))
    scheduler.step(1.0)
    assert scheduler.why(name).reason is Reason.FAILED
    assert scheduler.why(name).text.startswith("failed at frame 0 of 3: what\\n")
    assert scheduler.why(name).text.isprintable()
    assert len(scheduler.why(name).text) < 600
    for number, line in enumerate(lines):
        assert line.isascii()
        assert line.isprintable()
        assert json.loads(line)["seq"] == number
    assert json.loads(lines[1])["id"] == name


CALLS: list[tuple[str, Callable[[Scheduler], object]]] = [
    ("submit: not a request", lambda s: s.submit("a")),  # type: ignore[arg-type]
    ("submit: rude", lambda s: s.submit(Rude())),  # type: ignore[arg-type]
    ("submit: a live id", lambda s: s.submit(request(id="a"))),
    ("submit: a waiting id", lambda s: s.submit(request(id="b"))),
    *((f"{name}: {shown(value)[:20]}", lambda s, name=name, value=value: getattr(s, name)(value))  # type: ignore[misc]
      for name in ("cancel", "why", "state", "committed", "service") for value in ["x", None, 7, ["a"], Rude()]),
    *((f"set_tenant: {shown(value)[:20]}", lambda s, value=value: s.set_tenant(value, TenantSpec()))  # type: ignore[misc]
      for value in NO_NAMES),
    ("set_tenant: no spec", lambda s: s.set_tenant("t", None)),  # type: ignore[arg-type]
    ("set_tenant: a dict", lambda s: s.set_tenant("t", {"weight": 2})),  # type: ignore[arg-type]
    ("set_tenant: floor above the pool", lambda s: s.set_tenant("t", TenantSpec(floor_nbytes=1 << 62))),
    *((f"limit_pool: {shown(value)[:20]}", lambda s, value=value: s.limit_pool(value))  # type: ignore[misc]
      for value in [-1, 1 << 62, 1.0, True, "1", NAN, Rude()]),
    *((f"step: {shown(value)[:20]}", lambda s, value=value: s.step(value))  # type: ignore[misc]
      for value in [*NO_NUMBERS, 0.5, None]),
    ("update: no plan", lambda s: s.update(None, Outcome())),  # type: ignore[arg-type]
    ("update: another plan", lambda s: s.update(Plan(step=1), Outcome())),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CALLS)), ids=[name for name, _ in CALLS])
def test_a_bad_call_is_a_typed_error_and_changes_nothing(
    watched: tuple[Scheduler, Callable[[], object]], index: int
) -> None:
    scheduler, look = watched
    before = look()
    with pytest.raises(QvgPagedError):
        CALLS[index][1](scheduler)
    assert look() == before


OUTCOMES: list[Any] = [
    None, {"a": 3}, Outcome(committed=["a"]), Outcome(failed=["a"]), Outcome(committed={"b": 3}),  # type: ignore[arg-type]
    Outcome(committed={"a": 4}), Outcome(committed={"a": -1}), Outcome(committed={"a": 10**5000}),
    Outcome(committed={"a": NAN}), Outcome(committed={7: 3, "z": 1, None: 2}), Outcome(failed={"a": ValueError()}),  # type: ignore[dict-item]
    Outcome(failed={"b": "waits"}), Outcome(committed={"a": Rude()}), Outcome(failed=Rude()),  # type: ignore[dict-item, arg-type]
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(OUTCOMES)))
def test_a_bad_outcome_is_a_typed_error_and_the_plan_can_still_be_reported(cache: KVCacheManager, index: int) -> None:
    log = DecisionLog()
    scheduler = Scheduler(cache, config=SchedulerConfig(max_running=1), log=log)
    for name in "ab":
        scheduler.submit(request(id=name))
    plan = scheduler.step(0.0)
    before = log.digest
    with pytest.raises(ArgumentError, match="outcome"):
        scheduler.update(plan, OUTCOMES[index])
    assert log.digest == before
    assert scheduler.committed("a") == 0
    scheduler.update(plan, Outcome({"a": 3}))
    assert scheduler.step(1.0).finished


@pytest.mark.parametrize(
    "made",
    [
        lambda _: Scheduler(None),
        lambda cache: Scheduler(cache, policy="fcfs"),
        lambda cache: Scheduler(cache, policy=FairShare),
        lambda cache: Scheduler(cache, policy=object()),
        lambda cache: Scheduler(cache, config={"max_running": 1}),
        lambda cache: Scheduler(cache, seed=None),
        lambda cache: Scheduler(cache, seed=1.5),
        lambda cache: Scheduler(cache, seed=10**5000),
        lambda cache: AsyncScheduler(Scheduler(cache), None, poll_seconds="1"),
        lambda cache: AsyncScheduler(Scheduler(cache), None, poll_seconds=NAN),
        lambda _: AsyncScheduler(None, None),
    ],
)
def test_a_scheduler_cannot_be_made_of_anything_else(cache: KVCacheManager, made: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentError):
        made(cache)


def test_a_scheduler_cannot_be_copied_or_pickled(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    for copy in (deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot pickle"):
            copy(scheduler)


def test_calls_after_the_end_are_answers_or_typed_errors(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    scheduler.submit(request())
    plan = scheduler.step(0.0)
    scheduler.shutdown()
    scheduler.shutdown()
    scheduler.drain()
    assert scheduler.submit(request(id="late")).reason is Reason.DRAINING
    assert scheduler.cancel("a").reason is Reason.CANCELLED
    scheduler.update(plan, Outcome({"a": 3}))
    with pytest.raises(StateError, match="latest plan"):
        scheduler.update(plan, Outcome({"a": 3}))
    scheduler.step(1.0)
    assert not scheduler.busy


def test_a_request_of_any_size_is_refused_at_once_with_both_sizes(cache: KVCacheManager) -> None:
    scheduler = Scheduler(cache)
    for window in (
        Window(recent_frames=1 << 30),
        Window(recent_frames=8, sink_frames=1 << 30, retrieval_frames=1 << 30),
    ):
        answer = scheduler.submit(request(frames=1 << 31, branches=1 << 31, window=window))
        assert answer.reason is Reason.TOO_LARGE
        assert f"{cache.budget.pool} bytes are there" in answer.text


@settings(max_examples=25, deadline=None)
@given(st.integers(-(1 << 31), 1 << 31), st.integers(-(1 << 31), 1 << 31), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_no_request_that_is_accepted_can_get_a_policy_of_the_package_switched_off(
    low: int, high: int, slow: float, weight: float
) -> None:
    cache = make_cache(pool=30 * (16 << 10), format="dense")
    for policy in (Priority(), FairShare(), EarliestDeadline()):
        scheduler = Scheduler(cache, policy, SchedulerConfig(max_running=1))
        scheduler.set_tenant("t", TenantSpec(weight=weight, priority=high))
        for index, priority in enumerate((low, high, 0)):
            scheduler.submit(request(id=f"s{index}", priority=priority, deadline_fps=slow, frames=6))
        for now in (0.0, 1e-9, 1e9):
            plan = scheduler.step(now)
            assert not plan.policy_fault
            scheduler.update(plan, Outcome({d.stream_id: len(d.frames or ()) for d in plan.running}))


@pytest.mark.parametrize("value", NO_NAMES)
def test_a_cache_opens_no_stream_without_a_name_and_an_owner(cache: KVCacheManager, value: Any) -> None:
    for names in ({"stream_id": value}, {"stream_id": "a", "tenant": value}):
        with pytest.raises(ArgumentError, match="expected a non-empty string of up to 256 characters"):
            cache.open(**names, window=WINDOW)
    assert not cache.streams


def test_what_cannot_be_shown_is_named_by_its_kind() -> None:
    assert shown(Rude()) == "a Rude that cannot be shown"
    assert shown(10**5000) == "a int that cannot be shown"
    assert shown("x" * 1000).endswith("... (1002 characters)")
    assert shown(None) == "None"
