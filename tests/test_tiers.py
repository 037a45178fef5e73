"""The scheduler over the real manager: an oversubscribed pool, every rung of the ladder, the same bytes in the end."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FAST, make_cache, make_model, page_bytes, write

from qvg_paged import (
    ArgumentError,
    Demand,
    FreeFill,
    Grid,
    KVCacheManager,
    OutOfMemoryError,
    QualityFloor,
    Rung,
    Tier,
    Timeline,
    Window,
    inject_fault,
)
from qvg_paged.ladder import Relief, Squeeze, least_retrieval, lowered, squeeze
from qvg_paged.scheduler import (
    FCFS,
    Decision,
    FairShare,
    LadderBackend,
    Outcome,
    Plan,
    Policy,
    Reason,
    Reservation,
    Scheduler,
    SchedulerConfig,
    StreamRequest,
    StreamState,
    TenantSpec,
    TieredCache,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FINE = replace(FAST.with_codecs(grid=Grid.INT4), name="fine")
WINDOW = Window(sink_frames=1, recent_frames=8, retrieval_frames=4, bf16_recent=3)
PROUD = QualityFloor(rung=Rung.NONE, retrieval_frames=WINDOW.retrieval_frames)
FRAMES = 18
WIDE = Window(recent_frames=4, retrieval_frames=24)


class Engine:
    """Runs plans on the real store: the content of a frame is a function of its stream and index."""

    def __init__(
        self, manager: KVCacheManager, policy: Policy | None = None, *, prefetch: bool = True, **config: Any
    ) -> None:
        self.manager = manager
        self.cache = TieredCache(manager, prefetch=prefetch)
        self.scheduler = Scheduler(self.cache, policy, SchedulerConfig(**config))
        self.requests: dict[str, StreamRequest] = {}
        self.done: dict[str, list[dict[int, bytes]]] = {}
        self.seen: Counter[str] = Counter()
        self.stuck = 0
        self.planted = False
        self.now = 0.0

    def submit(
        self, name: str, tenant: str = "t", frames: int = FRAMES, window: Window = WINDOW, **changes: Any
    ) -> None:
        self.requests[name] = StreamRequest(name, tenant, frames, window, **changes)
        self.scheduler.submit(self.requests[name])

    def step(self) -> Plan:
        self.now += 1.0
        plan = self.scheduler.step(self.now)
        failed = self.cache.carry_out(plan, self.requests)
        for kind in ("demoted", "shrunk", "parked", "resumed", "admitted"):
            self.seen[kind] += len(getattr(plan, kind))
        committed = {}
        for decision in plan.running:
            if decision.stream_id in failed or not self.cache.ready(decision.stream_id):
                continue
            frames = decision.frames or range(0)
            streams = self.cache.streams(decision.stream_id)
            try:
                chunks = self.manager.begin_chunks(streams, len(frames))
            except OutOfMemoryError:
                assert self.planted, "memory that was promised is not there"
                continue
            for branch, chunk in enumerate(chunks):
                write(chunk, [content_seed(decision.stream_id, branch, frame) for frame in frames])
            self.manager.commit(chunks)
            committed[decision.stream_id] = len(frames)
            if frames.stop == self.requests[decision.stream_id].frames:
                self.done[decision.stream_id] = [page_bytes(stream) for stream in streams]
        self.manager.check_integrity()
        if plan.running or plan.parked:
            self.scheduler.update(plan, Outcome(committed, failed))
        return plan

    def run(self, most: int = 400) -> Iterator[Plan]:
        while self.scheduler.busy:
            most -= 1
            assert most, "the scheduler does not get on"
            yield self.step()


def content_seed(name: str, branch: int, frame: int) -> int:
    return (hash_of(name) * 4 + branch) * 1000 + frame


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 9973


def unsqueezed(name: str, branch: int = 0, frames: int = FRAMES) -> dict[int, bytes]:
    """What a stream holds in the end if it had a manager to itself."""
    cache = make_cache(pool=8 << 20, format=FINE)
    stream = cache.open(name, window=WINDOW)
    for start in range(0, frames, 3):
        with stream.begin_chunk(min(3, frames - start)) as chunk:
            write(chunk, [content_seed(name, branch, frame) for frame in chunk.frames])
            chunk.commit()
    return page_bytes(stream)


def small_manager(
    streams: float, path: Path | None = None, window: Window = WINDOW, frames: int = FRAMES, **changes: Any
) -> KVCacheManager:
    """A pool for so many streams at their worst."""
    fields: dict[str, Any] = {"format": FINE, "demote_to": FAST, "free_fill": FreeFill.POISON, "host_memory": "64MiB"}
    if path is not None:
        fields |= {"disk_path": path, "disk_memory": "64MiB", "host_memory": 100_000}
    fields |= changes
    roomy = make_cache(pool=8 << 20, **fields)
    worst = roomy.demand_nbytes(roomy.demand(window, frames)) * streams
    reserve = roomy.demand_nbytes(roomy.budget.reserve)
    return make_cache(pool=int(worst + reserve) + 3 * roomy.budget.slabs.slab_nbytes, **fields)


@pytest.mark.parametrize("tier", Tier)
def test_streams_that_were_parked_end_with_the_bytes_of_streams_that_were_not(tier: Tier, tmp_path: Path) -> None:
    manager = small_manager(2.2, tmp_path if tier is Tier.DISK else None)
    engine = Engine(manager, FairShare(quantum=0.5))
    for index in range(6):
        engine.submit(f"s{index}", tenant=f"t{index % 3}", quality=PROUD, branches=1 + index % 2)
    for _ in engine.run():
        pass
    assert engine.seen["parked"] >= 3
    assert engine.seen["demoted"] == engine.seen["shrunk"] == 0
    for index in range(6):
        name = f"s{index}"
        assert engine.scheduler.state(name) is StreamState.FINISHED
        assert engine.done[name] == [unsqueezed(name, branch) for branch in range(1 + index % 2)]
    stats = manager.stats()
    assert (stats.used_nbytes, stats.host_nbytes, stats.disk_nbytes) == (0, 0, 0)


def at_the_bottom(engine: Engine) -> list[Demand]:
    """What the running streams need for their next chunks once nothing can be taken from them any more."""
    found, cache = [], engine.cache
    for entry in engine.scheduler._state.running.values():
        now, demand = entry.squeeze or Squeeze(), entry.need
        for relief in Relief:
            after = cache.lowered(WIDE, 36, QualityFloor(), now, entry.committed, relief)
            if after is not None:
                lower = cache.squeezed_demand(WIDE, entry.committed, 3, after)
                if cache.demand_nbytes(lower) < cache.demand_nbytes(demand):
                    now, demand = after, lower
        found.append(demand)
    return found


def test_the_ladder_is_climbed_down_in_order_and_nobody_is_parked_while_it_helps() -> None:
    manager = small_manager(1.3, window=WIDE, frames=36)
    engine = Engine(manager)
    for index in range(6):
        engine.submit(f"s{index}", frames=36, window=WIDE)
    reasons: dict[str, list[Reason]] = {name: [] for name in engine.requests}
    demotions = 0
    while engine.scheduler.busy:
        bottom = at_the_bottom(engine)
        plan = engine.step()
        for decision in (*plan.demoted, *plan.shrunk, *plan.parked):
            reasons[decision.stream_id].append(decision.reason)
        if any(decision.reason is Reason.SQUEEZED for decision in plan.parked):
            assert not engine.cache.can_host(bottom), "somebody was parked although squeezing was enough"
        streams = [stream for stream in manager.streams.values() if stream.rung]
        demotions += sum(quality.demotions for stream in streams for quality in stream.ledger.values())
    assert len(engine.done) == 6
    assert demotions > 0
    seen = {reason for mine in reasons.values() for reason in mine}
    assert {Reason.DEMOTED, Reason.SHRUNK, Reason.SQUEEZED} <= seen
    for mine in reasons.values():
        assert Reason.SHRUNK not in mine or Reason.DEMOTED in mine[: mine.index(Reason.SHRUNK)]


def test_with_the_ladder_more_streams_run_together() -> None:
    steps = {}
    for ladder in (False, True):
        engine = Engine(small_manager(2.0), squeeze_to_admit=ladder)
        for index in range(8):
            engine.submit(f"s{index}", quality=QualityFloor() if ladder else PROUD)
        steps[ladder] = sum(1 for _ in engine.run())
        assert len(engine.done) == 8
    assert steps[False] >= 1.3 * steps[True]


def test_where_the_host_has_no_room_streams_are_promised_their_worst_case_and_left_alone() -> None:
    roomy = small_manager(2.6)
    worst = roomy.demand_nbytes(roomy.demand(WINDOW, FRAMES))
    engine = Engine(small_manager(2.6, host_memory=int(1.2 * worst)), prefetch=False)
    for index in range(5):
        engine.submit(f"s{index}")
    unbacked = set()
    for plan in engine.run():
        engine.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=int(1.5 * worst) if plan.step == 3 else None))
        unbacked |= {entry.id for entry in engine.scheduler._state.running.values() if not entry.backed}
        assert not unbacked & {decision.stream_id for decision in (*plan.demoted, *plan.shrunk, *plan.parked)}
    assert unbacked
    assert all(engine.done[name] == [unsqueezed(name)] for name in unbacked)


def test_a_stream_that_cannot_be_opened_fails_by_itself() -> None:
    engine = Engine(small_manager(2.6))
    engine.manager.open("s1#1", window=WINDOW)
    for index in range(3):
        engine.submit(f"s{index}", branches=2)
    for _ in engine.run():
        pass
    assert engine.scheduler.state("s1") is StreamState.FAILED
    assert "ArgumentError: stream_id: expected an id not in use" in engine.scheduler.why("s1").text
    assert set(engine.done) == {"s0", "s2"}
    assert list(engine.manager.streams) == ["s1#1"]


def test_floors_of_requests_and_tenants_decide_who_is_squeezed() -> None:
    engine = Engine(small_manager(2.2))
    engine.scheduler.set_tenant("proud", TenantSpec(quality=PROUD))
    for index in range(6):
        engine.submit(
            f"s{index}", tenant="proud" if index % 2 else "t", quality=PROUD if index == 0 else QualityFloor()
        )
    for plan in engine.run():
        for decision in (*plan.demoted, *plan.shrunk):
            assert decision.stream_id in ("s2", "s4")
    assert engine.seen["demoted"] > 0
    for name in ("s0", "s1", "s3", "s5"):
        assert engine.done[name] == [unsqueezed(name)]


def test_to_completion_nobody_is_squeezed_or_parked() -> None:
    engine = Engine(small_manager(2.2), no_preemption=True)
    assert engine.scheduler.reservation is Reservation.TO_COMPLETION
    for index in range(5):
        engine.submit(f"s{index}")
    for _ in engine.run():
        pass
    assert engine.seen == Counter(admitted=5)
    assert all(engine.done[f"s{index}"] == [unsqueezed(f"s{index}")] for index in range(5))


def test_a_tenant_above_its_ceiling_is_squeezed_before_it_is_parked() -> None:
    manager = small_manager(4.0)
    engine = Engine(manager)
    for index in range(2):
        engine.submit(f"s{index}", tenant="t")
    for _ in range(4):
        engine.step()
    held = sum(row.need_nbytes for row in engine.scheduler._state.running.values())
    engine.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=int(0.8 * held)))
    plan = engine.step()
    assert plan.demoted
    assert not plan.parked
    for _ in engine.run():
        pass
    assert len(engine.done) == 2


def test_a_smaller_limit_of_the_pool_squeezes_and_then_parks() -> None:
    manager = small_manager(4.0)
    engine = Engine(manager)
    for index in range(4):
        engine.submit(f"s{index}")
    for _ in range(4):
        engine.step()
    engine.scheduler.limit_pool(manager.pool_nbytes // 3)
    plan = engine.step()
    assert plan.demoted
    assert plan.parked
    engine.scheduler.limit_pool(None)
    for _ in engine.run():
        pass
    assert len(engine.done) == 4


def test_a_demotion_that_finds_no_room_is_made_up_for_with_the_next_plan() -> None:
    manager = small_manager(2.0)
    engine = Engine(manager)
    for index in range(3):
        engine.submit(f"s{index}")
    with inject_fault("demote.reserve", OutOfMemoryError("planted", 1, 0)):
        for _ in engine.run():
            pass
    assert engine.seen["demoted"] > 0
    assert len(engine.done) == 3


@pytest.mark.parametrize("point", ["host.allocate", "resume.reserve"])
def test_a_move_that_finds_no_room_is_made_up_for_with_the_next_plan(point: str) -> None:
    engine = Engine(small_manager(2.2), FairShare(quantum=0.5), prefetch=False)
    for index in range(6):
        engine.submit(f"s{index}", tenant=f"t{index % 3}", quality=PROUD, branches=1 + index % 2)
    engine.planted = True
    with inject_fault(point, OutOfMemoryError("planted", 1, 0)) as seen:
        for plan in engine.run():
            for decision in plan.running:
                engine.stuck += decision.stream_id in engine.cache._branches and not engine.cache.ready(
                    decision.stream_id
                )
    assert seen[0] > 1
    assert engine.stuck == (point == "resume.reserve")
    assert len(engine.done) == 6


def test_a_stream_whose_bytes_are_lost_fails_and_the_others_go_on(tmp_path: Path) -> None:
    manager = small_manager(2.2, tmp_path, host_memory=0)
    engine = Engine(manager, FairShare(quantum=0.5))
    for index in range(6):
        engine.submit(f"s{index}", tenant=f"t{index % 3}", quality=PROUD)
    damaged = ""
    for plan in engine.run():
        for decision in plan.parked:
            if not damaged:
                (stream,) = engine.cache.streams(decision.stream_id)
                assert stream.parked is not None
                if stream.parked.disk is not None and stream.parked.incoming is None:
                    damaged = decision.stream_id
                    path = stream.parked.disk.path
                    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    assert engine.scheduler.state(damaged) is StreamState.FAILED
    assert "CorruptedError" in engine.scheduler.why(damaged).text
    assert len(engine.done) == 5


def test_streams_are_brought_back_before_their_turn() -> None:
    manager = small_manager(2.6)
    engine = Engine(manager, FairShare(quantum=0.5))
    for index in range(4):
        engine.submit(f"s{index}", tenant=f"t{index}", quality=PROUD)
    early = 0
    for plan in engine.run():
        for decision in plan.waiting:
            for stream in engine.cache._branches.get(decision.stream_id, ()):
                early += stream.parked is not None and stream.parked.incoming is not None
    assert early > 0
    assert len(engine.done) == 4


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1 << 30))
@example(seed=8597)  # demoted by the plan that brought it back
def test_any_load_with_any_trouble_ends_well(seed: int, tmp_path_factory: Any) -> None:
    rng = Random(seed)
    path = tmp_path_factory.mktemp("tiers") if rng.random() < 0.5 else None
    manager = small_manager(rng.choice([1.3, 1.8, 2.6]), path)
    engine = Engine(manager, rng.choice([FCFS, FairShare])())
    floors = [QualityFloor(), QualityFloor(rung=Rung.TAIL), PROUD]
    names = [f"s{index}" for index in range(7)]
    for name in names:
        engine.submit(name, rng.choice("tuv"), rng.choice([3, 8, FRAMES]), quality=rng.choice(floors))
    for plan in engine.run():
        if rng.random() < 0.1:
            engine.scheduler.limit_pool(rng.choice([None, manager.pool_nbytes // 2, manager.pool_nbytes]))
        if rng.random() < 0.04:
            engine.scheduler.cancel(rng.choice(names))
        if not plan.running:
            engine.scheduler.limit_pool(None)
    for name in names:
        request, state = engine.requests[name], engine.scheduler.state(name)
        assert state in (StreamState.FINISHED, StreamState.CANCELLED)
        if state is StreamState.FINISHED and request.quality is PROUD:
            assert engine.done[name] == [unsqueezed(name, 0, request.frames)]
    stats = manager.stats()
    assert (stats.used_nbytes, stats.host_nbytes, stats.disk_nbytes) == (0, 0, 0)


def test_the_adapter_answers_for_the_manager_and_is_a_ladder(tmp_path: Path) -> None:
    manager = small_manager(2.0)
    cache = TieredCache(manager, transfer_rate=1e9)
    assert isinstance(cache, LadderBackend)
    assert not isinstance(manager, LadderBackend)
    assert (cache.pool_nbytes, cache.frames_per_chunk) == (manager.pool_nbytes, 3)
    assert cache.demand(WINDOW, FRAMES) == manager.demand(WINDOW, FRAMES)
    assert cache.park_seconds(10**9) == cache.resume_seconds(10**9) == 1.0
    assert cache.host_nbytes == 64 << 20
    assert TieredCache(small_manager(2.0, tmp_path)).host_nbytes == 64 << 20
    plain = TieredCache(make_cache())
    assert plain.host_nbytes == 0
    assert plain.lowered(WINDOW, 9, QualityFloor(), Squeeze(), 3, Relief.TAIL) is None
    for message, make in (
        ("quality", lambda: StreamRequest("a", "t", 3, WINDOW, quality="best")),  # type: ignore[arg-type]
        ("quality", lambda: TenantSpec(quality=1)),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match=f"{message}: expected a QualityFloor"):
            make()


def test_a_rung_that_could_need_more_memory_some_day_is_not_taken() -> None:
    """Codebooks that outweigh what they save: many centroids for few tokens."""
    heavy = replace(FAST.with_codecs(num_centroids=128, grid=Grid.INT4), name="heavy")
    manager = make_cache(pool=4 << 20, format=heavy, demote_to=heavy)
    cache = TieredCache(manager)
    window = Window(recent_frames=40)
    assert lowered(manager.config, window, QualityFloor(), Squeeze(), 40, Relief.TAIL) is not None
    assert cache.lowered(window, 80, QualityFloor(), Squeeze(), 40, Relief.TAIL) is None


@lru_cache
def two_streams() -> TieredCache:
    return TieredCache(small_manager(2.0))


@settings(max_examples=60, deadline=None)
@given(
    committed=st.integers(0, 30), since=st.integers(0, 30), frames=st.integers(1, 3), rung=st.sampled_from(Rung),
    retrieval=st.integers(0, 4),
)  # fmt: skip
def test_no_squeezed_stream_ever_needs_more_than_its_worst_case(
    committed: int, since: int, frames: int, rung: Rung, retrieval: int
) -> None:
    cache = two_streams()
    now = Squeeze(rung, since, retrieval)
    if since > committed or retrieval < least_retrieval(cache.manager.config, WINDOW):
        return
    demand = cache.squeezed_demand(WINDOW, committed, frames, now)
    worst = cache._worst(WINDOW, None, rung)
    assert demand.most(worst) == worst


def test_reliefs_go_down_only_and_stop_at_the_floor() -> None:
    config = small_manager(2.0).config
    now = lowered(config, WINDOW, QualityFloor(), Squeeze(), 9, Relief.TAIL)
    assert now == Squeeze(Rung.TAIL, 9)
    assert lowered(config, WINDOW, QualityFloor(), now, 12, Relief.TAIL) is None
    now = lowered(config, WINDOW, QualityFloor(), now, 12, Relief.SPANS)
    assert now == Squeeze(Rung.SPANS, 9)
    now = lowered(config, WINDOW, QualityFloor(retrieval_frames=2), now, 12, Relief.RETRIEVAL)
    assert now == Squeeze(Rung.SPANS, 9, 2)
    assert lowered(config, WINDOW, QualityFloor(retrieval_frames=2), now, 12, Relief.RETRIEVAL) is None
    assert lowered(config, WINDOW, QualityFloor(rung=Rung.TAIL), Squeeze(), 12, Relief.SPANS) is None
    tight = Window(recent_frames=1, retrieval_frames=4)
    assert least_retrieval(config, tight) == 2
    timeline = squeeze(Timeline(WINDOW, 4), Rung.TAIL, 9, make_model())
    assert timeline.worst_demand(3) != Demand()


def test_without_prefetch_a_stream_comes_back_with_its_turn_and_not_before() -> None:
    manager = small_manager(2.6)
    engine = Engine(manager, FairShare(quantum=0.5))
    engine.cache = TieredCache(manager, prefetch=False)
    for index in range(4):
        engine.submit(f"s{index}", tenant=f"t{index}", quality=PROUD)
    for plan in engine.run():
        for decision in plan.waiting:
            for stream in engine.cache._branches.get(decision.stream_id, ()):
                assert stream.parked is None or stream.parked.incoming is None
    assert engine.seen["parked"] > 0
    assert len(engine.done) == 4


def test_a_stream_that_was_parked_before_it_could_be_demoted_is_demoted_once_it_is_back() -> None:
    manager = small_manager(2.0)
    cache = TieredCache(manager)
    request = StreamRequest("a", "t", FRAMES, WINDOW)

    def told(reason: Reason, **changes: Any) -> tuple[Decision, ...]:
        return (Decision("a", reason, "", **changes),)

    cache.carry_out(Plan(step=1, admitted=told(Reason.ADMITTED)), {"a": request})
    (stream,) = cache.streams("a")
    for start in range(0, 12, 3):
        with stream.begin_chunk(3) as chunk:
            write(chunk, list(range(start, start + 3)))
            chunk.commit()
    demoted = told(Reason.DEMOTED, squeeze=Squeeze(Rung.TAIL, stream.committed))
    with inject_fault("demote.reserve", OutOfMemoryError("planted", 1, 0)):
        cache.carry_out(Plan(step=2, demoted=demoted, parked=told(Reason.PARKED)), {})
    cache.carry_out(Plan(step=3), {})
    assert stream.rung is Rung.NONE
    cache.carry_out(Plan(step=4, resumed=told(Reason.RESUMED)), {})
    assert stream.rung is Rung.TAIL
    manager.check_integrity()
