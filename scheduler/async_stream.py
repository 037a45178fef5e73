"""A submitted stream in asyncio: an async iterator over its chunks, an awaitable of the rest of them."""

import asyncio
from collections import deque
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.errors import StreamCancelledError, StreamFailedError
from qvg_paged.scheduler.request import StreamRequest

if TYPE_CHECKING:
    from qvg_paged.scheduler.async_driver import AsyncScheduler

__all__ = ["AsyncStream", "Feed"]

T = TypeVar("T")


class Feed(Generic[T]):
    """Chunks on their way from the driver to who reads them.

    Args:
        most: chunks after which the stream pauses; 0 drops them.
        taken: set when one is taken out.
    """

    def __init__(self, most: int, taken: asyncio.Event) -> None:
        self._most, self._taken = most, taken
        self._chunks: deque[T] = deque()
        self._news = asyncio.Event()
        self.outcome: Decision | Exception | None = None

    @property
    def full(self) -> bool:
        """Whether nothing more should be generated for now."""
        return 0 < self._most <= len(self._chunks)

    def put(self, chunk: T) -> None:
        """A chunk is there."""
        if self._most:
            self._chunks.append(chunk)
            self._news.set()

    def end(self, outcome: "Decision | Exception") -> None:
        """There will be no more; the first word counts."""
        self.outcome = self.outcome or outcome
        self._news.set()

    async def get(self) -> T:
        """The next chunk; see `AsyncStream`."""
        while not self._chunks:
            if self.outcome is not None:
                self._raise(self.outcome)
            self._news.clear()
            await self._news.wait()
        self._taken.set()
        return self._chunks.popleft()

    @staticmethod
    def _raise(outcome: "Decision | Exception") -> None:
        if isinstance(outcome, Exception):
            raise outcome
        if outcome.reason is Reason.COMPLETED:
            raise StopAsyncIteration
        raise (StreamCancelledError if outcome.reason is Reason.CANCELLED else StreamFailedError)(outcome)


class AsyncStream(Generic[T]):
    """Made by `AsyncScheduler.submit`. Iterate over it for its chunks, or await it for a list of the rest of them.

    If the task that waits for a chunk is cancelled, so is the stream; in an ``async with`` block it is cancelled
    however the block is left.

    Attributes:
        request: what was asked for.

    Raises:
        StreamFailedError: while reading: the engine reported an error.
        StreamCancelledError: while reading: the stream was cancelled.
    """

    def __init__(self, driver: "AsyncScheduler[T]", request: StreamRequest, feed: Feed[T]) -> None:
        self._driver, self._feed = driver, feed
        self.request = request

    @property
    def why(self) -> Decision:
        """The latest decision about it: why it waits, or how it ended."""
        outcome = self._feed.outcome
        return outcome if isinstance(outcome, Decision) else self._driver.scheduler.why(self.request.id)

    @property
    def done(self) -> bool:
        """Whether it has ended; chunks may still be unread."""
        return self._feed.outcome is not None

    def cancel(self) -> None:
        """Give it up; does nothing once it has ended."""
        if not self.done:
            self._driver.cancel(self.request.id)

    def __aiter__(self) -> "AsyncStream[T]":
        return self

    async def __anext__(self) -> T:
        try:
            return await self._feed.get()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __await__(self) -> Generator[object, None, list[T]]:
        return self._rest().__await__()

    async def _rest(self) -> list[T]:
        return [chunk async for chunk in self]

    async def __aenter__(self) -> "AsyncStream[T]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
