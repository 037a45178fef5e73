"""One call of a manager at a time; what attention decoded ahead is settled before any call that is not attention."""

from contextlib import AbstractContextManager
from threading import RLock
from types import TracebackType

from qvg_paged.kernels.lookahead import Lookahead

__all__ = ["Calls"]


class Calls:
    """The lock of a manager.

    Attributes:
        lookahead: between calls of `attend` and `seal`, which lock `attending` instead: neither changes pages that
            are read ahead, and only the first uses the staging buffer.
    """

    def __init__(self) -> None:
        self.lookahead = Lookahead()
        self._lock = RLock()

    @property
    def attending(self) -> AbstractContextManager[bool]:
        """The lock, with what was decoded ahead left as it is."""
        return self._lock

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self.lookahead.settle()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
