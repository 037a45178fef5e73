"""K and V of a layer into unquantised pages that lie at equal distances: one launch on a GPU."""

import torch

from qvg_paged.kernels.backend import Backend, kernel_scope, uses_triton
from qvg_paged.kernels.layout import GRANULE

__all__ = ["can_store", "store_tokens"]

HALF = GRANULE // 2
"""Every part of a page starts at a multiple of as many bytes."""
WIDE = 8


def can_store(k: torch.Tensor, v: torch.Tensor, backend: Backend) -> bool:
    """Whether `store_tokens` takes `k` and `v` ``[frames * tokens, heads, head_dim]``: rows of both are contiguous."""
    if not uses_triton(backend, k.device):
        return False
    _, heads, dim = k.shape
    return k.stride()[1:] == v.stride()[1:] == (dim, 1) and heads * dim % WIDE == 0


def store_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    tokens: int,
    first: int,
    step: int,
    key_offset: int,
    value_offset: int,
) -> None:
    """Copy `k` and `v` of one layer to where they belong.

    Args:
        k, v: ``[frames * tokens, heads, head_dim]``, see `can_store`.
        pages: the pool in their dtype.
        tokens: tokens of a frame.
        first, step: id of the first frame's page, and what is added to it for each further frame.
        key_offset, value_offset: bytes of a page at which K and V start.
    """
    from qvg_paged.kernels import _store_triton  # noqa: PLC0415 - triton is only loaded where it is used

    with kernel_scope(k.device):
        _store_triton.store(k, v, pages, tokens, first, step, key_offset // HALF, value_offset // HALF)
