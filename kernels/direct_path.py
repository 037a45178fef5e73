"""The direct path around its kernel: how many splits, which sequences at once, where partial results go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvg_paged.kernels import few_queries, many_queries
from qvg_paged.kernels.attention_plan import query_blocks, rope_tables
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.few_queries import (
    FEW_ROWS,
    Shares,
    few_queries_attention,
    has_gluon,
    page_groups,
    reads_few_queries,
    shares,
    tables_nbytes,
)
from qvg_paged.kernels.gluon import NotCompiled
from qvg_paged.kernels.layout import GRANULE, PageLayout, align
from qvg_paged.kernels.many_queries import (
    FEWEST_ROWS,
    has_wgmma,
    many_queries_attention,
    many_shares,
    reads_many_queries,
)
from qvg_paged.kernels.merge import merge_partials
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

__all__ = ["direct_path", "partial_nbytes"]

MAX_SPLITS = 64
INTERPRETED_PROGRAMS = 8
PROGRAMS_PER_MULTIPROCESSOR = 2


def partial_nbytes(rows: int, head_dim: int) -> int:
    """Bytes of one partial result of `rows` query heads."""
    return align(rows * head_dim * 4, GRANULE) + align(rows * 4, GRANULE)


def direct_path(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    *,
    cu_seqlens_q: tuple[int, ...],
    softmax_scale: float,
    rope: RoPESpec | None,
    workspace: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `qvg_paged.kernels.attention.paged_attention`, already checked."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for sequences in _sequences_that_fit(q, table, cu_seqlens_q, workspace):
        rows = slice(cu_seqlens_q[sequences.start], cu_seqlens_q[sequences.stop])
        if rows.start < rows.stop:
            given = (q, buffer, table, layouts, layer, cu_seqlens_q, sequences, softmax_scale, rope, workspace)
            try:
                _direct_sequences(*given, out[rows], lse[rows])
            except NotCompiled as error:
                error.give_up(q.device)
                _direct_sequences(*given, out[rows], lse[rows])
    return out, lse


def _sequences_that_fit(
    q: torch.Tensor, table: BlockTable, cu_queries: tuple[int, ...], workspace: torch.Tensor | None
) -> list[range]:
    """Consecutive sequences whose partial results, one split per format, fit the workspace together."""
    groups = max(1, len(table.groups))
    if workspace is None:
        return [range(table.batch)]
    made, start = [], 0
    for b in range(table.batch):
        needed = groups * partial_nbytes((cu_queries[b + 1] - cu_queries[b]) * q.shape[1], q.shape[2])
        if needed > workspace.numel():
            raise ArgumentError(
                f"workspace: expected at least {needed} bytes (partial results of {cu_queries[b + 1] - cu_queries[b]} "
                f"queries in {groups} formats), got {workspace.numel()}"
            )
        together = groups * partial_nbytes((cu_queries[b + 1] - cu_queries[start]) * q.shape[1], q.shape[2])
        if together > workspace.numel():
            made.append(range(start, b))
            start = b
    return [*made, range(start, table.batch)]


def _direct_sequences(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    cu_queries: tuple[int, ...],
    sequences: range,
    scale: float,
    rope: RoPESpec | None,
    workspace: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    from qvg_paged.kernels.direct_attention import (  # noqa: PLC0415 - triton is only loaded where it is used
        direct_attention,
        launch_shape,
    )

    heads = layouts[0].key.heads
    group_size = q.shape[1] // heads
    longest = max(cu_queries[b + 1] - cu_queries[b] for b in sequences) * group_size
    per_partial = partial_nbytes(lse.numel(), q.shape[2])
    cuts: dict[int, _Cut] = {}
    if rope is None:
        most = None if workspace is None else workspace.numel() // per_partial // max(1, len(table.groups))
        cuts = _cuts(q, table, layouts, cu_queries, sequences, group_size, longest, most)
    slots, tables = sum(c.work.slots for c in cuts.values()), sum(c.nbytes for c in cuts.values())
    least = (slots + len(table.groups) - len(cuts)) * per_partial + align(tables, GRANULE)
    if workspace is not None and least > workspace.numel():
        cuts, slots, tables = {}, 0, 0
    launches, splits = [], []
    for fmt in table.groups:
        if fmt in cuts:
            continue
        shape = launch_shape(layouts[fmt], q.dtype, longest, rope is not None)
        blocks = query_blocks(table, cu_queries, sequences, group_size, shape.rows)
        launches.append((fmt, shape, blocks))
        splits.append(_wanted_splits(table, layouts[fmt], fmt, sequences, blocks.count * heads, shape.tokens))
    taken = align(tables, GRANULE)
    if workspace is not None:
        splits = _affordable(splits, (workspace.numel() - taken) // per_partial - slots)
    total = slots + sum(splits)
    if workspace is None:
        workspace = torch.empty(total * per_partial + taken, dtype=torch.uint8, device=q.device)
    scratch, workspace = workspace[:taken], workspace[taken:]
    size = total * out.numel() * 4
    partials = workspace[:size].view(torch.float32).view(total, *out.shape)
    tail = workspace[align(size, GRANULE) :][: total * lse.numel() * 4]
    partial_lse = tail.view(torch.float32).view(total, *lse.shape)
    done = tables_at = 0
    for fmt, cut in cuts.items():
        some = slice(done, done + cut.work.slots)
        given = (partials[some], partial_lse[some], q, buffer, layouts[fmt], layer, table.groups[fmt].pages, cut.work)
        if cut.many:
            with many_queries.KERNEL.compiling():
                many_queries_attention(*given, softmax_scale=scale, rows=cut.rows)
        else:
            with few_queries.KERNEL.compiling():
                few_queries_attention(
                    *given, scratch[tables_at : tables_at + cut.nbytes], softmax_scale=scale, rows=cut.rows
                )
        done, tables_at = some.stop, tables_at + cut.nbytes
    for (fmt, shape, blocks), count in zip(launches, splits, strict=True):
        direct_attention(
            partials, partial_lse, q, buffer, layouts[fmt], layer, table.groups[fmt], blocks,
            softmax_scale=scale, num_splits=count, first_partial=done,
            rope=None if rope is None else rope_tables(table, fmt, rope),
            rope_layout=RoPELayout.INTERLEAVED if rope is None else rope.layout, shape=shape,
        )  # fmt: skip
        done += count
    merge_partials(partials, partial_lse, out, lse)


@dataclass(frozen=True)
class _Cut:
    """How one format's pages are read by a Gluon kernel.

    Attributes:
        work: its shares.
        nbytes: bytes of tables that it needs.
        rows: query rows of a block.
        many: it is the kernel for many queries.
    """

    work: Shares
    nbytes: int
    rows: int
    many: bool


def _cuts(
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    cu_queries: tuple[int, ...],
    sequences: range,
    group: int,
    longest: int,
    most_slots: int | None,
) -> dict[int, _Cut]:
    """Formats that a Gluon kernel reads for sequences of at most `longest` query rows."""
    made: dict[int, _Cut] = {}
    processors = 1
    if q.device.type == "cuda":
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    for fmt in table.groups:
        layout = layouts[fmt]
        if longest >= FEWEST_ROWS and has_wgmma(q.device) and reads_many_queries(layout, q.dtype):
            given = (table, fmt, layout, cu_queries, sequences, group, longest, processors, most_slots)
            work, rows = many_shares(*given)
            cut = _Cut(work, 0, rows, many=True)
        elif longest <= FEW_ROWS and has_gluon(q.device) and reads_few_queries(layout, q.dtype):
            rows = few_queries.block_rows(longest)
            programs, per_page = processors * few_queries.PROGRAMS_PER_MULTIPROCESSOR, page_groups(layout.key.tokens)
            work = shares(table, fmt, layout, cu_queries, sequences, group, rows, programs, per_page)
            cut = _Cut(work, tables_nbytes(layout, work, rows), rows, many=False)
        else:
            continue
        if cut.work.slots:
            made[fmt] = cut
    return made


def _wanted_splits(
    table: BlockTable, layout: PageLayout, fmt: int, sequences: range, programs: int, tile_tokens: int
) -> int:
    """Shares of the keys that fill the machine twice, none smaller than a tile."""
    indptr = table.groups[fmt].host_indptr
    most = max(indptr[b + 1] - indptr[b] for b in sequences) * math.ceil(layout.key.tokens / tile_tokens)
    filled = INTERPRETED_PROGRAMS
    if table.device.type == "cuda":
        filled = torch.cuda.get_device_properties(table.device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
    return max(1, min(math.ceil(filled / programs), most, MAX_SPLITS))


def _affordable(wanted: list[int], most: int | None) -> list[int]:
    """`wanted` cut down, evenly, to a sum of at most `most`; each stays at least 1."""
    if most is None or sum(wanted) <= most:
        return wanted
    spare = most - len(wanted)
    return [1 + (count - 1) * spare // (sum(wanted) - len(wanted)) for count in wanted]
