"""Codecs of a span for the closed loop: those of the library, and published ones it is compared with.

All count every stored byte: codes, scales, zero points, ids, codebooks, balancing, coefficients.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qvg_paged.kernels.codec import decode_span, encode_span
from qvg_paged.kernels.formats import Codec
from qvg_paged.kernels.layout import PartLayout
from qvg_paged.kernels.rope import RoPELayout

__all__ = ["DenseSpan", "Library", "Memory", "RoundToNearest", "SpanCodec", "asymmetric", "hadamard"]

Memory = dict[str, Tensor]
"""What a codec keeps from a span to the next one of the same heads."""


class SpanCodec(Protocol):
    """What happens to one tensor (K before RoPE, or V) of a closed span."""

    @property
    def uses_queries(self) -> bool:
        """Whether the second moment of the queries is wanted."""
        ...

    def centroids_for(self, tokens: int) -> int:
        """Centroids per stage and head of a span of `tokens` tokens; 0 for none."""
        ...

    def with_centroids(self, count: int) -> "SpanCodec":
        """The same codec with another number of centroids."""
        ...

    def code(self, x: Tensor, moment: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """`x` ``[heads, tokens, dim]`` as it reads after coding.

        `moment` ``[heads, dim, dim]`` is the sum of ``q q^T`` over queries so far, turned back to keys before RoPE;
        `memory` is whatever the codec left in it at the span before.
        """
        ...

    def bits(self, tokens: int, dim: int) -> float:
        """Stored bits per number of a span of `tokens` tokens of `dim` channels."""
        ...


@dataclass(frozen=True)
class DenseSpan:
    """Nothing happens: 16 bits."""

    uses_queries: bool = False

    def centroids_for(self, tokens: int) -> int:  # noqa: ARG002 - the protocol's
        """None."""
        return 0

    def with_centroids(self, count: int) -> SpanCodec:  # noqa: ARG002 - the protocol's
        """Itself."""
        return self

    def code(self, x: Tensor, moment: Tensor | None = None, memory: Memory | None = None) -> Tensor:  # noqa: ARG002
        """`x`."""
        return x

    def bits(self, tokens: int, dim: int) -> float:  # noqa: ARG002 - the protocol's
        """16."""
        return 16.0


@dataclass(frozen=True)
class Library:
    """A codec of the library, through `encode_span` and `decode_span`.

    Attributes:
        codec: how the tensor is stored.
        key: whether it is K, whose RoPE pairs are balanced together.
    """

    codec: Codec
    key: bool = True
    uses_queries: bool = False

    def centroids_for(self, tokens: int) -> int:
        """As the codec says."""
        return self.codec.centroids_for(tokens)

    def with_centroids(self, count: int) -> SpanCodec:
        """The same codec with another number of centroids."""
        return replace(self, codec=replace(self.codec, num_centroids=count))

    def code(self, x: Tensor, moment: Tensor | None = None, memory: Memory | None = None) -> Tensor:  # noqa: ARG002
        """What `decode_span` returns."""
        if self.codec.is_dense:
            return x
        pairing = RoPELayout.INTERLEAVED if self.key else None
        span = encode_span(x.transpose(0, 1), self.codec, pairing=pairing)
        return decode_span(span, x.dtype).transpose(0, 1)

    def bits(self, tokens: int, dim: int) -> float:
        """From the planes of the layout."""
        if self.codec.is_dense:
            return 16.0
        layout = PartLayout(
            codec=self.codec.fitted(dim), tokens=tokens, heads=1, head_dim=dim, dtype=torch.bfloat16,
            num_centroids=self.codec.centroids_for(tokens),
        )  # fmt: skip
        return 8 * (layout.payload_nbytes + layout.codebook_payload_nbytes) / (tokens * dim)


def asymmetric(x: Tensor, block: int, levels: int, fp8: bool) -> Tensor:
    """Blocks of the last axis on a min-max grid; scale and zero point in FP8 E4M3 or FP16."""
    if x.shape[-1] % block:
        pad = block - x.shape[-1] % block
        padded = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], pad)], -1)
        return asymmetric(padded, block, levels, fp8)[..., : x.shape[-1]]
    blocks = x.float().unflatten(-1, (-1, block))
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    store = torch.float8_e4m3fn if fp8 else torch.float16
    top = 448.0 if fp8 else 65504.0
    scale = ((high - low) / (levels - 1)).clamp(max=top).to(store).float()
    low = low.clamp(-top, top).to(store).float()
    codes = ((blocks - low) / scale.clamp_min(1e-8)).round_().clamp_(0, levels - 1)
    return (codes * scale + low).flatten(-2)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis (a power of two); its own inverse."""
    y, size = x.float(), x.shape[-1]
    step = 1
    while step < size:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return y / math.sqrt(size)


@dataclass(frozen=True)
class RoundToNearest:
    """Published grids without smoothing.

    Attributes:
        width: bits of a code.
        block: numbers that share a scale.
        symmetric: absmax grid around zero, as Quant VideoGen's baselines; otherwise min-max with a zero point.
        per_channel: blocks run over tokens of one channel (KIVI's keys, here before RoPE), not over channels.
        rotated: Hadamard transform of the channels around it (QuaRot).
        fp8: scales (and zero points) in FP8 instead of FP16.
    """

    width: int = 2
    block: int = 16
    symmetric: bool = False
    per_channel: bool = False
    rotated: bool = False
    fp8: bool = False
    uses_queries: bool = False

    def centroids_for(self, tokens: int) -> int:  # noqa: ARG002 - the protocol's
        """None."""
        return 0

    def with_centroids(self, count: int) -> SpanCodec:  # noqa: ARG002 - the protocol's
        """Itself."""
        return self

    def code(self, x: Tensor, moment: Tensor | None = None, memory: Memory | None = None) -> Tensor:  # noqa: ARG002
        """The nearest levels."""
        y = hadamard(x) if self.rotated else x.float()
        y = y.transpose(1, 2) if self.per_channel else y
        y = self._symmetric(y) if self.symmetric else asymmetric(y, self.block, 1 << self.width, self.fp8)
        y = y.transpose(1, 2) if self.per_channel else y
        return hadamard(y) if self.rotated else y

    def _symmetric(self, x: Tensor) -> Tensor:
        blocks, top = x.unflatten(-1, (-1, self.block)), (1 << (self.width - 1)) - 1
        scale = blocks.abs().amax(-1, keepdim=True) / top
        scale = scale.clamp(max=448.0).to(torch.float8_e4m3fn).float() if self.fp8 else scale.half().float()
        return ((blocks / scale.clamp_min(1e-8)).round_().clamp_(-top, top) * scale).flatten(-2)

    def bits(self, tokens: int, dim: int) -> float:
        """Codes, scales and zero points."""
        length = tokens if self.per_channel else dim
        blocks = -(-length // self.block)
        parts = (8 if self.fp8 else 16) * (1 if self.symmetric else 2)
        return self.width + parts * blocks / length
