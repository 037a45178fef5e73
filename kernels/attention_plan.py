"""What attention derives from a block table alone: uploaded once, kept on the table, reused in every layer and step."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any, TypeVar

import torch

from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.rope import RoPESpec, RoPETables

__all__ = [
    "Cohort",
    "DecodeRun",
    "QueryBlocks",
    "Room",
    "Slice",
    "cohorts",
    "query_blocks",
    "remembered",
    "rope_tables",
]

T = TypeVar("T")

LEAD_PAGES = 8
"""Sequences of fewer pages have no slice of their own to begin with."""


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
    """Pages decoded together, then attended to in one call; in FP8 or in the queries' dtype.

    Attributes:
        runs: the pages.
        fp8: decoded to FP8.
        launches: what decoding it launched, by where from and to.
    """

    runs: tuple[DecodeRun, ...]
    fp8: bool = False
    launches: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def count(self) -> int:
        """Pages of the slice."""
        return sum(run.count for run in self.runs)


@dataclass(frozen=True)
class Room:
    """How many pages a slice may hold.

    Attributes:
        pages: decoded to the queries' dtype, at least 1.
        fp8_pages: decoded to FP8, at least 1 if there are formats for it.
        fp8_formats: formats that go to FP8 slices of their own, before the others.
        lead: the first slice holds at most a quarter of a sequence's pages, because nothing hides its decoding.
        last: formats that come last; where there is no lead, the first slice has none of them, so that it can be
            decoded before they are written.
    """

    pages: int
    fp8_pages: int = 0
    fp8_formats: frozenset[int] = frozenset()
    lead: bool = False
    last: frozenset[int] = frozenset()

    def of(self, fp8: bool) -> int:
        """Pages of a slice."""
        return self.fp8_pages if fp8 else self.pages


@dataclass(frozen=True)
class Cohort:
    """Consecutive sequences with as many queries, and as many pages of each format, as one another."""

    sequences: range
    slices: tuple[Slice, ...]


def cohorts(
    table: BlockTable, cu_queries: tuple[int, ...], rope: RoPESpec | None, room: Room, together: bool
) -> tuple[Cohort, ...]:
    """Cut the work of a ragged batch into cohorts and slices.

    The slices of a single sequence mix formats. Those of several hold as many pages of one format of each sequence,
    sequence by sequence, so that the decoded tokens are a regular batch.

    Args:
        table: the pages.
        cu_queries: first query of each sequence.
        rope: positions to rotate to on read.
        room: pages of a slice.
        together: form cohorts of more than one sequence.
    """

    def build() -> tuple[Cohort, ...]:
        made = []
        most = min(room.of(fmt in room.fp8_formats) for fmt in table.groups) if together and table.groups else 1
        for members in _equals(table, cu_queries, most):
            cut = _batched_slices if len(members) > 1 else _single_slices
            kinds = [True, False] if room.fp8_formats else [False]
            slices = [piece for fp8 in kinds for piece in cut(table, rope, members, room, fp8)]
            made.append(Cohort(members, tuple(slices)))
        return tuple(made)

    return remembered(table, ("cohorts", cu_queries, rope, room, together), build)


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


def _run(table: BlockTable, fmt: int, rope: RoPESpec | None, rows: torch.Tensor | slice, fp8: bool) -> DecodeRun:
    group = table.groups[fmt]
    tables = None
    if rope is not None:
        full = rope_tables(table, fmt, rope)
        tables = RoPETables(full.cos_frame[rows], full.sin_frame[rows], full.cos_space, full.sin_space)
        if fp8:
            _ = tables.padded  # made here, where launches are in order
    return DecodeRun(fmt, group.pages[rows], group.codebooks[rows], tables)


def _kind(table: BlockTable, member: int, room: Room, fp8: bool) -> dict[int, int]:
    """Formats that go to slices in FP8, or the others, in order of decoding, with a sequence's pages of each."""
    counts = [(fmt, n) for fmt, n in _counts(table, member).items() if (fmt in room.fp8_formats) == fp8]
    return dict(sorted(counts, key=lambda item: item[0] in room.last))


def _sizes(room: Room, total: int, late: int, fp8: bool) -> list[int]:
    """Pages of each slice of a sequence, as even as can be after the first; the last `late` pages come last."""
    most, first = room.of(fp8), 0
    if room.lead:
        first = min(most, total // 4) if total >= LEAD_PAGES else 0
    elif late and total <= most:
        first = total - late
    return [first] * (first > 0) + _even(total - first, most)


def _even(total: int, most: int) -> list[int]:
    """`total` in as few parts of at most `most` as can be, as even as can be."""
    count = -(-total // most)
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def _single_slices(table: BlockTable, rope: RoPESpec | None, members: range, room: Room, fp8: bool) -> list[Slice]:
    counts = _kind(table, members.start, room, fp8)
    late = sum(count for fmt, count in counts.items() if fmt in room.last)
    sizes = _sizes(room, sum(counts.values()), late, fp8)
    made: list[list[DecodeRun]] = [[] for _ in sizes]
    at = 0
    for fmt, count in counts.items():
        first, done = table.groups[fmt].host_indptr[members.start], 0
        while done < count:
            size = min(sizes[at], count - done)
            made[at].append(_run(table, fmt, rope, slice(first + done, first + done + size), fp8))
            done, sizes[at] = done + size, sizes[at] - size
            at += sizes[at] == 0
    return [Slice(tuple(runs), fp8) for runs in made]


def _batched_slices(table: BlockTable, rope: RoPESpec | None, members: range, room: Room, fp8: bool) -> list[Slice]:
    made = []
    most = room.of(fp8) // len(members)
    for fmt, count in _kind(table, members.start, room, fp8).items():
        indptr = table.groups[fmt].host_indptr
        for begin, end in pairwise(accumulate(_even(count, most), initial=0)):
            rows: torch.Tensor | slice = slice(indptr[members.start], indptr[members.stop])
            if end - begin < count:
                chosen = [indptr[b] + i for b in members for i in range(begin, end)]
                rows = torch.tensor(chosen).to(table.device, non_blocking=True)
            made.append(Slice((_run(table, fmt, rope, rows, fp8),), fp8))
    return made
