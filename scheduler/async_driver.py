"""The scheduler for asyncio: submit a request, iterate over its chunks.

    async with AsyncScheduler(scheduler, engine) as driver:
        async with driver.submit(request) as stream:
            async for chunk in stream:
                ...

The engine is plain code. All its methods are called from one thread of the driver, one at a time, so that its CUDA
calls go to one stream and never block the event loop; the driver itself belongs to its event loop.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from qvg_paged.errors import ArgumentError, StateError
from qvg_paged.scheduler.async_stream import AsyncStream, Feed
from qvg_paged.scheduler.checks import check_integer, check_kind, check_number
from qvg_paged.scheduler.decision import Decision
from qvg_paged.scheduler.engine import Engine, Generator, Streams, describe
from qvg_paged.scheduler.errors import RefusedError
from qvg_paged.scheduler.plan import Outcome, Plan
from qvg_paged.scheduler.request import StreamRequest
from qvg_paged.scheduler.scheduler import Scheduler
from qvg_paged.scheduler.store import TieredCache

__all__ = ["AsyncScheduler"]

T = TypeVar("T")


@dataclass
class _Turn(Generic[T]):
    """What came of a step: the plan, chunks by stream, whether anything moved."""

    plan: Plan
    chunks: Mapping[str, T]
    moved: bool


class AsyncScheduler(Generic[T]):
    """Drives a scheduler and an engine; use it in an ``async with`` block.

    Leaving the block drains: no new requests, those that are in go on to their ends. Leaving it by an exception, or
    when the task is cancelled, shuts down: all streams are cancelled and closed.

    Args:
        scheduler: whom to ask; while the driver runs, submit and cancel through the driver.
        engine: what carries the plans out; with `store`, what generates.
        store: what closes, squeezes, parks, resumes and opens streams, in place of the engine.
        clock: seconds for ``Scheduler.step``.
        poll_seconds: how long to wait before trying again when nothing can move.

    Raises:
        ArgumentError: something else than a scheduler, or `poll_seconds` is not positive.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: "Engine[T] | Generator[T]",
        *,
        store: TieredCache | None = None,
        clock: Callable[[], float] = time.monotonic,
        poll_seconds: float = 0.05,
    ) -> None:
        check_kind("scheduler", scheduler, Scheduler)
        check_number("poll_seconds", poll_seconds, 1e-6, 1e6, "a number from 1e-6 to 1e6")
        self.scheduler = scheduler
        self._generator, self._clock, self._poll = engine, clock, poll_seconds
        self._store = Streams(engine) if store is None else store
        self._feeds: dict[str, Feed[T]] = {}
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> "AsyncScheduler[T]":
        if self._loop is not None:
            raise StateError("driver: expected to be entered once; make another")
        self._loop = asyncio.get_running_loop()
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._task = asyncio.create_task(self._drive(), name="scheduler")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.drain()
        finally:
            self.scheduler.shutdown()
            self._end_all()
            await self._stop()

    async def _stop(self) -> None:
        """Let the streams be closed, then end task and thread; what ended the task is raised here."""
        self._draining = True
        self._wake.set()
        try:
            await self._idle.wait()
        finally:
            self._task.cancel()
            self._thread.shutdown(wait=False)
        (end,) = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(end, Exception):
            raise end

    def submit(self, request: StreamRequest, *, buffer: int = 2) -> AsyncStream[T]:
        """Put a stream in line.

        Args:
            request: what to generate.
            buffer: chunks generated ahead of who reads them; the stream pauses when they are not read, but not for
                ever while others wait for its memory. 0 if nobody will read: chunks are dropped.

        Raises:
            RefusedError: the request was not accepted.
            ArgumentError: the id is in use, or `buffer` is negative.
            StateError: not in the driver's event loop, or the driver has stopped.
        """
        self._check_place("submit")
        check_integer("buffer", buffer, 0)
        check_kind("request", request, StreamRequest)
        if request.id in self._feeds:
            raise ArgumentError(f"id: expected one that is not in use, got {request.id!r}")
        feed = self._feeds[request.id] = Feed(buffer, self._wake)  # before the other thread sees the stream
        try:
            decision = self.scheduler.submit(request)
            if decision.reason.is_refusal:
                raise RefusedError(decision)
        except BaseException:
            del self._feeds[request.id]
            raise
        self._wake.set()
        return AsyncStream(self, request, feed)

    def cancel(self, stream_id: str) -> Decision:
        """Give a stream up: who reads it gets `StreamCancelledError`; a chunk that is under way is dropped.

        Raises:
            ArgumentError: unknown id.
            StateError: not in the driver's event loop.
        """
        self._check_place("cancel")
        decision = self.scheduler.cancel(stream_id)
        self._end(decision)
        self._wake.set()
        return decision

    async def drain(self) -> None:
        """Accept no new requests and wait for the ends of those that are in; buffers grow as they must."""
        self._check_place("drain")
        self._draining = True
        self.scheduler.drain()
        self._wake.set()
        await self._idle.wait()

    async def shutdown(self) -> None:
        """Accept no new requests, cancel all streams and wait until they are closed."""
        self._check_place("shutdown")
        self.scheduler.shutdown()
        self._end_all()
        await self.drain()

    def _check_place(self, what: str) -> None:
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is None or here is not self._loop:
            raise StateError(
                f"{what}: expected to be called in the event loop of the driver's `async with` block; from another "
                "thread use loop.call_soon_threadsafe"
            )
        if self._task.done():
            raise StateError(f"{what}: expected a driver that runs; this one has stopped")

    async def _drive(self) -> None:
        assert self._loop is not None
        stuck = False
        try:
            while True:
                self._wake.clear()
                if not self.scheduler.busy:
                    if self._draining:
                        self._idle.set()
                    await self._wake.wait()
                    continue
                unread = not (stuck or self._draining)
                full = frozenset(name for name, feed in self._feeds.items() if unread and feed.full)
                turn = await self._loop.run_in_executor(self._thread, self._turn, full)
                self._deliver(turn)
                stuck = not turn.moved and bool(full and turn.plan.waiting)
                if not (turn.moved or stuck):
                    await self._pause()
        except Exception as error:
            for feed in self._feeds.values():
                feed.end(error)
            raise
        finally:
            self._idle.set()

    async def _pause(self) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._poll)

    def _deliver(self, turn: _Turn[T]) -> None:
        for stream_id, chunk in turn.chunks.items():
            if stream_id in self._feeds:
                self._feeds[stream_id].put(chunk)
        for decision in turn.plan.finished:
            self._end(decision)

    def _end(self, decision: Decision) -> None:
        feed = self._feeds.pop(decision.stream_id, None)
        if feed is not None:
            feed.end(decision)

    def _end_all(self) -> None:
        for stream_id in list(self._feeds):
            self._end(self.scheduler.why(stream_id))

    def _turn(self, full: frozenset[str]) -> _Turn[T]:
        """A step, carried out; in the driver's thread."""
        plan = self.scheduler.step(self._clock())
        requests = {decision.stream_id: self.scheduler.request(decision.stream_id) for decision in plan.admitted}
        failed = self._store.carry_out(plan, requests)
        wanted = {
            decision.stream_id: decision.frames or range(0)
            for decision in plan.running
            if decision.stream_id not in {*failed, *full}
        }
        chunks = self._generate(wanted, failed)
        self.scheduler.update(plan, Outcome({name: len(wanted[name]) for name in chunks}, failed))
        moved = bool(chunks or failed or plan.finished or plan.parked or plan.resumed or plan.admitted)
        return _Turn(plan, chunks, moved)

    def _generate(self, wanted: dict[str, range], failed: dict[str, str]) -> dict[str, T]:
        if not wanted:
            return {}
        try:
            made = dict(self._generator.generate(wanted))
            if not made.keys() <= wanted.keys():
                raise ArgumentError(f"generate: expected chunks of {sorted(wanted)}, got {sorted(made)}")
        except Exception as error:
            failed.update(dict.fromkeys(wanted, describe(error)))
            return {}
        failed.update({name: describe(chunk) for name, chunk in made.items() if isinstance(chunk, Exception)})
        return {name: chunk for name, chunk in made.items() if not isinstance(chunk, Exception)}
