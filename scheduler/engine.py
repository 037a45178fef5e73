"""What an asyncio driver asks of an engine, and how it carries a plan out on one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler.plan import Plan
from qvg_paged.scheduler.request import StreamRequest

__all__ = ["Engine", "Generator", "Streams", "describe"]

T_co = TypeVar("T_co", covariant=True)


class Generator(Protocol[T_co]):
    """What generates. What it raises fails the streams that it is about, no other."""

    def generate(self, chunks: Mapping[str, range]) -> Mapping[str, "T_co | Exception"]:
        """Generate and commit these frames of these streams, together.

        Returns:
            Per stream its chunk, which goes to whoever submitted it, or the error that ends it. A stream that is left
            out has committed nothing and is asked again.
        """


class Engine(Generator[T_co], Protocol[T_co]):
    """What carries plans out all by itself, stream by stream. The parts that no plan asks for need not be there."""

    def open(self, request: StreamRequest) -> None:
        """A stream was admitted."""

    def park(self, stream_id: str) -> None:
        """Move a stream out of the pool; only where the scheduler's cache is a `ParkingBackend`."""

    def resume(self, stream_id: str) -> None:
        """Bring a parked stream back."""

    def squeeze(self, stream_id: str, squeeze: Squeeze) -> None:
        """Store a stream more cheaply; only where the scheduler's cache is a `LadderBackend`."""

    def close(self, stream_id: str) -> None:
        """A stream that was opened is over; what this raises is not passed on."""


class Streams:
    """Carries a plan out on an `Engine`; what `TieredCache` does on a manager."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def carry_out(self, plan: Plan, requests: Mapping[str, StreamRequest]) -> dict[str, str]:
        """See `TieredCache.carry_out`."""
        engine, failed = self._engine, dict[str, str]()
        for decision in plan.finished:
            self._attempt({}, decision.stream_id, engine.close)
        for decision in (*plan.demoted, *plan.shrunk):
            self._attempt(failed, decision.stream_id, partial(engine.squeeze, squeeze=decision.squeeze))
        for decision in plan.parked:
            self._attempt(failed, decision.stream_id, engine.park)
        for decision in plan.resumed:
            self._attempt(failed, decision.stream_id, engine.resume)
        for decision in plan.admitted:
            self._attempt(failed, decision.stream_id, lambda name: engine.open(requests[name]))
        return failed

    @staticmethod
    def _attempt(failed: dict[str, str], stream_id: str, call: Callable[[str], Any]) -> None:
        try:
            call(stream_id)
        except Exception as error:
            failed[stream_id] = describe(error)


def describe(error: Exception) -> str:
    """An error in one line, for ``Outcome.failed``."""
    return f"{type(error).__name__}: {error}"
