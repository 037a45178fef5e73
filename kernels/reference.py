"""PyTorch twins of the Triton launchers, same signatures: the CPU path, and what the kernels are tested against.

Given the same centroids and ids, codes, scales and decoded values equal the kernels' bit for bit.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qvg_paged.kernels._blocks import pack_codes, quantise_blocks, unpack_codes
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.layout import GRANULE, PLANE_ALIGNMENT, PartLayout, Plane
from qvg_paged.kernels.rope import RoPELayout, RoPETables

__all__ = ["assign_centroids", "centroid_means", "decode_both", "decode_pages", "quantise_pack"]

SLICE_TOKENS = 4096
"""Tokens times heads that are worked on at once."""
BATCH_ELEMENTS = 1 << 17
"""Values quantised at once: bounds the encoder's workspace."""
DECODE_ELEMENTS = 1 << 20
"""Values decoded at once."""


def slice_tokens(heads: int) -> int:
    """Tokens worked on at once for `heads` heads."""
    return max(256, SLICE_TOKENS // heads)


def assign_centroids(residual: torch.Tensor, centroids: torch.Tensor, ids: torch.Tensor) -> None:
    """Write the nearest centroid of every token, lowest index first among equals.

    Args:
        residual: ``[heads, tokens, head_dim]``.
        centroids: ``[heads, num_centroids, head_dim]`` bfloat16, as decoded.
        ids: ``[heads, tokens]`` uint8, written.
    """
    wide = centroids.float()
    norms = wide.square().sum(-1)[:, None]
    step = slice_tokens(len(residual))
    for start in range(0, residual.shape[1], step):
        x = residual[:, start : start + step].float()
        scores = torch.baddbmm(norms, x, wide.transpose(1, 2), alpha=-2.0)
        ids[:, start : start + step] = scores.argmin(-1)


def centroid_means(residual: torch.Tensor, ids: torch.Tensor, centroids: torch.Tensor, means: torch.Tensor) -> None:
    """Write the mean of the tokens of every centroid, summed in an order that never changes.

    Args:
        residual: ``[heads, tokens, head_dim]``.
        ids: ``[heads, tokens]`` uint8.
        centroids: ``[heads, num_centroids, head_dim]`` bfloat16, as decoded; one without tokens keeps its place.
        means: ``[heads, num_centroids, head_dim]`` float32, written.
    """
    sums, counts = torch.zeros_like(means), means.new_zeros(means.shape[:2])
    heads, tokens, _ = residual.shape
    step = slice_tokens(heads)
    for start in range(0, tokens, step):
        x = residual[:, start : start + step].float()
        member = x.new_zeros(heads, x.shape[1], sums.shape[1])
        member.scatter_(2, ids[:, start : start + step, None].long(), 1.0)
        sums.baddbmm_(member.transpose(1, 2), x)
        counts += member.sum(1)
    sums.div_(counts.clamp(min=1.0)[..., None])
    torch.where((counts == 0)[..., None], centroids.float(), sums, out=means)


def quantise_pack(
    residual: torch.Tensor,
    ids: torch.Tensor | None,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    first_head: int,
) -> None:
    """Quantise the residual of some heads and write codes, scales, ids and zero padding into the pages.

    Args:
        residual: ``[heads, frames * tokens, head_dim]``, natural channel order.
        ids: ``[stages, heads, frames * tokens]`` uint8, or None without stages.
        layout: planes of the part.
        buffer: 1-D uint8 pool, written.
        part_offsets: byte of the pool at which the part of each frame's page starts.
        first_head: head of the layout that ``residual[0]`` is.
    """
    heads, frames = residual.shape[0], len(part_offsets)
    frame_elements = layout.tokens * layout.head_dim
    some = max(1, BATCH_ELEMENTS // frame_elements)
    batch = max(1, BATCH_ELEMENTS // (frame_elements * min(some, heads)))
    for head in range(0, heads, some):
        for frame in range(0, frames, batch):
            tokens = slice(frame * layout.tokens, min(frame + batch, frames) * layout.tokens)
            mine = None if ids is None else ids[:, head : head + some, tokens]
            offsets = part_offsets[frame : frame + batch]
            _pack_frames(residual[head : head + some, tokens], mine, layout, buffer, offsets, first_head + head)
    for offset in part_offsets:
        zero_padding(buffer, layout.planes, offset)


def _pack_frames(
    residual: torch.Tensor,
    ids: torch.Tensor | None,
    layout: PartLayout,
    buffer: torch.Tensor,
    part_offsets: Sequence[int],
    first_head: int,
) -> None:
    codec, tokens = layout.codec, layout.tokens
    planes = {plane.name: plane for plane in layout.planes}
    owned = slice(first_head, first_head + len(residual))
    blocks = residual.float().unflatten(1, (-1, tokens)).unflatten(-1, (-1, codec.block_size))
    scales, codes = quantise_blocks(blocks, codec)
    codes = codes.flatten(-2)
    if layout.split_pairs:
        codes = torch.cat([codes[..., 0::2], codes[..., 1::2]], -1)
    packed = pack_codes(codes, codec.grid.bits)
    for frame, offset in enumerate(part_offsets):
        planes["codes"].view(buffer, offset)[owned] = packed[:, frame]
        planes["scales"].view(buffer, offset).view(torch.uint8)[owned] = scales[:, frame].transpose(1, 2)
        if ids is not None:
            inside = ids[:, :, frame * tokens : (frame + 1) * tokens]
            planes["ids"].view(buffer, offset)[owned] = inside.transpose(0, 1)


def zero_padding(buffer: torch.Tensor, planes: tuple[Plane, ...], offset: int) -> None:
    """Zero the bytes between the `planes` of a part that starts at byte `offset`, and after the last one."""
    for plane in planes:
        end = offset + plane.offset + plane.nbytes
        buffer[end : end + -plane.nbytes % PLANE_ALIGNMENT] = 0


def decode_pages(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    part_offset: int,
    codebook_part_offset: int,
    out: torch.Tensor,
    rope: RoPETables | None,
    rope_layout: RoPELayout,
) -> None:
    """Read the tokens of `pages`; arguments as in `qvg_paged.kernels.decode.decode_pages`."""
    tokens, heads, dim = layout.tokens, layout.heads, layout.head_dim
    if layout.codebook_planes:
        codebooks, slots = torch.unique(codebooks, return_inverse=True)
        books = _read_codebooks(buffer, codebooks, layout, codebook_part_offset)
    batch = max(1, DECODE_ELEMENTS // (tokens * heads * dim))
    target = out.view(-1, tokens, heads, dim)
    for begin in range(0, len(pages), batch):
        some = slice(begin, begin + batch)
        if layout.codec.is_dense:
            values = _gather(buffer, layout.plane("values"), part_offset, pages[some])
        else:
            values = _residual(buffer, pages[some], layout, part_offset, target[some])
            if layout.codebook_planes:
                _add_books(values, buffer, pages[some], slots[some], books, layout, part_offset)
        turn = None if rope is None else _turns(rope, some)
        _store(values, target[some], layout.split_pairs, turn, rope_layout)


def decode_both(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PartLayout,
    offsets: tuple[int, int, int, int],
    outs: tuple[torch.Tensor, torch.Tensor],
    rope: RoPETables | None,
    rope_layout: RoPELayout,
    narrow: int = 0,  # noqa: ARG001 - of the launch
) -> None:
    """Read K, then V; arguments as in `qvg_paged.kernels._decode_triton.decode_both`."""
    decode_pages(buffer, pages, codebooks, layout, *offsets[:2], outs[0], rope, rope_layout)
    value = replace(layout, split_pairs=False, pairing=None)
    decode_pages(buffer, pages, codebooks, value, *offsets[2:], outs[1], None, rope_layout)


def _gather(buffer: torch.Tensor, plane: Plane, part_offset: int, units: torch.Tensor) -> torch.Tensor:
    """A plane of several pages or codebooks, ``[units, *plane.shape]``."""
    start = part_offset + plane.offset
    rows = max(1, (buffer.numel() - start - plane.nbytes) // GRANULE + 1)
    view = buffer.as_strided((rows, plane.nbytes), (GRANULE, 1), buffer.storage_offset() + start)
    return view.index_select(0, units).view(plane.dtype).view(len(units), *plane.shape)


def _read_codebooks(
    buffer: torch.Tensor, codebooks: torch.Tensor, layout: PartLayout, offset: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Float32 centroids ``[books, stages, heads, centroids, head_dim]`` and balance ``[books, heads, head_dim]``."""
    centroids = balance = None
    if layout.codec.stages:
        centroids = _gather(buffer, layout.plane("centroids"), offset, codebooks).float()
        if layout.codec.centroid_type is CentroidType.FP8:
            scale = _gather(buffer, layout.plane("centroid_scales"), offset, codebooks)
            centroids.mul_(scale[..., None, None])
    if layout.codec.balanced:
        balance = _gather(buffer, layout.plane("balance"), offset, codebooks).float()
    return centroids, balance


def _residual(
    buffer: torch.Tensor, pages: torch.Tensor, layout: PartLayout, part_offset: int, out: torch.Tensor
) -> torch.Tensor:
    """Scaled levels ``[pages, tokens, heads, head_dim]`` float32 in stored order; in `out` itself where that serves."""
    codec, count = layout.codec, len(pages)
    in_place = out.dtype is torch.float32 and out.is_contiguous() and not layout.split_pairs
    values = out if in_place else out.new_empty(out.shape, dtype=torch.float32)
    packed = _gather(buffer, layout.plane("codes"), part_offset, pages)
    unpack_codes(packed, layout.tokens, codec.grid.bits, values.transpose(1, 2))
    if codec.grid.step != 1:
        values.mul_(codec.grid.step)
    values.add_(codec.grid.offset)
    scales = _gather(buffer, layout.plane("scales"), part_offset, pages).float().permute(0, 3, 1, 2)
    # [pages, tokens, heads, halves, blocks, channels of a block in a half]
    halves = 2 if layout.split_pairs else 1
    blocks = layout.head_dim // codec.block_size
    values.view(count, layout.tokens, layout.heads, halves, blocks, -1).mul_(scales[:, :, :, None, :, None])
    return values


def _add_books(
    values: torch.Tensor,
    buffer: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    books: tuple[torch.Tensor | None, torch.Tensor | None],
    layout: PartLayout,
    part_offset: int,
) -> None:
    centroids, balance = books
    if centroids is not None:
        _, stages, heads, count, dim = centroids.shape
        ids = _gather(buffer, layout.plane("ids"), part_offset, pages)  # [pages, heads, stages, tokens]
        rows = centroids.view(-1, dim)
        head = torch.arange(heads, device=rows.device)
        for stage in range(stages):
            first = ((slots[:, None] * stages + stage) * heads + head) * count  # [pages, heads]
            index = (first[:, None] + ids[:, :, stage].transpose(1, 2)).flatten()
            values.view(-1, dim).add_(rows.index_select(0, index))
    if balance is not None:
        values.mul_(balance[slots][:, None])


def _turns(rope: RoPETables, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
    part = RoPETables(rope.cos_frame[some], rope.sin_frame[some], rope.cos_space, rope.sin_space)
    cos, sin = part.expand()
    tokens = len(rope.cos_space)
    return cos.view(-1, tokens, 1, cos.shape[-1]), sin.view(-1, tokens, 1, sin.shape[-1])


def _pairs(x: torch.Tensor, layout: RoPELayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The two channels of every pair, as views of `x` in natural order."""
    if layout is RoPELayout.INTERLEAVED:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _store(
    values: torch.Tensor,
    out: torch.Tensor,
    split: bool,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    layout: RoPELayout,
) -> None:
    """Rotate `values` if asked to and write them to `out` in natural order."""
    if split and (turn is None or layout is RoPELayout.HALF_SPLIT):
        first, second = _pairs(values, RoPELayout.HALF_SPLIT)
        values = torch.stack([first, second], -1).flatten(-2)
        split = False
    if turn is None:
        if values.data_ptr() != out.data_ptr():
            out.copy_(values)
        return
    cos, sin = turn
    first, second = (part.float() for part in _pairs(values, RoPELayout.HALF_SPLIT if split else layout))
    target, other = _pairs(out, layout)
    turned = (first * cos).sub_(second * sin)
    other.copy_((first * sin).add_(second * cos))
    target.copy_(turned)
