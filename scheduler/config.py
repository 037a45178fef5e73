"""Settings of a scheduler."""

import math
from dataclasses import dataclass, field
from enum import Enum

from qvg_paged.errors import ArgumentError
from qvg_paged.scheduler.checks import check_integer, check_kind, check_number, shown
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
        exchange_share: for how many streams, as a share of those that run, a policy may have others parked in one step;
            for one in any case.
        headroom: share of the pool that admission leaves for the growth of those who run already.
        hold_steps: steps for which no new streams are admitted once someone had to be parked for want of memory, unless
            one leaves or all parked ones are back.
        squeeze_to_admit: store running streams more cheaply so that the first in line fits; if not, only what runs
            already makes them be squeezed.
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
    exchange_share: float = 0.25
    headroom: float = 0.05
    hold_steps: int = 4
    squeeze_to_admit: bool = True
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
            check_integer(name, getattr(self, name), bound)
        if not isinstance(self.no_preemption, bool):
            raise ArgumentError(f"no_preemption: expected True or False, got {shown(self.no_preemption)}")
        check_number("exchange_share", self.exchange_share, 0, 1, "a share from 0 to 1")
        check_number("headroom", self.headroom, 0, math.nextafter(1, 0), "a share from 0 to below 1")
        check_kind("default_tenant", self.default_tenant, TenantSpec)
        for name in ("chunk_cost", "pool_second_cost", "longest_charge"):
            check_number(name, getattr(self, name), 0, 1e12, "a finite number from 0 to 1e12")
        if self.policy_seconds is not None:
            check_number("policy_seconds", self.policy_seconds, 1e-9, 1e9, "a positive number up to 1e9, or None")
