"""What a run is made of: drawn from a seed (swarm sampling), or written down."""

from dataclasses import dataclass, field, replace
from random import Random

from qvg_paged.config import QualityFloor, Rung, Window
from qvg_paged.scheduler import SchedulerConfig, TenantSpec
from stress.arrivals import ARRIVALS, Arrival
from stress.faults import FAULTS, HOSTILE
from stress.ladder_cache import LADDERS
from stress.models import DRAWN, MODELS, Costs

__all__ = ["POLICIES", "Scenario", "draw_scenario", "tenant_specs"]

POLICIES = ("fcfs", "priority", "fair-share", "earliest-deadline")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run.

    Attributes:
        model: name in `MODELS`.
        policy: one of `POLICIES` or of `HOSTILE`, an installed one, or ``module:Class``.
        streams, tenants: how many.
        arrivals: name in `ARRIVALS`; `load` scales their rate to what the pool can serve, roughly.
        trace: arrivals that are followed instead.
        frames: shortest and longest stream.
        whole_chunks: whether streams end with a whole chunk.
        varied: whether streams differ in priority and number of branches.
        pool_streams: size of the pool, in longest streams at their worst.
        host_streams: the same for the host.
        can_park: whether the cache can.
        ladder: name in `LADDERS` if streams can be stored more cheaply before, or empty; needs `can_park`.
        retrieval_frames: frames that streams keep past the visible ones, of which the ladder takes some.
        weights: of tenants, in turn.
        ceiling: share of the pool that every tenant may hold, or None.
        floor: share of the pool that the first tenant gets back on demand.
        fps: play-out rate of streams in latent frames per second, or None.
        faults: chance of each fault per step.
        least_events, most_steps: streams keep coming until so much has happened; a run ends after so many steps.
        config: of the scheduler.
        costs: of the engine.
    """

    model: str = "self-forcing"
    policy: str = "fcfs"
    streams: int = 40
    tenants: int = 4
    arrivals: str = "poisson"
    load: float = 1.0
    trace: tuple[Arrival, ...] = ()
    frames: tuple[int, int] = (6, 60)
    whole_chunks: bool = False
    varied: bool = True
    pool_streams: float = 4.0
    host_streams: float = 1000.0
    can_park: bool = True
    ladder: str = ""
    retrieval_frames: int = 0
    weights: tuple[float, ...] = (1.0,)
    ceiling: float | None = None
    floor: float = 0.0
    fps: float | None = None
    faults: dict[str, float] = field(default_factory=dict)
    least_events: int = 0
    most_steps: int = 20_000
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    costs: Costs = field(default_factory=Costs)

    @property
    def window(self) -> Window:
        """What its streams keep."""
        return replace(MODELS[self.model].window, retrieval_frames=self.retrieval_frames)

    @property
    def slots(self) -> float:
        """Streams that run together if all is as intended."""
        most = self.config.max_running
        return max(1.0, self.pool_streams if most is None else min(most, self.pool_streams))

    @property
    def rate(self) -> float:
        """Streams per second that arrive."""
        chunks = sum(self.frames) / 2 / MODELS[self.model].model.frames_per_chunk
        return self.load * self.slots / (chunks * self.costs.batch(max(1, round(self.slots))))


def tenant_specs(scenario: Scenario, pool_nbytes: int) -> dict[str, TenantSpec]:
    """Rights of the tenants of a scenario."""
    return {
        f"t{index}": TenantSpec(
            weight=scenario.weights[index % len(scenario.weights)],
            ceiling_nbytes=None if scenario.ceiling is None else int(scenario.ceiling * pool_nbytes),
            floor_nbytes=int(scenario.floor * pool_nbytes) if index == 0 else 0,
            max_queued=scenario.config.default_tenant.max_queued,
            quality=QualityFloor(rung=Rung.TAIL) if scenario.ladder and index % 4 == 1 else QualityFloor(),
        )
        for index in range(scenario.tenants)
    }


def draw_scenario(seed: int, least_events: int = 0) -> Scenario:
    """The scenario of a seed: every knob and every fault rate is drawn."""
    rng = Random(f"scenario {seed}")
    hostile = rng.random() < 0.25
    faults = {name: rng.choice([0.02, 0.1]) for name in FAULTS if rng.random() < 0.4}
    chunk = MODELS[model := rng.choice(DRAWN)].model.frames_per_chunk
    scenario = Scenario(
        model=model,
        policy=rng.choice(sorted(HOSTILE) if hostile else POLICIES),
        streams=rng.choice([20, 40, 60]),
        tenants=rng.choice([1, 2, 4, 8]),
        arrivals=rng.choice(sorted(ARRIVALS)),
        load=rng.choice([0.7, 1.0, 2.0]),
        frames=(chunk, chunk * rng.choice([4, 12, 20])),
        pool_streams=rng.choice([1.2, 2.5, 5.0, 9.0]),
        host_streams=rng.choice([0.0, 2.0, 1000.0, 1000.0, 1000.0]),
        can_park=rng.random() < 0.8,
        weights=rng.choice([(1.0,), (1.0, 2.0, 3.0, 4.0)]),
        ceiling=rng.choice([None, None, 0.9]),
        floor=rng.choice([0.0, 0.0, 0.4]),
        fps=rng.choice([None, 1.0, 4.0]),
        faults=faults,
        least_events=least_events,
        config=SchedulerConfig(
            no_preemption=rng.random() < 0.2,
            max_running=rng.choice([None, None, 2, 6]),
            overtakes=rng.choice([0, 0, 8]),
            headroom=rng.choice([0.0, 0.05]),
            min_chunks=rng.choice([1, 1, 3]),
            default_tenant=TenantSpec(max_queued=rng.choice([8, 1024])),
            policy_strikes=rng.choice([3, 1000]),
        ),
    )
    ladder = rng.choice(["", *LADDERS])
    if not ladder or not scenario.can_park:
        return scenario
    return replace(scenario, ladder=ladder, retrieval_frames=rng.choice([0, 0, 2 * MODELS[model].span_frames]))
