"""``qvg-paged top``: what a metrics endpoint tells, as values for machines and as tables for people."""

import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qvg_paged.console import table
from qvg_paged.errors import ArgumentError

__all__ = ["Scrape", "fetch", "render", "summarise"]

MAX_NBYTES = 32 << 20
BAR_WIDTH = 44
LATENCIES = {
    "queue_wait": "kvp_queue_wait_seconds",
    "first_chunk": "kvp_time_to_first_chunk_seconds",
    "lateness": "kvp_chunk_lateness_seconds",
    "decision": "kvp_decision_seconds",
}
COUNTERS = {
    "chunks": "kvp_chunks_total",
    "frames": "kvp_frames_total",
    "refused": "kvp_admission_total",
    "parks": "kvp_preemptions_total",
    "resumes": "kvp_resumes_total",
    "stall_seconds": "kvp_stall_seconds_total",
    "chunks_not_committed": "kvp_chunks_not_committed_total",
    "out_of_memory": "kvp_alloc_failures_total",
    "non_finite": "kvp_nonfinite_total",
    "integrity": "kvp_integrity_failures_total",
    "policy_faults": "kvp_policy_faults_total",
}
TENANT_GAUGES = {
    "bytes": "kvp_tenant_bytes",
    "promised_bytes": "kvp_tenant_promised_bytes",
    "streams": "kvp_tenant_streams",
    "service": "kvp_tenant_service",
}


@dataclass(frozen=True)
class Scrape:
    """Samples of an endpoint.

    Attributes:
        at: seconds, monotonic.
        samples: labels and value of each sample, by name.
    """

    at: float
    samples: Mapping[str, list[tuple[Mapping[str, str], float]]]

    def value(self, name: str) -> float | None:
        """The only sample of that name, or None."""
        found = self.samples.get(name)
        return found[0][1] if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by value of a label."""
        sums: dict[str, float] = {}
        for labels, value in self.samples.get(name, []):
            key = labels.get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def total(self, name: str) -> float | None:
        """Sum of all samples of that name, or None if there are none; of requests, the refused ones."""
        found = self.samples.get(name, [])
        if name == COUNTERS["refused"]:
            found = [(labels, value) for labels, value in found if labels.get("outcome") == "refused"]
        return sum(value for _, value in found) if found else None

    def quantile(self, name: str, share: float) -> float | None:
        """A quantile of a histogram, interpolated in its buckets; None without observations."""
        counts = self.by(f"{name}_bucket", "le")
        buckets = sorted((float(bound), count) for bound, count in counts.items())
        if not buckets or not buckets[-1][1]:
            return None
        rank, low, below = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank:
                if math.isinf(bound) or count == below:
                    return low
                return low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return low


def fetch(url: str, timeout: float = 5.0) -> Scrape:
    """Ask an endpoint.

    Raises:
        ArgumentError: it does not answer, or not with metrics.
    """
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("no http:// or https:// in front")
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            text = answer.read(MAX_NBYTES).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ArgumentError(f"url: expected an endpoint of metrics, got {url!r}: {error}") from None
    samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    if not any(name.startswith("kvp_") for name in samples):
        raise ArgumentError(f"url: expected metrics of qvg-paged, got {len(samples)} others from {url!r}")
    return Scrape(time.monotonic(), samples)


def summarise(now: Scrape, before: Scrape | None = None) -> dict[str, Any]:
    """What there is to see, as plain values; rates per second since `before`, if that is given."""
    return {
        "v": 1,
        "pool": {
            "capacity_bytes": now.value("kvp_capacity_bytes"),
            "states": now.by("kvp_pool_bytes", "state"),
            "parked_bytes": now.by("kvp_parked_bytes", "tier"),
            "peak_bytes": now.value("kvp_peak_bytes"),
            "stored_bytes": now.value("kvp_stored_bytes"),
            "stored_unquantised_bytes": now.value("kvp_stored_unquantised_bytes"),
        },
        "streams": now.by("kvp_streams", "state"),
        "waiting": {reason: count for reason, count in now.by("kvp_waiting_streams", "reason").items() if count},
        "oldest_wait_seconds": now.value("kvp_oldest_wait_seconds"),
        "ended": now.by("kvp_streams_ended_total", "state"),
        "totals": {key: now.total(name) for key, name in COUNTERS.items()},
        "per_second": {key: _rate(now, before, name) for key, name in COUNTERS.items()},
        "latency_seconds": {
            key: {"p50": now.quantile(name, 0.5), "p99": now.quantile(name, 0.99)} for key, name in LATENCIES.items()
        },
        "fairness": {"jain": now.value("kvp_jain_ratio"), "gap": now.value("kvp_service_gap_ratio")},
        "policy_disabled": now.value("kvp_policy_disabled"),
        "tenants": _tenants(now, before),
    }


def _rate(now: Scrape, before: Scrape | None, name: str) -> float | None:
    """A counter's increase per second; one that fell has started anew."""
    if before is None or now.at <= before.at:
        return None
    last = now.total(name)
    first = before.total(name) or 0.0
    return None if last is None else (last - first if last >= first else last) / (now.at - before.at)


def _tenants(now: Scrape, before: Scrape | None) -> dict[str, dict[str, float | None]]:
    gauges = {key: now.by(name, "tenant") for key, name in TENANT_GAUGES.items()}
    chunks = now.by("kvp_chunks_total", "tenant")
    earlier = before.by("kvp_chunks_total", "tenant") if before else {}
    rows: dict[str, dict[str, float | None]] = {}
    for tenant in sorted({*chunks, *(name for values in gauges.values() for name in values)}):
        row: dict[str, float | None] = {key: values.get(tenant) for key, values in gauges.items()}
        row["chunks"] = chunks.get(tenant)
        gained = chunks.get(tenant, 0.0) - earlier.get(tenant, 0.0)
        row["chunks_per_second"] = None if before is None else max(0.0, gained) / max(now.at - before.at, 1e-9)
        rows[tenant] = row
    return rows


def render(summary: Mapping[str, Any]) -> Group:
    """The same for people."""
    parts: list[Text | Table] = []
    pool = summary["pool"]
    if pool["capacity_bytes"]:
        parts += [_bar(pool), _states(pool)]
    if summary["streams"]:
        parts += [_streams(summary), _latencies(summary)]
    if summary["tenants"]:
        columns = ["tenant", "streams", "MB", "promised MB", "service", "chunks", "chunks/s"]
        rows = [
            [_plain(name), *(_cell(row[key], scale) for key, scale in _TENANT_COLUMNS)]
            for name, row in summary["tenants"].items()
        ]
        parts.append(table("Tenants", columns, rows))
    return Group(*parts)


_TENANT_COLUMNS = (
    ("streams", 1.0), ("bytes", 1e6), ("promised_bytes", 1e6), ("service", 1.0), ("chunks", 1.0),
    ("chunks_per_second", 1.0),
)  # fmt: skip


def _plain(name: str) -> str:
    """A tenant's name, unable to move the cursor or to be taken for markup."""
    return name.encode("unicode_escape").decode().replace("[", "\\[")[:40]


def _cell(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    value /= scale
    return f"{value:.0f}" if scale == 1.0 and value == int(value) else f"{value:.1f}"


def _bar(pool: Mapping[str, Any]) -> Text:
    capacity = pool["capacity_bytes"]
    free = pool["states"].get("free", 0.0)
    filled = round(BAR_WIDTH * (1 - free / capacity))
    style = "red" if free < 0.05 * capacity else "yellow" if free < 0.2 * capacity else "green"
    bar = Text("pool  ")
    bar.append("█" * filled, style).append("░" * (BAR_WIDTH - filled), "dim")
    return bar.append(
        f"  {(capacity - free) / 1e6:.1f} of {capacity / 1e6:.1f} MB, peak {pool['peak_bytes'] / 1e6:.1f}"
    )


def _states(pool: Mapping[str, Any]) -> Text:
    shown = [f"{state} {nbytes / 1e6:.1f}" for state, nbytes in pool["states"].items() if nbytes]
    shown += [f"parked on {tier} {nbytes / 1e6:.1f}" for tier, nbytes in pool["parked_bytes"].items() if nbytes]
    dense, stored = pool["stored_unquantised_bytes"], pool["stored_bytes"]
    ratio = f"; stored at 1/{dense / stored:.2f} of the unquantised size" if stored else ""
    return Text(f"      MB: {', '.join(shown)}{ratio}")


def _streams(summary: Mapping[str, Any]) -> Text:
    states = ", ".join(f"{count:.0f} {state}" for state, count in summary["streams"].items())
    ended = ", ".join(f"{count:.0f} {state}" for state, count in summary["ended"].items())
    why = ", ".join(f"{reason} {count:.0f}" for reason, count in summary["waiting"].items())
    line = Text(f"streams  {states}; ended: {ended}")
    if why:
        line.append(f"; in line for: {why}, at most {_seconds(summary['oldest_wait_seconds'])}", "yellow")
    if summary["policy_disabled"]:
        line.append("; the policy is switched off", "bold red")
    return line


def _latencies(summary: Mapping[str, Any]) -> Table:
    rows = [
        [key.replace("_", " "), _seconds(values["p50"]), _seconds(values["p99"])]
        for key, values in summary["latency_seconds"].items()
    ]
    grid = table("Since the start", ["", "p50", "p99", "", "total", "per second"], [])
    grid.columns[3].justify = "left"
    counters = [
        [key.replace("_", " "), _cell(total), _cell(summary["per_second"][key])]
        for key, total in summary["totals"].items()
    ]
    fairness = summary["fairness"]
    for key in ("jain", "gap"):
        rows.append([f"fairness: {key}", _cell(fairness[key]) if fairness[key] is None else f"{fairness[key]:.3f}", ""])
    for index in range(max(len(rows), len(counters))):
        left = rows[index] if index < len(rows) else [""] * 3
        grid.add_row(*left, *(counters[index] if index < len(counters) else [""] * 3))
    return grid


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
