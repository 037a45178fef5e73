"""What the scheduler asks of a cache: books only, never pages.

`KVCacheManager` is a `CacheBackend`. A cache that can also move a stream out of the pool and back is a
`ParkingBackend`; only over one of those does the scheduler reserve to the next chunk boundary, because only there can
it take memory back. One that can store streams more cheaply before that is a `LadderBackend`. `TieredCache` makes a
manager one of these. Every method is a pure function of its arguments and of the cache's configuration, so that a
replay, and every rank of a head-sharded model, gets the same answers.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from qvg_paged.config import QualityFloor, Window
from qvg_paged.ladder import Relief, Squeeze
from qvg_paged.timeline import Demand

__all__ = ["CacheBackend", "LadderBackend", "ParkingBackend"]


@runtime_checkable
class CacheBackend(Protocol):
    """A pool that streams share."""

    @property
    def pool_nbytes(self) -> int:
        """Bytes for pages and codebooks."""

    @property
    def frames_per_chunk(self) -> int:
        """Most frames denoised together."""

    def demand(self, window: Window, frames: int | None = None) -> Demand:
        """Most of each kind of pool object that a stream of `frames` frames ever holds."""

    def demand_nbytes(self, demand: Demand) -> int:
        """Pool bytes of `demand`."""

    def can_host(self, demands: Sequence[Demand], nbytes: int | None = None) -> bool:
        """Whether these demands fit together in the pool, or in `nbytes` of it."""


@runtime_checkable
class ParkingBackend(CacheBackend, Protocol):
    """A pool whose streams can be moved to the host between chunks and back, byte for byte.

    `can_host` must hold for the demands of the moment although they change from chunk to chunk: a pool that
    fragments answers for the worst placement.
    """

    @property
    def host_nbytes(self) -> int:
        """Bytes on the host for parked streams."""

    def chunk_demand(self, window: Window, committed: int, frames: int) -> Demand:
        """Pool objects while a chunk of `frames` frames is open after `committed` frames."""

    def park_seconds(self, nbytes: int) -> float:
        """Time to move that many bytes to the host."""

    def resume_seconds(self, nbytes: int) -> float:
        """Time to move them back."""


@runtime_checkable
class LadderBackend(ParkingBackend, Protocol):
    """A pool whose streams can be stored more cheaply between chunks, for good."""

    def squeezed_demand(self, window: Window, committed: int, frames: int, squeeze: Squeeze) -> Demand:
        """`chunk_demand` of a stream that was squeezed."""

    def lowered(
        self, window: Window, frames: int, floor: QualityFloor, now: Squeeze, committed: int, relief: Relief
    ) -> Squeeze | None:
        """What a stream of `frames` frames is after that relief; None where it may not have it.

        Its worst case afterwards must fit wherever its worst case before does.
        """
