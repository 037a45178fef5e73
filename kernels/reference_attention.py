"""Attention in plain PyTorch: the `reference` path, and what the direct kernel is tested against."""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from qvg_paged.kernels.attention_plan import QueryBlocks, rope_tables
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.block_table import BlockTable, FormatGroup
from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.dense_attention import fold_queries, unfold_queries
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.kernels.rope import RoPELayout, RoPESpec, RoPETables

__all__ = ["direct_attention_reference", "gather_history", "reference_attention"]

SCORE_ELEMENTS = 1 << 24
"""Scores held at once when log-sum-exp is computed."""


def reference_attention(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    *,
    cu_seqlens_q: tuple[int, ...],
    softmax_scale: float,
    rope: RoPESpec | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `qvg_paged.kernels.attention.paged_attention`, already checked.

    With dense pages the output of a sequence is bit for bit that of a plain cache ``k, v`` ``[keys, heads, head_dim]``
    (keys turned by `RoPESpec.rotate` if they are turned on read) that calls ::

        scaled_dot_product_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
                                     scale=softmax_scale, enable_gqa=q_heads != kv_heads)
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for sequence in range(table.batch):
        rows = slice(cu_seqlens_q[sequence], cu_seqlens_q[sequence + 1])
        if rows.start == rows.stop or not table.entries(sequence):
            continue
        k, v = gather_history(buffer, table, layouts, layer, sequence, q.dtype, rope)
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[rows], k, v))
        grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=softmax_scale, enable_gqa=grouped)
        out[rows] = attended[0].transpose(0, 1)
        lse[rows] = _log_sum_exp(q[rows], k, softmax_scale)
    return out, lse


def gather_history(
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    sequence: int,
    dtype: torch.dtype,
    rope: RoPESpec | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded keys and values of one sequence in table order, each ``[keys, heads, head_dim]``."""
    part = layouts[0].key
    entries = table.entries(sequence)
    k, v = (buffer.new_empty((len(entries) * part.tokens, part.heads, part.head_dim), dtype=dtype) for _ in range(2))
    place = {entry: i for group in table.groups.values() for i, entry in enumerate(group.order)}
    done = 0
    for fmt, run in groupby(entries, key=lambda entry: table.formats[entry]):
        members = list(run)
        rows = slice(place[members[0]], place[members[0]] + len(members))
        tokens = slice(done, done + len(members) * part.tokens)
        tables = None if rope is None else _rows(rope_tables(table, fmt, rope), rows)
        rope_layout = RoPELayout.INTERLEAVED if rope is None else rope.layout
        _decode(buffer, table.groups[fmt], rows, layouts[fmt], layer, k[tokens], v[tokens], tables, rope_layout)
        done = tokens.stop
    return k, v


def _rows(tables: RoPETables, rows: slice) -> RoPETables:
    return RoPETables(tables.cos_frame[rows], tables.sin_frame[rows], tables.cos_space, tables.sin_space)


def _decode(
    buffer: torch.Tensor,
    group: FormatGroup,
    rows: slice,
    layout: PageLayout,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: RoPETables | None,
    rope_layout: RoPELayout,
) -> None:
    pages, books = group.pages[rows], group.codebooks[rows]
    decode_pages(
        buffer, pages, books, layout.key, layout.key_offset(layer), layout.key_codebook_offset(layer), k,
        rope=tables, rope_layout=rope_layout, backend=Backend.TORCH,
    )  # fmt: skip
    decode_pages(
        buffer, pages, books, layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer), v,
        backend=Backend.TORCH,
    )  # fmt: skip


def _log_sum_exp(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    heads = k.shape[1]
    folded = fold_queries(q[None].float(), heads)[0]  # [heads, rows, head_dim]
    keys = k.float().permute(1, 2, 0)
    step = max(1, SCORE_ELEMENTS // (heads * keys.shape[2]))
    pieces = [torch.logsumexp(torch.bmm(rows, keys) * scale, -1) for rows in torch.split(folded, step, 1)]
    return unfold_queries(torch.cat(pieces, 1)[None], len(q))[0]


def direct_attention_reference(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    buffer: torch.Tensor,
    layout: PageLayout,
    layer: int,
    group: FormatGroup,
    queries: QueryBlocks,
    *,
    softmax_scale: float,
    num_splits: int,
    first_partial: int,
    rope: RoPETables | None,
    rope_layout: RoPELayout,
    **_: object,
) -> None:
    """PyTorch twin of `qvg_paged.kernels.direct_attention.direct_attention`, float32; same arguments.

    Keys are cut into shares by whole pages, so that shares differ from the kernel's and their merge does not.
    """
    bounds = queries.cu_queries.tolist()
    part = layout.key
    for sequence in sorted(set(queries.sequence.tolist())):
        rows = slice(bounds[sequence], bounds[sequence + 1])
        target = slice(rows.start - queries.first_row, rows.stop - queries.first_row)
        begin, end = group.host_indptr[sequence : sequence + 2]
        for split in range(num_splits):
            share = slice(*(begin + (end - begin) * i // num_splits for i in (split, split + 1)))
            partial_lse[first_partial + split, target] = float("-inf")
            if share.start == share.stop:
                continue
            shape = ((share.stop - share.start) * part.tokens, part.heads, part.head_dim)
            k, v = (torch.empty(shape, device=buffer.device) for _ in range(2))
            tables = None if rope is None else _rows(rope, share)
            _decode(buffer, group, share, layout, layer, k, v, tables, rope_layout)
            folded = fold_queries(q[None, rows].float(), part.heads)[0]
            scores = torch.bmm(folded, k.permute(1, 2, 0)) * softmax_scale
            attended = torch.bmm(scores.softmax(-1), v.transpose(0, 1))
            partials[first_partial + split, target] = unfold_queries(attended[None], len(q[rows]))[0]
            partial_lse[first_partial + split, target] = unfold_queries(scores.logsumexp(-1)[None], len(q[rows]))[0]
