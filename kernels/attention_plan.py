"""What attention derives from a block table alone: uploaded once, kept on the table, reused in every layer and step."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch

from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.rope import RoPESpec, RoPETables

__all__ = ["Cohort", "DecodeRun", "QueryBlocks", "Slice", "cohorts", "query_blocks", "remembered", "rope_tables"]

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


@dataclass(frozen=True)
class DecodeRun:
    """Pages of one format that one call decodes, one after another."""

    fmt: int
    pages: torch.Tensor
    codebooks: torch.Tensor
    rope: RoPETables | None

    @property
    def count(self) -> int:
        """Pages of the run."""
        return len(self.pages)


@dataclass(frozen=True)
class Slice:
    """Pages decoded together, then attended to in one call."""

    runs: tuple[DecodeRun, ...]

    @property
    def count(self) -> int:
        """Pages of the slice."""
        return sum(run.count for run in self.runs)


@dataclass(frozen=True)
class Cohort:
    """Consecutive sequences with as many queries, and as many pages of each format, as one another."""

    sequences: range
    slices: tuple[Slice, ...]


def cohorts(
    table: BlockTable, cu_queries: tuple[int, ...], rope: RoPESpec | None, capacity: int, together: bool
) -> tuple[Cohort, ...]:
    """Cut the work of a ragged batch into cohorts and slices of at most `capacity` pages.

    The slices of a single sequence mix formats. Those of several hold as many pages of one format of each sequence,
    sequence by sequence, so that the decoded tokens are a regular batch.

    Args:
        table: the pages.
        cu_queries: first query of each sequence.
        rope: positions to rotate to on read.
        capacity: pages whose K and V fit the workspace, at least 1.
        together: form cohorts of more than one sequence.
    """

    def build() -> tuple[Cohort, ...]:
        made = []
        for members in _equals(table, cu_queries, capacity if together else 1):
            cut = _batched_slices if len(members) > 1 else _single_slices
            made.append(Cohort(members, tuple(cut(table, rope, members, capacity))))
        return tuple(made)

    return remembered(table, ("cohorts", cu_queries, rope, capacity, together), build)


def _equals(table: BlockTable, cu_queries: tuple[int, ...], most: int) -> list[range]:
    def size(b: int) -> tuple[int, ...]:
        return cu_queries[b + 1] - cu_queries[b], *_counts(table, b).values()

    made = []
    for _, same in groupby(range(table.batch), key=size):
        members = list(same)
        made += [range(b, min(b + most, members[-1] + 1)) for b in range(members[0], members[-1] + 1, most)]
    return made


def _counts(table: BlockTable, sequence: int) -> dict[int, int]:
    bounds = {fmt: group.host_indptr for fmt, group in table.groups.items()}
    return {fmt: indptr[sequence + 1] - indptr[sequence] for fmt, indptr in bounds.items()}


def _run(table: BlockTable, fmt: int, rope: RoPESpec | None, rows: torch.Tensor | slice) -> DecodeRun:
    group = table.groups[fmt]
    tables = None
    if rope is not None:
        full = rope_tables(table, fmt, rope)
        tables = RoPETables(full.cos_frame[rows], full.sin_frame[rows], full.cos_space, full.sin_space)
    return DecodeRun(fmt, group.pages[rows], group.codebooks[rows], tables)


def _single_slices(table: BlockTable, rope: RoPESpec | None, members: range, capacity: int) -> list[Slice]:
    made: list[Slice] = []
    runs: list[DecodeRun] = []
    room = capacity
    for fmt, count in _counts(table, members.start).items():
        first, done = table.groups[fmt].host_indptr[members.start], 0
        while done < count:
            size = min(room, count - done)
            runs.append(_run(table, fmt, rope, slice(first + done, first + done + size)))
            done, room = done + size, room - size
            if room == 0:
                made.append(Slice(tuple(runs)))
                runs, room = [], capacity
    return [*made, Slice(tuple(runs))] if runs else made


def _batched_slices(table: BlockTable, rope: RoPESpec | None, members: range, capacity: int) -> list[Slice]:
    made = []
    step = capacity // len(members)
    for fmt, count in _counts(table, members.start).items():
        indptr = table.groups[fmt].host_indptr
        for done in range(0, count, step):
            size = min(step, count - done)
            rows: torch.Tensor | slice = slice(indptr[members.start], indptr[members.stop])
            if size < count:
                chosen = [indptr[b] + done + i for b in members for i in range(size)]
                rows = torch.tensor(chosen).to(table.device, non_blocking=True)
            made.append(Slice((_run(table, fmt, rope, rows),)))
    return made
