"""Settings of a scheduler."""

import math
from dataclasses import dataclass, field
from enum import Enum

from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler.tenant import TenantSpec

__all__ = ["Reservation", "SchedulerConfig"]


class Reservation(Enum):
    """How far ahead memory is promised to a running stream."""

    NEXT_CHUNK = "next chunk"
    """To the end of the chunk that is generated; needs a cache that can park streams."""
    TO_COMPLETION = "to completion"
    """To the end of the stream: nobody is ever parked."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How a scheduler behaves, whatever the policy says.

    Attributes:
        no_preemption: promise memory to completion even if the cache could park streams.
        max_running: most streams that run together; None for as many as memory holds.
        max_parks: how often a stream may be parked without finishing a chunk in between.
        min_chunks: chunks a stream finishes, once it runs, before a policy may park it.
        headroom: share of the pool that admission leaves for the growth of those who run already.
        hold_steps: steps for which no new streams are admitted once someone had to be parked for want of memory, unless
            one leaves or all parked ones are back.
        overtakes: how many streams may overtake one that does not fit; 0 is strict order.
        default_tenant: rights of tenants that were not configured.
        max_tenants: most tenants known at a time.
        chunk_cost: cost units of a chunk, per branch.
        pool_second_cost: cost units of holding the whole pool for a second, and in proportion of less.
        longest_charge: most seconds between two steps that are charged.
        policy_seconds: what a foreign policy may take per step, in a worker; None runs it in place and trusts it.
        policy_strikes: faults after which a policy is switched off.
    """

    no_preemption: bool = False
    max_running: int | None = None
    max_parks: int = 3
    min_chunks: int = 1
    headroom: float = 0.05
    hold_steps: int = 4
    overtakes: int = 0
    default_tenant: TenantSpec = field(default_factory=TenantSpec)
    max_tenants: int = 1024
    chunk_cost: float = 1.0
    pool_second_cost: float = 1.0
    longest_charge: float = 60.0
    policy_seconds: float | None = 0.005
    policy_strikes: int = 5

    def __post_init__(self) -> None:
        least = {"max_parks": 1, "min_chunks": 1, "overtakes": 0, "hold_steps": 0}
        least |= {"max_tenants": 1, "policy_strikes": 1}
        if self.max_running is not None:
            least["max_running"] = 1
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ArgumentError(f"{name}: expected an integer >= {bound}, got {value!r}")
        if not 0 <= self.headroom < 1:
            raise ArgumentError(f"headroom: expected a share from 0 to below 1, got {self.headroom!r}")
        for name in ("chunk_cost", "pool_second_cost", "longest_charge"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ArgumentError(f"{name}: expected a finite number >= 0, got {value!r}")
        if self.policy_seconds is not None and not 0 < self.policy_seconds < math.inf:
            raise ArgumentError(f"policy_seconds: expected a positive number or None, got {self.policy_seconds!r}")
