"""The cache manager: many streams, one pool.

Threads: every method takes one lock, so bookkeeping is safe from any thread. CUDA streams: all `attend`, `write`,
`park` and `resume` calls of a manager go to one CUDA stream at a time, the caller's current one; whoever switches
orders the two. Memory is reused only behind everything launched before it was returned. One manager per device or rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from qvg_paged.batch import ChunkBatches
from qvg_paged.begin import Need, begin_chunks
from qvg_paged.budget import Budget, object_counts, object_sizes, page_layouts, stream_timeline
from qvg_paged.calls import Calls
from qvg_paged.checks import check_layer, check_name
from qvg_paged.chunk import Chunk, ChunkState
from qvg_paged.closing import seal_layer
from qvg_paged.commit import commit_chunks
from qvg_paged.config import CacheConfig, ModelSpec, QualityFloor, Rung, Window
from qvg_paged.demote import demote_streams, shrink_retrieval
from qvg_paged.disk import DiskTier
from qvg_paged.encoder import SpanEncoder
from qvg_paged.errors import ArgumentError, OutOfMemoryError, StorageError
from qvg_paged.events import CacheEvent, EventKind, Tally, fault_point
from qvg_paged.finite import FiniteCheck
from qvg_paged.host import HostArena
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.table_memory import TableMemory
from qvg_paged.notes import Notes, event, freed
from qvg_paged.page import DENSE_FORMAT, Page, PageStore
from qvg_paged.park import Parked, Tier, cancel_prefetch, discard, park_stream, prefetch_stream, resume_stream
from qvg_paged.pool import SlabPool
from qvg_paged.reader import page_digest, read_pages
from qvg_paged.resize import grow_pool, shrink_pool
from qvg_paged.stats import CacheStats, cache_stats, object_stats, stream_stats
from qvg_paged.stream import Stream
from qvg_paged.timeline import Demand
from qvg_paged.transfer import Mover

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """Owns the pool and everything in it.

    Args:
        model: geometry of the model's cache.
        config: memory, format, device.

    Attributes:
        model, config: as given.
        budget: how the memory is split.
        layouts: page layouts; index 0 is the unquantised one.
        streams: open streams by id.

    Raises:
        ConfigError: the memory cannot hold one chunk; the message says how much is needed.
    """

    def __init__(self, model: ModelSpec, config: CacheConfig) -> None:
        self.model = model
        self.config = config
        self.budget = Budget.split(model, config)
        self.layouts = page_layouts(model, config)
        self._dense = self.layouts[DENSE_FORMAT]
        device = torch.empty(0, device=cast(torch.device, config.device)).device
        sizes = object_sizes(self.layouts)
        self._pool = SlabPool(self.budget.slabs, sizes, device, config.free_fill)
        self.staging = torch.empty(self.budget.staging, dtype=torch.uint8, device=device)
        self.store = PageStore(self._pool, self.layouts)
        self.mover = Mover(self._pool.buffer, self.staging if device.type == "cuda" else None)
        self.host = HostArena(cast(int, config.host_memory), pinned=device.type == "cuda")
        self.disk: DiskTier | None = None
        if config.disk_path is not None:
            folder, room = cast(Path, config.disk_path), cast(int, config.disk_memory)
            self.disk = DiskTier(folder, room, self.layouts, pinned=device.type == "cuda")
        self.encoder = SpanEncoder(self._pool.buffer, self.layouts)
        self.streams: dict[str, Stream] = {}
        self.floors: dict[str, QualityFloor] = {}
        self.finite = FiniteCheck(self._pool, self._dense, model.dtype)
        self.needs: dict[Need, Mapping[int, int]] = {}
        self.notes = Notes(config.on_event)
        self._tally = self.notes.tally
        self.tables = TableMemory(device)
        self._batches = ChunkBatches(self)
        self._lock = Calls()

    @property
    def device(self) -> torch.device:
        """Where the pool lives."""
        return self._pool.buffer.device

    @property
    def pool_nbytes(self) -> int:
        """Bytes for pages and codebooks."""
        return self.budget.pool

    @property
    def frames_per_chunk(self) -> int:
        """Most frames denoised together."""
        return self.model.frames_per_chunk

    def demand(self, window: Window, frames: int | None = None) -> Demand:
        """Most of each kind of pool object that a stream of `frames` frames (None: endless) ever holds.

        Raises:
            ConfigError: the window cannot hold a span.
        """
        return stream_timeline(self.config, window).worst_demand(self.model.frames_per_chunk, frames)

    def demand_nbytes(self, demand: Demand) -> int:
        """Pool bytes of `demand`."""
        return sum(size * count for size, count in object_counts(self.layouts, demand).items())

    def can_host(self, demands: Sequence[Demand], nbytes: int | None = None) -> bool:
        """Whether streams with these worst cases can live together to their ends, whatever the order of events.

        `nbytes` asks the same of a smaller pool.
        """
        counts = object_counts(self.layouts, sum(demands, self.budget.reserve))
        slabs = self.budget.slabs
        usable = slabs.num_slabs if nbytes is None else min(slabs.num_slabs, nbytes // slabs.slab_nbytes)
        return slabs.slabs_for(counts) <= usable

    def open(
        self, stream_id: str, *, tenant: str = "default", window: Window, floor: QualityFloor | None = None
    ) -> Stream:
        """Open a stream; takes no memory before its first chunk. `floor` says how far it may be squeezed.

        Raises:
            ArgumentError: the id is in use.
            ConfigError: the window cannot hold a span.
        """
        with self._lock:
            timeline = stream_timeline(self.config, window)
            return self._add(Stream(self, stream_id, tenant, timeline, floor))

    def _add(self, stream: Stream) -> Stream:
        check_name("stream_id", stream.id)
        check_name("tenant", stream.tenant)
        if stream.id in self.streams:
            raise ArgumentError(f"stream_id: expected an id not in use, got {stream.id!r}; close that stream first")
        self.streams[stream.id] = stream
        return stream

    def begin_chunks(
        self,
        streams: Sequence[Stream],
        frames: int | None = None,
        *,
        retrieve: Sequence[int] = (),
        positions: Mapping[int, float] | None = None,
    ) -> list[Chunk]:
        """Open a chunk on each stream, all or none: CFG branches begin together. See `Stream.begin_chunk`."""
        with self._lock:
            try:
                return begin_chunks(self, streams, frames, retrieve, positions)
            except Tally.COUNTED as error:
                self._tally.fail(error)
                raise

    def attend(
        self, layer: int, chunks: Sequence[Chunk], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """`Chunk.attend` for several chunks in one launch: tokens of all chunks concatenated in order.

        Args:
            layer: 0 to ``num_layers - 1``.
            chunks: open chunks of this manager, each once.
            q: ``[sum of tokens, num_q_heads, head_dim]``.
            k, v: ``[sum of tokens, num_kv_heads, head_dim]``.

        Returns:
            ``[sum of tokens, num_q_heads, head_dim]`` in q's dtype.
        """
        with self._lock.attending, torch.no_grad():
            return self._batches.attend(layer, chunks, q, k, v, self._lock.lookahead)

    def write(self, layer: int, chunks: Sequence[Chunk], k: torch.Tensor, v: torch.Tensor) -> None:
        """`Chunk.write` for several chunks at once; arguments as `attend`."""
        with self._lock, torch.no_grad():
            self._batches.write(layer, chunks, k, v)

    def seal(self, chunk: Chunk, layer: int) -> None:
        """See `Chunk.seal`."""
        with self._lock.attending:
            self._batches.check([chunk])
            seal_layer(self, chunk, layer)

    def block_tables(self, chunks: Sequence[Chunk]) -> BlockTable:
        """Block table of open chunks, for engines that call the kernels themselves; `BlockTable.dense` pads it."""
        with self._lock:
            return self._batches.table(chunks)

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """`Chunk.commit` for several chunks; the host waits for the device once, not once per chunk.

        Where one fails while its span is encoded, it is aborted, those before it are committed, those after it open.

        Raises:
            StateError: a chunk is not open, or one of its layers was never written; nothing changed.
            NonFiniteError: chunks hold NaN or infinity; these were aborted, the others are still open.
        """
        with self._lock:
            self._batches.check(chunks)
            try:
                commit_chunks(self, chunks)
            except Tally.COUNTED as error:
                self._tally.fail(error)
                raise

    def abort(self, chunk: Chunk) -> None:
        """See `Chunk.abort`."""
        with self._lock:
            if chunk.state is ChunkState.OPEN:
                self.abort_all([chunk])

    def abort_all(self, chunks: Sequence[Chunk]) -> None:
        """Abort open chunks; their events go out together."""
        events: list[CacheEvent] = []
        for chunk in chunks:
            self.finish(chunk, ChunkState.ABORTED)
            events += self.release(chunk.stream.tenant, chunk.reservation.pages)
        self.send(events)

    def finish(self, chunk: Chunk, state: ChunkState) -> None:
        """Detach a chunk from its stream; drop batches it was part of, and device memory that served it alone."""
        chunk.finish(state)
        self._batches.drop(chunk)

    def release(self, tenant: str, pages: list[Page]) -> list[CacheEvent]:
        """Take an owner from each page; memory is reusable once what was launched so far is done. The event to send."""
        returned = self.store.release(pages, self.encoder.fence()) if pages else 0
        return freed(tenant, pages, returned)

    def fork(self, stream: Stream, stream_id: str) -> Stream:
        """See `Stream.fork`."""
        with self._lock:
            stream.require_open()
            fault_point("stream.fork")
            branch = self._add(Stream(self, stream_id, stream.tenant, stream.timeline, stream.floor))
            self.store.retain(list(stream.pages.values()))
            branch.pages = dict(stream.pages)
            branch.committed = stream.committed
            return branch

    def set_floor(self, tenant: str, floor: QualityFloor | None) -> None:
        """How far streams of `tenant` may be squeezed from now on; what was demoted stays demoted. None: no floor."""
        with self._lock:
            if floor is None:
                self.floors.pop(tenant, None)
            elif isinstance(floor, QualityFloor):
                self.floors[tenant] = floor
            else:
                raise ArgumentError(f"floor: expected a QualityFloor or None, got {floor!r}")

    def demote(self, streams: Sequence[Stream], rung: Rung) -> int:
        """Store streams more cheaply, for good, between chunks; bytes that went back to the pool.

        On `Rung.TAIL` the dense tail is quantised now, and from now on frames are as soon as a chunk's worth of them
        is committed; sink frames kept unquantised by the window stay so. On `Rung.SPANS` all quantised pages are
        requantised to ``CacheConfig.demote_to``: a span keeps its codebook and ids, only its residual is coarser.
        docs/tiers.md says what happens to pages that forks share.

        Raises:
            QualityFloorError: a stream may not go down that far; nothing changed.
            OutOfMemoryError: no memory is left for the new pages; some spans may be demoted already, the rest is as
                it was.
            StateError: a stream is closed, parked or has an open chunk; nothing changed.
        """
        with self._lock, self._tally, torch.no_grad():
            return demote_streams(self, streams, rung)

    def shrink_retrieval(self, stream: Stream, frames: int) -> int:
        """See `Stream.shrink_retrieval`."""
        with self._lock:
            return shrink_retrieval(self, stream, frames)

    def shrink(self, nbytes: int) -> int:
        """Give pool memory back to the host engine, in whole slabs; bytes that it got, at least `nbytes`.

        Pages move together first. The pool's storage is replaced by a smaller one, so for a moment both are there.
        The bytes go back to PyTorch's allocator (``torch.cuda.empty_cache`` hands them on). Over a scheduler, call its
        ``limit_pool`` before, and this once running streams have been squeezed or parked.

        Raises:
            OutOfMemoryError: streams hold more than what would be left, or it could not hold a chunk; none has changed.
            StateError: a chunk is open or a stream on its way back.
        """
        with self._lock, self._tally, torch.no_grad():
            return shrink_pool(self, nbytes)

    def grow(self, nbytes: int) -> int:
        """Take memory again that `shrink` gave back; bytes that the pool got, at most `nbytes`.

        Raises:
            torch.OutOfMemoryError: the device has none; nothing changed.
            StateError: a chunk is open or a stream on its way back.
        """
        with self._lock, torch.no_grad():
            return grow_pool(self, nbytes)

    def park(self, stream: Stream, tier: Tier | None = None) -> Tier:
        """See `Stream.park`."""
        with self._lock, self._tally, torch.no_grad():
            return park_stream(self, stream, tier)

    def restore(self, stream_id: str, *, tenant: str = "default", floor: QualityFloor | None = None) -> Stream:
        """A parked stream that an earlier process left on the disk; `Stream.resume` brings it back.

        Raises:
            ArgumentError: there is none, or the id is in use.
            CorruptedError: its file is damaged.
            StorageError: there is no disk, it failed, or the file is of another version or model.
        """
        with self._lock:
            if self.disk is None:
                raise StorageError("restore: expected disk_path and disk_memory in CacheConfig, got neither")
            image, container = self.disk.find(stream_id, tenant)
            stream = self._add(Stream(self, stream_id, tenant, image.timeline, floor))
            stream.committed = image.committed
            stream.parked = Parked(image, disk=container)
            return stream

    def prefetch_resume(self, stream: Stream) -> None:
        """See `Stream.prefetch_resume`."""
        with self._lock, self._tally, torch.no_grad():
            prefetch_stream(self, stream)

    def cancel_prefetch(self, stream: Stream) -> None:
        """See `Stream.cancel_prefetch`."""
        with self._lock:
            cancel_prefetch(self, stream)

    def has_room(self, counts: Mapping[int, int]) -> bool:
        """Whether that many further objects, by size, fit as pages lie now."""
        with self._lock:
            try:
                self._pool.require(counts)
            except OutOfMemoryError:
                return False
            return True

    def resume(self, stream: Stream) -> Tier:
        """See `Stream.resume`."""
        with self._lock, self._tally, torch.no_grad():
            return resume_stream(self, stream)

    def close_stream(self, stream: Stream) -> None:
        """See `Stream.close`."""
        with self._lock:
            if stream.closed:
                return
            if stream.chunk is not None:
                self.abort(stream.chunk)
            stream.closed = True
            del self.streams[stream.id]
            discard(self, stream)
            pages, stream.pages = list(stream.pages.values()), {}
            self.send(self.release(stream.tenant, pages))

    def read(
        self, stream: Stream, layer: int, frames: Sequence[int] | None, dtype: torch.dtype | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Stream.read`."""
        with self._lock, torch.no_grad():
            stream.require_open()
            check_layer(layer, self.model)
            wanted = list(stream.pages) if frames is None else list(frames)
            missing = sorted(set(wanted) - set(stream.pages))
            if missing:
                raise ArgumentError(f"frames: expected frames that are still stored, got {missing}")
            self.encoder.order_after()
            pages = [stream.pages[frame] for frame in wanted]
            return read_pages(self._pool.buffer, self.layouts, pages, layer, dtype or self.model.dtype)

    def digests(self, stream: Stream) -> dict[int, int]:
        """See `Stream.digests`."""
        with self._lock:
            stream.require_open()
            self.encoder.order_after()
            buffer, layouts = self._pool.buffer, self.layouts
            return {frame: page_digest(buffer, layouts[page.format], page) for frame, page in stream.pages.items()}

    def stats(self) -> CacheStats:
        """Books of the moment."""
        with self._lock:
            self._pool.reclaim(wait=False)
            streams = {
                stream.id: stream_stats(stream.tenant, stream.committed, stream.pages.values(), self._dense.page_nbytes)
                for stream in self.streams.values()
            }
            pages: list[Page] = []
            for stream in self.streams.values():
                pages += stream.pages.values()
                pages += stream.chunk.reservation.pages if stream.chunk else ()
            objects = object_stats(self.budget, self.layouts, pages)
            stats = cache_stats(self.budget, self._pool, streams, objects, self._tally)
            disk = 0 if self.disk is None else self.disk.used_nbytes
            return replace(stats, host_nbytes=self.host.used_nbytes, disk_nbytes=disk)

    def check_integrity(self) -> None:
        """Walk all books and raise `IntegrityError` if a byte, an owner or a codebook is not accounted for."""
        with self._lock, self._tally:
            held: list[Page] = []
            for stream in self.streams.values():
                held += stream.held()
            self.store.check_integrity(held)
            parked = [stream.parked for stream in self.streams.values() if stream.parked]
            self.host.check_integrity([extent for each in parked for extent in each.host or ()])

    @staticmethod
    def event(kind: EventKind, stream: Stream, frames: Iterable[int], pages: list[Page]) -> CacheEvent:
        """An event about pages of a stream."""
        return event(kind, stream, frames, pages)

    def send(self, events: list[CacheEvent]) -> None:
        """Count events and tell the event sink, after the books have changed."""
        self.notes.send(events)
