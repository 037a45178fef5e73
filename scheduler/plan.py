"""What the scheduler decides and what the engine reports back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Decision", "Outcome", "Plan", "Reason"]


class Reason(Enum):
    """Why a stream is where it is."""

    QUEUED = "queued"
    """Accepted; the next step decides."""
    ADMITTED = "admitted"
    """Its worst case to completion fits beside those of all running streams."""
    ADVANCE = "advance"
    """It is running and generates its next chunk."""
    NO_MEMORY = "no memory"
    """First in line, but its worst case does not fit beside those of the running streams."""
    BEHIND = "behind"
    """A stream before it in line does not fit; nobody overtakes (head-of-line blocking)."""
    TOO_LARGE = "too large"
    """Its worst case does not fit even alone: refused."""
    COMPLETED = "completed"
    """All its frames are committed."""
    FAILED = "failed"
    """The engine reported an error."""
    CANCELLED = "cancelled"
    """The caller cancelled it."""


@dataclass(frozen=True)
class Decision:
    """One stream, why, and the same in a sentence.

    Attributes:
        stream_id: the stream.
        reason: why.
        text: the numbers behind it, for people.
        frames: frames to generate next; set in ``Plan.running`` only.
    """

    stream_id: str
    reason: Reason
    text: str
    frames: range | None = None


@dataclass(frozen=True)
class Plan:
    """One step, to be carried out in the order of the fields. Every unfinished stream is in `running` or `waiting`.

    Attributes:
        step: number of the step, from 1.
        finished: streams that completed, failed or were cancelled: close them first, others are promised their memory.
        rejected: requests refused since the last step; there is nothing to do for them.
        admitted: streams to open; they are in `running` as well.
        running: streams that generate one chunk each, `Decision.frames` of it.
        waiting: streams in line, in the order in which they will be admitted.
        policy_fault: what was wrong with the policy's answer if it was replaced by order of arrival, or empty.
    """

    step: int
    finished: tuple[Decision, ...] = ()
    rejected: tuple[Decision, ...] = ()
    admitted: tuple[Decision, ...] = ()
    running: tuple[Decision, ...] = ()
    waiting: tuple[Decision, ...] = ()
    policy_fault: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a plan's running streams.

    Attributes:
        committed: frames committed, by stream; one that is not named committed none and tries again.
        failed: streams that cannot go on, with what went wrong.
    """

    committed: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
