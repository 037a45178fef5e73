"""Merging attention over disjoint sets of keys by log-sum-exp.

A partial result is a pair: the output normalised over its own keys, and the natural log of the sum of their
exponentials. With ``w_i = exp(lse_i - lse)`` and ``lse = log(sum_i exp(lse_i))`` the whole is ``sum_i w_i * out_i``.
A set without keys has lse = -inf and its output is never read.
"""

from collections.abc import Sequence

import torch

from qvg_paged.kernels.backend import Backend, uses_triton

__all__ = [
    "merge_into_reference", "merge_partials", "merge_partials_reference", "merge_pieces", "merge_pieces_reference"
]  # fmt: skip

Piece = tuple[torch.Tensor, torch.Tensor]


def merge_partials(
    partials: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    *, backend: Backend = Backend.AUTO,
) -> None:  # fmt: skip
    """Merge all partial results at once.

    Args:
        partials: ``[partials, ..., head_dim]`` float32, contiguous; not read where `partial_lse` is -inf.
        partial_lse: ``[partials, ...]`` float32, contiguous, natural log.
        out: ``[..., head_dim]``, contiguous, written in its own dtype; zeros where no partial has a key.
        lse: ``[...]`` float32, contiguous, written; -inf where no partial has a key.
        backend: Triton or its PyTorch twin.
    """
    if lse.numel() == 0:
        return
    if not uses_triton(backend, out.device):
        merge_partials_reference(partials, partial_lse, out, lse)
        return
    from qvg_paged.kernels import _merge_triton  # noqa: PLC0415 - triton is only loaded where it is used

    _merge_triton.merge_partials(partials, partial_lse, out, lse)


def merge_partials_reference(
    partials: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """PyTorch twin of `merge_partials`; same arguments."""
    merged = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    lse.fill_(float("-inf"))
    for part, part_lse in zip(partials, partial_lse, strict=True):
        merge_into_reference(merged, lse, part, part_lse)
    out.copy_(merged)


def merge_pieces(
    pieces: Sequence[Piece], out: torch.Tensor, lse: torch.Tensor, *, backend: Backend = Backend.AUTO
) -> None:
    """Merge a few partial results that lie anywhere; one of them may be the result itself.

    Args:
        pieces: outputs ``[sequences, tokens, kv_heads, group, head_dim]``, any float dtype and strides but for the last
            dimension, with log-sum-exps ``[sequences, tokens, kv_heads, group]`` float32; an output is not read where
            its log-sum-exp is -inf.
        out: like the outputs, contiguous, written in its own dtype; zeros where no piece has a key.
        lse: like the log-sum-exps, contiguous, written; -inf where no piece has a key.
        backend: Triton or its PyTorch twin.
    """
    if lse.numel() == 0:
        return
    if not uses_triton(backend, out.device):
        merge_pieces_reference(pieces, out, lse)
        return
    from qvg_paged.kernels import _merge_triton  # noqa: PLC0415

    _merge_triton.merge_pieces(pieces, out, lse)


def merge_pieces_reference(pieces: Sequence[Piece], out: torch.Tensor, lse: torch.Tensor) -> None:
    """PyTorch twin of `merge_pieces`; same arguments."""
    merged = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    total = torch.full_like(lse, float("-inf"))
    for part, part_lse in pieces:
        merge_into_reference(merged, total, part, part_lse)
    out.copy_(merged)
    lse.copy_(total)


def merge_into_reference(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge one partial result into a running one ``[..., head_dim]`` float32, in place."""
    merged = torch.logaddexp(lse, part_lse)
    reference = merged.masked_fill(merged == float("-inf"), 0.0)
    kept, filled = (lse != float("-inf"))[..., None], (part_lse != float("-inf"))[..., None]
    out.mul_((lse - reference).exp_()[..., None]).masked_fill_(~kept, 0.0)
    out.add_(torch.where(filled, part, 0.0) * (part_lse - reference).exp_()[..., None])
    lse.copy_(merged)
