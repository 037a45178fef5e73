"""What the scheduler decides and what the engine reports back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.line import Waiting

__all__ = ["Decision", "Outcome", "Plan", "Reason"]


@dataclass(frozen=True)
class Plan:
    """One step, to be carried out in the order of the fields. Every unfinished stream is in `running` or `waiting`.

    Attributes:
        step: number of the step, from 1.
        finished: streams that completed, failed or were cancelled: close them first, others are promised their memory.
        rejected: requests refused since the last step; there is nothing to do for them.
        demoted: streams to store more cheaply, down to `Decision.squeeze.rung`; they are in `running` as well.
        shrunk: streams whose retrieval memory shrinks to `Decision.squeeze.retrieval_frames`; likewise.
        parked: streams to move out of the pool; they are in `waiting` as well.
        resumed: parked streams to bring back; they are in `running` as well.
        admitted: streams to open; they are in `running` as well.
        running: streams that generate one chunk each, `Decision.frames` of it.
        line: what `waiting` is made of once somebody asks for it.
        policy_fault: what was wrong with the policy's answer if it was replaced by order of arrival, or empty.
        leader: the running stream that is not parked until it has finished a chunk, or empty.
    """

    step: int
    finished: tuple[Decision, ...] = ()
    rejected: tuple[Decision, ...] = ()
    demoted: tuple[Decision, ...] = ()
    shrunk: tuple[Decision, ...] = ()
    parked: tuple[Decision, ...] = ()
    resumed: tuple[Decision, ...] = ()
    admitted: tuple[Decision, ...] = ()
    running: tuple[Decision, ...] = ()
    line: Waiting = field(default_factory=Waiting, repr=False)
    policy_fault: str = ""
    leader: str = ""

    @property
    def waiting(self) -> tuple[Decision, ...]:
        """Streams in line, in the order in which they will be admitted."""
        return self.line.decisions


@dataclass(frozen=True)
class Outcome:
    """What became of a plan's running streams.

    Attributes:
        committed: frames committed, by stream; one that is not named committed none and tries again.
        failed: running or parked streams of the plan that cannot go on, with what went wrong.
    """

    committed: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
