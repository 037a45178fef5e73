"""What the scheduler decides and what the engine reports back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from qvg_paged.ladder import Squeeze

__all__ = ["Decision", "Outcome", "Plan", "Reason"]


class Reason(Enum):
    """Why a stream is where it is."""

    QUEUED = "queued"
    """Accepted; the next step decides."""
    ADMITTED = "admitted"
    """What is reserved for it fits beside what is reserved for all running streams."""
    RESUMED = "resumed"
    """It was parked and fits again."""
    ADVANCE = "advance"
    """It is running and generates its next chunk."""
    NO_MEMORY = "no memory"
    """First in line, but it does not fit beside the running streams."""
    NO_HOST_MEMORY = "no host memory"
    """First in line; it would fit now, but there is no room to park it should the others grow."""
    NO_SLOT = "no slot"
    """First in line, but as many streams run as may."""
    QUOTA = "quota"
    """Its tenant holds as much of the pool as it may."""
    FLOOR = "floor"
    """What is free is promised to tenants that hold less than their floor."""
    HOLD_OFF = "hold off"
    """Someone had to be parked: no new streams for some steps, until one has left or all parked ones are back."""
    BEHIND = "behind"
    """A stream before it in line does not fit; nobody overtakes (head-of-line blocking)."""
    PARKED = "parked"
    """It made room for a stream that the policy, or a tenant's floor, puts first."""
    SQUEEZED = "squeezed"
    """The running streams grew, the pool shrank or a quota was lowered, and it had to make room."""
    DEMOTED = "demoted"
    """The running streams, or one in line, need room: it is stored more cheaply."""
    SHRUNK = "shrunk"
    """The same, and it gives up frames that it kept for retrieval."""
    TOO_LARGE = "too large"
    """Its worst case does not fit even alone: refused."""
    QUEUE_FULL = "queue full"
    """Its tenant has as many streams in line as it may, or there are too many tenants: refused."""
    DRAINING = "draining"
    """No new streams are accepted: refused."""
    COMPLETED = "completed"
    """All its frames are committed."""
    FAILED = "failed"
    """The engine reported an error."""
    CANCELLED = "cancelled"
    """The caller cancelled it."""

    @property
    def is_refusal(self) -> bool:
        """Whether a request with this answer was never accepted."""
        return self in (Reason.TOO_LARGE, Reason.QUEUE_FULL, Reason.DRAINING)


@dataclass(frozen=True)
class Decision:
    """One stream, why, and the same in a sentence.

    Attributes:
        stream_id: the stream.
        reason: why.
        text: the numbers behind it, for people.
        frames: frames to generate next; set in ``Plan.running`` only.
        squeeze: what the stream is from now on; set in ``Plan.demoted`` and ``Plan.shrunk`` only.
    """

    stream_id: str
    reason: Reason
    text: str
    frames: range | None = None
    squeeze: Squeeze | None = None


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
        waiting: streams in line, in the order in which they will be admitted.
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
    waiting: tuple[Decision, ...] = ()
    policy_fault: str = ""
    leader: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a plan's running streams.

    Attributes:
        committed: frames committed, by stream; one that is not named committed none and tries again.
        failed: running or parked streams of the plan that cannot go on, with what went wrong.
    """

    committed: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
