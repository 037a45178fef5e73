"""What the scheduler promises, held against the simulator: fairness, goodput, attacks, starvation, oversubscription.

Every function returns rows: what, its bound, what was found, whether it held, and how it was found.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from qvg_paged.scheduler import SchedulerConfig
from stress.arrivals import Arrival
from stress.attacks import ATTACKS, VICTIM, attacked, solo
from stress.checker import Checker
from stress.metrics import measure
from stress.models import Costs
from stress.presets import PRESETS
from stress.rated import ServiceLevel, rated_load
from stress.scenario import Scenario
from stress.simulator import simulate
from stress.stats import jain, mean, percentile

__all__ = ["Row", "attacks", "fairness", "goodput", "oversubscription", "starvation"]

WINDOW_CHUNKS = 8


@dataclass(frozen=True)
class Row:
    """A promise.

    Attributes:
        name: what.
        bound: what was promised.
        value: what was found.
        held: whether it is within.
        text: how it was found.
    """

    name: str
    bound: str
    value: str
    held: bool
    text: str


def _backlogged(weights: tuple[float, ...], streams: int, seed: int, frames: Sequence[int] = (60,)) -> Scenario:
    """All tenants have streams in line from the first moment on."""
    rng = Random(f"backlog {frames} {seed}")
    tenants = [f"t{place % len(weights)}" for place in range(streams)]
    trace = tuple(Arrival(0.001 * rng.random(), tenant, rng.choice(frames)) for tenant in tenants)
    return Scenario(
        policy="fair-share", streams=streams, tenants=len(weights), weights=weights, trace=trace, pool_streams=8.0,
        varied=False, config=SchedulerConfig(max_running=8),
    )  # fmt: skip


def _shares(scenario: Scenario, seed: int) -> tuple[list[float], list[float], float, float]:
    """Jain's index of windows, weighted service of each tenant while all were in line, largest gap and U."""
    checker = Checker()
    chunks: dict[str, int] = defaultdict(int)
    start: dict[str, float] = {}
    windows: list[float] = []
    shares: list[float] = []
    for line in simulate(scenario, seed).lines:
        record = json.loads(line)
        checker.take(record)
        if record["kind"] == "report":
            for name in record["committed"]:
                chunks[checker.ledger.streams[name].tenant] += 1
        if record["kind"] != "plan":
            continue
        waiting = {stream.tenant for stream in checker.ledger.live.values() if stream.state != "running"}
        if len(waiting) < scenario.tenants:
            continue
        now = {name: service / weight for name, (service, weight) in checker.services().items()}
        shares = list(now.values())
        if not start:
            start = now
        if len(chunks) == scenario.tenants and min(chunks.values()) >= WINDOW_CHUNKS:
            windows.append(jain([now[name] - start[name] for name in now]))
            start, chunks = now, defaultdict(int)
    assert checker.finish() == []
    return windows, shares, checker.service.largest_gap, checker.service.unit


def fairness(seeds: Sequence[int]) -> list[Row]:
    """Shares of backlogged tenants, equal and weighted, and the largest service gap."""
    least, whole, gaps = 1.0, 1.0, []
    count = 0
    for seed in seeds:
        windows, shares, gap, unit = _shares(_backlogged((1.0,) * 4, 240, seed), seed)
        least, whole, count = min(least, *windows), min(whole, jain(shares)), count + len(windows)
        gaps.append(gap / unit)
    mixed = 1.0
    for seed in seeds:
        windows, _, gap, unit = _shares(_backlogged((1.0,) * 4, 200, seed, frames=(12, 24, 36, 60)), seed)
        mixed = min(mixed, *windows)
        gaps.append(gap / unit)
    worst = 0.0
    for seed in seeds[:2]:
        _, shares, gap, unit = _shares(_backlogged((1.0, 2.0, 3.0, 4.0), 1000, seed), seed)
        worst = max(worst, *(abs(share / mean(shares) - 1) for share in shares))
        gaps.append(gap / unit)
    text = f"4 tenants in line all the time, 8 slots, {len(seeds)} seeds, {count} windows"
    return [
        Row("fairness, windows of >= 8 chunks per tenant", "Jain >= 0.98", f"{least:.4f}", least >= 0.98, text),
        Row(
            "fairness, the same, streams of 4 to 20 chunks",
            "Jain >= 0.98",
            f"{mixed:.4f}",
            mixed >= 0.98,
            f"least of all windows, {len(seeds)} seeds",
        ),
        Row("fairness, whole run", "Jain >= 0.999", f"{whole:.5f}", whole >= 0.999, text),
        Row(
            "weights 1:2:3:4", "within 1 %", f"{worst:.2%}", worst <= 0.01, "1,000 streams of 20 chunks, while all wait"
        ),
        Row("normalised service gap", "<= 2U", f"{max(gaps):.2f} U", max(gaps) <= 2, "largest over these runs"),
    ]


def goodput(seeds: Sequence[int], tell: Callable[[str], None]) -> list[Row]:
    """Fair share against order of arrival, around the rated load."""
    base = replace(PRESETS["steady"], streams=150)
    rated = rated_load(base, seeds[:2], ServiceLevel(), tell=tell)
    rows = []
    for factor in (0.9, 1.0, 1.2):
        found = {}
        for policy in ("fcfs", "fair-share"):
            scenario = replace(base, policy=policy, load=rated * factor)
            runs = [measure(simulate(scenario, seed).lines).summary() for seed in seeds]
            found[policy] = mean([run["chunks_per_second_under_load"] for run in runs])
        ratio = found["fair-share"] / found["fcfs"]
        text = f"{found['fair-share']:.3f} and {found['fcfs']:.3f} chunks/s, {len(seeds)} seeds; rated load {rated:.3f}"
        rows.append(Row(f"goodput against FCFS, {factor} x rated load", ">= 99 %", f"{ratio:.1%}", ratio >= 0.99, text))
    return rows


def attacks(seeds: Sequence[int], tell: Callable[[str], None]) -> list[Row]:
    """A victim's time to first chunk under attack, against a machine of its own of half the size."""
    alone: list[float] = []
    for seed in seeds:
        alone += measure(simulate(solo(seed, streams=100), seed).lines).first_by_tenant[VICTIM]
    rows = []
    for name in ATTACKS:
        under: dict[str, list[float]] = {"fair-share": [], "fcfs": []}
        for policy, seed in [(policy, seed) for policy in under for seed in seeds]:
            tell(f"{name}, {policy}, seed {seed}")
            run = simulate(attacked(name, seed, streams=100, policy=policy), seed)
            under[policy] += measure(run.lines).first_by_tenant[VICTIM]
        ratio, fcfs = (percentile(times, 0.99) / percentile(alone, 0.99) for times in under.values())
        median = percentile(under["fair-share"], 0.5) / percentile(alone, 0.5)
        text = (
            f"p99 {percentile(under['fair-share'], 0.99):.1f} s, alone {percentile(alone, 0.99):.1f} s, "
            f"n = {len(alone)}; median {median:.1f}x; FCFS p99 {fcfs:.0f}x"
        )
        rows.append(Row(f"victim's p99 first chunk, {name}", "<= 1.5x alone", f"{ratio:.2f}x", ratio <= 1.5, text))
    return rows


def starvation(seeds: Sequence[int]) -> list[Row]:
    """The longest wait against what the service gap allows."""
    worst, drained = 0.0, True
    for seed in seeds:
        scenario = _backlogged((1.0,) * 4, 120, seed, frames=(24,))
        scenario = replace(scenario, config=replace(scenario.config, pool_second_cost=0.0))
        run = simulate(scenario, seed)
        drained = drained and run.drained
        worst = max(worst, _wait_over_bound(run.lines, scenario))
    text = "wait for the first chunk / ((chunks before it in its tenant's line + 2U) x seconds per chunk x tenants)"
    return [Row("starvation: longest wait by its bound", "<= 1", f"{worst:.2f}", worst <= 1 and drained, text)]


def _wait_over_bound(lines: Sequence[str], scenario: Scenario) -> float:
    slots = int(scenario.slots)
    pace = scenario.costs.batch(slots) / slots
    unit = slots + 2.0
    ahead: dict[str, int] = defaultdict(int)
    bounds: dict[str, float] = {}
    worst, now, moved = 0.0, 0.0, 0.0
    for line in lines:
        record = json.loads(line)
        if record["kind"] == "submit":
            chunks = -(-record["frames"] // 3)
            bounds[record["id"]] = (ahead[record["tenant"]] + chunks + 2 * unit) * pace * scenario.tenants
            ahead[record["tenant"]] += chunks
        elif record["kind"] == "plan":
            for name in record["admitted"]:
                worst = max(worst, now / (bounds[name] + moved))
        elif record["kind"] == "engine" and record["event"] == "clock":
            now, moved = record["t"], moved + record["moved"]
    return worst


def oversubscription(seeds: Sequence[int], costs: Costs | None = None) -> list[Row]:
    """Twice the worst cases that fit: reservation chunk by chunk against the best admission to completion."""
    costs = costs or Costs()
    base = Scenario(
        policy="fair-share", streams=100, load=2.0, frames=(12, 60), pool_streams=4.0, varied=False,
        config=SchedulerConfig(max_running=8), costs=costs,
    )  # fmt: skip
    name = "2x oversubscription" if costs == Costs() else "2x oversubscription, measured costs"
    static = {}
    for slots in range(1, 9):
        config = replace(base.config, no_preemption=True, max_running=slots)
        runs = [measure(simulate(replace(base, config=config, load=8.0), seed).lines) for seed in seeds]
        static[slots] = mean([run.summary()["chunks_per_second_under_load"] for run in runs])
    best = max(static, key=lambda slots: static[slots])
    rows, previous, cliff, lost = [], None, 0.0, 0
    for load in [0.5 * 1.1**step for step in range(16)]:
        runs = [measure(simulate(replace(base, load=load), seed).lines) for seed in seeds]
        now = mean([run.summary()["chunks_per_second_under_load"] for run in runs])
        cliff = min(cliff, now / previous - 1 if previous else 0.0)
        previous, lost = now, lost + sum(run.lost_streams for run in runs)
    runs = [measure(simulate(replace(base, load=8.0), seed).lines) for seed in seeds]
    ratio = mean([run.summary()["chunks_per_second_under_load"] for run in runs]) / static[best]
    waste = mean([run.summary()["waste_ratio"] for run in runs])
    moved = mean([run.summary()["transfer_ratio"] for run in runs])
    parks = mean([run.summary()["parks_per_chunk"] for run in runs])
    lost += sum(run.lost_streams for run in runs)
    text = (
        f"8 slots on a pool for 4 worst cases, {len(seeds)} seeds; best static admission runs {best}; costs: "
        f"{costs.source}, {costs.chunk:.2f} s a chunk, {costs.chunk_more:.2f} s each further stream"
    )
    rows.append(Row(f"{name}: goodput by best static", ">= 85 %", f"{ratio:.1%}", ratio >= 0.85, text))
    text = f"chunks that came to nothing; besides, transfers take {moved:.1%} of the time, {parks:.3f} parks per chunk"
    rows.append(Row(f"{name}: wasted work", "<= 5 %", f"{waste:.1%}", waste <= 0.05, text))
    text = "largest change of goodput per +10 % load, from 0.5 to 2.1"
    rows.append(Row(f"{name}: no cliff", ">= -20 %", f"{cliff:.1%}", cliff >= -0.2, text))
    rows.append(Row(f"{name}: streams lost", "0", str(lost), lost == 0, "over all these runs"))
    return rows
