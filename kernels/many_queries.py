"""Attention of many query rows to 2-bit pages on Hopper: which pages, shares of equal work, launches.

Shares are those of `qvg_paged.kernels.few_queries`, cut in tiles of 64 tokens for blocks of 64 to 192 query rows.
"""

import math
from collections.abc import Callable

import torch

from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.few_queries import LOG2_E, Shares, page_groups, shares, soonest_share
from qvg_paged.kernels.formats import CentroidType
from qvg_paged.kernels.gluon import GluonKernel
from qvg_paged.kernels.layout import PageLayout, PartLayout

__all__ = ["FEWEST_ROWS", "block_rows", "has_wgmma", "many_queries_attention", "many_shares", "reads_many_queries"]

FEWEST_ROWS = 33
"""Query rows (queries times the heads that share a KV head) of a sequence from which on this is the faster kernel."""
START_TILES = 8
"""What a program does before and after its tiles, and what merging its result takes, in tiles."""
MOST_WAVES = 12
TILE_COSTS = {64: 1.08, 128: 1.33, 192: 1.64}
"""Microseconds a tile on an H200, by query rows of a program."""
LAUNCHES = {
    1: {"STAGES": 4, "REGISTERS": 152, "DECODE_REGISTERS": 104},
    2: {"STAGES": 4, "REGISTERS": 152, "DECODE_REGISTERS": 104},
    3: {"STAGES": 3, "REGISTERS": 128, "DECODE_REGISTERS": 128},
}
"""Tiles of a ring, registers of attending and of decoding warps, by blocks of 64 rows."""


def reads_many_queries(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether pages of `layout` can be read by this kernel for queries of `dtype`."""

    def fits(part: PartLayout) -> bool:
        codec = part.codec
        return (
            not codec.is_dense
            and codec.grid.bits == 2
            and codec.stages == 1
            and codec.centroid_type is CentroidType.BF16
            and not part.split_pairs
            and codec.block_size == 64
            and part.head_dim == 128
        )

    return dtype is torch.bfloat16 and fits(layout.key) and fits(layout.value)


KERNEL = GluonKernel("_many_queries_gluon", "many queries are attended by a slower kernel")


def has_wgmma(device: torch.device) -> bool:
    """Whether `device` has the kernel's instructions, and the installed Triton what it is written in."""
    return KERNEL.runs_on(device, (9, 0), below=(10, 0))


def block_rows(rows: int) -> int:
    """Query rows of a program where sequences have at most `rows`."""
    return min(TILE_COSTS, key=lambda block: math.ceil(rows / block) * TILE_COSTS[block])


def many_shares(
    table: BlockTable, fmt: int, layout: PageLayout, cu_queries: tuple[int, ...], sequences: range, group: int,
    longest: int, processors: int, most_slots: int | None,
) -> tuple[Shares, int]:  # fmt: skip
    """Cut the keys of `sequences` in format `fmt` into shares, for programs of so many query rows.

    Args:
        table: the pages.
        fmt: format whose pages are read.
        layout: its page layout.
        cu_queries: first query of each sequence of the table.
        sequences: consecutive sequences.
        group: query heads of a KV head.
        longest: query rows of a sequence at most.
        processors: multiprocessors of the GPU.
        most_slots: partial results that there is memory for; a query gets more only if its codebooks are more.
    """
    per_page, rows = page_groups(layout.key.tokens), block_rows(longest)

    def cut(rows: int, programs: int, length: Callable[[list[int], int], int]) -> Shares:
        given = (table, fmt, layout, cu_queries, sequences, group, rows, programs, per_page, length)
        return shares(*given, results=2 if rows == 64 else 1)

    for affordable in (rows, max(rows, 128)):
        programs = processors
        while programs:
            work = cut(affordable, programs, _share_length)
            if most_slots is None or work.slots <= most_slots:
                return work, affordable
            programs //= 2
        work = cut(affordable, 1, _whole)
        if most_slots is not None and work.slots <= most_slots:
            break
    return work, affordable


def _whole(lengths: list[int], _: int) -> int:
    return max(lengths, default=1)


def _share_length(lengths: list[int], programs: int) -> int:
    """Tiles of the longest share: two halves of a program take turns, so one would be too few."""
    return max(2, soonest_share(lengths, programs, range(1, MOST_WAVES + 1), START_TILES))


def many_queries_attention(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    buffer: torch.Tensor,
    layout: PageLayout,
    layer: int,
    pages: torch.Tensor,
    work: Shares,
    *,
    softmax_scale: float,
    rows: int,
) -> None:
    """Attend sequences of many queries to their pages of one format.

    Args:
        partials: ``[work.slots, queries, q_heads, head_dim]`` float32, written where there are keys.
        partial_lse: ``[work.slots, queries, q_heads]`` float32; -inf where there are none.
        q: ``[total_q, q_heads, head_dim]`` bfloat16, last dimension contiguous.
        buffer: 1-D uint8 pool.
        layout: planes of the format.
        layer: layer to read.
        pages: page ids of the format's entries.
        work: shares of the sequences.
        softmax_scale: factor on the scores.
        rows: query rows of a program, as `work` was cut.
    """
    from qvg_paged.kernels._many_queries_gluon import many_queries_kernel  # noqa: PLC0415
    from qvg_paged.kernels._page_tiles import part_bytes, part_code  # noqa: PLC0415
    from qvg_paged.kernels.launch import launch  # noqa: PLC0415

    key, blocks = layout.key, rows // 64
    if work.ragged:
        partial_lse.fill_(float("-inf"))
    launch(
        many_queries_kernel, (len(work.items) * key.heads,),
        partials, partial_lse, q, buffer, pages, work.items, softmax_scale * LOG2_E, partials.shape[1], key.heads,
        q.shape[1] // key.heads, key.tokens, len(work.items), q.stride(0), q.stride(1),
        part_bytes(key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
        part_bytes(layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
        KEY=part_code(key), VALUE=part_code(layout.value), HEAD_DIM=key.head_dim, BLOCKS=blocks,
        num_warps=4, **LAUNCHES[blocks],
    )  # fmt: skip
