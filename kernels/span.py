"""A span of the pool, layer by layer: unquantised pages become quantised ones and a codebook, in place."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.layout import GRANULE, PLANE_ALIGNMENT, PageLayout, PartLayout

if TYPE_CHECKING:
    from qvg_paged.kernels._encode_triton import SpanPlaces
    from qvg_paged.kernels._tokens_triton import SpanTokens

__all__ = ["SpanEncoding"]


class SpanEncoding:
    """Encodes the layers of one span, in any order, each whenever its tokens are final.

    Places of all layers are worked out, and uploaded, once. On a GPU a layer is a dozen launches for all heads of K
    and V, and nothing waits for the host.

    Args:
        buffer: 1-D uint8 pool.
        source: layout of the unquantised pages.
        target: layout of the quantised ones.
        dense_pages: page id of each frame, to read.
        pages: page id of each frame, to write.
        codebook: id of the codebook; None if the format keeps none.
        backend: Triton or PyTorch.
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
    ) -> None:
        self._buffer = buffer
        self._source, self._target = source, target
        self._dense_pages, self._pages, self._codebook = list(dense_pages), list(pages), codebook
        self._backend = backend
        self._triton = uses_triton(backend, buffer.device)
        self._table = self._upload() if self._triton else None

    def encode(self, layer: int) -> None:
        """Write K and V of `layer` into the quantised pages and the codebook."""
        key, value = self._target.key, self._target.value
        if self._table is not None and not (key.codec.is_dense or value.codec.is_dense):
            with kernel_scope(self._buffer.device):
                for parts in [(0, 1)] if self._target.is_uniform else [(0,), (1,)]:
                    self._launch(layer, parts)
        else:
            for part in (0, 1):
                self._encode_part(layer, part)

    def _upload(self) -> torch.Tensor:
        """A row per layer: first elements of K's frames and V's, bytes of their parts, bytes of the codebooks."""
        device, frames = self._buffer.device, len(self._pages)
        dense = [page * (GRANULE // self._source.key.dtype.itemsize) for page in self._dense_pages]
        pages = [page * GRANULE for page in self._pages]
        row = torch.tensor([*dense, *dense, *pages, *pages, *[(self._codebook or 0) * GRANULE] * 2])
        inside = _places_inside(self._source, self._target, frames)
        table = torch.empty(inside.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        return torch.add(inside, row, out=table).to(device, non_blocking=True)

    def places(self, layer: int, parts: tuple[int, ...]) -> "tuple[SpanTokens, SpanPlaces]":
        """Where K (0) and V (1) of a layer come from and go to, for the Triton launchers."""
        from qvg_paged.kernels import _span_triton  # noqa: PLC0415 - triton is only loaded where it is used

        assert self._table is not None
        source, frames = self._source.key, len(self._pages)
        row, some = self._table[layer], slice(parts[0], parts[-1] + 1)
        starts, ends = row[: 4 * frames].view(2, 2, frames)
        tokens = _span_triton.SpanTokens(
            base=self._buffer[: self._buffer.numel() // 4 * 4].view(source.dtype), starts=starts[some],
            token_stride=source.heads * source.head_dim, head_stride=source.head_dim, frame_tokens=source.tokens,
            heads=source.heads, head_dim=source.head_dim,
        )  # fmt: skip
        both: tuple[PartLayout, ...] = (self._target.key, self._target.value)
        return tokens, _span_triton.SpanPlaces(self._buffer, both[some], ends[some], row[4 * frames :][some])

    def _launch(self, layer: int, parts: tuple[int, ...]) -> None:
        from qvg_paged.kernels import _span_triton  # noqa: PLC0415 - triton is only loaded where it is used

        _span_triton.encode_rows(*self.places(layer, parts))
        for part in parts:
            planes = (self._target.value if part else self._target.key).codebook_planes
            if any(plane.nbytes % PLANE_ALIGNMENT for plane in planes):
                reference.zero_padding(self._buffer, planes, self._book(layer, part))

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


@lru_cache(maxsize=64)
def _places_inside(source: PageLayout, target: PageLayout, frames: int) -> torch.Tensor:
    """`SpanEncoding`'s table for pages and a codebook at the start of the pool."""
    layers = torch.arange(target.num_layers)[:, None]

    def parts(sizes: PartLayout, stride: int) -> torch.Tensor:
        return torch.tensor([0, sizes.nbytes]).repeat_interleave(frames) + layers * stride

    book = torch.tensor([0, target.key.codebook_nbytes]) + layers * target.codebook_layer_nbytes
    starts = parts(source.key, source.layer_nbytes) // source.key.dtype.itemsize
    return torch.cat([starts, parts(target.key, target.layer_nbytes), book], 1)
