"""Turns a full span of unquantised pages into quantised ones, off the critical path."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from qvg_paged.events import fault_point
from qvg_paged.fence import Fence
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout
from qvg_paged.page import DENSE_FORMAT, Page

__all__ = ["SpanEncoder"]


class SpanEncoder:
    """Encodes spans in order, on a side stream of its own where the device has streams.

    What is written does not depend on when: a span's bytes are a function of its tokens and the codec.
    """

    def __init__(self, buffer: torch.Tensor, layouts: tuple[PageLayout, ...]) -> None:
        self._buffer = buffer
        self._layouts = layouts
        self._side = None
        if buffer.device.type == "cuda":
            self._side = torch.cuda.Stream(buffer.device)
        self.guard()
        self._done: Fence | None = None

    def guard(self) -> None:
        """See to it that a pool dropped while a span is encoded is not given to anyone else before that is done."""
        if self._side is not None:
            self._buffer.record_stream(self._side)

    def _on_side_stream(self) -> AbstractContextManager[object]:
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self._buffer.device))
        return torch.cuda.stream(self._side)

    def encode(self, dense: list[Page], quantised: list[Page]) -> None:
        """Write the span held by `dense` pages into `quantised` pages and their codebook."""
        with self._on_side_stream():
            for layer in range(self._layouts[DENSE_FORMAT].num_layers):
                fault_point("encode.layer")
                self._encode_layer(layer, dense, quantised)
            self._done = Fence.record(self._buffer.device)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Launch other work in order with spans: behind what was launched so far, and `order_after` waits for it."""
        with self._on_side_stream():
            try:
                yield
            finally:
                self._done = Fence.record(self._buffer.device)

    def _encode_layer(self, layer: int, dense: list[Page], quantised: list[Page]) -> None:
        source, target = self._layouts[DENSE_FORMAT], self._layouts[quantised[0].format]
        codebook = quantised[0].codebook
        book = codebook.slot.id * GRANULE if codebook else 0
        for part, start, end, codebook_offset in (
            (target.key, source.key_offset(layer), target.key_offset(layer), target.key_codebook_offset(layer)),
            (target.value, source.value_offset(layer), target.value_offset(layer), target.value_codebook_offset(layer)),
        ):
            values = source.key.plane("values")
            frames = [values.view(self._buffer, page.id * GRANULE + start) for page in dense]
            offsets = [page.id * GRANULE + end for page in quantised]
            self._encode_part(part, frames, offsets, book + codebook_offset if codebook else None)

    def _encode_part(
        self, part: PartLayout, frames: list[torch.Tensor], offsets: list[int], codebook: int | None
    ) -> None:
        if part.codec.is_dense:
            for frame, offset in zip(frames, offsets, strict=True):
                part.plane("values").view(self._buffer, offset).copy_(frame)
        else:
            encode_part(torch.cat(frames), part, self._buffer, offsets, codebook)

    def order_after(self) -> None:
        """Let the current stream wait until every span handed over so far is encoded."""
        if self._done is not None:
            self._done.order_after()

    def fence(self) -> Fence:
        """A fence behind all launched work, on the current stream and on the encoder's."""
        with self._on_side_stream():
            return Fence.record(self._buffer.device)
