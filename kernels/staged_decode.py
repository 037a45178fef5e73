"""Decoding for the staged path: slices of a block table into scratch, launched anew or repeated.

What decoding a slice launches is the same in every denoising step of a chunk, so on CUDA it is recorded the first time
and repeated afterwards, which costs the host a fraction.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from qvg_paged.kernels import fp8_attention
from qvg_paged.kernels.decode import decode_layer
from qvg_paged.kernels.layout import PageLayout, PartLayout
from qvg_paged.kernels.lookahead import Step
from qvg_paged.kernels.rope import RoPELayout, RoPESpec
from qvg_paged.kernels.slices import Slice

__all__ = ["FP8_DTYPE", "Decoder", "decoded_page_nbytes"]

FP8_DTYPE = torch.float8_e4m3fn


def decoded_page_nbytes(part: PartLayout, dtype: torch.dtype) -> int:
    """Bytes of K and V of one page of one layer, decoded."""
    return 2 * part.tokens * part.heads * part.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Decoder:
    """Where pages come from and decoded keys go.

    Attributes:
        buffer: 1-D uint8 pool.
        layouts: page layouts that the formats of slices index.
        rope: keys are rotated when read.
        dtype: of slices that are not FP8.
        scratch: 1-D uint8.
        halves: slices take the halves of the scratch in turns; otherwise all of it.
        capacity: pages of the scratch, if slices take its two ends in turns instead, where they may overlap; else 0.
        widest: most pages of a slice.
        narrow: multiprocessors that decoding on a side stream takes, if not 0.
    """

    buffer: torch.Tensor
    layouts: Sequence[PageLayout]
    rope: RoPESpec | None
    dtype: torch.dtype
    scratch: torch.Tensor
    halves: bool
    capacity: int = 0
    widest: int = 0
    narrow: int = 0

    def step(self, piece: Slice, layer: int, *, written: bool = True) -> Step:
        """Decoding of `layer` of a slice; unless it is `written`, its unquantised pages are left to the end."""

        def decode(half: int, stream: torch.cuda.Stream | None) -> None:
            self._decode(piece, layer, half, (self._early(piece, half, written),), stream)

        def complete(half: int) -> None:
            early = self._early(piece, half, written)
            self._decode(piece, layer, half, (range(early.start), range(early.stop, piece.count)), None)

        key = (id(piece), layer, written, self.buffer.data_ptr(), self.scratch.data_ptr(), self.dtype)
        return Step(key, decode, complete)

    def _early(self, piece: Slice, half: int, written: bool) -> range:
        """Pages that can be decoded while the slice before is attended to."""
        if not self.capacity:
            return range(piece.count)
        free = min(self.capacity - self.widest, piece.count)
        first, last = (piece.count - free, piece.count) if half else (0, free)
        known = piece.count if written else sum(r.count for r in piece.runs if not self._is_dense(r.fmt))
        return range(min(first, known), min(last, known))

    def _is_dense(self, fmt: int) -> bool:
        return self.layouts[fmt].format.is_dense

    def dense(self, piece: Slice, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a slice, ``[pages * tokens, heads, head_dim]``, member by member."""
        part = self.layouts[0].key
        memory, pages, first = self._memory(half), piece.count, 0
        if self.capacity:
            memory, pages, first = self.scratch, self.capacity, (self.capacity - piece.count) * half
        nbytes = pages * decoded_page_nbytes(part, self.dtype)
        keys, values = memory[:nbytes].view(self.dtype).view(2, pages * part.tokens, part.heads, part.head_dim)
        some = slice(first * part.tokens, (first + piece.count) * part.tokens)
        return keys[some], values[some]

    def fp8(self, piece: Slice, half: int) -> fp8_attention.Fp8Scratch:
        """Scratch of an FP8 slice."""
        part, sequences = self.layouts[0].key, len(piece.members)
        keys = piece.count // sequences * part.tokens
        return fp8_attention.Fp8Scratch.carve(
            self._memory(half), sequences * part.heads, keys, part.head_dim, FP8_DTYPE
        )

    def _memory(self, half: int) -> torch.Tensor:
        size = self.scratch.numel() // 2
        return self.scratch[size * half : size * (half + 1)] if self.halves else self.scratch

    def _decode(
        self, piece: Slice, layer: int, half: int, ranges: tuple[range, ...], stream: torch.cuda.Stream | None
    ) -> None:
        """Decode ranges of a slice's pages."""
        ranges = tuple(filter(None, ranges))
        if not ranges:
            return
        if self.buffer.device.type != "cuda":
            self._launch(piece, layer, half, ranges)
            return
        from qvg_paged.kernels.launch import recorded  # noqa: PLC0415 - triton is only loaded where it is used

        where = (self.buffer.data_ptr(), self.scratch.data_ptr(), self.scratch.numel(), self.dtype)
        narrow = 0 if stream is None else self.narrow
        key = (layer, half, ranges, narrow, *where)
        launches = piece.launches.get(key)
        if launches is not None:
            raw = (torch.cuda.current_stream(self.buffer.device) if stream is None else stream).cuda_stream
            for repeat in launches:
                repeat(raw)
            return
        with nullcontext() if stream is None else torch.cuda.stream(stream), recorded() as launches:
            self._launch(piece, layer, half, ranges, narrow)
        piece.launches[key] = launches

    def _launch(self, piece: Slice, layer: int, half: int, ranges: tuple[range, ...], narrow: int = 0) -> None:
        rope_layout = RoPELayout.INTERLEAVED if self.rope is None else self.rope.layout
        if piece.fp8:
            scratch = self.fp8(piece, half)
            fp8_attention.decode_runs(scratch, self.buffer, piece.runs, tuple(self.layouts), layer, rope_layout)
            return
        keys, values = self.dense(piece, half)
        for begin, run in (found for pages in ranges for found in piece.parts(pages)):
            layout = self.layouts[run.fmt]
            tokens = slice(begin * layout.key.tokens, (begin + run.count) * layout.key.tokens)
            decode_layer(
                self.buffer, run.pages, run.codebooks, layout, layer, keys[tokens], values[tokens], rope=run.rope,
                rope_layout=rope_layout, narrow=narrow,
            )  # fmt: skip
