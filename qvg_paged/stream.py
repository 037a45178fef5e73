"""One video being generated: its committed frames, its window, its open chunk."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qvg_paged.chunk import Chunk
from qvg_paged.config import QualityFloor, Rung, Window
from qvg_paged.demote import FrameQuality, ledger
from qvg_paged.errors import ArgumentError, IntegrityError, StateError
from qvg_paged.ladder import SqueezedTimeline
from qvg_paged.page import Page
from qvg_paged.park import Parked, Tier
from qvg_paged.timeline import Timeline

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager

__all__ = ["Stream"]


class Stream:
    """A stream of a manager; made by `KVCacheManager.open` and `Stream.fork`.

    Attributes:
        id: name, unique among the manager's open streams.
        tenant: owner; pages are shared only inside a tenant.
        window: what it keeps.
        timeline: the window's rules as arithmetic.
        committed: frames committed so far, evicted ones included.
        pages: page of each frame that is still stored, ascending.
        chunk: the open chunk, or None.
        closed: whether `close` was called.
        parked: where the stream is while it is not in the pool, or None.
        floor: how far it may be squeezed, unless its tenant's floor is stricter.
    """

    def __init__(
        self,
        manager: "KVCacheManager",
        stream_id: str,
        tenant: str,
        timeline: Timeline,
        floor: QualityFloor | None = None,
    ) -> None:
        self.manager = manager
        self.id = stream_id
        self.tenant = tenant
        self.timeline = timeline
        self.committed = 0
        self.pages: dict[int, Page] = {}
        self.chunk: Chunk | None = None
        self.closed = False
        self.floor = floor or QualityFloor()
        self.parked: Parked | None = None

    @property
    def rung(self) -> Rung:
        """How far the stream was squeezed."""
        return self.timeline.rung if isinstance(self.timeline, SqueezedTimeline) else Rung.NONE

    @property
    def quality_floor(self) -> QualityFloor:
        """How far it may be squeezed: the stricter of its own floor and its tenant's."""
        return self.floor.stricter(self.manager.floors.get(self.tenant, QualityFloor()))

    @property
    def ledger(self) -> dict[int, FrameQuality]:
        """Format and number of demotions of each stored frame."""
        return ledger(self.manager, self)

    @property
    def window(self) -> Window:
        """What the stream keeps."""
        return self.timeline.window

    def require_open(self) -> None:
        """Raise `StateError` if the stream is closed or parked."""
        if self.closed:
            raise StateError(f"stream: expected an open stream, {self.id!r} is closed; open another")
        if self.parked is not None:
            raise StateError(f"stream: expected a stream in the pool, {self.id!r} is parked; resume it first")

    def require_idle(self) -> None:
        """Raise `StateError` if the stream is closed or parked or has an open chunk."""
        self.require_open()
        if self.chunk is not None:
            raise StateError(f"stream: {self.id!r} has an open chunk; commit or abort it first")

    def begin_chunk(
        self,
        frames: int | None = None,
        *,
        retrieve: Sequence[int] = (),
        positions: Mapping[int, float] | None = None,
    ) -> Chunk:
        """Reserve everything a chunk may need until its commit, and open it.

        Args:
            frames: how many, at most the model's ``frames_per_chunk``; None for as many.
            retrieve: frames kept past the window that this chunk shall see as well.
            positions: frame positions for rotary embedding that differ from the frames' own indices.

        Raises:
            OutOfMemoryError: the pool cannot hold it; nothing changed.
            StateError: the stream is closed or has an open chunk.
            ArgumentError: a frame is not stored, or `frames` is out of range.
        """
        return self.manager.begin_chunks([self], frames, retrieve=retrieve, positions=positions)[0]

    def held(self) -> list[Page]:
        """Every page the stream owns, those of its open chunk and those it is being resumed into included.

        Raises:
            IntegrityError: one belongs to another tenant.
        """
        pages = list(self.pages.values()) + (self.chunk.reservation.pages if self.chunk else [])
        if self.parked is not None and self.parked.incoming is not None:
            pages += self.parked.incoming.pages.values()
        foreign = [page.id for page in pages if page.tenant != self.tenant]
        if foreign:
            raise IntegrityError(f"stream {self.id!r} of {self.tenant!r}: pages {foreign} are not its own")
        return pages

    def visible(self, retrieve: Sequence[int] = ()) -> tuple[int, ...]:
        """Frames the next chunk attends to, ascending.

        Raises:
            ArgumentError: a frame of `retrieve` is not stored.
        """
        if not retrieve:
            return tuple(self.timeline.visible(self.committed))
        missing = sorted(set(retrieve) - set(self.pages))
        if missing:
            raise ArgumentError(
                f"retrieve: expected frames that are still stored ({_ranges(list(self.pages))}), got {missing}; "
                "keep more with Window(retrieval_frames=...)"
            )
        return tuple(sorted({*self.timeline.visible(self.committed), *retrieve}))

    def seen(self, visible: Sequence[int]) -> Collection[Page]:
        """Pages of visible frames."""
        if len(visible) == len(self.pages):
            return self.pages.values()
        return [self.pages[frame] for frame in visible]

    def read(
        self, layer: int, frames: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded K and V of stored frames, as attention sees them before rotation.

        Args:
            layer: 0 to ``num_layers - 1``.
            frames: stored frames; None for all of them.
            dtype: of the result; None for the model's.

        Returns:
            K and V, each ``[frames * tokens_per_frame, num_kv_heads, head_dim]``.
        """
        return self.manager.read(self, layer, frames, dtype)

    def digests(self) -> dict[int, int]:
        """A 64-bit digest of each stored frame's page and codebook bytes."""
        return self.manager.digests(self)

    def fork(self, stream_id: str) -> "Stream":
        """A stream with the same history, sharing every page; an open chunk stays with this stream.

        Raises:
            StateError: this stream is closed.
            ArgumentError: the id is in use.
        """
        return self.manager.fork(self, stream_id)

    def demote(self, rung: Rung) -> int:
        """Store the stream more cheaply, for good: `KVCacheManager.demote` for one stream."""
        return self.manager.demote([self], rung)

    def shrink_retrieval(self, frames: int) -> int:
        """Keep at most `frames` frames past the visible ones from now on; bytes that went back to the pool.

        Raises:
            QualityFloorError: the stream's or its tenant's floor allows no fewer; nothing changed.
            ArgumentError: more than it keeps now, or too few for its spans to fill.
            StateError: the stream is closed, parked or has an open chunk.
        """
        return self.manager.shrink_retrieval(self, frames)

    def park(self, tier: Tier | None = None) -> Tier:
        """Move the stream out of the pool, between chunks; where it is now.

        Until `resume` it can be closed, moved on to the disk, and asked for its ledger, nothing else. Pages shared
        with forks stay in the pool for them.

        Args:
            tier: where to; None for the host if it has room, else the disk. A stream on the host can be parked again
                with `Tier.DISK`; its host copy stays until the room is needed.

        Raises:
            OutOfMemoryError: ``CacheConfig.host_memory`` or ``disk_memory`` is full; nothing changed.
            StorageError: the disk failed, or there is none; nothing changed.
            StateError: the stream is closed or has an open chunk.
        """
        return self.manager.park(self, tier)

    def prefetch_resume(self) -> None:
        """Begin to bring a parked stream back, beside what the device is doing. `resume` completes it.

        Raises:
            OutOfMemoryError: the pool has no room; nothing changed.
            StateError: the stream is not parked.
        """
        self.manager.prefetch_resume(self)

    def cancel_prefetch(self) -> None:
        """Give the memory of a prefetch back; the stream stays parked. Does nothing where there is none."""
        self.manager.cancel_prefetch(self)

    def resume(self) -> Tier:
        """Bring a parked stream back, byte for byte, into pages of its own; where it came from.

        Raises:
            OutOfMemoryError: the pool has no room; the stream stays parked.
            CorruptedError: no copy has the bytes that left; the stream stays parked and can only be closed.
            StorageError: the disk failed; the stream stays parked.
            StateError: the stream is not parked.
        """
        return self.manager.resume(self)

    def close(self) -> None:
        """Abort an open chunk and return everything. Does nothing on a closed stream."""
        self.manager.close_stream(self)


def _ranges(frames: list[int]) -> str:
    """Sorted frame numbers as ``0-3, 8-11``."""
    runs: list[list[int]] = []
    for frame in sorted(frames):
        if runs and runs[-1][-1] == frame - 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
