"""Many query rows on Hopper: 2-bit pages decoded into shared memory, under the tensor cores' asynchronous products."""

import math

import torch

from qvg_paged.kernels._page_tiles import part_bytes, part_code
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.few_queries import LOG2_E, shares
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.kernels.merge import merge_partials

__all__ = ["attend"]


def attend(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layout: PageLayout,
    layer: int,
    cu_queries: tuple[int, ...],
    *,
    rows: int,
    tokens: int,
    softmax_scale: float,
    processors: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of sequences attending to pages of one format.

    Args:
        q: ``[total_q, q_heads, head_dim]`` bfloat16.
        buffer: 1-D uint8 pool.
        table: pages, all of format 0, which `qvg_paged.kernels.few_queries.reads_few_queries` accepts.
        layout: their layout.
        layer: layer to read.
        cu_queries: first query of each sequence, and the number of queries.
        rows: query rows of a program, 64 or 128.
        tokens: tokens of a sub-tile, 32 or 64.
        softmax_scale: factor on the scores.
        processors: multiprocessors of the GPU.
    """
    from direct_candidates.wgmma_kernel import many_queries_kernel  # noqa: PLC0415 - the tests replace it

    key, group = layout.key, q.shape[1] // layout.key.heads
    per_page = math.ceil(key.tokens / tokens)
    programs = processors * (128 // rows)
    work = shares(table, 0, layout, cu_queries, range(table.batch), group, rows, programs, per_page)
    partials = torch.empty((work.slots, *q.shape), device=q.device)
    partial_lse = torch.full((work.slots, *q.shape[:2]), -math.inf, device=q.device)
    many_queries_kernel[(len(work.items) * key.heads,)](
        partials, partial_lse, q, buffer, table.groups[0].pages, work.items, softmax_scale * LOG2_E, len(q), key.heads,
        group, key.tokens, len(work.items), q.stride(0), q.stride(1),
        part_bytes(key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
        part_bytes(layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
        KEY=part_code(key), VALUE=part_code(layout.value), HEAD_DIM=key.head_dim, CB=key.codec.block_size, M=rows,
        N=tokens, num_warps=rows // 16,
    )  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
    merge_partials(partials, partial_lse, out, lse)
    return out, lse
