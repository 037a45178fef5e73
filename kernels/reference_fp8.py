"""PyTorch twins of the FP8 launchers, same signatures: every rounding to E4M3 is there, in float32 otherwise."""

import math

import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.layout import PageLayout, PartLayout
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["attend", "bound_pages", "clear_bounds", "decode_part", "key_rows", "quantise_queries"]

ROOM = 224.0
QUERY_PEAK = 256.0
WEIGHT_PEAK = 8.0
"""Log2 of the largest softmax weight before it is rounded."""
LOG2_E = math.log2(math.e)


def key_rows(count: int) -> torch.Tensor:
    """Row of keys that belongs to each of `count` positions of values: 4t + 2j + e within 16 becomes 8j + 2t + e."""
    position = torch.arange(count)
    return (position & -16) | ((position & 2) << 2) | ((position & 12) >> 1) | (position & 1)


def positions(layout: PartLayout) -> torch.Tensor:
    """Position of each token of a page: codes of one byte are neighbours, unless the page leaves a byte unfilled."""
    tokens, per_byte = layout.tokens, 8 // layout.codec.grid.bits
    token = torch.arange(tokens)
    if tokens % per_byte:
        return token
    tile, inside = token // 256 * 256, token % 256
    stride = (tokens - tile).clamp(max=256) // per_byte
    return tile + inside % stride * per_byte + inside // stride


def units(bounds: torch.Tensor) -> torch.Tensor:
    """Worth of a stored 1.0, ``[problems, 2]``."""
    return bounds.view(-1, 2, 2).sum(-1).clamp(min=1e-30) / ROOM


def clear_bounds(bounds: torch.Tensor) -> None:
    """Bounds ``[problems, 4]`` before any page has raised them."""
    bounds.zero_()


def bound_pages(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PageLayout,
    layer: int,
    bounds: torch.Tensor,
) -> None:
    """Raise `bounds` ``[problems, 4]`` to what `pages` hold: residual and centroids of keys, then of values."""
    parts = (
        (layout.key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
        (layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
    )
    for i, (part, offset, book_offset) in enumerate(parts):
        heads, codec = part.heads, part.codec
        scales = reference._gather(buffer, part.plane("scales"), offset, pages).float()
        factors, total = torch.ones(len(pages), heads, part.head_dim, device=buffer.device), None
        if codec.balanced:
            factors = reference._gather(buffer, part.plane("balance"), book_offset, codebooks).float().abs()
        if codec.stages:
            centroids = reference._gather(buffer, part.plane("centroids"), book_offset, codebooks).float().abs().amax(3)
            if codec.centroid_type is CentroidType.FP8:
                centroids *= reference._gather(buffer, part.plane("centroid_scales"), book_offset, codebooks)[..., None]
            total = (centroids.sum(1) * factors).amax(-1)
        residual = scales.amax((2, 3)) * codec.grid.max_level * factors.amax(-1)
        for j, bound in enumerate((residual, total)):
            if bound is not None:
                most = bound.view(len(bounds) // heads, -1, heads).amax(1).flatten()
                bounds[:, 2 * i + j] = torch.maximum(bounds[:, 2 * i + j], most)


def decode_part(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    offsets: tuple[int, int],
    bounds: torch.Tensor,
    out: torch.Tensor,
    first_token: int,
    transposed: bool,
    rope: RoPETables | None,
    rope_layout: RoPELayout,
) -> None:
    """Decode keys, or values if `transposed`, to positions from `first_token` on."""
    heads, dim, tokens = layout.heads, layout.head_dim, layout.tokens
    decoded = buffer.new_empty((len(pages) * tokens, heads, dim), dtype=torch.float32)
    reference.decode_pages(buffer, pages, codebooks, layout, *offsets, decoded, rope, rope_layout)
    sequences = len(bounds) // heads
    each = len(pages) // sequences
    x = decoded.view(sequences, each, tokens, heads, dim)
    ordered = torch.empty_like(x)
    ordered[:, :, positions(layout).to(x.device)] = x
    ordered = ordered.permute(0, 3, 1, 2, 4).reshape(sequences * heads, each * tokens, dim)
    ordered = (ordered / units(bounds)[:, int(transposed), None, None]).to(out.dtype)
    span = slice(first_token, first_token + each * tokens)
    if transposed:
        out[:, :, span] = ordered.transpose(1, 2)
        return
    if rope_layout is RoPELayout.INTERLEAVED if rope is not None else layout.split_pairs:
        ordered = torch.cat([ordered[..., 0::2], ordered[..., 1::2]], -1)
    out[:, key_rows(out.shape[1])[span].to(out.device)] = ordered


def quantise_queries(q: torch.Tensor, heads: int, split: bool, out: torch.Tensor, scales: torch.Tensor) -> None:
    """Fold query heads into rows and scale every row to the same largest magnitude."""
    sequences, tokens, q_heads, dim = q.shape
    folded = q.float().view(sequences, tokens, heads, q_heads // heads, dim).transpose(1, 2).reshape(out.shape)
    if split:
        folded = torch.cat([folded[..., 0::2], folded[..., 1::2]], -1)
    largest = folded.abs().amax(-1).clamp(min=1e-30)
    scales.copy_(largest / QUERY_PEAK)
    out.copy_((folded * (QUERY_PEAK / largest)[..., None]).to(out.dtype))


def attend(
    queries: torch.Tensor,
    query_scales: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_keys: int,
    scale: float,
    heads: int,
    shape: tuple[int, ...],
) -> None:
    """Attention with rounded weights; the largest of every row is 2 ** 8 before it is rounded."""
    splits, _, q_heads, dim = out.shape
    rows, group, tile = queries.shape[1], q_heads // heads, shape[1]
    worth = units(bounds)
    ordered = keys.float()[:, key_rows(keys.shape[1])[:num_keys].to(keys.device)]
    scores = torch.bmm(queries.float(), ordered.transpose(1, 2))
    scores *= (query_scales * worth[:, :1] * (scale * LOG2_E))[..., None]
    whole = num_keys // tile
    for split in range(splits):
        end = num_keys if split == splits - 1 else whole * (split + 1) // splits * tile
        share = slice(whole * split // splits * tile, end)
        top = scores[..., share].amax(-1, keepdim=True) - WEIGHT_PEAK
        weights = torch.exp2(scores[..., share] - top)
        total = weights.sum(-1, keepdim=True)
        some = torch.bmm(weights.to(keys.dtype).float(), values[:, :, share].float().transpose(1, 2))
        some *= worth[:, 1, None, None] / total
        unfolded = some.view(-1, heads, rows // group, group, dim).transpose(1, 2)
        out[split] = unfolded.reshape(out.shape[1:])
        sums = ((top + total.log2()) / LOG2_E).view(-1, heads, rows // group, group).transpose(1, 2)
        lse[split] = sums.reshape(lse.shape[1:])
