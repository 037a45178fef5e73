"""How much load a configuration carries: the service level, the load-goodput curve and the rated load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stress.metrics import Metrics, measure
from stress.scenario import Scenario
from stress.simulator import simulate
from stress.stats import mean, percentile

__all__ = ["LOADS", "ServiceLevel", "curve", "rated_load"]

LOADS = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 2.0)


@dataclass(frozen=True)
class ServiceLevel:
    """What viewers are promised.

    Attributes:
        continuous_play: least share of streams whose viewer never waits.
        stall_ratio: most of the viewing time that is waiting.
        lateness_seconds: latest that the 99th percentile of chunks comes for its viewer.
        first_chunk_seconds: most that the 99th percentile of first chunks takes beyond a chunk in a full batch; None
            for no such promise.
    """

    continuous_play: float = 0.99
    stall_ratio: float = 0.005
    lateness_seconds: float = 0.0
    first_chunk_seconds: float | None = None

    def holds(self, metrics: Metrics, batch_seconds: float) -> bool:
        """Whether a run kept it."""
        summary = metrics.summary()
        late = percentile(metrics.first_chunk_seconds, 0.99) - batch_seconds
        return (
            summary["continuous_play_ratio"] >= self.continuous_play
            and summary["stall_ratio"] <= self.stall_ratio
            and summary["lateness_p99_seconds"] <= self.lateness_seconds
            and (self.first_chunk_seconds is None or late <= self.first_chunk_seconds)
        )


def _holds(scenario: Scenario, load: float, seeds: Sequence[int], level: ServiceLevel) -> bool:
    batch = scenario.costs.batch(max(1, round(scenario.slots)))
    return all(level.holds(measure(simulate(replace(scenario, load=load), seed).lines), batch) for seed in seeds)


def rated_load(
    scenario: Scenario,
    seeds: Sequence[int],
    level: ServiceLevel,
    *,
    most: float = 2.0,
    precision: float = 0.02,
    tell: Callable[[str], None] = lambda _: None,
) -> float:
    """The largest Poisson load at which every seed holds the service level, by bisection; 0 if none does.

    1 is the load at which all slots work all the time.
    """
    scenario = replace(scenario, arrivals="poisson", trace=(), faults={})
    least = 0.0
    while most - least > precision:
        load = (least + most) / 2
        held = _holds(scenario, load, seeds, level)
        tell(f"load {load:.3f}: {'held' if held else 'missed'}")
        least, most = (load, most) if held else (least, load)
    return least


def curve(scenario: Scenario, seeds: Sequence[int], loads: Sequence[float] = LOADS) -> list[dict[str, float]]:
    """Means over seeds of the goodput and of what it costs, at each load."""
    rows = []
    for load in loads:
        at_load = replace(scenario, load=load, trace=(), faults={})
        found = [measure(simulate(at_load, seed).lines).summary() for seed in seeds]
        names = ("goodput_streams_per_second", "goodput_chunks_per_second", "chunks_per_second_under_load",
                 "first_chunk_p99_seconds", "stall_ratio", "waste_ratio", "parks_per_chunk",
                 "lost_streams")  # fmt: skip
        rows.append({"load": load} | {name: mean([summary[name] for summary in found]) for name in names})
    return rows
