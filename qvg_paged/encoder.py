"""Turns a full span of unquantised pages into quantised ones, off the critical path."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from qvg_paged.events import fault_point
from qvg_paged.fence import PASSED, Fence
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.kernels.span import SpanEncoding
from qvg_paged.page import DENSE_FORMAT, Page

if TYPE_CHECKING:
    from qvg_paged.kernels._span_program import SpanProgram

__all__ = ["SpanEncoder"]


class SpanEncoder:
    """Encodes spans in order, on a side stream of its own where the device has streams.

    What is written does not depend on when: a span's bytes are a function of its tokens and the codec.
    """

    def __init__(self, buffer: torch.Tensor, layouts: tuple[PageLayout, ...]) -> None:
        self._buffer = buffer
        self._layouts = layouts
        self._programs: dict[tuple[int, int], SpanProgram] = {}
        self._side = None
        if buffer.device.type == "cuda":
            self._side = torch.cuda.Stream(buffer.device)
        self.guard()
        self._done = PASSED

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
            self._encode([self._span(dense, quantised)], range(self._layouts[DENSE_FORMAT].num_layers))

    def begin(self, dense: list[Page], quantised: list[Page]) -> SpanEncoding:
        """A span whose layers can be encoded as they become final; nothing is encoded yet."""
        with self._on_side_stream():
            return self._span(dense, quantised)

    def encode_layers(self, spans: Sequence[SpanEncoding], layers: Sequence[int]) -> None:
        """Write some layers of spans: of their tokens as what was launched so far leaves them."""
        with self._on_side_stream():
            self._encode(spans, layers)

    def _span(self, dense: list[Page], quantised: list[Page]) -> SpanEncoding:
        codebook, shape = quantised[0].codebook, (quantised[0].format, len(quantised))
        span = SpanEncoding(
            self._buffer, self._layouts[DENSE_FORMAT], self._layouts[quantised[0].format], [page.id for page in dense],
            [page.id for page in quantised], codebook.id if codebook else None, program=self._programs.get(shape),
        )  # fmt: skip
        if span.program is not None:
            self._programs[shape] = span.program
        return span

    def _encode(self, spans: Sequence[SpanEncoding], layers: Sequence[int]) -> None:
        for span in spans:
            for layer in layers:
                fault_point("encode.layer")
                span.encode(layer)
        self._done = Fence.record(self._buffer.device)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Launch other work in order with spans: behind what was launched so far, and `order_after` waits for it."""
        with self._on_side_stream():
            try:
                yield
            finally:
                self._done = Fence.record(self._buffer.device)

    def order_after(self) -> None:
        """Let the current stream wait until every span handed over so far is encoded."""
        if self._done is not PASSED:
            self.fence_of_spans().order_after()

    def fence_of_spans(self) -> Fence:
        """A fence behind every span handed over so far: all there is to wait for where the host has just waited for
        the current stream.
        """
        if self._done.passed():
            self._done = PASSED
        return self._done

    def fence(self) -> Fence:
        """A fence behind all launched work, on the current stream and on the encoder's."""
        with self._on_side_stream():
            return Fence.record(self._buffer.device)
