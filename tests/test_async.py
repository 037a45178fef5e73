"""The asyncio driver: chunks arrive in order, whoever stops reading stops the stream, nothing is left behind."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from tiny import WINDOW, grow, make_cache

from qvg_paged import ArgumentError, KVCacheManager, OutOfMemoryError, StateError, Window
from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler import (
    AsyncScheduler,
    Decision,
    FairShare,
    Plan,
    Reason,
    RefusedError,
    Scheduler,
    SchedulerConfig,
    StreamCancelledError,
    StreamFailedError,
    StreamRequest,
    StreamState,
    TieredCache,
)
from qvg_paged.scheduler.engine import Streams

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """An engine over a real cache that notes who called what, where, and breaks on request."""

    def __init__(self) -> None:
        self.cache: KVCacheManager = make_cache(pool=30 * (16 << 10), format="dense")
        self.calls: list[tuple[str, str]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.broken: dict[str, BaseException] = {}
        self.refusals = 0

    def _note(self, what: str, stream_id: str) -> None:
        self.calls.append((what, stream_id))
        self.threads.add(threading.current_thread().name)
        if f"{what} {stream_id}" in self.broken:
            raise self.broken[f"{what} {stream_id}"]

    def open(self, request: StreamRequest) -> None:
        self._note("open", request.id)
        self.cache.open(request.id, tenant=request.tenant, window=request.window)

    def generate(self, chunks: Mapping[str, range]) -> Mapping[str, Any]:
        self._note("generate", ",".join(chunks))
        assert self.gate.wait(30)
        made: dict[str, Any] = {}
        for name, frames in chunks.items():
            if f"chunk {name}" in self.broken:
                made[name] = self.broken[f"chunk {name}"]
            elif self.refusals:
                self.refusals -= 1
            else:
                grow(self.cache.streams[name], len(frames))
                made[name] = (name, frames)
        return made

    def park(self, stream_id: str) -> None:
        self._note("park", stream_id)

    def resume(self, stream_id: str) -> None:
        self._note("resume", stream_id)

    def close(self, stream_id: str) -> None:
        self._note("close", stream_id)
        self.cache.streams[stream_id].close()


def request(name: str, frames: int = 12, **changes: Any) -> StreamRequest:
    return StreamRequest(name, "t", frames, WINDOW, **changes)


def run(
    scenario: Callable[[AsyncScheduler[Any], Recorder], Awaitable[None]], engine: Recorder | None = None
) -> Recorder:
    """Run a scenario inside the driver's block; whatever happens in it, the cache must be empty afterwards."""
    engine = engine or Recorder()

    async def main() -> None:
        async with AsyncScheduler(Scheduler(engine.cache), engine, poll_seconds=0.01) as driver:
            await scenario(driver, engine)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert_clean(engine)
    return engine


def assert_clean(engine: Recorder) -> None:
    assert engine.cache.stats().used_nbytes == 0
    assert not engine.cache.streams
    engine.cache.check_integrity()


def test_chunks_arrive_in_order_and_engine_calls_come_from_one_thread() -> None:
    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        streams = [driver.submit(request(name, 7)) for name in "abc"]
        for stream in streams:
            seen = [chunk async for chunk in stream]
            assert seen == [(stream.request.id, frames) for frames in (range(3), range(3, 6), range(6, 7))]
            assert stream.done
            assert stream.why.reason is Reason.COMPLETED
            assert await stream == [], "it can be asked again"

    engine = run(scenario)
    assert len(engine.threads) == 1
    assert threading.current_thread().name not in engine.threads
    for what in ("open", "close"):
        assert [name for call, name in engine.calls if call == what] == ["a", "b", "c"]


def test_leaving_the_block_waits_for_all_streams_and_their_chunks_can_be_read_later() -> None:
    left: list[Any] = []

    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        left.extend(driver.submit(request(name)) for name in "abc")

    async def read() -> None:
        for stream in left:
            assert len(await stream) == 4

    run(scenario)
    asyncio.run(read())


def test_an_unread_stream_pauses_and_goes_on_when_it_is_read() -> None:
    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        slow = driver.submit(request("slow"), buffer=1)
        quick = driver.submit(request("quick"))
        assert len(await quick) == 4
        assert driver.scheduler.committed("slow") == 3
        await asyncio.sleep(0.05)
        assert driver.scheduler.committed("slow") == 3, "one chunk is waiting to be read"
        assert await slow.__anext__() == ("slow", range(3))
        while driver.scheduler.committed("slow") < 6:
            await asyncio.sleep(0.005)
        assert len(await slow) == 3

    run(scenario)


def test_unread_streams_do_not_stop_those_that_wait_for_their_memory() -> None:
    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        unread = [driver.submit(request(name), buffer=1) for name in "ab"]
        assert len(await driver.submit(request("c"))) == 4, "it waits until one of them is done"
        assert [len(await stream) for stream in unread] == [4, 4]

    run(scenario)


def test_a_stream_that_nobody_reads_can_say_so() -> None:
    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        stream = driver.submit(request("a"), buffer=0)
        assert await stream == []
        assert driver.scheduler.committed("a") == 12

    run(scenario)


@pytest.mark.parametrize("where", ["reading", "in a block", "by name"])
def test_whoever_stops_reading_cancels_the_stream(where: str) -> None:
    async def scenario(driver: AsyncScheduler[Any], engine: Recorder) -> None:
        stream = driver.submit(request("a"))
        if where == "reading":
            engine.gate.clear()
            task = asyncio.create_task(stream.__anext__())
            while not any(what == "generate" for what, _ in engine.calls):
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            engine.gate.set()
        elif where == "in a block":
            async with stream:
                async for _ in stream:
                    break
        else:
            stream.cancel()
            stream.cancel()
        assert driver.scheduler.state("a") is StreamState.CANCELLED
        with pytest.raises(StreamCancelledError, match="'a': cancelled at frame") as caught:
            await stream
        assert caught.value.decision == stream.why
        assert await driver.submit(request("b"))

    run(scenario)


def test_a_queued_stream_can_be_cancelled_and_its_name_used_again() -> None:
    async def scenario(driver: AsyncScheduler[Any], engine: Recorder) -> None:
        engine.gate.clear()
        kept = [driver.submit(request(name)) for name in "ab"]
        waiting = driver.submit(request("c"))
        driver.cancel("c")
        with pytest.raises(StreamCancelledError):
            await waiting
        again = driver.submit(request("c", 3))
        engine.gate.set()
        assert len(await again) == 1
        assert [len(await stream) for stream in kept] == [4, 4]

    run(scenario)


def test_a_request_that_is_refused_or_known_is_an_error_at_once() -> None:
    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        with pytest.raises(RefusedError, match="'huge': refused: needs") as caught:
            driver.submit(StreamRequest("huge", "t", 1000, Window(recent_frames=1000)))
        assert caught.value.decision.reason is Reason.TOO_LARGE
        stream = driver.submit(request("a", 3))
        with pytest.raises(ArgumentError, match="id: expected one that is not in use, got 'a'"):
            driver.submit(request("a"))
        for bad in (-1, True, 1.0):
            with pytest.raises(ArgumentError, match="buffer: expected an integer >= 0"):
                driver.submit(request("b"), buffer=bad)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="request: expected a StreamRequest, got 'b'"):
            driver.submit("b")  # type: ignore[arg-type]
        assert len(await stream) == 1
        await driver.drain()
        with pytest.raises(RefusedError, match="accepts no new streams"):
            driver.submit(request("late"))

    run(scenario)


@pytest.mark.parametrize(
    ("where", "survives"), [("open a", True), ("chunk a", True), ("generate a,b", False), ("close a", True)]
)
def test_what_the_engine_raises_fails_the_stream_it_is_about(where: str, survives: bool) -> None:
    engine = Recorder()
    engine.broken[where] = ValueError("broken\n")

    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        first, second = (driver.submit(request(name, 6)) for name in "ab")
        if where == "close a":
            assert len(await first) == 2
            del engine.broken[where]
            engine.cache.streams["a"].close()
        else:
            with pytest.raises(StreamFailedError, match="ValueError: broken"):
                await first
        if survives:
            assert len(await second) == 2
        else:
            with pytest.raises(StreamFailedError):
                await second
        assert len(await driver.submit(request("c", 6))) == 2

    run(scenario, engine)


def test_a_stream_that_the_engine_leaves_out_is_asked_again() -> None:
    engine = Recorder()
    engine.refusals = 5

    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        assert len(await driver.submit(request("a"))) == 4

    run(scenario, engine)
    assert len([call for call in engine.calls if call[0] == "generate"]) == 9


def test_chunks_of_streams_that_were_not_asked_for_fail_those_that_were() -> None:
    class Liar(Recorder):
        def generate(self, chunks: Mapping[str, range]) -> Mapping[str, Any]:
            return {**super().generate(chunks), "nobody": 1}

    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        with pytest.raises(StreamFailedError, match=r"generate: expected chunks of \['a'\], got \['a', 'nobody'\]"):
            await driver.submit(request("a"))

    run(scenario, Liar())


def test_leaving_the_block_by_an_exception_cancels_and_closes_everything() -> None:
    engine = Recorder()
    streams: list[Any] = []

    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        streams.extend(driver.submit(request(name)) for name in "abc")
        await streams[0].__anext__()
        raise RuntimeError("the engine's owner gave up")

    with pytest.raises(RuntimeError, match="gave up"):
        run(scenario, engine)
    assert_clean(engine)
    assert [stream.why.reason for stream in streams] == [Reason.CANCELLED] * 3


def test_a_cancelled_block_shuts_down_even_while_it_drains() -> None:
    engine = Recorder()

    async def main() -> None:
        engine.gate.clear()
        task = asyncio.create_task(block())
        while not engine.calls:
            await asyncio.sleep(0.005)
        task.cancel()
        engine.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def block() -> None:
        async with AsyncScheduler(Scheduler(engine.cache), engine) as driver:
            for name in "ab":
                driver.submit(request(name))

    asyncio.run(asyncio.wait_for(main(), 60))
    assert_clean(engine)


def test_shutdown_cancels_and_the_driver_then_refuses() -> None:
    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        stream = driver.submit(request("a"))
        await stream.__anext__()
        await driver.shutdown()
        with pytest.raises(StreamCancelledError):
            await stream
        with pytest.raises(RefusedError):
            driver.submit(request("b"))

    run(scenario)


def test_calls_from_the_wrong_place_are_errors() -> None:
    engine = Recorder()
    driver: AsyncScheduler[Any] = AsyncScheduler(Scheduler(engine.cache), engine)
    with pytest.raises(StateError, match="submit: expected to be called in the event loop"):
        driver.submit(request("a"))

    async def main() -> None:
        async with driver:
            with pytest.raises(StateError, match="cancel: expected to be called in the event loop"):
                await asyncio.to_thread(driver.cancel, "a")
        with pytest.raises(StateError, match="submit: expected a driver that runs"):
            driver.submit(request("a"))
        with pytest.raises(StateError, match="entered once"):
            async with driver:
                pass

    asyncio.run(asyncio.wait_for(main(), 60))
    with pytest.raises(ArgumentError, match="poll_seconds"):
        AsyncScheduler(driver.scheduler, engine, poll_seconds=0.0)


def test_a_scheduler_that_breaks_tells_every_reader_and_whoever_leaves_the_block() -> None:
    engine = Recorder()
    scheduler = Scheduler(engine.cache)

    async def main() -> None:
        async with AsyncScheduler(scheduler, engine, clock=lambda: float("nan")) as driver:
            stream = driver.submit(request("a"))
            with pytest.raises(ArgumentError, match="now: expected a finite time"):
                await stream
            with pytest.raises(StateError, match="has stopped"):
                driver.submit(request("b"))

    with pytest.raises(ArgumentError, match="now"):
        asyncio.run(asyncio.wait_for(main(), 60))


def test_the_event_loop_is_free_while_the_engine_works() -> None:
    async def scenario(driver: AsyncScheduler[Any], engine: Recorder) -> None:
        engine.gate.clear()
        stream = driver.submit(request("a", 3))
        began, turns = time.monotonic(), 0
        while turns < 20:
            await asyncio.sleep(0.001)
            turns += 1
        assert time.monotonic() - began < 10
        assert driver.scheduler.committed("a") == 0
        engine.gate.set()
        assert len(await stream) == 1

    run(scenario)


def test_memory_that_ran_out_is_an_ordinary_end_of_one_stream() -> None:
    engine = Recorder()
    engine.broken["chunk a"] = OutOfMemoryError("pool exhausted", 2, 1)

    async def scenario(driver: AsyncScheduler[Any], _: Recorder) -> None:
        with pytest.raises(StreamFailedError, match="OutOfMemoryError: pool exhausted"):
            await driver.submit(request("a"))

    run(scenario, engine)


def test_cancelling_at_every_moment_leaves_nothing_behind() -> None:
    """A task that reads is cancelled after so many turns of the loop; then another stream must run as ever."""
    cancelled = 0
    for turns in range(0, 60, 3):

        async def scenario(driver: AsyncScheduler[Any], _: Recorder, turns: int = turns) -> None:
            nonlocal cancelled

            async def read() -> None:
                async with driver.submit(request("a", 6)) as stream:
                    async for _ in stream:
                        await asyncio.sleep(0)

            task = asyncio.create_task(read())
            for _ in range(turns):
                await asyncio.sleep(0.0005 if turns % 2 else 0)
            task.cancel()
            (end,) = await asyncio.gather(task, return_exceptions=True)
            cancelled += isinstance(end, asyncio.CancelledError)
            assert len(await driver.submit(request("b", 6))) == 2

        run(scenario)
    assert cancelled >= 5


def test_an_engine_of_ones_own_is_told_of_every_move_and_what_it_raises_fails_that_stream() -> None:
    calls: list[Any] = []

    class Mover:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def call(*what: Any, **named: Any) -> None:
                calls.append((name, *what, *named.values()))
                if what[0] == "broken":
                    raise ValueError(name)

            return call

    def told(*streams: str, **changes: Any) -> tuple[Decision, ...]:
        return tuple(Decision(stream, Reason.ADVANCE, "", **changes) for stream in streams)

    plan = Plan(
        step=1, finished=told("done", "broken"), demoted=told("d", squeeze=Squeeze()), shrunk=told("broken"),
        parked=told("p", "broken"), resumed=told("r"), admitted=told("a"),
    )  # fmt: skip
    wanted = request("a")
    failed = Streams(Mover()).carry_out(plan, {"a": wanted})
    assert failed == {"broken": "ValueError: park"}
    assert calls == [
        ("close", "done"), ("close", "broken"), ("squeeze", "d", Squeeze()), ("squeeze", "broken", None),
        ("park", "p"), ("park", "broken"), ("resume", "r"), ("open", wanted),
    ]  # fmt: skip


def test_over_a_tiered_cache_streams_are_squeezed_and_parked_and_all_chunks_arrive() -> None:
    manager = make_cache(pool=260 << 10, host_memory="2MiB")
    cache = TieredCache(manager)
    scheduler = Scheduler(cache, FairShare(quantum=0.5), SchedulerConfig(headroom=0.0))
    moves: Counter[str] = Counter()

    class Watcher:
        def answered(self, *_: Any) -> None:
            pass

        def planned(self, plan: Plan, *_: Any) -> None:
            moves.update(parked=len(plan.parked), resumed=len(plan.resumed), admitted=len(plan.admitted))

    class Generate:
        def generate(self, chunks: Mapping[str, range]) -> Mapping[str, Any]:
            made: dict[str, Any] = {}
            for name, frames in chunks.items():
                try:
                    for stream in cache.streams(name):
                        grow(stream, len(frames))
                    made[name] = frames
                except OutOfMemoryError:
                    continue
            return made

    async def main() -> None:
        scheduler.observe(Watcher())
        async with AsyncScheduler(scheduler, Generate(), store=cache, poll_seconds=0.01) as driver:
            window = Window(sink_frames=1, recent_frames=8, retrieval_frames=12)
            streams = [driver.submit(StreamRequest(f"s{i}", f"t{i % 3}", 24, window)) for i in range(6)]
            streams[5].cancel()
            for stream in streams[:5]:
                assert [list(frames) for frames in await stream] == [list(range(i, i + 3)) for i in range(0, 24, 3)]

    asyncio.run(asyncio.wait_for(main(), 60))
    assert moves["parked"] > 0
    assert moves["resumed"] == moves["parked"]
    assert manager.stats().used_nbytes == 0
    assert not manager.streams
    manager.check_integrity()
