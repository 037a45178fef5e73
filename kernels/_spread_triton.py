"""Triton launcher of the balancing factors: the spread of every channel over a span, as `_span_torch` defines it."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels import _span_plan
from qvg_paged.kernels._span_plan import SAMPLE_RUN, cdiv, moment_runs, moment_tile, sample_size, sample_stride
from qvg_paged.kernels._span_torch import OUTLIER, spread_resolution
from qvg_paged.kernels._tokens_triton import COUNTS, SpanTokens, load_tile, load_tokens, rounded_to_bf16
from qvg_paged.kernels.formats import BalanceRule
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import PartLayout
from qvg_paged.kernels.rope import RoPELayout

__all__ = ["pairings_of", "write_spread"]

PAIRINGS = {None: 0, RoPELayout.INTERLEAVED: 1, RoPELayout.HALF_SPLIT: 2}
MOMENTS = [name for name in COUNTS if name not in ("rows", "span_tokens", "num_centroids")]
SPREAD = ["books_ptr", "first_row", "heads", "span_tokens", "runs", "balance_offset", "pairings", "split"]


@triton.jit(do_not_specialize=MOMENTS)
def _moments_kernel(
    moments_ptr, x_ptr, starts_ptr, first_row, heads, frames, frame_tokens, token_stride, head_stride,
    D: tl.constexpr, T: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Sums, and sums of squares, of the distances from the span's first token, of one run of tokens; that token."""
    run, row = tl.program_id(0), tl.program_id(1)
    first = tl.arange(0, 1)
    origin = load_tokens(
        x_ptr, starts_ptr, first_row + row, first, first == 0, heads, frames, frame_tokens, token_stride, head_stride, D
    ).to(tl.float64)  # [1, D]
    total = tl.zeros((T, D), tl.float64)
    squares = tl.zeros((T, D), tl.float64)
    tiles = frames * tl.cdiv(frame_tokens, T)
    for tile in tl.range(run * (RUN // T), tl.minimum((run + 1) * (RUN // T), tiles), num_stages=4):
        x, _, inside = load_tile(
            x_ptr, starts_ptr, first_row + row, tile, heads, frames, frame_tokens, token_stride, head_stride, D, T
        )  # fmt: skip
        x = x.to(tl.float64)
        x = tl.where(inside[:, None], x - origin, 0.0)
        total += x
        squares += x * x
    out = moments_ptr + (row * tl.num_programs(0) + run) * 3 * D + tl.arange(0, D)
    tl.store(out, tl.sum(total, 0))
    tl.store(out + D, tl.sum(squares, 0))
    tl.store(out + 2 * D, tl.sum(origin, 0))


@triton.jit(do_not_specialize=[*MOMENTS, "span_tokens", "stride"])
def _sampled_moments_kernel(
    moments_ptr, x_ptr, starts_ptr, first_row, heads, frames, frame_tokens, token_stride, head_stride, span_tokens,
    stride, D: tl.constexpr, T: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The same of every `stride`-th token of the span, `RUN` of these in a run."""
    run, row = tl.program_id(0), tl.program_id(1)
    first = tl.arange(0, 1)
    origin = load_tokens(
        x_ptr, starts_ptr, first_row + row, first, first == 0, heads, frames, frame_tokens, token_stride, head_stride, D
    ).to(tl.float64)  # [1, D]
    total = tl.zeros((T, D), tl.float64)
    squares = tl.zeros((T, D), tl.float64)
    for place in tl.range(0, RUN, T):
        token = (run * RUN + place + tl.arange(0, T)) * stride
        inside = token < span_tokens
        x = load_tokens(
            x_ptr, starts_ptr, first_row + row, token, inside, heads, frames, frame_tokens, token_stride, head_stride, D
        ).to(tl.float64)
        x = tl.where(inside[:, None], x - origin, 0.0)
        total += x
        squares += x * x
    out = moments_ptr + (row * tl.num_programs(0) + run) * 3 * D + tl.arange(0, D)
    tl.store(out, tl.sum(total, 0))
    tl.store(out + D, tl.sum(squares, 0))
    tl.store(out + 2 * D, tl.sum(origin, 0))


TOGETHER = tl.constexpr(8)
"""Runs that are loaded at once."""


@triton.jit
def _variance(moments_ptr, row, runs, span_tokens, resolution, channel, D: tl.constexpr):
    totals = tl.zeros((TOGETHER, D), tl.float64)
    squared = tl.zeros((TOGETHER, D), tl.float64)
    for start in range(0, runs, TOGETHER):
        run = start + tl.arange(0, TOGETHER)[:, None]
        at = moments_ptr + (row * runs + run) * 3 * D + channel
        totals += tl.load(at, mask=run < runs, other=0.0)
        squared += tl.load(at + D, mask=run < runs, other=0.0)
    total, squares = tl.sum(totals, 0), tl.sum(squared, 0)
    shift = total / span_tokens
    limit = (tl.load(moments_ptr + row * runs * 3 * D + 2 * D + channel) + shift) * resolution
    variance = squares / span_tokens - shift * shift
    return tl.where(variance > limit * limit, variance, 0.0)


@triton.jit
def _median(x, D: tl.constexpr):
    """The lower of the two values in the middle."""
    place = tl.arange(0, D)
    before = (x[:, None] < x[None, :]) | ((x[:, None] == x[None, :]) & (place[:, None] < place[None, :]))
    return tl.sum(tl.where(tl.sum(before.to(tl.int32), 0) == (D - 1) // 2, x, 0.0), 0)


@triton.jit(do_not_specialize=SPREAD)
def _spread_kernel(
    inverse_ptr, buffer_ptr, books_ptr, moments_ptr, first_row, heads, span_tokens, runs, balance_offset, resolution,
    smallest, pairings, split, D: tl.constexpr, RULE: tl.constexpr, OUTLIER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tensor, head = (first_row + row) // heads, (first_row + row) % heads
    channel = tl.arange(0, D)
    pairing = (pairings >> (2 * tensor)) & 3
    partner = tl.where(pairing == 1, channel ^ 1, tl.where(pairing == 2, (channel + D // 2) % D, channel))
    variance = _variance(moments_ptr, row, runs, span_tokens, resolution, channel, D)
    variance = (variance + _variance(moments_ptr, row, runs, span_tokens, resolution, partner, D)) * 0.5
    spread = tl.sqrt(variance)
    if RULE == 1:
        spread = tl.maximum(tl.sqrt(spread * _median(spread, D)), spread * 0.5)
    if RULE == 2:
        middle = _median(spread, D) * OUTLIER
        middle = tl.where(middle > 0, middle, float("inf"))
        spread = tl.where(spread > middle, spread / middle, 1.0)
    spread = rounded_to_bf16(spread.to(tl.float32))
    spread = tl.where(spread > smallest, spread, 1.0)
    tl.store(inverse_ptr + row * D + channel, tl.div_rn(tl.full((D,), 1.0, tl.float32), spread))
    stored = tl.where(((split >> tensor) & 1) == 1, channel // 2 + channel % 2 * (D // 2), channel)
    out = (buffer_ptr + tl.load(books_ptr + tensor) + balance_offset).to(tl.pointer_type(tl.bfloat16))
    tl.store(out + head * D + stored, spread.to(tl.bfloat16))


def write_spread(
    tokens: SpanTokens,
    layouts: tuple[PartLayout, ...],
    buffer: torch.Tensor,
    books: torch.Tensor,
    group: range,
    inverse: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Write the balancing factors of the rows of a group into their codebooks, and their reciprocals.

    Args:
        tokens: those of the span that are looked at.
        layouts: of each of its tensors.
        buffer: 1-D uint8 pool.
        books: ``[tensors]`` int64 on the device: byte of the pool at which the codebook part starts.
        group: rows.
        inverse: ``[rows, head_dim]`` float32, the reciprocals, written.
        scratch: 1-D uint8 of `scratch_nbytes` a row, overwritten.
    """
    dim, codec = tokens.head_dim, layouts[0].codec
    take = _sampled_moments if codec.is_rebalanced else _moments
    moments, runs, count = take(tokens, group, scratch)
    pairings, split = pairings_of(layouts)
    launch(
        _spread_kernel, (len(group),),
        inverse, buffer, books, moments, group.start, tokens.heads, count, runs,
        layouts[0].plane("balance").offset, spread_resolution(tokens.base.dtype), torch.finfo(torch.bfloat16).tiny,
        pairings, split, D=dim, RULE=2 if codec.is_rebalanced else int(codec.balance_rule is BalanceRule.ROOT),
        OUTLIER=OUTLIER, num_warps=4,
    )  # fmt: skip


def _moments(tokens: SpanTokens, group: range, scratch: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Moments of every run of tokens, ``[rows, runs, 3, head_dim]``, how many runs, and of how many tokens."""
    dim = tokens.head_dim
    runs = moment_runs(tokens.frames, tokens.frame_tokens, dim)
    moments = scratch[: len(group) * runs * 3 * dim * 8].view(torch.float64)
    launch(
        _moments_kernel, (runs, len(group)),
        moments, tokens.base, tokens.starts, group.start, tokens.heads, tokens.frames, tokens.frame_tokens,
        tokens.token_stride, tokens.head_stride, D=dim, T=moment_tile(dim), RUN=_span_plan.MOMENT_TOKENS, num_warps=4,
    )  # fmt: skip
    return moments, runs, tokens.span_tokens


def _sampled_moments(tokens: SpanTokens, group: range, scratch: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The same of the sampled tokens."""
    dim, count = tokens.head_dim, sample_size(tokens.span_tokens)
    runs = cdiv(count, SAMPLE_RUN)
    moments = scratch[: len(group) * runs * 3 * dim * 8].view(torch.float64)
    launch(
        _sampled_moments_kernel, (runs, len(group)),
        moments, tokens.base, tokens.starts, group.start, tokens.heads, tokens.frames, tokens.frame_tokens,
        tokens.token_stride, tokens.head_stride, tokens.span_tokens, sample_stride(tokens.span_tokens),
        D=dim, T=max(1, 2048 // dim), RUN=SAMPLE_RUN, num_warps=4,
    )  # fmt: skip
    return moments, runs, count


def pairings_of(layouts: tuple[PartLayout, ...]) -> tuple[int, int]:
    """Two bits per tensor that name its pairing, and one that says whether even channels are stored first."""
    pairings = sum(PAIRINGS[layout.pairing] << (2 * number) for number, layout in enumerate(layouts))
    return pairings, sum(int(layout.split_pairs) << number for number, layout in enumerate(layouts))
