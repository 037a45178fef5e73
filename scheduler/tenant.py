"""Tenants: what they may hold, what they are due, what they have had."""

from dataclasses import dataclass, field
from typing import Any

from qvg_paged.config import QualityFloor
from qvg_paged.scheduler.checks import MAX_COUNT, check_fps, check_integer, check_kind, check_number

__all__ = ["Tenant", "TenantSpec"]

MAX_NBYTES = 1 << 63


@dataclass(frozen=True, kw_only=True)
class TenantSpec:
    """Rights of a tenant; may be changed while its streams run.

    Attributes:
        weight: share of service under contention, relative to other tenants'.
        floor_nbytes: pool bytes it gets back from others as soon as it has use for them.
        ceiling_nbytes: most pool bytes its running streams are promised together; None for no limit.
        max_queued: most streams that wait for admission; more are refused.
        priority: added to the priority of its streams.
        deadline_fps: play-out rate of its streams that name none.
        quality: how far its streams may be squeezed when memory is short.
    """

    weight: float = 1.0
    floor_nbytes: int = 0
    ceiling_nbytes: int | None = None
    max_queued: int = 1024
    priority: int = 0
    deadline_fps: float | None = None
    quality: QualityFloor = field(default_factory=QualityFloor)

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 1e-6, 1e6, "a number from 1e-6 to 1e6")
        check_integer("floor_nbytes", self.floor_nbytes, 0, MAX_NBYTES)
        if self.ceiling_nbytes is not None:
            check_integer("ceiling_nbytes", self.ceiling_nbytes, max(1, self.floor_nbytes), MAX_NBYTES)
        check_integer("max_queued", self.max_queued, 0)
        check_integer("priority", self.priority, -MAX_COUNT)
        check_fps(self.deadline_fps)
        check_kind("quality", self.quality, QualityFloor)


@dataclass(frozen=True)
class Tenant:
    """A tenant's rights and its account.

    Attributes:
        spec: its rights.
        configured: whether someone set them; others are forgotten when idle and room is needed.
        service: cost units it has had.
        virtual_time: service by weight, lifted when it comes back from having nothing in line: idle time is no credit.
        weight: its share of service, as in a `TenantView`.
    """

    spec: TenantSpec
    configured: bool = False
    service: float = 0.0
    virtual_time: float = 0.0
    weight: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.__dict__["weight"] = self.spec.weight

    def but(self, **changes: Any) -> "Tenant":
        """A copy with other accounts: `dataclasses.replace` at a fraction of its price."""
        other = object.__new__(Tenant)
        object.__setattr__(other, "__dict__", self.__dict__ | changes)
        return other
