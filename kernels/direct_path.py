"""The direct path around its kernel: how many splits, which sequences at once, where partial results go."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qvg_paged.kernels.attention_plan import query_blocks, rope_tables
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.few_queries import (
    FEW_ROWS,
    WARPS_PER_MULTIPROCESSOR,
    Shares,
    block_rows,
    few_queries_attention,
    give_up,
    has_gluon,
    page_groups,
    reads_few_queries,
    shares,
    tables_nbytes,
)
from qvg_paged.kernels.layout import GRANULE, PageLayout, align
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
            except _NoGluon as error:
                give_up(q.device, error.reason)
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
    few = {} if rope is not None else _few_queries(q, table, layouts, cu_queries, sequences, group_size, longest)
    slots, tables = sum(c.work.slots for c in few.values()), sum(c.nbytes for c in few.values())
    least = (slots + len(table.groups) - len(few)) * per_partial + align(tables, GRANULE)
    if workspace is not None and least > workspace.numel():
        few, slots, tables = {}, 0, 0
    launches, splits = [], []
    for fmt in table.groups:
        if fmt in few:
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
    for fmt, plan in few.items():
        some = slice(done, done + plan.work.slots)
        with _compiling():
            few_queries_attention(
                partials[some], partial_lse[some], q, buffer, layouts[fmt], layer, table.groups[fmt].pages, plan.work,
                scratch[tables_at : tables_at + plan.nbytes], softmax_scale=scale, rows=block_rows(longest),
            )  # fmt: skip
        done, tables_at = some.stop, tables_at + plan.nbytes
    for (fmt, shape, blocks), count in zip(launches, splits, strict=True):
        direct_attention(
            partials, partial_lse, q, buffer, layouts[fmt], layer, table.groups[fmt], blocks,
            softmax_scale=scale, num_splits=count, first_partial=done,
            rope=None if rope is None else rope_tables(table, fmt, rope),
            rope_layout=RoPELayout.INTERLEAVED if rope is None else rope.layout, shape=shape,
        )  # fmt: skip
        done += count
    merge_partials(partials, partial_lse, out, lse)


class _NoGluon(Exception):  # noqa: N818 - never seen outside
    """The kernel for few queries did not compile."""

    def __init__(self, reason: Exception) -> None:
        super().__init__()
        self.reason = reason


@contextmanager
def _compiling() -> Iterator[None]:
    """Tell what a compiler raises from what a device does."""
    from triton.errors import TritonError  # noqa: PLC0415 - triton is only loaded where it is used

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (TritonError, RuntimeError, AttributeError, TypeError) as error:
        raise _NoGluon(error) from error


@dataclass(frozen=True)
class _FewQueries:
    """How one format's pages are read by the kernel for few queries: its shares, and bytes of their tables."""

    work: Shares
    nbytes: int


def _few_queries(
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    cu_queries: tuple[int, ...],
    sequences: range,
    group: int,
    longest: int,
) -> dict[int, _FewQueries]:
    made: dict[int, _FewQueries] = {}
    if longest > FEW_ROWS or not has_gluon(q.device):
        return made
    programs = WARPS_PER_MULTIPROCESSOR
    if q.device.type == "cuda":
        programs *= torch.cuda.get_device_properties(q.device).multi_processor_count
    rows = block_rows(longest)
    for fmt in table.groups:
        if reads_few_queries(layouts[fmt], q.dtype):
            per_page = page_groups(layouts[fmt].key.tokens)
            work = shares(table, fmt, layouts[fmt], cu_queries, sequences, group, rows, programs, per_page)
            if work.slots:
                made[fmt] = _FewQueries(work, tables_nbytes(layouts[fmt], work, rows))
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
