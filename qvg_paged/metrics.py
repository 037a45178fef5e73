"""Prometheus metrics of a manager, gathered from its books when somebody asks; needs ``qvg-paged[metrics]``.

    server = serve_metrics(9400, CacheCollector(cache), SchedulerMetrics(scheduler))

One prefix, base units, no stream ids. Tenants are labels only as far as `TenantLabels` allows.
"""

import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import cast
from wsgiref.simple_server import WSGIServer

try:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ImportError("prometheus_client: expected to be installed; pip install 'qvg-paged[metrics]'") from error

from qvg_paged import __version__
from qvg_paged.errors import (
    ArgumentError,
    CorruptedError,
    IntegrityError,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
)
from qvg_paged.events import EventKind, Tally
from qvg_paged.kernels.formats import PageFormat
from qvg_paged.manager import KVCacheManager
from qvg_paged.stats import CacheStats

__all__ = ["OTHER", "CacheCollector", "MetricsServer", "TenantLabels", "gauge", "serve_metrics"]

OTHER = "other"
"""Label of all tenants that have none of their own."""


class TenantLabels:
    """Names of tenants as label values, a bounded number of them.

    Args:
        names: tenants that always have their own label.
        most: labels in all, `OTHER` besides; who comes first gets one and keeps it, so that no series changes hands.

    Raises:
        ArgumentError: more names than labels.
    """

    def __init__(self, names: Iterable[str] = (), most: int = 50) -> None:
        self._labels = {name: _printable(name) for name in names}
        self._most = most
        self._lock = threading.Lock()
        if isinstance(most, bool) or not isinstance(most, int) or most < len(self._labels):
            raise ArgumentError(f"most: expected an integer >= the {len(self._labels)} names, got {most!r}")

    def __call__(self, tenant: str) -> str:
        """The label of a tenant."""
        label = self._labels.get(tenant)
        if label is not None:
            return label
        with self._lock:
            if len(self._labels) >= self._most:
                return OTHER
            return self._labels.setdefault(tenant, _printable(tenant))

    def total(self, values: Iterable[tuple[str, float]]) -> dict[str, float]:
        """Sums by label of pairs of tenant and value."""
        sums: dict[str, float] = {}
        for tenant, value in values:
            label = self(tenant)
            sums[label] = sums.get(label, 0.0) + value
        return sums


def _printable(name: str) -> str:
    """A name that can be encoded, and that is not `OTHER`, which means something else."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    return f"{shown} (tenant)" if shown == OTHER else shown


def gauge(name: str, text: str, label: str = "", values: "dict[str, float] | float" = 0.0) -> Metric:
    """A gauge with at most one label."""
    if isinstance(values, dict):
        family = GaugeMetricFamily(name, text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        return family
    return GaugeMetricFamily(name, text, value=values)


class CacheCollector(Collector):
    """Metrics of a manager. Nothing is counted on their behalf: a scrape reads `KVCacheManager.stats`.

    Args:
        cache: the manager.
        tenants: which tenants have labels; share it with the scheduler's metrics.
    """

    def __init__(self, cache: KVCacheManager, tenants: TenantLabels | None = None) -> None:
        self._cache = cache
        self._tenants = TenantLabels() if tenants is None else tenants

    def collect(self) -> Iterator[Metric]:
        """Families of the moment."""
        stats = self._cache.stats()
        fmt = cast(PageFormat, self._cache.config.format)
        yield InfoMetricFamily("kvp_build", "Version and format.", value={"version": __version__, "format": fmt.name})
        yield from _memory(stats)
        sums = self._tenants.total(stats.tenant_nbytes.items())
        yield gauge("kvp_tenant_bytes", "Pool bytes that a tenant's pages and codebooks take.", "tenant", sums)
        sums = self._tenants.total(stats.tenant_objects.items())
        yield gauge("kvp_tenant_pages", "Pages and codebooks of a tenant.", "tenant", sums)
        yield gauge("kvp_open_streams", "Streams that are open in the cache.", values=len(stats.streams))
        yield from _counters(stats.tally)


def _memory(stats: CacheStats) -> Iterator[Metric]:
    budget, owned = stats.budget, {kind: float(found.nbytes) for kind, found in stats.objects.items()}
    live = sum(stats.tenant_nbytes.values())
    states = {
        **owned,
        "unattached": live - sum(owned.values()),
        "returning": stats.used_nbytes - live,
        "partial": budget.pool - stats.used_nbytes - stats.free_nbytes,
        "free": float(stats.free_nbytes),
    }
    text = "Pool bytes by what they hold; they add up to kvp_capacity_bytes."
    yield gauge("kvp_pool_bytes", text, "state", states)
    yield gauge("kvp_capacity_bytes", "Bytes of the pool.", values=budget.pool)
    yield gauge("kvp_peak_bytes", "Most pool bytes ever in use.", values=stats.peak_nbytes)
    parked = {"host": float(stats.host_nbytes), "disk": float(stats.disk_nbytes)}
    yield gauge("kvp_parked_bytes", "Bytes of parked streams outside the pool.", "tier", parked)
    parts = {name: float(getattr(budget, name)) for name in ("pool", "staging", "encode", "overhead")}
    yield gauge("kvp_memory_bytes", "The manager's memory by what it is for.", "part", parts)
    counts = {kind: float(found.count) for kind, found in stats.objects.items()}
    yield gauge("kvp_pages", "Pages by format, and codebooks, that streams hold.", "state", counts)
    most = {kind: float(found.capacity) for kind, found in stats.objects.items()}
    yield gauge("kvp_capacity_pages", "Pages of one kind that an otherwise empty pool holds.", "state", most)
    stored = [(stream.nbytes, stream.dense_nbytes) for stream in stats.streams.values()]
    text = "What streams store; shared pages count in each of them."
    yield gauge("kvp_stored_bytes", text, values=sum(nbytes for nbytes, _ in stored))
    text = "What the frames of kvp_stored_bytes would take unquantised."
    yield gauge("kvp_stored_unquantised_bytes", text, values=sum(dense for _, dense in stored))


def _counters(tally: Tally) -> Iterator[Metric]:
    events = CounterMetricFamily("kvp_page_events", "Events of pages by kind.", labels=["kind"])
    moved = CounterMetricFamily("kvp_page_event_bytes", "Bytes of page events by kind.", labels=["kind"])
    for kind in EventKind:
        events.add_metric([kind.value], tally.events[kind])
        moved.add_metric([kind.value], tally.nbytes[kind])
    yield events
    yield moved
    frames = tally.frames
    yield CounterMetricFamily("kvp_committed_frames", "Frames committed.", value=frames[EventKind.COMMIT])
    yield CounterMetricFamily("kvp_demoted_frames", "Frames stored more cheaply.", value=frames[EventKind.DEMOTE])
    transfer = CounterMetricFamily("kvp_transfer_bytes", "Bytes that streams took out and back.", labels=["dir"])
    transfer.add_metric(["out"], tally.nbytes[EventKind.PARK])
    transfer.add_metric(["in"], tally.nbytes[EventKind.RESUME])
    yield transfer
    failed = tally.failures
    for name, text, label, counts in (
        ("kvp_evictions", "Frames that left their streams.", "reason", {"window": frames[EventKind.EVICT]}),
        ("kvp_alloc_failures", "What did not fit.", "reason", {"memory": failed[OutOfMemoryError]}),
        ("kvp_nonfinite", "Commits refused for NaN or infinity.", "tensor", {"kv": failed[NonFiniteError]}),
        ("kvp_integrity_failures", "Books or parked copies found wrong.", "where",
         {"books": failed[IntegrityError], "parked": failed[CorruptedError]}),
        ("kvp_storage_failures", "Failures of a tier.", "tier", {"disk": failed[StorageError]}),
    ):  # fmt: skip
        family = CounterMetricFamily(name, text, labels=[label])
        for value, count in counts.items():
            family.add_metric([value], count)
        yield family


class MetricsServer:
    """A running HTTP endpoint; use it in a ``with`` block or call `close`.

    Attributes:
        url: where to scrape.
        port: where it listens.
    """

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        host, port = server.server_address[:2]
        self.port = int(port)
        self.url = f"http://{host!s}:{port}/metrics"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def serve_metrics(port: int, *collectors: Collector, host: str = "127.0.0.1") -> MetricsServer:
    """Serve metrics over HTTP from a thread of its own.

    Args:
        port: where to listen; 0 for any free port.
        collectors: whose metrics; a `CacheCollector`, a ``SchedulerMetrics``.
        host: address to listen at; there is no authentication, so mind who can reach it.

    Raises:
        ArgumentError: the port is out of range or taken, or two collectors have a metric of the same name.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ArgumentError(f"port: expected 0 to 65535, got {port!r}")
    registry = CollectorRegistry(auto_describe=True)
    try:
        for collector in collectors:
            registry.register(collector)
    except ValueError as error:
        raise ArgumentError(f"collectors: expected different metrics, got one twice: {error}") from None
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ArgumentError(f"port: expected one that is free at {host}, got {port}: {error.strerror}") from None
    return MetricsServer(server, thread)
