"""Who runs, who waits and who is refused: values in, values out, no tensors."""

from qvg_paged.scheduler.plan import Decision, Outcome, Plan, Reason
from qvg_paged.scheduler.policy import FCFS, Policy
from qvg_paged.scheduler.request import StreamRequest, StreamState, WaitingStream
from qvg_paged.scheduler.scheduler import Scheduler

__all__ = [
    "FCFS",
    "Decision",
    "Outcome",
    "Plan",
    "Policy",
    "Reason",
    "Scheduler",
    "StreamRequest",
    "StreamState",
    "WaitingStream",
]
