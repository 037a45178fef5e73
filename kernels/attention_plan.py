"""What attention derives from a block table alone: uploaded once, kept on the table, reused in every layer and step."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.rope import RoPESpec, RoPETables

__all__ = ["QueryBlocks", "query_blocks", "remembered", "rope_tables"]

T = TypeVar("T")


def remembered(table: BlockTable, key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returns, built once for `table`."""
    if key not in table.cache:
        table.cache[key] = build()
    value: T = table.cache[key]
    return value


def rope_tables(table: BlockTable, fmt: int, rope: RoPESpec) -> RoPETables:
    """Cosines and sines for the positions of the table's entries of one format, on its device."""
    return remembered(table, ("rope", fmt, rope), lambda: rope.tables(_group_positions(table, fmt), table.device))


def _group_positions(table: BlockTable, fmt: int) -> list[float]:
    return [table.positions[i] for i in table.groups[fmt].order]


@dataclass(frozen=True)
class QueryBlocks:
    """Blocks of query rows of consecutive sequences.

    Attributes:
        sequence: ``[count]`` int32, the block's sequence.
        row: ``[count]`` int32, its first row within the sequence (queries times heads that share a KV head).
        cu_queries: ``[batch + 1]`` int32, first query of each sequence of the table.
        count: number of blocks.
        first_row: first query of the first sequence.
    """

    sequence: torch.Tensor
    row: torch.Tensor
    cu_queries: torch.Tensor
    count: int
    first_row: int


def query_blocks(
    table: BlockTable, cu_queries: tuple[int, ...], sequences: range, group: int, rows: int
) -> QueryBlocks:
    """Blocks of `rows` rows over the queries of `sequences`, `group` rows a query."""

    def build() -> QueryBlocks:
        blocks = [(b, row) for b in sequences for row in range(0, (cu_queries[b + 1] - cu_queries[b]) * group, rows)]

        def upload(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32).to(table.device, non_blocking=True)

        sequence, row = upload([b for b, _ in blocks]), upload([r for _, r in blocks])
        return QueryBlocks(sequence, row, upload(cu_queries), len(blocks), cu_queries[sequences.start])

    return remembered(table, ("queries", cu_queries, sequences, group, rows), build)
