"""Paged split-K attention of xformers over BF16, FP8 and INT4 pages: the quantised caches of text engines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["PAGE_TOKENS", "SPLIT_K", "PagedCache", "fp8_rows", "int4_rows", "paged_caches"]

PAGE_TOKENS = 256
SPLIT_K = tuple(f"xformers split-K, {kind} pages" for kind in ("BF16", "FP8", "INT4"))
E4M3_MAX = 448.0
Tensors = list[torch.Tensor]


def _coefficients(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scale in the low and shift in the high half of an int32, both float16."""
    return torch.stack([scale, shift], -1).half().view(torch.int32)


def int4_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[..., 1 + head_dim / 8]`` int32 (coefficients, then eight channels a word), and what they read back as."""
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6).half().float()
    shift = low.half().float()
    codes = ((x.float() - shift) / scale).round().clamp(0, 15)
    places = 16 ** torch.arange(8, device=x.device)
    words = (codes.long().unflatten(-1, (-1, 8)) * places).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return torch.cat([_coefficients(scale[..., 0], shift[..., 0]), words], -1), (codes * scale + shift).to(x.dtype)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows ``[..., head_dim / 4]`` int32 of E4M3, coefficients ``[...]`` int32, and what they read back as."""
    scale = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=1e-6).half().float()
    rounded = (x.float() / scale).to(torch.float8_e4m3fn)
    coefficients = _coefficients(scale[..., 0], torch.zeros_like(scale[..., 0]))[..., 0]
    return rounded.view(torch.int32), coefficients, (rounded.float() * scale).to(x.dtype)


@dataclass(frozen=True)
class PagedCache:
    """K and V in pages of 256 tokens in shuffled order, as `triton_splitk` reads them.

    Attributes:
        name: of the system.
        key, value: ``[1, tokens of all pages, heads, words]``.
        scales: FP8 coefficients of K and V, or None.
        block_tables: ``[batch, pages]`` int32.
        keys: keys of each sequence.
        nbytes: payload.
        read: K and V as read back, ``[batch, keys, heads, head_dim]``.
    """

    name: str
    key: torch.Tensor
    value: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None
    block_tables: torch.Tensor
    keys: int
    nbytes: int
    read: tuple[torch.Tensor, torch.Tensor]

    def attention(self, q: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A call for ``[total_q, q_heads, head_dim]``, as many queries of each sequence; lengths are uploaded now."""
        from xformers.ops import fmha  # noqa: PLC0415 - optional, and slow to import

        batch, kv_heads = len(self.block_tables), self.key.shape[2]
        lengths = [len(q) // batch] * batch, [self.keys] * batch
        make = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens
        mask = make(*lengths, self.block_tables, PAGE_TOKENS, device=q.device)
        group = q.shape[1] // kv_heads
        rows = q.unflatten(1, (kv_heads, group))[None]
        key, value = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (self.key, self.value))
        inputs = fmha.Inputs(query=rows, key=key, value=value, attn_bias=mask)
        if self.scales is not None:
            scales = [x[:, :, :, None].expand(-1, -1, -1, group) for x in self.scales]
            inputs = fmha.triton_splitk.InputsFp8(
                query=rows, key=key, value=value, attn_bias=mask,
                k_fp8_scale_shift=scales[0], v_fp8_scale_shift=scales[1],
            )  # fmt: skip
        return lambda: fmha.triton_splitk.FwOp.apply(inputs, needs_gradient=False)[0].reshape(q.shape)


def paged_caches(k: torch.Tensor, v: torch.Tensor) -> Iterator[PagedCache]:
    """BF16, FP8 and INT4 caches of K and V ``[batch, heads, keys, head_dim]``."""
    batch, _, keys, _ = k.shape
    pages = -(-keys // PAGE_TOKENS)
    order = torch.randperm(batch * pages, device=k.device)
    tables = order.view(batch, pages).int()
    tokens_first = [x.transpose(1, 2).contiguous() for x in (k, v)]

    def paged(x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(batch * pages, PAGE_TOKENS, *x.shape[2:])
        padded = x.new_zeros(batch, pages * PAGE_TOKENS, *x.shape[2:])
        padded[:, :keys] = x
        out[order] = padded.view(batch * pages, PAGE_TOKENS, *x.shape[2:])
        return out.flatten(0, 1)[None]

    def cache(
        name: str, stored: list[torch.Tensor], read: list[torch.Tensor], scales: list[torch.Tensor]
    ) -> PagedCache:
        nbytes = sum(x.numel() * x.element_size() for x in (*stored, *scales))
        both = (paged(scales[0]), paged(scales[1])) if scales else None
        return PagedCache(name, paged(stored[0]), paged(stored[1]), both, tables, keys, nbytes, (read[0], read[1]))

    yield cache(SPLIT_K[0], tokens_first, tokens_first, [])
    rows = [fp8_rows(x) for x in tokens_first]
    yield cache(SPLIT_K[1], [r[0] for r in rows], [r[2] for r in rows], [r[1] for r in rows])
    rows4 = [int4_rows(x) for x in tokens_first]
    yield cache(SPLIT_K[2], [r[0] for r in rows4], [r[1] for r in rows4], [])
