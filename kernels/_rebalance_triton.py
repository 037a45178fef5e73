"""Triton launcher of `BalanceRule.RESIDUAL`: what smoothing leaves of every channel, as `_span_torch` defines it."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._encode_triton import SpanPlaces
from qvg_paged.kernels._span_plan import SAMPLE_RUN, cdiv, sample_size, sample_stride
from qvg_paged.kernels._span_torch import centroid_resolution
from qvg_paged.kernels._spread_triton import pairings_of
from qvg_paged.kernels._tokens_triton import COUNTS, RowGroup, read_tokens, rounded_to_bf16
from qvg_paged.kernels.launch import launch

__all__ = ["multiply", "rebalance"]

REBALANCE = ["books_ptr", "first_row", "heads", "span_tokens", "runs", "balance_offset", "pairings", "split"]


@triton.jit(do_not_specialize=[*COUNTS, "stride"])
def _left_kernel(
    energies_ptr, x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, first_row, rows, heads, frames, frame_tokens,
    span_tokens, num_centroids, token_stride, head_stride, stride, D: tl.constexpr, T: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of squares over a run of every `stride`-th token: of what all stages leave, and of what was smoothed."""
    run, row = tl.program_id(0), tl.program_id(1)
    left = tl.zeros((T, D), tl.float64)
    whole = tl.zeros((T, D), tl.float64)
    for place in tl.range(0, RUN, T):
        token = (run * RUN + place + tl.arange(0, T)) * stride
        inside = token < span_tokens
        x = read_tokens(
            x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, row, token, inside, first_row, rows, heads, frames,
            frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D, 0, True,
        )  # fmt: skip
        rest = read_tokens(
            x_ptr, starts_ptr, inverse_ptr, ids_ptr, centroids_ptr, row, token, inside, first_row, rows, heads, frames,
            frame_tokens, span_tokens, num_centroids, token_stride, head_stride, D, STAGES, True,
        )  # fmt: skip
        x, rest = x.to(tl.float64), rest.to(tl.float64)
        whole += x * x
        left += rest * rest
    out = energies_ptr + (row * tl.num_programs(0) + run) * 2 * D + tl.arange(0, D)
    tl.store(out, tl.sum(left, 0))
    tl.store(out + D, tl.sum(whole, 0))


@triton.jit
def _energy_left(energies_ptr, row, runs, resolution, channel, D: tl.constexpr):
    left = tl.zeros((D,), tl.float64)
    whole = tl.zeros((D,), tl.float64)
    for run in range(runs):
        at = energies_ptr + (row * runs + run) * 2 * D + channel
        left += tl.load(at)
        whole += tl.load(at + D)
    least = whole * resolution * resolution
    return tl.where(left > 0, tl.maximum(left, least), 0.0)


@triton.jit(do_not_specialize=REBALANCE)
def _rebalance_kernel(
    inverse_ptr, factor_ptr, buffer_ptr, books_ptr, energies_ptr, first_row, heads, span_tokens, runs, balance_offset,
    resolution, smallest, pairings, split, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tensor, head = (first_row + row) // heads, (first_row + row) % heads
    channel = tl.arange(0, D)
    pairing = (pairings >> (2 * tensor)) & 3
    partner = tl.where(pairing == 1, channel ^ 1, tl.where(pairing == 2, (channel + D // 2) % D, channel))
    mean = _energy_left(energies_ptr, row, runs, resolution, channel, D)
    mean = (mean + _energy_left(energies_ptr, row, runs, resolution, partner, D)) * 0.5 / span_tokens
    stored = tl.where(((split >> tensor) & 1) == 1, channel // 2 + channel % 2 * (D // 2), channel)
    out = (buffer_ptr + tl.load(books_ptr + tensor) + balance_offset).to(tl.pointer_type(tl.bfloat16))
    out += head * D + stored
    before = tl.load(out).to(tl.float32)
    balance = rounded_to_bf16(tl.sqrt(mean).to(tl.float32) * before)
    balance = tl.where(balance > smallest, balance, before)
    tl.store(inverse_ptr + row * D + channel, tl.div_rn(tl.full((D,), 1.0, tl.float32), balance))
    tl.store(factor_ptr + row * D + channel, tl.div_rn(before, balance))
    tl.store(out, balance.to(tl.bfloat16))


@triton.jit(do_not_specialize=["num_centroids"])
def _multiply_kernel(out_ptr, values_ptr, factor_ptr, num_centroids, D: tl.constexpr, K: tl.constexpr):
    row, k = tl.program_id(1), tl.program_id(0) * K + tl.arange(0, K)
    channel, known = tl.arange(0, D), (k < num_centroids)[:, None]
    at = (row * num_centroids + k[:, None]) * D + channel
    product = tl.load(values_ptr + at, mask=known, other=0.0).to(tl.float32) * tl.load(factor_ptr + row * D + channel)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        product = rounded_to_bf16(product)
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=known)


def rebalance(group: RowGroup, places: SpanPlaces, factor: torch.Tensor) -> None:
    """Write the balance that smoothing asks for into the codebooks, and its reciprocals into the group.

    Args:
        group: the rows.
        places: where they go.
        factor: ``[rows, head_dim]`` float32, written: what centroids are to be multiplied by, which the group holds as
            smoothing found them.
    """
    assert group.inverse is not None
    tokens, layout = group.tokens, places.layouts[0]
    rows, dim = len(group.rows), tokens.head_dim
    count = sample_size(tokens.span_tokens)
    runs = cdiv(count, SAMPLE_RUN)
    energies = group.scratch[: rows * runs * 2 * dim * 8].view(torch.float64)
    launch(
        _left_kernel, (runs, rows),
        energies, *group.arguments, sample_stride(tokens.span_tokens), D=dim, T=max(1, 2048 // dim), RUN=SAMPLE_RUN,
        STAGES=layout.codec.stages, num_warps=4,
    )  # fmt: skip
    pairings, split = pairings_of(places.layouts)
    launch(
        _rebalance_kernel, (rows,),
        group.inverse, factor, places.buffer, places.books, energies, group.rows.start, tokens.heads,
        count, runs, layout.plane("balance").offset, centroid_resolution(layout.codec.centroid_type),
        torch.finfo(torch.bfloat16).tiny, pairings, split, D=dim, num_warps=4,
    )  # fmt: skip


def multiply(values: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """Write centroids ``[rows, num_centroids, head_dim]`` times ``[rows, head_dim]`` to `out`, float32 or bfloat16."""
    rows, count, dim = values.shape
    launch(
        _multiply_kernel, (cdiv(count, 16), rows), out, values, factor, count, D=dim, K=16, num_warps=4
    )  # fmt: skip
