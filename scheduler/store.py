"""The cache manager as a cache whose streams can be squeezed, parked and brought back; and what does that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from qvg_paged.budget import object_counts, stream_timeline
from qvg_paged.compact import make_room
from qvg_paged.config import QualityFloor, Rung, Window
from qvg_paged.errors import OutOfMemoryError, QvgPagedError
from qvg_paged.ladder import Relief, Squeeze, SqueezedTimeline, lowered, squeeze
from qvg_paged.manager import KVCacheManager
from qvg_paged.scheduler.plan import Plan
from qvg_paged.scheduler.request import StreamRequest
from qvg_paged.stream import Stream
from qvg_paged.timeline import Demand, Timeline

__all__ = ["TieredCache"]


class TieredCache:
    """A manager as a `LadderBackend`, and the first half of carrying a plan out.

        cache = TieredCache(manager)
        scheduler = Scheduler(cache)
        ...
        plan = scheduler.step(time.monotonic())
        failed = cache.carry_out(plan, requests)         # closes, demotes, parks, resumes, opens
        ...                                              # chunks of plan.running that are `ready` and not `failed`
        scheduler.update(plan, Outcome(committed, failed))

    A parked stream goes to the host while there is room, then to the disk. What is set aside for it is the larger of
    the two, which holds all parked streams whatever their sizes.

    Args:
        manager: whose streams these are; all of them must come through the scheduler.
        transfer_rate: bytes per second between pool and host, as measured by benchmarks/park_bench.py.
        prefetch: bring the first parked stream in line back before its turn, if there is room for it.
    """

    def __init__(self, manager: KVCacheManager, *, transfer_rate: float = 40e9, prefetch: bool = True) -> None:
        self.manager = manager
        self._rate = transfer_rate
        self._prefetch = prefetch
        self._slabs = manager.budget.slabs
        self._branches: dict[str, list[Stream]] = {}
        self._behind: dict[str, Squeeze] = {}
        self._leaving: set[str] = set()
        self._coming: set[str] = set()
        self._worst = lru_cache(maxsize=1024)(self._worst_demand)
        self._chunk = lru_cache(maxsize=4096)(self._chunk_demand)

    @property
    def pool_nbytes(self) -> int:
        """Bytes for pages and codebooks when the manager was given; what it gave back is a limit of the scheduler."""
        return self._slabs.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes outside the pool for parked streams."""
        disk = self.manager.disk
        return max(self.manager.host.nbytes, 0 if disk is None else disk.nbytes - disk.leftover_nbytes)

    @property
    def frames_per_chunk(self) -> int:
        """Most frames denoised together."""
        return self.manager.frames_per_chunk

    def demand(self, window: Window, frames: int | None = None) -> Demand:
        """Most of each kind of pool object that a stream of `frames` frames ever holds."""
        return self._worst(window, frames, Rung.NONE)

    def demand_nbytes(self, demand: Demand) -> int:
        """Pool bytes of `demand`."""
        return self.manager.demand_nbytes(demand)

    def can_host(self, demands: Sequence[Demand], nbytes: int | None = None) -> bool:
        """Whether these demands fit together in the pool, or in `nbytes` of it, once pages have moved together."""
        counts = object_counts(self.manager.layouts, sum(demands, self.manager.budget.reserve))
        usable = self._slabs.num_slabs if nbytes is None else nbytes // self._slabs.slab_nbytes
        return self._slabs.slabs_for(counts) <= usable

    def chunk_demand(self, window: Window, committed: int, frames: int) -> Demand:
        """Pool objects while a chunk of `frames` frames is open after `committed` frames."""
        return self._chunk(window, committed, frames, Squeeze())

    def squeezed_demand(self, window: Window, committed: int, frames: int, squeeze: Squeeze) -> Demand:
        """The same of a stream that was squeezed."""
        return self._chunk(window, committed, frames, squeeze)

    def lowered(
        self, window: Window, frames: int, floor: QualityFloor, now: Squeeze, committed: int, relief: Relief
    ) -> Squeeze | None:
        """What a stream is after that relief; None where it may not have it, or could need more memory some day."""
        after = lowered(self.manager.config, window, floor, now, committed, relief)
        if after is None or after.rung is now.rung:
            return after
        slabs, layouts = self._slabs, self.manager.layouts
        before, worst = (self._worst(window, frames, rung) for rung in (Rung.NONE, after.rung))
        larger = self.demand_nbytes(worst) > self.demand_nbytes(before)
        more = slabs.slabs_for(object_counts(layouts, worst)) > slabs.slabs_for(object_counts(layouts, before))
        return None if larger or more else after

    def park_seconds(self, nbytes: int) -> float:
        """Time to move that many bytes to the host."""
        return nbytes / self._rate

    def resume_seconds(self, nbytes: int) -> float:
        """Time to move them back."""
        return nbytes / self._rate

    def _timeline(self, window: Window, now: Squeeze) -> Timeline:
        manager = self.manager
        return squeeze(stream_timeline(manager.config, now.window(window)), now.rung, now.since, manager.model)

    def _chunk_demand(self, window: Window, committed: int, frames: int, now: Squeeze) -> Demand:
        return self._timeline(window, now).demand(committed, frames)

    def _worst_demand(self, window: Window, frames: int | None, rung: Rung) -> Demand:
        timeline = self._timeline(window, Squeeze(rung))
        worst = timeline.worst_demand(self.frames_per_chunk, frames)
        if isinstance(timeline, SqueezedTimeline):  # a later grid of short spans may leave as many frames over
            worst = replace(worst, dense_pages=worst.dense_pages + timeline.cell_frames - 1)
        return worst

    def streams(self, stream_id: str) -> list[Stream]:
        """The cache streams of a request: one, or one per branch."""
        return self._branches[stream_id]

    def ready(self, stream_id: str) -> bool:
        """Whether a running stream can begin its chunk: not if it found no room to come back yet."""
        streams = self._branches.get(stream_id, [])
        return bool(streams) and all(stream.parked is None for stream in streams)

    def carry_out(self, plan: Plan, requests: Mapping[str, StreamRequest]) -> dict[str, str]:
        """Close, squeeze, park, resume and open what the plan says, and make room for its chunks.

        What finds no room (which takes a fault, since all of it was promised) is tried again with the next plan.

        Args:
            plan: what `Scheduler.step` returned.
            requests: of the admitted streams, by id.

        Returns:
            Streams that cannot go on, and why: for ``Outcome.failed``.
        """
        failed: dict[str, str] = {}
        for decision in plan.finished:
            self._forget(decision.stream_id)
        self._behind |= {d.stream_id: d.squeeze for d in (*plan.demoted, *plan.shrunk) if d.squeeze is not None}
        parked, resumed = ({d.stream_id for d in decisions} for decisions in (plan.parked, plan.resumed))
        self._leaving = (self._leaving - resumed) | parked
        self._coming = (self._coming - parked) | resumed
        self._squeeze()
        self._attempt(failed, self._leaving, lambda stream: stream.parked is not None or stream.park())
        self._attempt(failed, self._coming, lambda stream: stream.parked is None or stream.resume())
        self._squeeze()
        for decision in plan.admitted:
            self._branches[decision.stream_id] = []
            try:
                self._open(requests[decision.stream_id])
            except QvgPagedError as error:
                failed[decision.stream_id] = f"{type(error).__name__}: {error}"
        self._make_room(plan)
        return failed

    def _forget(self, stream_id: str) -> None:
        self._behind.pop(stream_id, None)
        self._leaving.discard(stream_id)
        self._coming.discard(stream_id)
        for stream in self._branches.pop(stream_id, ()):
            stream.close()

    def _squeeze(self) -> None:
        """Squeeze streams as planned; one for which there is no room yet is tried again with the next plan."""
        for stream_id, now in list(self._behind.items()):
            streams = self._branches[stream_id]
            if not self.ready(stream_id):
                continue
            try:
                self.manager.demote([stream for stream in streams if stream.rung < now.rung], now.rung)
            except OutOfMemoryError:
                continue
            for stream in streams:
                kept = stream.window.retrieval_frames
                if now.retrieval_frames is not None and now.retrieval_frames < kept:
                    stream.shrink_retrieval(now.retrieval_frames)
            del self._behind[stream_id]

    def _attempt(self, failed: dict[str, str], waiting: set[str], move: Callable[[Stream], object]) -> None:
        for stream_id in sorted(waiting):
            try:
                for stream in self._branches[stream_id]:
                    move(stream)
            except OutOfMemoryError:
                continue
            except QvgPagedError as error:
                failed[stream_id] = f"{type(error).__name__}: {error}"
            waiting.remove(stream_id)

    def _open(self, request: StreamRequest) -> None:
        names = [request.id, *(f"{request.id}#{branch}" for branch in range(1, request.branches))]
        for name in names:
            stream = self.manager.open(name, tenant=request.tenant, window=request.window, floor=request.quality)
            self._branches[request.id].append(stream)

    def _make_room(self, plan: Plan) -> None:
        """Move pages together once for all chunks of the plan, then bring the next stream back if there is room."""
        for stream in (stream for streams in self._branches.values() for stream in streams):
            stream.cancel_prefetch()
        total = Demand()
        for decision in plan.running:
            for stream in self._branches[decision.stream_id]:
                frames = len(decision.frames or ())
                kept = stream.timeline.demand(stream.committed, 0)
                total += stream.timeline.demand(stream.committed, frames) - kept
        try:
            make_room(self.manager, total + self.manager.budget.reserve)
        except OutOfMemoryError:
            return  # whoever begins a chunk last is told so and tries again
        if self._prefetch:
            self._prefetch_next(plan, total)

    def _prefetch_next(self, plan: Plan, promised: Demand) -> None:
        if all(stream.parked is None for streams in self._branches.values() for stream in streams):
            return  # the line, which may be long, is written out only if somebody in it can come back
        waiting = (self._branches.get(decision.stream_id, ()) for decision in plan.waiting)
        parked = next((streams for streams in waiting if streams), ())
        counts = object_counts(self.manager.layouts, promised + self.manager.budget.reserve)
        for stream in parked:
            if stream.parked is not None and self.manager.has_room(counts + stream.parked.image.counts):
                counts = counts + stream.parked.image.counts
                stream.prefetch_resume()
