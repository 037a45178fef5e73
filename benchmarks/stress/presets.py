"""Scenarios with a name."""

from qvg_paged.scheduler import SchedulerConfig
from stress.scenario import Scenario

__all__ = ["PRESETS"]

_SLOTS = SchedulerConfig(max_running=8)

PRESETS = {
    "steady": Scenario(policy="fair-share", streams=100, load=0.8, pool_streams=8.0, fps=0.5, config=_SLOTS),
    "bursts": Scenario(
        policy="fair-share", streams=100, load=0.8, arrivals="bursts-13", pool_streams=8.0, fps=0.5, config=_SLOTS
    ),
    "diurnal": Scenario(
        policy="fair-share", streams=200, load=0.9, arrivals="diurnal", pool_streams=8.0, fps=0.5, config=_SLOTS
    ),
    "herd": Scenario(
        policy="fair-share", streams=128, load=0.9, arrivals="herd", pool_streams=8.0, fps=0.5, config=_SLOTS
    ),
    "oversubscribed": Scenario(policy="fair-share", streams=100, load=1.2, pool_streams=3.0, fps=0.5),
    "ladder": Scenario(
        policy="fair-share", streams=100, load=1.2, pool_streams=3.0, fps=0.5, ladder="tails", config=_SLOTS
    ),
    "retrieval": Scenario(
        policy="fair-share", streams=100, load=1.2, pool_streams=3.0, fps=0.5, ladder="spans", retrieval_frames=24,
        frames=(48, 120), config=_SLOTS,
    ),
    "cannot-park": Scenario(policy="fair-share", streams=100, load=0.8, pool_streams=6.0, fps=0.5, can_park=False),
    "many-tenants": Scenario(
        policy="fair-share", streams=400, tenants=100, load=1.0, pool_streams=8.0, fps=0.5, config=_SLOTS
    ),
    "weights": Scenario(
        policy="fair-share", streams=200, tenants=4, load=4.0, pool_streams=8.0, weights=(1.0, 2.0, 3.0, 4.0),
        config=_SLOTS,
    ),
    "faults": Scenario(
        policy="fair-share", streams=100, load=0.8, pool_streams=4.0, fps=0.5,
        faults={"chunk fails": 0.05, "stream fails": 0.02, "out of memory": 0.05, "cancel running": 0.05,
                "cancel queued": 0.05, "cancel parked": 0.05, "park fails": 0.05, "bit flipped": 0.05,
                "pool shrinks": 0.05},
    ),
}  # fmt: skip
"""By name; besides these there are the attacks of `stress.attacks` and ``swarm``, which draws everything."""
