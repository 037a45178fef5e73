"""Attention of few query rows to 2-bit pages: shares of equal work, tables of centroid scores, a program a share.

The shares are cut for the whole ragged batch at once: a share is a run of 16 code rows of pages that have one codebook,
for one block of query rows, and every share of a launch is about as long as the others whatever the histories are.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from qvg_paged.kernels.attention_plan import remembered
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.gluon import GluonKernel
from qvg_paged.kernels.layout import TILE_TOKENS, PageLayout, PartLayout

__all__ = [
    "FEW_ROWS", "Shares", "few_queries_attention", "page_groups", "reads_few_queries", "shares", "soonest_share",
    "tables_nbytes",
]  # fmt: skip

FEW_ROWS = 64
"""Query rows (queries times the heads that share a KV head) of a sequence up to which this is the faster kernel."""
CODE_ROWS = 16
START_GROUPS = 5
"""What a program does before and after its groups, in groups of a warp."""
MOST_GROUPS = 64
"""Groups of a warp at most: 4096 keys, whose weights the kernel's integers can hold."""
WARPS = 4
"""Warps of a program, as in `_few_operands_gluon`."""
PROGRAMS_PER_MULTIPROCESSOR = 2
LOG2_E = math.log2(math.e)


def reads_few_queries(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether pages of `layout` can be read by this kernel for queries of `dtype`."""

    def fits(part: PartLayout) -> bool:
        codec, dim = part.codec, part.head_dim
        return (
            not codec.is_dense
            and codec.grid.bits == 2
            and codec.stages == 1
            and codec.centroid_type is CentroidType.BF16
            and not part.split_pairs
            and codec.block_size == 64
            and dim in {64, 128}
        )

    same = layout.key.codec.block_size == layout.value.codec.block_size
    # Weights of centroids are rounded to bfloat16, so float16 queries would lose precision.
    return dtype is torch.bfloat16 and same and fits(layout.key) and fits(layout.value)


KERNEL = GluonKernel("_few_queries_gluon", "few queries are attended by the slower kernel")


def has_gluon(device: torch.device) -> bool:
    """Whether `device` has the kernel's instructions, and the installed Triton what it is written in."""
    return KERNEL.runs_on(device, (8, 9))


def block_rows(rows: int) -> int:
    """Query rows of a block where sequences have at most `rows`."""
    return 8 if rows <= 8 else 16


@dataclass(frozen=True)
class Shares:
    """Work of one launch.

    Attributes:
        items: ``[count, 9]`` int32: table, codebook, first entry, first group of its page, groups, slot, first query
            (from `first_query` on), first row, rows.
        tables: ``[tables, 4]`` int32: codebook, first query of the sequence, first row, rows.
        slots: partial results a query gets at most.
        ragged: some queries get fewer.
    """

    items: torch.Tensor
    tables: torch.Tensor
    slots: int
    ragged: bool


def page_groups(tokens: int) -> int:
    """Groups of 16 code rows in a page."""
    full, rest = divmod(tokens, TILE_TOKENS)
    return full * (TILE_TOKENS // 4 // CODE_ROWS) + math.ceil(math.ceil(rest / 4) / CODE_ROWS)


def shares(
    table: BlockTable, fmt: int, layout: PageLayout, cu_queries: tuple[int, ...], sequences: range, group: int,
    rows: int, programs: int, per_page: int, length: Callable[[list[int], int], int] | None = None, results: int = 1,
) -> Shares:  # fmt: skip
    """Cut the keys of `sequences` in format `fmt` into shares for about `programs` programs.

    Args:
        table: the pages.
        fmt: format whose pages are read.
        layout: its page layout.
        cu_queries: first query of each sequence of the table.
        sequences: consecutive sequences.
        group: query heads of a KV head.
        rows: rows of a block of queries.
        programs: programs that run at the same time.
        per_page: groups of tokens in a page, the unit in which keys are cut.
        length: groups of the longest share, from those of all runs and `programs`; this kernel's own if None.
        results: partial results of a share, in slots that follow one another.
    """

    def build() -> Shares:
        heads = layout.key.heads
        blocks = {b: math.ceil((cu_queries[b + 1] - cu_queries[b]) * group / rows) for b in sequences}
        runs = {b: list(_runs(table, fmt, b)) for b in sequences}
        lengths = [count * per_page for b in sequences for _, _, count in runs[b] for _ in range(blocks[b] * heads)]
        longest = (length or _share_length)(lengths, programs)
        items: list[tuple[int, ...]] = []
        tables: list[tuple[int, ...]] = []
        slots = []
        for b in sequences:
            queries, used = cu_queries[b + 1] - cu_queries[b], 0
            for book, first, count in runs[b]:
                parts = math.ceil(count * per_page / longest)
                taken = range(used, used + parts * results, results)
                bounds = [count * per_page * i // parts for i in range(parts + 1)]
                for block in range(blocks[b]):
                    live = min(rows, queries * group - block * rows)
                    place = (cu_queries[b] - cu_queries[sequences.start], block * rows, live)
                    items += [
                        (len(tables), book, first + begin // per_page, begin % per_page, end - begin, slot, *place)
                        for slot, (begin, end) in zip(taken, pairwise(bounds), strict=True)
                    ]
                    tables.append((book, cu_queries[b], block * rows, live))
                used += parts * results
            slots += [used] if blocks[b] else []

        def upload(values: list[tuple[int, ...]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32).to(table.device, non_blocking=True)

        return Shares(upload(items), upload(tables), max(slots, default=0), len(set(slots)) > 1)

    key = ("shares", fmt, cu_queries, sequences, group, rows, programs, per_page, length, results)
    return remembered(table, key, build)


def _share_length(lengths: list[int], programs: int) -> int:
    """Groups of the longest share, at most `MOST_GROUPS` for each warp."""
    most = MOST_GROUPS * WARPS
    fewest = max(1, math.ceil(sum(lengths) / (programs * most)))
    return soonest_share(lengths, programs, range(fewest, fewest + 4), START_GROUPS, most, WARPS)


def soonest_share(
    lengths: list[int], programs: int, waves: range, start: int, most: float = math.inf, together: int = 1
) -> int:  # fmt: skip
    """Length of the longest share so that runs of these lengths are read soonest, in whole waves of programs.

    Args:
        lengths: of the runs.
        programs: that run at the same time.
        waves: numbers of waves to aim for.
        start: what a program costs besides its share, in the time of a unit.
        most: longest share there may be.
        together: units of `lengths` that a program reads at the same time.
    """
    total, starts = sum(lengths), Counter(lengths)

    def cost(longest: int) -> int:
        count = sum(times * math.ceil(length / longest) for length, times in starts.items())
        return math.ceil(count / programs) * (math.ceil(longest / together) + start)

    ideal = [max(1, total / (programs * count)) for count in waves]
    wanted = (math.ceil(length * stretch / 20) for length in ideal for stretch in range(20, 41))
    return min((int(min(length, most)) for length in wanted), key=cost)


def _runs(table: BlockTable, fmt: int, sequence: int) -> Iterator[tuple[int, int, int]]:
    """Codebook, first entry (of the format's group) and length of runs of pages with one codebook."""
    group = table.groups[fmt]
    first, last = group.host_indptr[sequence : sequence + 2]
    for book, run in groupby(range(first, last), key=lambda i: table.codebooks[group.order[i]]):
        entries = list(run)
        yield book, entries[0], len(entries)


def _blocks(layout: PageLayout) -> int:
    return layout.key.head_dim // layout.key.codec.block_size


def tables_nbytes(layout: PageLayout, work: Shares, rows: int) -> int:
    """Bytes of the tables of a launch."""
    from qvg_paged.kernels._query_tables_triton import table_floats  # noqa: PLC0415

    key = layout.key
    return 4 * len(work.tables) * key.heads * table_floats(key.num_centroids, key.head_dim, _blocks(layout), rows)


def few_queries_attention(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    buffer: torch.Tensor,
    layout: PageLayout,
    layer: int,
    pages: torch.Tensor,
    work: Shares,
    tables: torch.Tensor,
    *,
    softmax_scale: float,
    rows: int,
) -> None:
    """Attend sequences of few queries to their pages of one format.

    Args:
        partials: ``[work.slots, queries, q_heads, head_dim]`` float32, written where there are keys.
        partial_lse: ``[work.slots, queries, q_heads]`` float32; -inf where there are none.
        q: ``[total_q, q_heads, head_dim]`` bfloat16, last dimension contiguous.
        buffer: 1-D uint8 pool.
        layout: planes of the format.
        layer: layer to read.
        pages: page ids of the format's entries.
        work: shares of the sequences.
        tables: scratch of `tables_nbytes` bytes, uint8.
        softmax_scale: factor on the scores.
        rows: rows of a block, as `work` was cut.
    """
    from qvg_paged.kernels._few_queries_gluon import few_queries_kernel  # noqa: PLC0415
    from qvg_paged.kernels._page_tiles import part_bytes, part_code  # noqa: PLC0415
    from qvg_paged.kernels._query_tables_triton import (  # noqa: PLC0415
        CENTROIDS,
        query_tables_kernel,
        table_floats,
    )
    from qvg_paged.kernels.launch import launch, overlapping  # noqa: PLC0415

    key, blocks = layout.key, _blocks(layout)
    group = q.shape[1] // key.heads
    floats = table_floats(key.num_centroids, key.head_dim, blocks, rows)
    key_part = part_bytes(key, layout.key_offset(layer), layout.key_codebook_offset(layer))
    value_part = part_bytes(layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer))
    scratch = tables.view(torch.float32)
    if work.ragged:
        partial_lse.fill_(float("-inf"))
    launch(
        query_tables_kernel, (len(work.tables), key.heads, math.ceil(key.num_centroids / CENTROIDS)),
        scratch, q, buffer, work.tables, softmax_scale * LOG2_E, key.heads, group, floats, key_part,
        q.stride(0), q.stride(1),
        KEY=part_code(key), HEAD_DIM=key.head_dim, BLOCKS=blocks, ROWS=rows, CENTROIDS=CENTROIDS,
        OVERLAP=overlapping(q.device)["OVERLAP"], num_warps=4,
    )  # fmt: skip
    launch(
        few_queries_kernel, (len(work.items), key.heads),
        partials, partial_lse, scratch, buffer, pages, work.items, partials.shape[1], key.heads, group, key.tokens,
        floats, key_part, value_part,
        VALUE=part_code(layout.value), BLOCKS=blocks, ROWS=rows, ALIGNED=key.tokens % 4 == 0, num_warps=WARPS,
        **overlapping(q.device),
    )  # fmt: skip
