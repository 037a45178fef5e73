"""The frames being denoised together: written over and over, then committed or thrown away."""

from collections.abc import Mapping
from enum import Enum
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from qvg_paged.errors import StateError
from qvg_paged.kernels.block_table import NO_CODEBOOK, BlockTable
from qvg_paged.page import DENSE_FORMAT, Reservation
from qvg_paged.scratch import ScratchWriter

if TYPE_CHECKING:
    from qvg_paged.kernels.span import SpanEncoding
    from qvg_paged.stream import Stream

__all__ = ["Chunk", "ChunkState"]


class ChunkState(Enum):
    """Where a chunk is in its life."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Chunk:
    """An open chunk of one stream; made by `Stream.begin_chunk`. As a context manager it aborts unless committed.

    Attributes:
        stream: the stream it extends.
        frames: indices of its frames.
        state: open, committed or aborted.
    """

    def __init__(
        self,
        stream: "Stream",
        frames: range,
        reservation: Reservation,
        visible: tuple[int, ...] | None,
        positions: Mapping[int, float],
    ) -> None:
        self.stream = stream
        self.frames = frames
        self.state = ChunkState.OPEN
        self.reservation = reservation
        self._visible = visible
        self._positions = positions
        self.written = [False] * stream.manager.model.num_layers
        self.sealed: set[int] = set()
        self.encodings: list[SpanEncoding] | None = None

    @cached_property
    def visible(self) -> tuple[int, ...]:
        """History frames it attends to, ascending."""
        return self._visible or tuple(self.stream.timeline.visible(self.frames.start))

    @cached_property
    def table(self) -> BlockTable:
        """Block table over the visible history, then its own frames; fixed while the chunk is open.

        Raises:
            StateError: it is first asked for when the chunk is done.
        """
        self.require_open()
        positions: tuple[float, ...] = (*self.visible, *self.frames)
        if self._positions:
            positions = tuple([self._positions.get(frame, frame) for frame in (*self.visible, *self.frames)])
        pages = [*self.stream.seen(self.visible), *self.reservation.scratch]
        return BlockTable.of_one(
            tuple([page.id for page in pages]),
            tuple([NO_CODEBOOK if page.codebook is None else page.codebook.id for page in pages]),
            tuple([page.format for page in pages]),
            positions,
            self.stream.manager.tables,
        )

    def finish(self, state: ChunkState) -> None:
        """Detach it from its stream, and drop device memory that served it alone."""
        self.state = state
        self.stream.chunk = None
        self.encodings = None
        table: BlockTable | None = self.__dict__.get("table")
        if table is not None:
            table.retire(idle=state is ChunkState.COMMITTED)  # its check has waited for the device

    @cached_property
    def writer(self) -> ScratchWriter:
        """Writes into its scratch pages, unless it is always part of a batch."""
        manager = self.stream.manager
        return ScratchWriter(manager.store.pool, manager.layouts[DENSE_FORMAT], self.reservation.scratch)

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk: frames times tokens per frame."""
        return len(self.frames) * self.stream.manager.model.tokens_per_frame

    def require_open(self) -> None:
        """Raise `StateError` unless the chunk is open."""
        if self.state is not ChunkState.OPEN:
            raise StateError(f"chunk: expected an open chunk, got one that is {self.state.value}; begin another")

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Overwrite the chunk's K and V of `layer` and attend to visible history and the chunk itself.

        Args:
            layer: 0 to ``num_layers - 1``.
            q: ``[tokens, num_q_heads, head_dim]``, any float dtype, already rotated.
            k: ``[tokens, num_kv_heads, head_dim]``, the model's dtype; rotated unless ``rope="on_read"``.
            v: as `k`.

        Returns:
            ``[tokens, num_q_heads, head_dim]`` in q's dtype.

        Raises:
            ArgumentError: a shape, dtype or device differs; nothing was written.
            StateError: the chunk is not open, or the layer is sealed.
        """
        return self.stream.manager.attend(layer, [self], q, k, v)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite the chunk's K and V of `layer` without attending (prefill). Arguments and errors as `attend`."""
        self.stream.manager.write(layer, [self], k, v)

    def seal(self, layer: int) -> None:
        """Say that K and V of `layer` are final, as the clean pass leaves a layer: the chunk's commit has less to do.

        If the commit will fill a span, the layer is encoded from now on, on a stream of the cache's own, beside
        whatever is launched next. What is committed is the same as without, and an abort drops it.

        Raises:
            StateError: the layer was never written, or the chunk is not open.
        """
        self.stream.manager.seal(self, layer)

    def commit(self) -> None:
        """Make the frames history, quantise spans that are full now, and move the window.

        Raises:
            StateError: a layer was never written, or the chunk is not open; nothing changed.
            NonFiniteError: K or V hold NaN or infinity; the chunk was aborted.
        """
        self.stream.manager.commit([self])

    def abort(self) -> None:
        """Throw the chunk away; the stream is as it was. Does nothing on a finished chunk."""
        self.stream.manager.abort(self)

    def __enter__(self) -> "Chunk":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
