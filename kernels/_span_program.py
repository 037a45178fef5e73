"""What encoding a layer of a span launches: worked out once for a format, repeated for every layer of every span."""

from functools import lru_cache

import torch

from qvg_paged.kernels._encode_triton import SpanPlaces
from qvg_paged.kernels._span_plan import workspace_nbytes
from qvg_paged.kernels._span_triton import encode_rows
from qvg_paged.kernels._span_workspace import Workspace
from qvg_paged.kernels._tokens_triton import SpanTokens
from qvg_paged.kernels.launch import MovedLaunch, movable, recorded
from qvg_paged.kernels.layout import PageLayout, PartLayout

__all__ = ["SpanProgram"]


class SpanProgram:
    """Encodes layers of spans of one shape with Triton.

    Where pages and temporary memory lie differs from layer to layer; the launches, apart from that, do not.

    Args:
        buffer: 1-D uint8 pool.
        source: layout of the unquantised pages.
        target: layout of the quantised ones; neither K nor V is dense.
        frames: of a span.
    """

    def __init__(self, buffer: torch.Tensor, source: PageLayout, target: PageLayout, frames: int) -> None:
        self._buffer, self._source, self._target, self._frames = buffer, source, target, frames
        self._inside = _places_inside(source, target, frames).to(buffer.device).unbind()
        span_tokens = frames * target.key.tokens
        self._nbytes = max(workspace_nbytes(part, span_tokens) for part in (target.key, target.value))
        self._parts: list[tuple[int, ...]] = [(0, 1)] if target.is_uniform else [(0,), (1,)]
        self._launches: list[MovedLaunch] = []
        self._address = 0

    def places(
        self, bases: torch.Tensor, layer: int, parts: tuple[int, ...] = (0, 1)
    ) -> tuple[SpanTokens, SpanPlaces]:
        """Where K (0) and V (1) of a layer come from and go to; `bases` as in `encode`."""
        return self._places(self._inside[layer] + bases, parts)

    def encode(self, bases: torch.Tensor, layer: int) -> None:
        """Write the pages and the codebook of a layer.

        Args:
            bases: ``[4 * frames + 2]`` int64 on the device: first elements of K's pages and V's, bytes at which
                theirs, then those to be written, and the codebook twice begin.
            layer: of the span.
        """
        row, workspace = self._inside[layer] + bases, Workspace(self._nbytes, self._buffer.device)
        blocks = (row, workspace.block)
        if self._launches and self._address == self._buffer.data_ptr():
            stream = torch.cuda.current_stream(self._buffer.device).cuda_stream
            begins = [block.data_ptr() for block in blocks]
            for repeat in self._launches:
                repeat(stream, begins)
            return
        with recorded() as launches:
            for parts in self._parts:
                encode_rows(*self._places(row, parts), workspace=workspace)
        self._address = self._buffer.data_ptr()
        self._launches = [moved for launch in launches if (moved := movable(launch, blocks)) is not None]

    def _places(self, row: torch.Tensor, parts: tuple[int, ...]) -> tuple[SpanTokens, SpanPlaces]:
        source, frames = self._source.key, self._frames
        some = slice(parts[0], parts[-1] + 1)
        starts, ends = row[: 4 * frames].view(2, 2, frames)
        tokens = SpanTokens(
            base=self._buffer[: self._buffer.numel() // 4 * 4].view(source.dtype), starts=starts[some],
            token_stride=source.heads * source.head_dim, head_stride=source.head_dim, frame_tokens=source.tokens,
            heads=source.heads, head_dim=source.head_dim,
        )  # fmt: skip
        both: tuple[PartLayout, ...] = (self._target.key, self._target.value)
        return tokens, SpanPlaces(self._buffer, both[some], ends[some], row[4 * frames :][some])


@lru_cache(maxsize=64)
def _places_inside(source: PageLayout, target: PageLayout, frames: int) -> torch.Tensor:
    """A row per layer of what `SpanProgram.encode` calls bases, for pages and a codebook at the start of the pool."""
    layers = torch.arange(target.num_layers)[:, None]

    def parts(sizes: PartLayout, stride: int) -> torch.Tensor:
        return torch.tensor([0, sizes.nbytes]).repeat_interleave(frames) + layers * stride

    book = torch.tensor([0, target.key.codebook_nbytes]) + layers * target.codebook_layer_nbytes
    starts = parts(source.key, source.layer_nbytes) // source.key.dtype.itemsize
    return torch.cat([starts, parts(target.key, target.layer_nbytes), book], 1)
