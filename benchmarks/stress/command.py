"""``qvg-paged stress``: runs a scenario over seeds, checks every log, and writes what came of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler import load_policy
from stress.arrivals import ARRIVALS, read_trace
from stress.attacks import ATTACKS, attacked
from stress.calibration import measured_costs
from stress.coverage import print_matrix, rows
from stress.faults import FAULTS, HOSTILE
from stress.ladder_cache import LADDERS
from stress.metrics import Metrics, measure
from stress.models import MODELS
from stress.on_manager import run_on_manager
from stress.presets import PRESETS
from stress.rated import ServiceLevel, curve, rated_load
from stress.run import Run
from stress.scenario import Scenario, draw_scenario
from stress.series import curves
from stress.shrink import Failure, find_failure, shrink
from stress.simulator import simulate
from stress.stats import bootstrap, mean, percentile

__all__ = ["BACKENDS", "StressOptions", "execute", "make_scenario", "names"]

BACKENDS = ("simulator", "manager")
GEOMETRIES = ("reduced", "real")
SWARM = "swarm"
Tell = Callable[[str, int, int], None]


def names() -> str:
    """Of all scenarios."""
    return ", ".join([*PRESETS, *ATTACKS, SWARM])


@dataclass(frozen=True, kw_only=True)
class StressOptions:
    """Options of the command; None leaves the scenario's own setting.

    Attributes:
        scenario: a preset, an attack, or ``swarm``, which draws everything from the seed.
        seeds: how many, from `seed` on.
        frames: shortest and longest stream, as ``6-60``.
        ladder: ``tails``, ``spans`` or ``none``.
        trace: CSV file with arrivals.
        costs: result file of ``qvg-paged bench`` whose measurements the simulated engine costs.
        faults: names, each with ``=rate`` if wanted, or ``all``.
        oversubscription: summed worst cases of as many streams as have slots, by the pool.
        load_curve, rated: whether to measure these, too.
        backend: ``simulator``, or ``manager`` for the real cache.
        device, geometry: of the manager; ``reduced`` or ``real``.
    """

    scenario: str = "steady"
    seed: int = 0
    seeds: int = 5
    streams: int | None = None
    tenants: int | None = None
    arrivals: str | None = None
    frames: str | None = None
    ladder: str | None = None
    trace: Path | None = None
    load: float | None = None
    model: str | None = None
    pool_streams: float | None = None
    oversubscription: float | None = None
    policy: str | None = None
    max_running: int | None = None
    fps: float | None = None
    costs: Path | None = None
    chunk_seconds: float | None = None
    chunk_more_seconds: float | None = None
    faults: Sequence[str] = ()
    least_events: int = 0
    load_curve: bool = True
    rated: bool = False
    backend: str = "simulator"
    device: str = "cpu"
    geometry: str = "reduced"
    out: Path = field(default_factory=lambda: Path("runs/stress"))


def make_scenario(options: StressOptions, seed: int) -> Scenario:
    """The scenario of one seed.

    Raises:
        ArgumentError: an option does not fit; the message says what does.
    """
    name = options.scenario
    if name not in (*PRESETS, *ATTACKS, SWARM):
        raise ArgumentError(f"scenario: expected one of {names()}, got {name!r}")
    base = PRESETS.get(name) or (draw_scenario(seed) if name == SWARM else attacked(name, seed))
    changes: dict[str, Any] = {"least_events": options.least_events} if options.least_events else {}
    for key in ("streams", "tenants", "arrivals", "load", "model", "pool_streams", "policy", "fps"):
        value = getattr(options, key)
        if value is not None:
            changes[key] = value
    if options.frames is not None:
        changes["frames"] = _frames(options.frames)
    if options.ladder is not None:
        changes["ladder"] = _ladder(options.ladder)
    if options.trace is not None:
        changes["trace"] = tuple(read_trace(options.trace))
    elif base.trace and changes.keys() & {"streams", "tenants", "arrivals", "load"}:
        changes["trace"] = ()
        changes.setdefault("tenants", max(1, base.tenants))
    if options.max_running is not None:
        changes["config"] = replace(base.config, max_running=options.max_running)
    costs = {"chunk": options.chunk_seconds, "chunk_more": options.chunk_more_seconds}
    model = changes.get("model", base.model)
    measured = measured_costs(options.costs, model) if options.costs is not None and model in MODELS else base.costs
    changes["costs"] = replace(measured, **{key: value for key, value in costs.items() if value is not None})
    scenario = replace(base, **changes)
    if options.oversubscription is not None:
        scenario = replace(scenario, pool_streams=scenario.slots / options.oversubscription)
    if options.faults:
        scenario = replace(scenario, faults=_faults(options.faults))
    _check(scenario, len(scenario.trace))
    return scenario


def _frames(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1] <= 1_000_000:
        raise ArgumentError(f"frames: expected the shortest and the longest stream, as in 6-60, got {text!r}")
    return found


def _ladder(name: str) -> str:
    if name not in ("none", *LADDERS):
        raise ArgumentError(f"ladder: expected none or one of {', '.join(LADDERS)}, got {name!r}")
    return "" if name == "none" else name


def _faults(chosen: Sequence[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for item in chosen:
        name, _, rate = item.partition("=")
        for fault in FAULTS if name == "all" else (name,):
            if fault not in FAULTS:
                raise ArgumentError(f"faults: expected all or one of {', '.join(FAULTS)}, got {fault!r}")
            try:
                rates[fault] = float(rate or 0.05)
            except ValueError:
                rates[fault] = -1.0
            if not 0 <= rates[fault] <= 1:
                raise ArgumentError(f"faults: expected a rate from 0 to 1 after {fault}=, got {rate!r}")
    return rates


def _check(scenario: Scenario, traced: int) -> None:
    streams = traced or scenario.streams
    bounds: list[tuple[str, float, float, float]] = [
        ("streams", streams, 1, 100_000 if traced else 1000),
        ("load", scenario.load, 0.01, 100),
        ("pool_streams", scenario.pool_streams, 0.1, 10_000),
        ("chunk_seconds", scenario.costs.chunk, 1e-6, 1e6),
        ("chunk_more_seconds", scenario.costs.chunk_more, 0, 1e6),
    ]
    if not traced:
        bounds.append(("tenants", scenario.tenants, 1, 100))
    for name, value, least, most in bounds:
        if not least <= value <= most:
            raise ArgumentError(f"{name}: expected {least} to {most}, got {value}")
    if scenario.arrivals not in ARRIVALS:
        raise ArgumentError(f"arrivals: expected one of {', '.join(ARRIVALS)}, got {scenario.arrivals!r}")
    if scenario.model not in MODELS:
        raise ArgumentError(f"model: expected one of {', '.join(MODELS)}, got {scenario.model!r}")
    if scenario.policy not in HOSTILE:
        load_policy(scenario.policy)


def execute(options: StressOptions, tell: Tell = lambda *_: None) -> dict[str, Any]:
    """Run, check and measure; the results of a result file. Events go to ``events.jsonl`` in ``options.out``.

    Args:
        options: what to run.
        tell: told what is being done, how much of it is done and how much there is.

    Raises:
        ArgumentError: an option does not fit.
    """
    if options.backend not in BACKENDS:
        raise ArgumentError(f"backend: expected one of {', '.join(BACKENDS)}, got {options.backend!r}")
    if options.geometry not in GEOMETRIES:
        raise ArgumentError(f"geometry: expected one of {', '.join(GEOMETRIES)}, got {options.geometry!r}")
    seeds = range(options.seed, options.seed + options.seeds)
    scenarios = {seed: make_scenario(options, seed) for seed in seeds}
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[tuple[Run, Metrics]] = []
    failures: list[Failure] = []
    for place, (seed, scenario) in enumerate(scenarios.items()):
        tell("seeds", place, len(scenarios))
        failure = _one(options, scenario, seed, runs, first=place == 0)
        if failure is not None:
            failures.append(shrink(failure) if options.backend == "simulator" else failure)
    tell("seeds", len(scenarios), len(scenarios))
    return _results(options, scenarios[options.seed], runs, failures, tell)


def _one(
    options: StressOptions, scenario: Scenario, seed: int, runs: list[tuple[Run, Metrics]], *, first: bool
) -> Failure | None:
    if options.backend == "manager":
        run = run_on_manager(scenario, seed, options.device, real=options.geometry == "real")
    else:
        try:
            run = simulate(scenario, seed)
        except Exception:  # whatever it is, it is found again and told
            return find_failure(scenario, seed)
    metrics = measure(run.lines)
    if first:
        (options.out / "events.jsonl").write_text("\n".join(run.lines) + "\n")
    runs.append((run, metrics))
    if metrics.violations:
        bad = metrics.violations[0]
        step = sum('"kind":"plan"' in line for line in run.lines[: bad.seq + 1])
        return Failure(scenario, seed, step, bad.invariant, bad.text)
    return None if run.drained else Failure(scenario, seed, run.steps, "drained", "streams are left")


def _results(
    options: StressOptions,
    scenario: Scenario,
    runs: Sequence[tuple[Run, Metrics]],
    failures: Sequence[Failure],
    tell: Tell,
) -> dict[str, Any]:
    fired: Counter[tuple[str, str]] = Counter()
    for run, _ in runs:
        fired.update(run.fired)
    per_seed = [_row(run, metrics) for run, metrics in runs]
    summary = {}
    for name in per_seed[0]["metrics"] if per_seed else ():
        values = [row["metrics"][name] for row in per_seed]
        low, high = bootstrap(values)
        summary[name] = {"mean": mean(values), "low": low, "high": high, "n": len(values)}
    first = runs[0][1] if runs else Metrics()
    events = sum(run.events for run, _ in runs)
    found: dict[str, Any] = {
        "headline": f"Scenario {options.scenario} with policy {scenario.policy} on the {options.backend}: {len(runs)} "
        f"seeds, {events} events, {sum(fired.values())} faults, {len(failures)} failures.",
        "scenario": scenario,
        "runs": per_seed,
        "summary": summary,
        "failures": [vars(failure) for failure in failures],
        "coverage": rows(fired),
        "coverage_text": print_matrix(fired),
        "curves": curves(runs[0][0].lines) if runs else curves([]),
        "distributions": {
            key: _thinned(getattr(first, key)) for key in ("first_chunk_seconds", "chunk_seconds", "lateness_seconds")
        },
        "load_curve": [],
    }
    if options.backend == "simulator" and not scenario.trace:
        seeds = range(options.seed, options.seed + min(3, options.seeds))
        if options.load_curve:
            tell("load-goodput curve", 0, 1)
            found["load_curve"] = curve(scenario, seeds)
            tell("load-goodput curve", 1, 1)
        if options.rated:
            tell("rated load", 0, 1)
            found["rated_load"] = rated_load(scenario, seeds, ServiceLevel())
            tell("rated load", 1, 1)
    return found


def _row(run: Run, metrics: Metrics) -> dict[str, Any]:
    decisions = run.decision_seconds
    timing = {
        "decision_p50_seconds": percentile(decisions, 0.5),
        "decision_p99_seconds": percentile(decisions, 0.99),
    }
    return {
        "seed": run.seed,
        "digest": run.digest,
        "events": run.events,
        "steps": run.steps,
        "seconds": run.seconds,
        "drained": run.drained,
        "violations": len(metrics.violations),
        "metrics": {**metrics.summary(), **timing},
    }


def _thinned(values: Sequence[float], most: int = 500) -> list[float]:
    """At most so many of them, in order, the extremes kept."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    return [ordered[place * (len(ordered) - 1) // (most - 1)] for place in range(most)]
