"""Tenants that mean harm, as arrivals beside those of a victim that behaves."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from qvg_paged.scheduler import SchedulerConfig
from stress.arrivals import Arrival, arrival_times
from stress.scenario import Scenario

__all__ = ["ATTACKS", "VICTIM", "attacked", "solo"]

VICTIM = "victim"
ATTACKER = "attacker"
SHARE = 2
"""Tenants: the victim is due one part in so many."""

BASE = Scenario(
    policy="fair-share",
    tenants=0,
    frames=(24, 24),
    pool_streams=8.0,
    fps=0.5,
    varied=False,
    config=SchedulerConfig(max_running=8),
)


def _flood(rng: Random, until: float) -> list[Arrival]:
    """Far more streams than fit, all at once and then again and again."""
    times = [round(10.0 * burst + rng.random(), 3) for burst in range(int(until / 10)) for _ in range(20)]
    return [Arrival(at, ATTACKER, 24) for at in times if at < until][:600]


def _cancel_storm(rng: Random, until: float) -> list[Arrival]:
    """Streams that are given up, most of them before or during their first chunk."""
    times = arrival_times("poisson", rng, 2.0, int(2.0 * until))
    return [Arrival(at, ATTACKER, 24, patience=rng.expovariate(1 / 4.0)) for at in times]


def _fill_and_squeeze(rng: Random, until: float) -> list[Arrival]:
    """Streams as long as may be fill the pool; short ones press from behind."""
    fill = [Arrival(0.01 * place, ATTACKER, 120) for place in range(40)]
    squeeze = [Arrival(at, ATTACKER, 3) for at in arrival_times("bursts-3", rng, 1.0, int(until))]
    return sorted([*fill, *squeeze])


ATTACKS: dict[str, Callable[[Random, float], list[Arrival]]] = {
    "flood": _flood,
    "cancel-storm": _cancel_storm,
    "fill-and-squeeze": _fill_and_squeeze,
}
"""Arrivals of an attacker, until a time, by name."""


def _victim(seed: int, streams: int) -> list[Arrival]:
    """A load of half the victim's share."""
    rate = 0.5 * replace(BASE, load=1.0).rate / SHARE
    return [Arrival(at, VICTIM, 24) for at in arrival_times("poisson", Random(f"victim {seed}"), rate, streams)]


def attacked(name: str, seed: int, *, streams: int = 60, policy: str = "fair-share") -> Scenario:
    """The victim on the whole machine, under attack."""
    mine = _victim(seed, streams)
    theirs = ATTACKS[name](Random(f"{name} {seed}"), mine[-1].at)
    return replace(BASE, policy=policy, trace=tuple(sorted([*mine, *theirs], key=lambda a: a.at)))


def solo(seed: int, *, streams: int = 60) -> Scenario:
    """The same victim alone on its share: that part of the pool and of the slots, and of the compute."""
    costs = replace(BASE.costs, chunk=BASE.costs.chunk * SHARE, chunk_more=BASE.costs.chunk_more * SHARE)
    slots = (BASE.config.max_running or SHARE) // SHARE
    return replace(
        BASE,
        trace=tuple(_victim(seed, streams)),
        pool_streams=BASE.pool_streams / SHARE,
        config=SchedulerConfig(max_running=slots),
        costs=costs,
    )
