"""Who runs, who waits, who makes room and who is refused: values in, values out, no tensors."""

from qvg_paged.scheduler.async_driver import AsyncScheduler
from qvg_paged.scheduler.async_stream import AsyncStream
from qvg_paged.scheduler.backend import CacheBackend, LadderBackend, ParkingBackend
from qvg_paged.scheduler.config import Reservation, SchedulerConfig
from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.engine import Engine, Generator
from qvg_paged.scheduler.errors import RefusedError, StreamCancelledError, StreamFailedError, StreamLostError
from qvg_paged.scheduler.log import DecisionLog
from qvg_paged.scheduler.plan import Outcome, Plan
from qvg_paged.scheduler.plugins import available_policies, load_policy
from qvg_paged.scheduler.policy import FCFS, EarliestDeadline, FairShare, Policy, Priority
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.scheduler import Scheduler
from qvg_paged.scheduler.store import TieredCache
from qvg_paged.scheduler.tenant import TenantSpec
from qvg_paged.scheduler.view import StreamView, SystemView, TenantView

__all__ = [
    "FCFS",
    "AsyncScheduler",
    "AsyncStream",
    "CacheBackend",
    "Decision",
    "DecisionLog",
    "EarliestDeadline",
    "Engine",
    "FairShare",
    "Generator",
    "LadderBackend",
    "Outcome",
    "ParkingBackend",
    "Plan",
    "Policy",
    "Priority",
    "Reason",
    "RefusedError",
    "Reservation",
    "Scheduler",
    "SchedulerConfig",
    "StreamCancelledError",
    "StreamFailedError",
    "StreamLostError",
    "StreamRequest",
    "StreamState",
    "StreamView",
    "SystemView",
    "TenantSpec",
    "TenantView",
    "TieredCache",
    "available_policies",
    "load_policy",
]
