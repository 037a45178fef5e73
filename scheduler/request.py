"""What an engine asks for, and where a stream is."""

from dataclasses import dataclass, field
from enum import Enum

from qvg_paged.config import QualityFloor, Window
from qvg_paged.scheduler.checks import MAX_COUNT, check_fps, check_integer, check_kind, check_name

__all__ = ["StreamRequest", "StreamState"]


class StreamState(Enum):
    """Where a submitted stream is; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    PARKED = "parked"
    """Its history is on the host, complete, until its turn comes back."""
    FINISHED = "finished"
    FAILED = "failed"
    """The engine reported an error, or the request was refused."""
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the stream."""
        return self in (StreamState.FINISHED, StreamState.FAILED, StreamState.CANCELLED)


@dataclass(frozen=True)
class StreamRequest:
    """A video to be generated.

    Attributes:
        id: name, unique among streams that are not final, at most 256 characters.
        tenant: who pays for it, at most 256 characters.
        frames: frames to commit in all, given ones included.
        window: what the stream keeps.
        deadline_fps: frames per second its viewer plays; None for that of the tenant.
        priority: larger is more urgent; for policies, `FCFS` ignores it.
        branches: cache streams that advance together (2 with classifier-free guidance); admitted all or none.
        quality: how far it may be squeezed when memory is short, unless its tenant's floor is stricter.
    """

    id: str
    tenant: str
    frames: int
    window: Window
    deadline_fps: float | None = None
    priority: int = 0
    branches: int = 1
    quality: QualityFloor = field(default_factory=QualityFloor)

    def __post_init__(self) -> None:
        check_name("id", self.id)
        check_name("tenant", self.tenant)
        check_integer("frames", self.frames, 1)
        check_kind("window", self.window, Window)
        check_fps(self.deadline_fps)
        check_integer("priority", self.priority, -MAX_COUNT)
        check_integer("branches", self.branches, 1)
        check_kind("quality", self.quality, QualityFloor)
