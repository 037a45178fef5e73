"""One decision about a stream, and why."""

from dataclasses import dataclass
from enum import Enum

from qvg_paged.ladder import Squeeze

__all__ = ["Decision", "Reason"]


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

    def __init__(
        self,
        stream_id: str,
        reason: Reason,
        text: str,
        frames: range | None = None,
        squeeze: Squeeze | None = None,
    ) -> None:
        """As generated, without the price of a frozen dataclass's fields."""
        fields = self.__dict__
        fields["stream_id"], fields["reason"], fields["text"] = stream_id, reason, text
        fields["frames"], fields["squeeze"] = frames, squeeze
