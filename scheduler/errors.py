"""How a stream of an `AsyncScheduler` can end other than well. Each error has the decision that says why."""

from qvg_paged.errors import QvgPagedError
from qvg_paged.scheduler.decision import Decision

__all__ = ["RefusedError", "StreamCancelledError", "StreamFailedError", "StreamLostError"]


class StreamLostError(QvgPagedError):
    """A stream will not generate further chunks although it has frames to go.

    Attributes:
        decision: the scheduler's last word on it.
    """

    def __init__(self, decision: Decision) -> None:
        super().__init__(f"stream {decision.stream_id!r}: {decision.text}")
        self.decision = decision


class RefusedError(StreamLostError):
    """The request was not accepted: it can never fit, its tenant's queue is full, or the scheduler drains."""


class StreamFailedError(StreamLostError):
    """The engine reported an error."""


class StreamCancelledError(StreamLostError):
    """Somebody cancelled it."""
