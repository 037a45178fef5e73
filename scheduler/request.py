"""What an engine asks for, and what a policy gets to see of it."""

from dataclasses import dataclass
from enum import Enum

from qvg_paged.config import Window
from qvg_paged.errors import ArgumentError

__all__ = ["StreamRequest", "StreamState", "WaitingStream"]


class StreamState(Enum):
    """Where a submitted stream is; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    """The engine reported an error, or the request was refused because it can never fit."""
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the stream."""
        return self in (StreamState.FINISHED, StreamState.FAILED, StreamState.CANCELLED)


@dataclass(frozen=True)
class StreamRequest:
    """A video to be generated.

    Attributes:
        id: name, unique among streams that are queued or running.
        tenant: who pays for it.
        frames: frames to commit in all, given ones included.
        window: what the stream keeps.
        deadline_fps: frames per second its viewer plays; for policies, `FCFS` ignores it.
        priority: larger is more urgent; for policies, `FCFS` ignores it.
        branches: cache streams that advance together (2 with classifier-free guidance); admitted all or none.
    """

    id: str
    tenant: str
    frames: int
    window: Window
    deadline_fps: float | None = None
    priority: int = 0
    branches: int = 1

    def __post_init__(self) -> None:
        for name in ("id", "tenant"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ArgumentError(f"{name}: expected a non-empty string, got {value!r}")
        for name in ("frames", "branches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.deadline_fps is not None and not 0 < self.deadline_fps < float("inf"):
            raise ArgumentError(f"deadline_fps: expected a positive number or None, got {self.deadline_fps!r}")


@dataclass(frozen=True)
class WaitingStream:
    """Read-only snapshot of a queued stream, as policies see it.

    Attributes:
        request: what was asked for.
        arrival: serial number of its submission.
        waited: seconds since the first step that saw it.
        nbytes: pool bytes it needs at its worst.
    """

    request: StreamRequest
    arrival: int
    waited: float
    nbytes: int
