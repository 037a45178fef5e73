"""What goes wrong, by name, and policies that misbehave."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from qvg_paged.scheduler import FCFS, StreamView, SystemView
from qvg_paged.scheduler.guard import Answer, InPlace

__all__ = ["BREAKING", "FAULTS", "HOSTILE", "RESUMING", "VirtualClock", "VirtualRunner"]

FAULTS = (
    "cancel queued", "cancel admitted", "cancel running", "cancel parking", "cancel parked", "cancel resuming",
    "cancel final", "cancel unknown", "duplicate id", "double free", "stale handle",
    "chunk fails", "encoding fails", "stream fails", "nan", "out of memory", "too large",
    "park fails", "disk full", "disk fails", "file truncated", "bit flipped",
    "clock forward", "clock backward", "clock stalls",
    "pool shrinks", "quota changes", "weight changes", "flood", "fill and squeeze",
)  # fmt: skip
"""Faults that any run may draw; hostile policies come besides.

In the simulator a fault is what the scheduler gets to see of it: a chunk that comes to nothing (``chunk fails``;
``encoding fails``: between encoding and publishing; ``out of memory``: some chunks of a plan and all after them), a
stream that breaks (``nan``, ``stream fails``, and at its return ``disk fails``, ``file truncated``, ``bit flipped``),
a report that comes twice (``double free``) or too late (``stale handle``). `stress.on_manager` breaks the real store.
"""

BREAKING = {"chunk fails": False, "encoding fails": False, "stream fails": True, "nan": True}
"""Faults of a chunk, and whether its stream cannot go on."""

RESUMING = ("disk fails", "file truncated", "bit flipped")
"""Faults of a stream that comes back."""


class VirtualClock:
    """The simulator's time."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class VirtualRunner(InPlace):
    """Asks in place and measures by the virtual clock: late answers are dropped, the same in every run.

    Args:
        clock: whose time policies use up.
        seconds: their budget.
    """

    def __init__(self, clock: VirtualClock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def ask(self, call: Callable[[], Any], most: int) -> Answer:
        """What `call` returns, unless it took too long."""
        began = self._clock.now
        answer = super().ask(call, most)
        took, self._clock.now = self._clock.now - began, began
        return (None, "took too long") if took > self._seconds else answer


class _Hostile(FCFS, ABC):
    """Misbehaves now and then.

    Args:
        rng: when.
        clock: what it uses up.
    """

    def __init__(self, rng: Random, clock: VirtualClock) -> None:
        self.rng, self.clock = rng, clock
        self.misdeeds = 0

    def rank(self, view: SystemView) -> Sequence[str]:
        """Order of arrival, or something wrong."""
        if self.rng.random() < 0.2:
            self.misdeeds += 1
            return self.misrank(view)
        return super().rank(view)

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:  # noqa: ARG002 - the protocol names it
        """Whoever may be parked, or something wrong."""
        if self.rng.random() < 0.2:
            self.misdeeds += 1
            return self.mispark(view)
        return [other for other in sorted(view.parkable) if self.rng.random() < 0.5]

    @abstractmethod
    def misrank(self, view: SystemView) -> Sequence[str]:
        """What it answers when it misbehaves."""

    def mispark(self, view: SystemView) -> Sequence[str]:
        """The same for `park`."""
        return self.misrank(view)


class Raises(_Hostile):
    """Raises all kinds of things."""

    def misrank(self, view: SystemView) -> Sequence[str]:
        """Never returns."""
        error = self.rng.choice([ValueError, RecursionError, MemoryError, KeyError])
        raise error(f"at {view.now}\n")


class Lies(_Hostile):
    """Forgets, repeats and invents streams."""

    def misrank(self, view: SystemView) -> Sequence[str]:
        """A wrong list."""
        ids = [stream.id for stream in view.waiting]
        wrong: list[Any] = [ids[1:], ids * 2, [*ids, "nobody"], [None], "abc", 7, iter(lambda: "x", None)]
        return self.rng.choice(wrong)  # type: ignore[no-any-return]

    def mispark(self, view: SystemView) -> Sequence[str]:
        """The same for those that run."""
        ids = [stream.id for stream in view.running]
        wrong: list[Any] = [ids * 2, [*ids, "nobody"], [None], 7]
        return self.rng.choice(wrong)  # type: ignore[no-any-return]


class Sleeps(_Hostile):
    """Takes ten seconds."""

    def misrank(self, view: SystemView) -> Sequence[str]:
        """The right answer, too late."""
        self.clock.sleep(10.0)
        return super(_Hostile, self).rank(view)


class EvictsTheLeader(_Hostile):
    """Gives up everybody that runs, the leader first."""

    def misrank(self, view: SystemView) -> Sequence[str]:
        """Latest first: legal, and as unfair as can be."""
        return [stream.id for stream in reversed(view.waiting)]

    def mispark(self, view: SystemView) -> Sequence[str]:
        """Everybody, pinned ones included."""
        return sorted((stream.id for stream in view.running), key=lambda name: name in view.parkable)


HOSTILE = {"raises": Raises, "lies": Lies, "sleeps": Sleeps, "evicts-the-leader": EvictsTheLeader}
"""Policies that misbehave in a fifth of their answers."""
