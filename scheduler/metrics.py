"""Prometheus metrics of a scheduler; needs ``qvg-paged[metrics]``.

Counters and histograms follow inputs and plans, gauges are read from a snapshot when somebody asks. Seconds are those
of the scheduler's clock, except `kvp_decision_seconds`.
"""

from collections import Counter as Counts
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from qvg_paged.metrics import TenantLabels, gauge
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.inputs import Cancel, Input, Report, Shutdown, Submit
from qvg_paged.scheduler.plan import Plan
from qvg_paged.scheduler.scheduler import Scheduler
from qvg_paged.scheduler.state import State

__all__ = ["SchedulerMetrics"]

WAITS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LATENESS = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
DECISIONS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
REFUSALS = tuple(reason for reason in Reason if reason.is_refusal)
ENDS = {Reason.COMPLETED: "finished", Reason.FAILED: "failed", Reason.CANCELLED: "cancelled"}
PARKS = (Reason.PARKED, Reason.SQUEEZED)
SQUEEZES = (Reason.DEMOTED, Reason.SHRUNK)
NOT_WAITING = (*REFUSALS, *ENDS, *SQUEEZES, Reason.ADMITTED, Reason.RESUMED, Reason.ADVANCE)
WAITING = tuple(reason for reason in Reason if reason not in NOT_WAITING)
SAMPLE_SECONDS = 5.0
WINDOW_SECONDS = 60.0


@dataclass
class _Watch:
    """What is remembered of a stream that is not final: since when, its first chunk, how late it has been."""

    tenant: str
    fps: float | None
    since: float | None = None
    first: float | None = None
    late: float = 0.0


@dataclass(frozen=True)
class _Sample:
    """Service by weight of the tenants in line at a time, and the dearest unit times the streams that ran."""

    now: float
    service: dict[str, float]
    unit: float


class SchedulerMetrics(Collector):
    """Metrics of a scheduler, from now on.

    Args:
        scheduler: whom to look at.
        tenants: which tenants have labels; share it with the cache's metrics.
    """

    def __init__(self, scheduler: Scheduler, tenants: TenantLabels | None = None) -> None:
        self._scheduler = scheduler
        self._label = TenantLabels() if tenants is None else tenants
        self._watched: dict[str, _Watch] = {}
        self._fresh: list[_Watch] = []
        self._reported: dict[str, int] = {}
        self._wasted_pages = 0
        self._planned_at = 0.0
        self._plan = Plan(step=0)
        self._faults = scheduler.policy_faults
        self._samples: tuple[_Sample, ...] = ()
        self._make()
        view = scheduler.snapshot()
        for stream in (*view.waiting, *view.running):
            self._watched[stream.id] = _Watch(stream.tenant, stream.deadline_fps, stream.since, stream.first_chunk)
        scheduler.observe(self)

    def _make(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=None)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=None)

        self._admission = counter("kvp_admission", "What requests met with.", "outcome", "reason")
        self._ended = counter("kvp_streams_ended", "Streams that came to an end.", "state")
        self._parked = counter("kvp_preemptions", "Streams that were parked.", "kind")
        self._squeezed = counter("kvp_squeezes", "Running streams that were stored more cheaply.", "kind")
        self._resumed = counter("kvp_resumes", "Streams that came back.")
        self._chunks = counter("kvp_chunks", "Chunks committed.", "tenant")
        self._frames = counter("kvp_frames", "Frames committed.", "tenant")
        self._wasted = counter("kvp_wasted_page_seconds", "Pages held by chunks that came to nothing, times seconds.")
        self._failed_chunks = counter("kvp_chunks_not_committed", "Chunks that came to nothing.")
        self._stalled = counter("kvp_stall_seconds", "Seconds for which viewers had no frame.")
        self._late_signals = counter("kvp_late_signals", "Reports about streams that were gone by then.")
        self._policy = counter("kvp_policy_faults", "Answers that were replaced.", "policy", "kind")
        self._wait = histogram("kvp_queue_wait_seconds", "From submission to admission.", WAITS)
        self._first = histogram("kvp_time_to_first_chunk_seconds", "From submission to the first chunk.", WAITS)
        self._late = histogram("kvp_chunk_lateness_seconds", "How late chunks of streams with a rate were.", LATENESS)
        self._decision = histogram("kvp_decision_seconds", "What a step took to decide.", DECISIONS)
        self._off = Gauge("kvp_policy_disabled", "Whether the policy was switched off.", registry=None)
        for reason in (Reason.QUEUED, Reason.ADMITTED, *REFUSALS):
            self._answer(reason, 0)
        for end in ENDS.values():
            self._ended.labels(end)
        for reason in PARKS:
            self._parked.labels(reason.value)
        for reason in SQUEEZES:
            self._squeezed.labels(reason.value)
        for hook in ("rank", "park"):
            self._policy.labels(self._scheduler.policy_name, hook)

    def _answer(self, reason: Reason, count: int = 1) -> None:
        outcome = "refused" if reason.is_refusal else reason.value
        self._admission.labels(outcome, reason.value).inc(count)

    def answered(self, event: Input, decision: Decision | None, state: State) -> None:
        """An input of the scheduler."""
        match event, decision:
            case Submit(request), Decision():
                self._answer(decision.reason)
                if decision.reason is Reason.QUEUED:
                    fps = request.deadline_fps or state.tenants[request.tenant].spec.deadline_fps
                    watch = self._watched[request.id] = _Watch(request.tenant, fps)
                    self._fresh.append(watch)
            case Cancel(stream_id), Decision():
                self._end(stream_id, decision.reason)
            case Shutdown(), _:
                for stream_id in list(self._watched):
                    self._end(stream_id, Reason.CANCELLED)
            case Report(plan, outcome), _:
                self._report(plan, {**dict.fromkeys(outcome.failed, 0), **outcome.committed}, state)

    def _end(self, stream_id: str, reason: Reason) -> None:
        if self._watched.pop(stream_id, None) is not None:
            self._ended.labels(ENDS[reason]).inc()

    def _report(self, plan: Plan, committed: dict[str, int], state: State) -> None:
        self._late_signals.inc(sum(stream_id not in self._watched for stream_id in committed))
        self._reported = {d.stream_id: frames for d in plan.running if (frames := committed.get(d.stream_id, 0))}
        lost = [state.find(d.stream_id) for d in plan.running if d.stream_id not in self._reported]
        self._failed_chunks.inc(len(lost))
        needs = [entry.need for entry in lost if entry is not None]
        self._wasted_pages = sum(n.dense_pages + n.quantised_pages + n.demoted_pages for n in needs)

    def planned(self, plan: Plan, state: State, seconds: float) -> None:
        """A plan of the scheduler."""
        self._decision.observe(seconds)
        now = state.now
        for watch in self._fresh:
            watch.since = now
        self._fresh.clear()
        self._wasted.inc(self._wasted_pages * max(0.0, now - self._planned_at))
        for stream_id, frames in self._reported.items():
            entry = state.find(stream_id)
            if stream_id in self._watched and entry is not None:
                self._chunk(self._watched[stream_id], now, frames, entry.committed - frames)
        self._wasted_pages, self._planned_at, self._plan, self._reported = 0, now, plan, {}
        self._note_moves(plan, now)
        faults = self._scheduler.policy_faults
        if faults > self._faults:
            hook = plan.policy_fault.partition(" ")[0].rpartition(".")[2]
            self._policy.labels(self._scheduler.policy_name, hook).inc(faults - self._faults)
        self._faults = faults
        if not self._samples or now >= self._samples[-1].now + SAMPLE_SECONDS:
            self._sample(state)

    def _note_moves(self, plan: Plan, now: float) -> None:
        for decision in plan.admitted:
            watch = self._watched[decision.stream_id]
            self._answer(Reason.ADMITTED)
            self._wait.observe(now - (now if watch.since is None else watch.since))
        for decision in plan.parked:
            self._parked.labels(decision.reason.value).inc()
        for decision in (*plan.demoted, *plan.shrunk):
            self._squeezed.labels(decision.reason.value).inc()
        self._resumed.inc(len(plan.resumed))
        for decision in plan.finished:
            self._end(decision.stream_id, decision.reason)

    def _chunk(self, watch: _Watch, now: float, frames: int, before: int) -> None:
        """A chunk after `before` frames is there at `now`; it was due when the viewer had seen those."""
        label = self._label(watch.tenant)
        self._chunks.labels(label).inc()
        self._frames.labels(label).inc(frames)
        if watch.first is None:
            watch.first = now
            self._first.observe(now - (now if watch.since is None else watch.since))
        elif watch.fps is not None:
            late = max(0.0, now - watch.first - before / watch.fps)
            self._late.observe(late)
            self._stalled.inc(max(0.0, late - watch.late))
            watch.late = max(late, watch.late)

    def _sample(self, state: State) -> None:
        tenants = ((name, state.tenants[name]) for name in state.left)
        service = {name: tenant.service / tenant.spec.weight for name, tenant in tenants}
        sample = _Sample(state.now, service, state.dearest_chunk * len(state.running))
        recent = (old for old in self._samples if old.now >= state.now - WINDOW_SECONDS)
        self._samples = (*recent, sample)

    def _fairness(self) -> tuple[float, float]:
        """Jain index and largest gap over the window, of tenants that were in line all along."""
        samples = self._samples
        always = set.intersection(*(set(sample.service) for sample in samples)) if samples else set()
        had = [samples[-1].service[name] - samples[0].service[name] for name in always]
        squares, unit = sum(value * value for value in had), max((sample.unit for sample in samples), default=0.0)
        if len(had) < 2 or not squares or not unit:
            return 1.0, 0.0
        return sum(had) ** 2 / (len(had) * squares), (max(had) - min(had)) / unit

    def collect(self) -> Iterator[Metric]:
        """Families of the moment."""
        view = self._scheduler.snapshot()
        self._off.set(self._scheduler.policy_disabled)
        for metric in vars(self).values():
            if isinstance(metric, (Counter, Histogram, Gauge)):
                yield from map(_without_created, metric.collect())
        streams = (*view.waiting, *view.running)
        states = dict.fromkeys(("queued", "running", "parked"), 0.0) | Counts(s.state.value for s in streams)
        yield gauge("kvp_streams", "Streams that are not final.", "state", states)
        known = [(name, 0) for name in view.tenants]
        owners = self._label.total([*known, *((stream.tenant, 1) for stream in streams)])
        yield gauge("kvp_tenant_streams", "Streams of a tenant that are not final.", "tenant", owners)
        reasons = {reason.value: 0.0 for reason in WAITING} | Counts(d.reason.value for d in self._plan.waiting)
        yield gauge("kvp_waiting_streams", "Streams in line, by what they wait for.", "reason", reasons)
        oldest = max((view.waited(stream) for stream in view.waiting), default=0.0)
        yield gauge("kvp_oldest_wait_seconds", "Longest wait of a stream in line.", values=oldest)
        yield gauge("kvp_promisable_bytes", "Pool bytes that may be promised.", values=view.pool_nbytes)
        promised = self._label.total((name, tenant.nbytes) for name, tenant in view.tenants.items())
        yield gauge("kvp_tenant_promised_bytes", "Pool bytes promised to a tenant.", "tenant", promised)
        service = self._label.total((name, tenant.service) for name, tenant in view.tenants.items())
        yield gauge("kvp_tenant_service", "Cost units that known tenants have had.", "tenant", service)
        jain, gap = self._fairness()
        text = "Jain index of service by weight over a minute, of tenants in line all along."
        yield gauge("kvp_jain_ratio", text, values=jain)
        text = "Largest gap of service by weight over a minute, in dearest chunks times running streams."
        yield gauge("kvp_service_gap_ratio", text, values=gap)
        text = "Exceptions of observers of the scheduler."
        yield CounterMetricFamily("kvp_observer_faults", text, value=self._scheduler.observer_faults)


def _without_created(metric: Metric) -> Metric:
    """Without the time at which each series began, which nobody asks for and which doubles their number."""
    metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    return metric
