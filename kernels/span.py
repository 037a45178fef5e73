"""A span of the pool, layer by layer: unquantised pages become quantised ones and a codebook, in place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.layout import GRANULE, PLANE_ALIGNMENT, PageLayout

if TYPE_CHECKING:
    from qvg_paged.kernels._encode_triton import SpanPlaces
    from qvg_paged.kernels._span_program import SpanProgram
    from qvg_paged.kernels._tokens_triton import SpanTokens

__all__ = ["SpanEncoding"]


class SpanEncoding:
    """Encodes the layers of one span, in any order, each whenever its tokens are final.

    On a GPU a layer is a dozen launches for all heads of K and V, and nothing waits for the host.

    Args:
        buffer: 1-D uint8 pool.
        source: layout of the unquantised pages.
        target: layout of the quantised ones.
        dense_pages: page id of each frame, to read.
        pages: page id of each frame, to write.
        codebook: id of the codebook; None if the format keeps none.
        backend: Triton or PyTorch.
        program: of a span of as many frames before, of the same pool and layouts; None to make it anew.

    Attributes:
        program: what spans of so many frames have in common where Triton encodes them, else None.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        source: PageLayout,
        target: PageLayout,
        dense_pages: Sequence[int],
        pages: Sequence[int],
        codebook: int | None,
        *,
        backend: Backend = Backend.AUTO,
        program: "SpanProgram | None" = None,
    ) -> None:
        self._buffer = buffer
        self._source, self._target = source, target
        self._dense_pages, self._pages, self._codebook = list(dense_pages), list(pages), codebook
        self._backend = backend
        self.program: SpanProgram | None = None
        if uses_triton(backend, buffer.device) and not (target.key.codec.is_dense or target.value.codec.is_dense):
            from qvg_paged.kernels import _span_program  # noqa: PLC0415 - triton is only loaded where it is used

            self.program = program or _span_program.SpanProgram(buffer, source, target, len(pages))
            self._bases = self._upload()

    def encode(self, layer: int) -> None:
        """Write K and V of `layer` into the quantised pages and the codebook."""
        if self.program is None:
            for part in (0, 1):
                self._encode_part(layer, part)
            return
        with kernel_scope(self._buffer.device):
            self.program.encode(self._bases, layer)
            for part in (0, 1):
                planes = (self._target.value if part else self._target.key).codebook_planes
                if any(plane.nbytes % PLANE_ALIGNMENT for plane in planes):
                    reference.zero_padding(self._buffer, planes, self._book(layer, part))

    def _upload(self) -> torch.Tensor:
        """First elements of K's frames and V's, bytes of their pages, bytes of the codebook."""
        device = self._buffer.device
        dense = [page * (GRANULE // self._source.key.dtype.itemsize) for page in self._dense_pages]
        pages = [page * GRANULE for page in self._pages]
        bases = [*dense, *dense, *pages, *pages, *[(self._codebook or 0) * GRANULE] * 2]
        return torch.tensor(bases, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def places(self, layer: int, parts: tuple[int, ...]) -> "tuple[SpanTokens, SpanPlaces]":
        """Where K (0) and V (1) of a layer come from and go to, for the Triton launchers."""
        assert self.program is not None
        return self.program.places(self._bases, layer, parts)

    def _book(self, layer: int, part: int) -> int:
        assert self._codebook is not None
        target = self._target
        inside = target.value_codebook_offset(layer) if part else target.key_codebook_offset(layer)
        return self._codebook * GRANULE + inside

    def _encode_part(self, layer: int, part: int) -> None:
        source, target = self._source, self._target
        layout = target.value if part else target.key
        start = source.value_offset(layer) if part else source.key_offset(layer)
        end = target.value_offset(layer) if part else target.key_offset(layer)
        plane = source.key.plane("values")
        frames = [plane.view(self._buffer, page * GRANULE + start) for page in self._dense_pages]
        offsets = [page * GRANULE + end for page in self._pages]
        if layout.codec.is_dense:
            for frame, offset in zip(frames, offsets, strict=True):
                layout.plane("values").view(self._buffer, offset).copy_(frame)
        else:
            book = self._book(layer, part) if layout.codebook_planes else None
            encode_part(torch.cat(frames), layout, self._buffer, offsets, book, backend=self._backend)
