"""Between the core and a policy: a time budget, a check of every answer, a default for wrong ones, a count of faults.

A foreign policy is asked in a worker thread. Its time budget is that of a step, all questions together; an answer that
comes late is dropped, and while the worker is still busy with it further questions are not put. What was answered, or
went wrong, is told to a listener, which logs it: a replay does not depend on the speed of the machine.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence, Set
from functools import partial
from itertools import islice
from typing import Any, Protocol

from qvg_paged.errors import StateError
from qvg_paged.scheduler.line import Turns
from qvg_paged.scheduler.policy import FCFS, FairShare, KeyedPolicy, Policy
from qvg_paged.scheduler.view import StreamView, SystemView

__all__ = ["Answer", "InPlace", "OutsideLock", "PolicyGuard", "Recorded", "Runner", "Worker"]

Answer = tuple[list[Any] | None, str]
"""What a policy answered, unchecked, or None and what went wrong."""
Listener = Callable[[str, Sequence[str] | None, str], None]


class Runner(Protocol):
    """Where policies are asked."""

    def begin(self) -> None:
        """A step begins."""

    def ask(self, call: Callable[[], Any], most: int) -> Answer:
        """The first ``most + 1`` elements of what `call` returns, or what went wrong."""


_thread = threading.local()


class OutsideLock:
    """A re-entrant lock that a policy cannot take while it is asked: it would change what is being decided."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if getattr(_thread, "asking", False):
            raise StateError("scheduler: expected no call from inside a policy; answer from what the view shows")
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _collect(call: Callable[[], Any], most: int, caught: type[BaseException]) -> Answer:
    _thread.asking = True
    try:
        return list(islice(iter(call()), most + 1)), ""
    except caught as error:
        return None, f"raised {type(error).__name__}: {_text(error)}"
    finally:
        _thread.asking = False


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return "and its message raised, too"


class InPlace:
    """Asks in the caller's thread and waits as long as it takes: for policies of this package."""

    def begin(self) -> None:
        """Nothing to do."""

    def ask(self, call: Callable[[], Any], most: int) -> Answer:
        """What `call` returns."""
        return _collect(call, most, Exception)


class Worker:
    """Asks in a thread of its own, for at most `seconds` per step.

    Args:
        seconds: time budget of a step.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._left = seconds
        self._asked = 0
        self._answered = 0
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], Any], int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        self._started = False
        self._finalizer = weakref.finalize(self, self._jobs.put, None)

    def begin(self) -> None:
        """The budget is whole again."""
        self._left = self.seconds

    def ask(self, call: Callable[[], Any], most: int) -> Answer:
        """What `call` returns, if it does in time."""
        if not self._started:
            self._started = True
            threading.Thread(target=_serve, args=(self._jobs, self._answers), daemon=True, name="policy").start()
        while self._answered < self._asked:
            try:
                self._answered = self._answers.get_nowait()[0]
            except queue.Empty:
                return None, "is still busy with an earlier question"
        if self._left <= 0:
            return None, f"had used up the {self.seconds * 1e3:g} ms of the step"
        began = time.perf_counter()
        self._asked += 1
        self._jobs.put((self._asked, call, most))
        try:
            self._answered, answer = self._answers.get(timeout=self._left)
        except queue.Empty:
            self._left = 0.0
            return None, f"took more than the {self.seconds * 1e3:g} ms of the step"
        self._left -= time.perf_counter() - began
        return answer


def _serve(
    jobs: "queue.SimpleQueue[tuple[int, Callable[[], Any], int] | None]",
    answers: "queue.SimpleQueue[tuple[int, Answer]]",
) -> None:
    while (job := jobs.get()) is not None:
        number, call, most = job
        answers.put((number, _collect(call, most, BaseException)))  # by no means may a policy end the worker
        del job, call  # they lead to the worker's owner, whose end would not come while this thread holds them


class Recorded:
    """Repeats logged answers instead of asking: for replays.

    Args:
        answers: ids, or None and the fault, in the order of the questions.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = iter(answers)

    def begin(self) -> None:
        """Nothing to do."""

    def ask(self, call: Callable[[], Any], most: int) -> Answer:
        """The next logged answer."""
        del call, most
        return next(self._answers, (None, "gave no answer in the log"))


class PolicyGuard:
    """Checked answers of a policy; the core's `Advice`.

    Args:
        policy: whom to ask.
        runner: where.
        strikes: faults after which it is not asked any more.
        trusted: the same policy if it is one of this package, whose answers need no check.
        listen: told of every question: hook, answer as checked (None: the default was used), fault.

    Attributes:
        name: class of the policy.
        faults: how many there were.
        fault: what was wrong in the current step, or empty.
    """

    def __init__(
        self,
        policy: Policy,
        runner: Runner,
        strikes: int,
        listen: Listener | None = None,
        *,
        trusted: KeyedPolicy | None = None,
    ) -> None:
        self._policy, self._runner, self._strikes, self._listen = policy, runner, strikes, listen
        self._trusted = trusted
        self._default = FCFS()
        self.name = type(policy).__name__
        self.faults = 0
        self.fault = ""

    @property
    def disabled(self) -> bool:
        """Whether the policy had too many faults to be asked again."""
        return self.faults >= self._strikes

    def begin(self) -> None:
        """A step begins."""
        self.fault = ""
        self._runner.begin()

    @property
    def keyed(self) -> bool:
        """Whether the policy is one of this package, which is not asked for a rank."""
        return self._trusted is not None

    @property
    def by_turns(self) -> bool:
        """Whether it is, and tenants have turns."""
        return isinstance(self._trusted, FairShare)

    def turns(self, view: SystemView) -> Turns:
        """Turns of the tenants in line."""
        assert isinstance(self._trusted, FairShare)
        return self._trusted.turns(view)

    def rank(self, view: SystemView) -> Sequence[str]:
        """Ids of all waiting streams, best first."""
        known = view.waiting_ids
        return self._ask("rank", lambda: self._policy.rank(view), known, len(known), partial(self._default.rank, view))

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Ids of running streams to give up, best first."""
        if self._trusted is not None:
            return self._trusted.park(view, stream)
        default = partial(self._default.park, view, stream)
        return self._ask("park", lambda: self._policy.park(view, stream), view.parkable, 0, default)

    def _ask(
        self, hook: str, call: Callable[[], Any], known: Set[str], least: int, default: Callable[[], Sequence[str]]
    ) -> Sequence[str]:
        if self.disabled:
            return default()
        answer, fault = self._runner.ask(call, len(known))
        if answer is not None:
            fault = _wrong(answer, known, least)
        if fault:
            self.faults += 1
            answer = None
            fault = f"{self.name}.{hook} {fault}"
            self.fault = self.fault or fault + ("; it is switched off" if self.disabled else "")
        if self._listen is not None:
            self._listen(hook, answer, fault)
        return default() if answer is None else answer


def _wrong(answer: list[Any], known: Set[str], least: int) -> str:
    """What is wrong with an answer, or nothing."""
    if not {str}.issuperset(map(type, answer)):
        return "answered with something that is not an id"
    named = set(answer)
    if len(named) < len(answer):
        return "named a stream twice"
    if not named <= known:
        return f"named a stream that is not one of the {len(known)} to choose from"
    if len(answer) < least:
        return f"expected each of the {least} waiting ids once, got {len(answer)}"
    return ""
