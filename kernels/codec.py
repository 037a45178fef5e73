"""The codec as a value: a span of K or V encoded into a buffer of its own, and read back.

The manager writes the same bytes into its pool; this is for measuring, for tests and for trying formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.decode import OUT_DTYPES, decode_pages
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import Codec
from qvg_paged.kernels.layout import GRANULE, PartLayout, align
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

__all__ = ["EncodedSpan", "decode_span", "encode_span"]


@dataclass(frozen=True)
class EncodedSpan:
    """One tensor (K or V) of one layer of a span, as stored.

    Attributes:
        buffer: 1-D uint8; the codebook part, then the part of every frame, each at a multiple of `GRANULE`.
        layout: planes of the parts.
        frames: frames of the span.
    """

    buffer: torch.Tensor
    layout: PartLayout
    frames: int

    @property
    def nbytes(self) -> int:
        """Bytes stored, padding included."""
        return self.buffer.numel()

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the planes, padding excluded."""
        return self.frames * self.layout.payload_nbytes + self.layout.codebook_payload_nbytes

    def part_offset(self, frame: int) -> int:
        """Byte of `buffer` at which the part of `frame` starts."""
        return align(self.layout.codebook_nbytes, GRANULE) + frame * align(self.layout.nbytes, GRANULE)


def encode_span(
    x: torch.Tensor,
    codec: Codec,
    *,
    tokens_per_frame: int | None = None,
    initial_centroids: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    split_pairs: bool = False,
    pairing: RoPELayout | None = None,
    backend: Backend = Backend.AUTO,
) -> EncodedSpan:
    """Encode a span of K or V.

    Args:
        x: ``[tokens, heads, head_dim]`` bfloat16, float16 or float32, any strides.
        codec: how it is stored.
        tokens_per_frame: a divisor of `tokens`; None makes the span one frame.
        initial_centroids: ``[stages, heads, num_centroids, head_dim]`` warm start.
        ids: ``[stages, heads, tokens]`` uint8 taken as given, with `initial_centroids`.
        split_pairs: store even channels before odd ones (keys that are rotated when read).
        pairing: RoPE pairs that share a balancing factor (keys); None balances every channel by itself.
        backend: Triton or PyTorch.

    Raises:
        ArgumentError: an argument does not fit.
    """
    if x.ndim != 3 or len(x) == 0:
        raise ArgumentError(f"x: expected [tokens, heads, head_dim] with at least one token, got {tuple(x.shape)}")
    tokens = len(x) if tokens_per_frame is None else tokens_per_frame
    if tokens < 1 or len(x) % tokens:
        raise ArgumentError(f"tokens_per_frame: expected a divisor of the {len(x)} tokens of x, got {tokens_per_frame}")
    layout = PartLayout(
        codec=codec.fitted(x.shape[2]), tokens=tokens, heads=x.shape[1], head_dim=x.shape[2], dtype=x.dtype,
        num_centroids=codec.centroids_for(len(x)), split_pairs=split_pairs and not codec.is_dense, pairing=pairing,
    )  # fmt: skip
    frames = len(x) // tokens
    nbytes = align(layout.codebook_nbytes, GRANULE) + frames * align(layout.nbytes, GRANULE)
    span = EncodedSpan(torch.zeros(nbytes, dtype=torch.uint8, device=x.device), layout, frames)
    encode_part(
        x, layout, span.buffer, [span.part_offset(frame) for frame in range(frames)],
        0 if layout.codebook_planes else None, initial_centroids=initial_centroids, ids=ids, backend=backend,
    )  # fmt: skip
    return span


def decode_span(
    span: EncodedSpan,
    dtype: torch.dtype,
    *,
    frames: Sequence[int] | None = None,
    rope: RoPESpec | None = None,
    positions: Sequence[float] | torch.Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> torch.Tensor:
    """Read frames of a span, ``[len(frames) * tokens_per_frame, heads, head_dim]`` in `dtype`.

    Args:
        span: what `encode_span` returned.
        dtype: bfloat16, float16 or float32.
        frames: frames in the order wanted; None reads all.
        rope: turn keys to the positions of their frames.
        positions: frame positions for `rope`, one per frame read; None takes the frames' numbers in the span.
        backend: Triton or PyTorch.

    Raises:
        ArgumentError: an argument does not fit.
    """
    layout = span.layout
    chosen = list(range(span.frames)) if frames is None else list(frames)
    if any(not 0 <= frame < span.frames for frame in chosen):
        raise ArgumentError(f"frames: expected frames 0 to {span.frames - 1} of the span, got {chosen}")
    if dtype not in OUT_DTYPES:
        raise ArgumentError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    if rope is None and positions is not None:
        raise ArgumentError("positions: expected together with rope, got positions alone")
    where = chosen if positions is None else positions
    if len(where) != len(chosen):
        raise ArgumentError(f"positions: expected one per frame ({len(chosen)}), got {len(where)}")
    device = span.buffer.device
    pages = torch.tensor([span.part_offset(frame) // GRANULE for frame in chosen], dtype=torch.int32, device=device)
    out = torch.empty((len(chosen) * layout.tokens, layout.heads, layout.head_dim), dtype=dtype, device=device)
    decode_pages(
        span.buffer, pages, torch.zeros_like(pages), layout, 0, 0, out,
        rope=None if rope is None else rope.tables(where, device),
        rope_layout=RoPELayout.INTERLEAVED if rope is None else rope.layout, backend=backend,
    )  # fmt: skip
    return out
