"""Metrics: what a scrape shows of a manager and a scheduler, and that nobody who looks on can disturb them."""

import contextlib
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tiny import SPAN, WINDOW, grow, make_cache, write

from qvg_paged import (
    ArgumentError,
    IntegrityError,
    KVCacheManager,
    NonFiniteError,
    OutOfMemoryError,
    Window,
    __version__,
)
from qvg_paged.metrics import OTHER, CacheCollector, TenantLabels, serve_metrics
from qvg_paged.scheduler import Outcome, Reason, Scheduler, SchedulerConfig, StreamRequest, SystemView, TenantSpec
from qvg_paged.scheduler.metrics import SchedulerMetrics

pytestmark = pytest.mark.usefixtures("one_thread")

Series = Mapping[str, float]


def scrape(*collectors: Any) -> Series:
    """Samples by name and labels, as ``name{label=value,...}``, from the text that a server would send."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return parse(generate_latest(registry).decode())


def parse(text: str) -> Series:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found, "a series may be told only once"
            found[name] = sample.value
    return found


def under(series: Series, name: str) -> dict[str, float]:
    """Values of a metric by the text of its labels."""
    return {key[len(name) + 1 : -1]: value for key, value in series.items() if key.startswith(name + "{")}


@pytest.fixture
def dense() -> KVCacheManager:
    """Room for two streams of twelve frames."""
    return make_cache(pool=30 * (16 << 10), format="dense")


def request(name: str, tenant: str = "t", frames: int = 12, **changes: Any) -> StreamRequest:
    return StreamRequest(name, tenant, frames, WINDOW, **changes)


def advance(scheduler: Scheduler, now: float) -> list[str]:
    plan = scheduler.step(now)
    scheduler.update(plan, Outcome({d.stream_id: len(d.frames or ()) for d in plan.running}))
    return [d.stream_id for d in plan.running]


def test_pool_bytes_by_state_add_up_to_the_capacity_in_every_phase() -> None:
    cache = make_cache()
    collector = CacheCollector(cache)
    seen: set[str] = set()

    def check() -> Series:
        series = scrape(collector)
        states = under(series, "kvp_pool_bytes")
        assert sum(states.values()) == series["kvp_capacity_bytes"] == cache.budget.pool
        assert all(value >= 0 for value in states.values())
        assert states["state=unattached"] == 0, "streams and open chunks explain every byte"
        seen.update(state for state, value in states.items() if value)
        return series

    check()
    first = cache.open("a", tenant="x", window=WINDOW)
    grow(first, 3 * SPAN)
    second = first.fork("b")
    check()
    grow(second, 3, 50)
    with first.begin_chunk(2):
        series, stats = check(), cache.stats()
    assert series["kvp_tenant_bytes{tenant=x}"] == stats.used_nbytes
    assert series["kvp_open_streams"] == 2
    pages = {page.id for stream in (first, second) for page in stream.pages.values()}
    counts = under(series, "kvp_pages")
    assert counts["state=dense"] + counts["state=qvg4-int2"] == len(pages) + 2, "shared pages once, and a chunk's two"
    assert counts["state=codebooks"] > 0
    assert series["kvp_tenant_pages{tenant=x}"] == sum(counts.values())
    assert series["kvp_stored_bytes"] < series["kvp_stored_unquantised_bytes"]
    assert {"state=dense", "state=qvg4-int2", "state=codebooks", "state=free", "state=partial"} <= seen
    assert series[f"kvp_build_info{{format=qvg4-int2,version={__version__}}}"] == 1


def test_counters_of_a_manager_follow_what_happened() -> None:
    cache = make_cache(pool=2 << 20)
    collector = CacheCollector(cache)
    before = scrape(collector)
    assert before["kvp_alloc_failures_total{reason=memory}"] == 0, "a series is there before anything happens"
    stream = cache.open("a", window=Window(recent_frames=6))
    grow(stream, 9)
    with pytest.raises(OutOfMemoryError):
        cache.begin_chunks([cache.open(f"b{i}", window=WINDOW) for i in range(1000)])
    chunk = stream.begin_chunk(1)
    write(chunk, [9])
    nan = torch.full((chunk.num_tokens, cache.model.num_kv_heads, cache.model.head_dim), float("nan"))
    chunk.write(0, nan, nan)
    with pytest.raises(NonFiniteError):
        chunk.commit()
    cache.store.pool.used_nbytes += 1
    with pytest.raises(IntegrityError):
        cache.check_integrity()
    cache.store.pool.used_nbytes -= 1
    after = scrape(collector)
    for name, count in {
        "kvp_alloc_failures_total{reason=memory}": 1,
        "kvp_nonfinite_total{tensor=kv}": 1,
        "kvp_integrity_failures_total{where=books}": 1,
        "kvp_committed_frames_total": 9,
        "kvp_evictions_total{reason=window}": 3,
        "kvp_page_events_total{kind=commit}": 3,
        "kvp_page_events_total{kind=publish}": 2,
    }.items():
        assert after[name] == count, name
    allocated, freed = (after[f"kvp_page_event_bytes_total{{kind={kind}}}"] for kind in ("allocate", "free"))
    assert allocated - freed == cache.stats().used_nbytes


def test_a_stream_that_leaves_the_pool_and_comes_back_is_seen_on_the_way() -> None:
    cache = make_cache(host_memory="1MiB")
    stream = cache.open("a", window=WINDOW)
    grow(stream, 2 * SPAN)
    nbytes = cache.stats().used_nbytes

    def look() -> tuple[float, float, float, float]:
        series = scrape(CacheCollector(cache))
        assert sum(under(series, "kvp_pool_bytes").values()) == series["kvp_capacity_bytes"]
        out, back = (series[f"kvp_transfer_bytes_total{{dir={way}}}"] for way in ("out", "in"))
        return series["kvp_parked_bytes{tier=host}"], under(series, "kvp_pages")["state=qvg4-int2"], out, back

    assert look() == (0, 2 * SPAN, 0, 0)
    stream.park()
    assert look() == (nbytes, 0, nbytes, 0)
    stream.prefetch_resume()
    look()
    stream.resume()
    assert look() == (0, 2 * SPAN, nbytes, nbytes)


def test_metrics_of_a_scheduler_tell_who_came_waited_ran_and_left(dense: KVCacheManager) -> None:
    scheduler = Scheduler(dense, config=SchedulerConfig(max_running=2))
    metrics = SchedulerMetrics(scheduler)
    for name in "abcd":
        scheduler.submit(request(name, frames=4))
    scheduler.submit(StreamRequest("huge", "t", 1000, Window(recent_frames=1000)))
    assert advance(scheduler, 10.0) == ["a", "b"]
    series = scrape(metrics)
    assert under(series, "kvp_streams") == {"state=queued": 2, "state=running": 2, "state=parked": 0}
    assert under(series, "kvp_waiting_streams")["reason=no slot"] == 1
    assert series["kvp_admission_total{outcome=refused,reason=too large}"] == 1
    assert series["kvp_admission_total{outcome=queued,reason=queued}"] == 4
    assert series["kvp_admission_total{outcome=admitted,reason=admitted}"] == 2
    scheduler.cancel("d")
    scheduler.cancel("d")
    now = 11.0
    while scheduler.busy:
        advance(scheduler, now)
        now += 1.0
    series = scrape(metrics)
    assert under(series, "kvp_streams_ended_total") == {"state=finished": 3, "state=failed": 0, "state=cancelled": 1}
    assert series["kvp_chunks_total{tenant=t}"] == 6
    assert series["kvp_frames_total{tenant=t}"] == 12
    assert (series["kvp_queue_wait_seconds_count"], series["kvp_queue_wait_seconds_sum"]) == (3, 2.0)
    assert series["kvp_time_to_first_chunk_seconds_count"] == 3
    assert series["kvp_time_to_first_chunk_seconds_sum"] == 1.0 + 1.0 + 3.0
    assert series["kvp_decision_seconds_count"] >= 4
    assert series["kvp_tenant_service{tenant=t}"] == pytest.approx(scheduler.service("t"))
    assert series["kvp_oldest_wait_seconds"] == 0


def test_lateness_and_stalls_are_those_of_the_viewer(dense: KVCacheManager) -> None:
    """Three frames a second; chunks of three: the second is due a second after the first."""
    scheduler = Scheduler(dense)
    metrics = SchedulerMetrics(scheduler)
    scheduler.set_tenant("t", TenantSpec(deadline_fps=3.0))
    scheduler.submit(request("a", frames=12))
    for now in (0.0, 5.0, 5.5, 8.0, 9.0):  # chunks are there at 5, 5.5 (due 6), 8 (due 7), 9 (due 8)
        advance(scheduler, now)
    series = scrape(metrics)
    assert series["kvp_time_to_first_chunk_seconds_sum"] == 5.0
    assert series["kvp_chunk_lateness_seconds_count"] == 3
    assert series["kvp_chunk_lateness_seconds_sum"] == 2.0
    assert series["kvp_chunk_lateness_seconds_bucket{le=0.0}"] == 1
    assert series["kvp_stall_seconds_total"] == 1.0, "the viewer waited once; the last was as late as the one before"


def test_chunks_that_came_to_nothing_and_reports_that_came_too_late_are_counted(dense: KVCacheManager) -> None:
    scheduler = Scheduler(dense)
    metrics = SchedulerMetrics(scheduler)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    plan = scheduler.step(0.0)
    scheduler.cancel("b")
    scheduler.update(plan, Outcome({"b": 3}))
    scheduler.step(2.0)
    series = scrape(metrics)
    demand = dense.demand(WINDOW, 12)
    assert series["kvp_late_signals_total"] == 1
    assert series["kvp_chunks_not_committed_total"] == 1
    assert series["kvp_wasted_page_seconds_total"] == 2.0 * (demand.dense_pages + demand.quantised_pages)
    assert under(series, "kvp_streams_ended_total")["state=cancelled"] == 1
    scheduler.shutdown()
    assert under(scrape(metrics), "kvp_streams_ended_total")["state=cancelled"] == 2


def test_metrics_attached_late_know_the_streams_that_are_there(dense: KVCacheManager) -> None:
    scheduler = Scheduler(dense)
    scheduler.submit(request("a", frames=6))
    advance(scheduler, 1.0)
    metrics = SchedulerMetrics(scheduler)
    advance(scheduler, 2.0)
    advance(scheduler, 3.0)
    series = scrape(metrics)
    assert series["kvp_time_to_first_chunk_seconds_sum"] == 2.0
    assert under(series, "kvp_streams_ended_total")["state=finished"] == 1
    assert series["kvp_late_signals_total"] == 0


def test_fairness_is_measured_over_a_minute_among_tenants_in_line(dense: KVCacheManager) -> None:
    """One slot; first come first served, and the first tenant's streams came first."""
    scheduler = Scheduler(dense, config=SchedulerConfig(max_running=1, pool_second_cost=0.0))
    metrics = SchedulerMetrics(scheduler)
    assert scrape(metrics)["kvp_jain_ratio"] == 1.0
    for line, name in enumerate("aab"):
        for i in range(20):
            scheduler.submit(request(f"{line}-{i}", tenant=name, frames=3))
    for now in range(0, 35, 5):
        advance(scheduler, float(now))
    series = scrape(metrics)
    assert series["kvp_jain_ratio"] == pytest.approx(0.5)
    assert series["kvp_service_gap_ratio"] == 6.0, "six chunks, in chunks"


def test_squeezes_parks_and_resumes_are_counted_by_kind() -> None:
    from test_tiers import WIDE, Engine, small_manager  # noqa: PLC0415 - an engine over the real tiers

    engine = Engine(small_manager(1.3, window=WIDE, frames=36))
    metrics = SchedulerMetrics(engine.scheduler)
    for index in range(6):
        engine.submit(f"s{index}", frames=36, window=WIDE)
    for _ in engine.run():
        pass
    series = scrape(metrics, CacheCollector(engine.manager))
    squeezes, parks = under(series, "kvp_squeezes_total"), under(series, "kvp_preemptions_total")
    assert squeezes == {"kind=demoted": engine.seen["demoted"], "kind=shrunk": engine.seen["shrunk"]}
    assert min(squeezes.values()) > 0
    assert sum(parks.values()) == engine.seen["parked"] > 0
    assert series["kvp_resumes_total"] == engine.seen["resumed"]
    assert series["kvp_demoted_frames_total"] > 0
    assert series["kvp_parked_bytes{tier=host}"] == 0


def test_the_books_of_a_scrape_add_up_after_memory_was_given_back() -> None:
    cache = make_cache()
    collector = CacheCollector(cache)
    before = scrape(collector)["kvp_capacity_bytes"]
    got = cache.shrink(256 << 10)
    series = scrape(collector)
    assert series["kvp_capacity_bytes"] == before - got
    assert sum(under(series, "kvp_pool_bytes").values()) == series["kvp_capacity_bytes"]


class Broken:
    """A policy that is wrong, and an observer that raises."""

    def rank(self, view: SystemView) -> list[str]:
        raise ValueError(str(view.now))

    def park(self, *_: Any) -> list[str]:
        return []

    def planned(self, *_: Any) -> None:
        raise RuntimeError("planned")

    answered = planned


def test_faults_of_a_policy_are_counted_and_an_observer_cannot_disturb(
    dense: KVCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(dense, Broken(), SchedulerConfig(policy_seconds=None, policy_strikes=2))
    scheduler.observe(Broken())
    metrics = SchedulerMetrics(scheduler)
    for name in "abc":
        scheduler.submit(request(name))
    for now in range(4):
        assert advance(scheduler, float(now)) == ["a", "b"]
    series = scrape(metrics)
    assert under(series, "kvp_policy_faults_total") == {"kind=rank,policy=Broken": 2, "kind=park,policy=Broken": 0}
    assert series["kvp_policy_disabled"] == 1
    assert series["kvp_observer_faults_total"] == scheduler.observer_faults == 11
    assert len([record for record in caplog.records if record.name == "qvg_paged.scheduler"]) == 1


def test_tenants_beyond_the_bound_share_a_label_and_no_name_can_break_a_line() -> None:
    label = TenantLabels(["kept"], most=4)
    names = ["a\nkvp_fake 1", 'q"uote\\', "\udc80", "late", "kept", OTHER]
    assert [label(name) for name in names] == ["a\nkvp_fake 1", 'q"uote\\', "\\udc80", OTHER, "kept", OTHER]
    assert label("a\nkvp_fake 1") == "a\nkvp_fake 1", "who has a label keeps it"
    assert TenantLabels()(OTHER) == "other (tenant)", "a tenant of that name is not the rest"
    assert label.total([("late", 1), ("later", 2), ("kept", 4)]) == {OTHER: 3, "kept": 4}
    cache = make_cache()
    for index, name in enumerate(names):
        grow(cache.open(f"s{index}", tenant=name, window=Window(recent_frames=6)), 1)
    registry = CollectorRegistry()
    registry.register(CacheCollector(cache, label))
    text = generate_latest(registry).decode()
    assert not [line for line in text.splitlines() if line.startswith("kvp_fake")]
    tenants = under(parse(text), "kvp_tenant_bytes")
    assert len(tenants) == 5
    assert sum(tenants.values()) == cache.stats().used_nbytes
    with pytest.raises(ArgumentError, match="expected an integer >= the 2 names, got 1"):
        TenantLabels("ab", most=1)


@pytest.fixture
def endpoint(dense: KVCacheManager) -> Iterator[str]:
    with serve_metrics(0, CacheCollector(dense)) as server:
        assert server.port
        yield server.url


def test_a_server_answers_and_stops(dense: KVCacheManager, endpoint: str) -> None:
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        assert parse(answer.read().decode())["kvp_capacity_bytes"] == dense.budget.pool


@pytest.mark.parametrize("port", [-1, 1 << 16, True, "9400", 1.0])
def test_a_port_that_is_none_is_an_error(port: Any) -> None:
    with pytest.raises(ArgumentError, match="port: expected 0 to 65535"):
        serve_metrics(port)


def test_a_port_that_is_taken_and_a_collector_named_twice_are_errors(dense: KVCacheManager) -> None:
    collector = CacheCollector(dense)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve_metrics(0, collector))
        with pytest.raises(ArgumentError, match=f"port: expected one that is free at 127.0.0.1, got {server.port}"):
            serve_metrics(server.port, collector)
    with pytest.raises(ArgumentError, match="collectors: expected different metrics"):
        serve_metrics(0, collector, CacheCollector(dense))


def test_every_reason_that_a_stream_can_wait_for_has_a_series(dense: KVCacheManager) -> None:
    waiting = under(scrape(SchedulerMetrics(Scheduler(dense))), "kvp_waiting_streams")
    assert {f"reason={reason.value}" for reason in (Reason.NO_MEMORY, Reason.QUOTA, Reason.PARKED)} <= set(waiting)
    assert "reason=completed" not in waiting
