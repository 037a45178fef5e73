"""Who looks on: told of every input and every plan, in the caller's thread, and unable to disturb either."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from qvg_paged.scheduler.decision import Decision
from qvg_paged.scheduler.inputs import Input
from qvg_paged.scheduler.plan import Plan
from qvg_paged.scheduler.state import State

__all__ = ["Observer", "Observers"]

LOGGER = logging.getLogger("qvg_paged.scheduler")


class Observer(Protocol):
    """Called under the scheduler's lock: be quick, and do not change anything."""

    def answered(self, event: Input, decision: Decision | None, state: State) -> None:
        """Something went in, and `state` is what came of it; `decision` if it was about one stream."""

    def planned(self, plan: Plan, state: State, seconds: float) -> None:
        """A step was decided, which took `seconds`."""


class Observers:
    """All who look on; what one raises is logged once, counted and otherwise ignored.

    Attributes:
        faults: how often one of them raised.
    """

    def __init__(self) -> None:
        self._all: list[Observer] = []
        self.faults = 0

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, observer: Observer) -> None:
        """Look on from now on."""
        self._all.append(observer)

    def answered(self, event: Input, decision: Decision | None, state: State) -> None:
        """See `Observer.answered`."""
        for observer in self._all:
            self._tell(observer.answered, event, decision, state)

    def planned(self, plan: Plan, state: State, seconds: float) -> None:
        """See `Observer.planned`."""
        for observer in self._all:
            self._tell(observer.planned, plan, state, seconds)

    def _tell(self, call: Callable[..., None], *what: Any) -> None:
        try:
            call(*what)
        except Exception:
            self.faults += 1
            if self.faults == 1:
                LOGGER.exception("an observer of the scheduler raised; further faults are only counted")
