"""Attention to a resident BF16 history by the kernels everybody uses: what a quantised history competes with."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["CPU", "CUDNN", "FLASH", "XFORMERS", "dense_systems", "sdpa"]

CUDNN, FLASH, XFORMERS = "cuDNN", "FlashAttention-2", "xformers"
CPU = "PyTorch"
Pair = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[int], torch.Tensor]


def sdpa(backend: SDPBackend | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`scaled_dot_product_attention` of ``[batch, heads, tokens, head_dim]`` by one backend only (None: any)."""
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def _backends(device: torch.device) -> dict[str, SDPBackend | None]:
    if device.type != "cuda":
        return {CPU: None}
    return {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}


def dense_systems(q: torch.Tensor, batch: int, dense: Sequence[Pair]) -> Iterator[tuple[str, Call]]:
    """Name and call of each dense kernel; calls take the input set and return ``[total_q, q_heads, head_dim]``.

    Args:
        q: ``[total_q, q_heads, head_dim]``, as many queries of each sequence.
        batch: sequences.
        dense: K and V of each set, ``[batch, heads, keys, head_dim]``.
    """
    batched = q.view(batch, -1, *q.shape[1:])
    heads_first = batched.transpose(1, 2).contiguous()

    def by(backend: SDPBackend | None) -> Call:
        return lambda number: sdpa(backend, heads_first, *dense[number]).transpose(1, 2).reshape(q.shape)

    for name, backend in _backends(q.device).items():
        yield name, by(backend)
    if q.device.type == "cuda":
        yield XFORMERS, lambda number: _xformers(batched, *dense[number]).reshape(q.shape)


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`memory_efficient_attention` of ``[batch, tokens, heads, head_dim]`` queries: the operator it tries first.

    The function itself turns everything on a GPU away if the package's compiled part was built for another PyTorch.
    """
    from xformers.ops import fmha  # noqa: PLC0415 - optional, and slow to import

    k, v = (x.transpose(1, 2) for x in (k, v))
    if q.shape[2] != k.shape[2]:
        shape = (*k.shape[:3], q.shape[2] // k.shape[2], k.shape[3])
        q = q.unflatten(2, shape[2:4])
        k, v = (x.unsqueeze(3).expand(shape) for x in (k, v))
    return fmha.flash.FwOp.apply(fmha.Inputs(query=q, key=k, value=v), needs_gradient=False)[0]
