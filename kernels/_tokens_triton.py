"""The tokens of a span for Triton kernels: where they lie, and what is left of them after balancing and smoothing.

A *row* is one head of one tensor (K, then V). Tokens are read from where the model or the pool keeps them, a frame at a
time; the residual is computed on the way and never stored:

    y = x / balance;  y = y - centroid[id] for every stage so far             rounded to the model's dtype each time
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._span_plan import SEEN_RUN, SUM_TILE, SUM_TOKENS
from qvg_paged.kernels._span_workspace import Workspace
from qvg_paged.kernels.errors import ArgumentError

__all__ = [
    "COUNTS",
    "RowGroup",
    "SpanTokens",
    "check_power_of_two",
    "empty_ids",
    "load_tile",
    "load_tokens",
    "read_tokens",
    "rounded_to_bf16",
    "sample_of",
    "tile_tokens",
]

COUNTS = ["starts_ptr", "first_row", "rows", "heads", "frames", "frame_tokens", "span_tokens", "num_centroids"]
"""Arguments that must not decide what is compiled: counts, and rows of a table that start anywhere."""
ALIGNED = 16
"""Elements: what offsets of frames and strides are multiples of, so that loads are wide."""


def check_power_of_two(head_dim: int) -> None:
    """Raise `ArgumentError` for head dims whose tiles Triton cannot hold."""
    if head_dim & (head_dim - 1) or head_dim < 16:
        raise ArgumentError(f"head_dim: expected a power of two >= 16 for Triton, got {head_dim}; use Backend.TORCH")


@dataclass(frozen=True)
class SpanTokens:
    """Tokens of one or two tensors (K, V) of a span, where they lie.

    Attributes:
        base: what offsets count from, in the model's dtype.
        starts: ``[tensors, frames]`` int64 on the device: element of `base` at which a frame starts.
        token_stride, head_stride: elements from a token, a head to the next; channels are contiguous.
        frame_tokens: tokens per frame.
        heads: heads of each tensor.
        head_dim: channels.
    """

    base: torch.Tensor
    starts: torch.Tensor
    token_stride: int
    head_stride: int
    frame_tokens: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, x: torch.Tensor, frame_tokens: int) -> "SpanTokens":
        """Those of `x` ``[tokens, heads, head_dim]``, copied only if its strides do not allow wide loads."""
        strides = (x.stride(0), x.stride(1))
        if x.stride(2) != 1 or any(stride % ALIGNED for stride in strides) or x.data_ptr() % 32:
            x = x.clone(memory_format=torch.contiguous_format)
        starts = torch.arange(len(x) // frame_tokens, device=x.device) * (frame_tokens * x.stride(0))
        return cls(x, starts[None], x.stride(0), x.stride(1), frame_tokens, x.shape[1], x.shape[2])

    @property
    def tensors(self) -> int:
        """1, or 2 for K and V."""
        return self.starts.shape[0]

    @property
    def frames(self) -> int:
        """Frames of the span."""
        return self.starts.shape[1]

    @property
    def span_tokens(self) -> int:
        """Tokens of each tensor."""
        return self.frames * self.frame_tokens

    def sample(self, stride: int) -> "SpanTokens":
        """The first of every `stride` tokens of a frame."""
        return replace(self, token_stride=self.token_stride * stride, frame_tokens=self.frame_tokens // stride)


@dataclass(frozen=True)
class RowGroup:
    """Rows that are encoded together, and their workspace.

    Attributes:
        tokens: the span.
        rows: rows of the group, counted from the first head of the first tensor.
        inverse: ``[rows, head_dim]`` float32, reciprocals of the balancing factors; None if the codec keeps none.
        ids: ``[stages, rows, span_tokens]`` uint8.
        centroids: ``[stages, rows, num_centroids, head_dim]`` bfloat16, as decoded, natural channel order.
        norms: ``[rows, num_centroids]`` float32, squared lengths of the centroids of the stage at work.
        scratch: 1-D uint8, for sums of centroids.
        run: tokens whose sums are kept apart.
    """

    tokens: SpanTokens
    rows: range
    inverse: torch.Tensor | None
    ids: torch.Tensor
    centroids: torch.Tensor
    norms: torch.Tensor
    scratch: torch.Tensor
    run: int = SUM_TOKENS

    @property
    def num_centroids(self) -> int:
        """Centroids per stage and row."""
        return self.centroids.shape[2]

    @property
    def arguments(self) -> tuple[object, ...]:
        """What `read_tokens` takes, in the order of the kernels' parameters."""
        tokens, base = self.tokens, self.tokens.base
        return (
            base, tokens.starts, base if self.inverse is None else self.inverse, self.ids, self.centroids,
            self.rows.start, len(self.rows), tokens.heads, tokens.frames, tokens.frame_tokens, tokens.span_tokens,
            self.num_centroids, tokens.token_stride, tokens.head_stride,
        )  # fmt: skip


def sample_of(group: RowGroup, stride: int, workspace: Workspace) -> RowGroup:
    """The same rows with the first of every `stride` tokens; centroids are shared, ids are not."""
    if stride == 1:
        return group
    tokens = group.tokens.sample(stride)
    return replace(
        group, tokens=tokens, ids=empty_ids(1, len(group.rows), tokens.span_tokens, workspace), run=SEEN_RUN
    )


def empty_ids(stages: int, rows: int, span_tokens: int, workspace: Workspace) -> torch.Tensor:
    """Ids of a `RowGroup`, uninitialised; what follows them can be read up to a tile's end."""
    count = stages * rows * span_tokens
    return workspace.take((count + SUM_TILE,), torch.uint8)[:count].view(stages, rows, span_tokens)


@triton.jit
def rounded_to_bf16(x):
    """Finite float32 `x`, rounded to what bfloat16 holds; in integers, since Triton's interpreter cuts instead."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def load_tokens(
    x_ptr, starts_ptr, row, token, inside, heads, frames, frame_tokens, token_stride, head_stride, D: tl.constexpr
):
    """Stored values of some tokens, ``[tokens, D]``; `row` counts from the first head of the first tensor."""
    frame = token // frame_tokens
    start = tl.load(starts_ptr + row // heads * frames + frame, mask=inside, other=0)  # [T]
    at = tl.multiple_of(start, 16) + (token - frame * frame_tokens).to(tl.int64) * token_stride
    at += (row % heads).to(tl.int64) * head_stride
    return tl.load(x_ptr + at[:, None] + tl.arange(0, D), mask=inside[:, None], other=0.0)


@triton.jit
def load_tile(
    x_ptr, starts_ptr, row, tile, heads, frames, frame_tokens, token_stride, head_stride, D: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Stored values of one tile of a frame, ``[T, D]``, zero behind its end; its tokens; which of them there are.

    Tiles count through the frames of the span; one address and no indirection per tile, so that loads run ahead.
    """
    frame = tile // tl.cdiv(frame_tokens, T)
    span_token, inside = tile_tokens(tile, frame_tokens, T)
    token = span_token - frame * frame_tokens
    start = tl.multiple_of(tl.load(starts_ptr + row // heads * frames + frame), 16)
    first = x_ptr + start + (row % heads).to(tl.int64) * head_stride
    at = first + token[:, None].to(tl.int64) * token_stride + tl.arange(0, D)
    return tl.load(at, mask=inside[:, None], other=0.0), span_token, inside


@triton.jit
def tile_tokens(tile, frame_tokens, T: tl.constexpr):
    """Tokens of a tile as `load_tile` counts them, and which of them there are."""
    per_frame = tl.cdiv(frame_tokens, T)
    frame = tile // per_frame
    token = (tile - frame * per_frame) * T + tl.arange(0, T)
    return frame * frame_tokens + token, token < frame_tokens


@triton.jit
def read_tokens(
    x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, row, token, inside, first_row, rows, heads, frames,
    frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D: tl.constexpr, STAGES: tl.constexpr,
    BALANCED: tl.constexpr,
):  # fmt: skip
    """Residual of some tokens after `STAGES` stages, ``[tokens, D]`` in the model's dtype; `row` is one of the group's.

    The group's reciprocal balance is ``[rows, D]``, its ids ``[stages, rows, span_tokens]``, its centroids
    ``[stages, rows, num_centroids, D]``.
    """
    x = load_tokens(
        x_ptr, starts_ptr, first_row + row, token, inside, heads, frames, frame_tokens, token_stride, head_stride, D
    )
    channel = tl.arange(0, D)
    dtype = x_ptr.dtype.element_ty
    if BALANCED:
        inverse = tl.load(inverse_ptr + row * D + channel)
        x = (x.to(tl.float32) * inverse).to(dtype)
    for stage in tl.static_range(STAGES):
        chosen = tl.load(ids_ptr + (stage * rows + row).to(tl.int64) * span_tokens + token, mask=inside, other=0).to(
            tl.int32
        )
        at = ((stage * rows + row) * num_centroids + chosen) * D  # [T]
        centroid = tl.load(centroids_ptr + at[:, None] + channel, mask=inside[:, None], other=0.0)
        x = (x.to(tl.float32) - centroid.to(tl.float32)).to(dtype)
    return x
