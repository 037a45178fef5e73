"""How the staged path cuts a block table into slices that are decoded together and attended to in one call."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch

from qvg_paged.kernels.attention_plan import remembered, rope_tables
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.rope import RoPESpec, RoPETables

__all__ = ["Cohort", "DecodeRun", "Room", "Slice", "cohorts"]

LEAD_PAGES = 8
"""Sequences of fewer pages have no slice of their own to begin with."""
SLICE_PAGES = 10
"""What a slice more costs, launched, written and merged, in pages whose decoding nothing hides."""


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

    def part(self, pages: range) -> "DecodeRun":
        """Some of the pages, in views of the run's tensors."""
        some = slice(pages.start, pages.stop)
        rope = None if self.rope is None else self.rope.of_frames(some)
        return DecodeRun(self.fmt, self.pages[some], self.codebooks[some], rope)


@dataclass(frozen=True)
class Slice:
    """Pages decoded together, then attended to in one call; in FP8 or in the queries' dtype.

    Attributes:
        runs: the pages, as many of each member, member by member.
        members: places in their cohort of the sequences that attend to it.
        fp8: decoded to FP8.
        launches: what decoding it launched, by where from and to.
    """

    runs: tuple[DecodeRun, ...]
    members: range = range(1)
    fp8: bool = False
    launches: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def count(self) -> int:
        """Pages of the slice."""
        return sum(run.count for run in self.runs)

    def parts(self, pages: range) -> Iterator[tuple[int, DecodeRun]]:
        """What of the runs some pages of the slice are, each with its first page in the slice."""
        first = 0
        for run in self.runs:
            some = range(max(pages.start - first, 0), min(pages.stop - first, run.count))
            if some:
                yield first + some.start, run if len(some) == run.count else run.part(some)
            first += run.count


@dataclass(frozen=True)
class Room:
    """How many pages a slice may hold.

    Attributes:
        pages: decoded to the queries' dtype, at least 1.
        fp8_pages: decoded to FP8, at least 1 if there are formats for it.
        fp8_formats: formats that go to FP8 slices of their own, before the others.
        lead: the first slice holds at most a quarter of a sequence's pages, because nothing hides its decoding; not in
            FP8, where a slice more costs more than that hides.
        last: formats that come last; where there is neither lead nor capacity, the first slice has none of them, so
            that it can be decoded before they are written.
        capacity: pages of all slices that lie in the scratch at once; slices of single sequences, of which two may
            need more, may be as long. 0 if `pages` is the limit for all.
    """

    pages: int
    fp8_pages: int = 0
    fp8_formats: frozenset[int] = frozenset()
    lead: bool = False
    last: frozenset[int] = frozenset()
    capacity: int = 0

    def of(self, fp8: bool) -> int:
        """Pages of a slice."""
        return self.fp8_pages if fp8 else self.pages


@dataclass(frozen=True)
class Cohort:
    """Sequences with as many queries as one another, those with most pages first.

    Attributes:
        sequences: of the table.
        rows: their queries; a slice, if they are neighbours and in order.
        slices: what each of them attends to.
    """

    sequences: tuple[int, ...]
    rows: slice | torch.Tensor
    slices: tuple[Slice, ...]


def cohorts(
    table: BlockTable, cu_queries: tuple[int, ...], rope: RoPESpec | None, room: Room, together: bool
) -> tuple[Cohort, ...]:
    """Cut the work of a ragged batch into cohorts and slices.

    The slices of a single sequence mix formats. Those of several hold as many pages of one format of each of their
    members, so that the decoded tokens are a regular batch: first the pages that all have, then what the longer ones
    have beyond that.

    Args:
        table: the pages.
        cu_queries: first query of each sequence.
        rope: positions to rotate to on read.
        room: pages of a slice.
        together: form cohorts of more than one sequence.
    """

    def build() -> tuple[Cohort, ...]:
        made = []
        for members in _equals(table, cu_queries, room, together):
            kinds = [True, False] if room.fp8_formats else [False]
            cut = _batched_slices if len(members) > 1 else _single_slices
            slices = [piece for fp8 in kinds for piece in cut(table, rope, members, room, fp8)]
            rows = [row for b in members for row in range(cu_queries[b], cu_queries[b + 1])]
            made.append(Cohort(members, _rows(table, rows), tuple(slices)))
        return tuple(made)

    return remembered(table, ("cohorts", cu_queries, rope, room, together), build)


def _equals(table: BlockTable, cu_queries: tuple[int, ...], room: Room, together: bool) -> list[tuple[int, ...]]:
    if not together:
        return [(b,) for b in range(table.batch)]

    def pages(b: int) -> list[int]:
        return [-count for kind in (True, False) for count in _kind(table, b, room, kind).values()]

    alike: dict[int, list[int]] = {}
    for b in range(table.batch):
        alike.setdefault(cu_queries[b + 1] - cu_queries[b], []).append(b)
    return [tuple(sorted(members, key=pages)) for members in alike.values()]


def _counts(table: BlockTable, sequence: int) -> dict[int, int]:
    bounds = {fmt: group.host_indptr for fmt, group in table.groups.items()}
    return {fmt: indptr[sequence + 1] - indptr[sequence] for fmt, indptr in bounds.items()}


def _run(table: BlockTable, fmt: int, rope: RoPESpec | None, rows: torch.Tensor | slice, fp8: bool) -> DecodeRun:
    group = table.groups[fmt]
    tables = None
    if rope is not None:
        tables = rope_tables(table, fmt, rope).of_frames(rows)
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
    if room.lead and not fp8:
        first = min(most, total // 4) if total >= LEAD_PAGES else 0
    elif total and room.capacity and not fp8:
        return _even(total, _fewer_slices(total, room))
    elif late and total <= most:
        first = total - late
    return [first] * (first > 0) + _even(total - first, _needed(total - first, most))


def _fewer_slices(total: int, room: Room) -> int:
    """Slices of `total` pages: what of two neighbours finds no room beside the other is decoded between them."""

    def cost(count: int) -> int:
        return count * (SLICE_PAGES + max(0, 2 * _needed(total, count) - room.capacity))

    return min(range(_needed(total, room.capacity), _needed(total, room.pages) + 1), key=cost)


def _needed(total: int, most: int) -> int:
    """Parts of at most `most` that `total` takes."""
    return -(-total // most)


def _even(total: int, count: int) -> list[int]:
    """`total` in `count` parts as even as can be."""
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def _single_slices(
    table: BlockTable, rope: RoPESpec | None, members: tuple[int, ...], room: Room, fp8: bool
) -> list[Slice]:
    counts = _kind(table, members[0], room, fp8)
    late = sum(count for fmt, count in counts.items() if fmt in room.last)
    sizes = _sizes(room, sum(counts.values()), late, fp8)
    made: list[list[DecodeRun]] = [[] for _ in sizes]
    at = 0
    for fmt, count in counts.items():
        first, done = table.groups[fmt].host_indptr[members[0]], 0
        while done < count:
            size = min(sizes[at], count - done)
            made[at].append(_run(table, fmt, rope, slice(first + done, first + done + size), fp8))
            done, sizes[at] = done + size, sizes[at] - size
            at += sizes[at] == 0
    return [Slice(tuple(runs), fp8=fp8) for runs in made]


def _batched_slices(
    table: BlockTable, rope: RoPESpec | None, members: tuple[int, ...], room: Room, fp8: bool
) -> list[Slice]:
    made = []
    for fmt in _kind(table, members[0], room, fp8):
        indptr = table.groups[fmt].host_indptr
        counts = [indptr[b + 1] - indptr[b] for b in members]
        for below, level in pairwise([0, *sorted({*counts} - {0})]):
            for some in _neighbours([count >= level for count in counts], room.of(fp8)):
                sizes = _even(level - below, _needed(level - below, room.of(fp8) // len(some)))
                for begin, end in pairwise(accumulate(sizes, initial=below)):
                    entries = [indptr[members[place]] + i for place in some for i in range(begin, end)]
                    made.append(Slice((_run(table, fmt, rope, _rows(table, entries), fp8),), some, fp8))
    return made


def _neighbours(chosen: Sequence[bool], most: int) -> list[range]:
    """Runs of chosen places, at most `most` in each."""
    made = []
    for is_chosen, run in groupby(range(len(chosen)), key=chosen.__getitem__):
        places = list(run)
        if is_chosen:
            made += [range(places[i], min(places[i] + most, places[-1] + 1)) for i in range(0, len(places), most)]
    return made


def _rows(table: BlockTable, chosen: list[int]) -> torch.Tensor | slice:
    """Chosen rows of a tensor on the table's device, as a slice if they are neighbours."""
    some = slice(chosen[0], chosen[-1] + 1) if chosen else slice(0, 0)
    if chosen == list(range(some.start, some.stop)):
        return some
    return torch.tensor(chosen).to(table.device, non_blocking=True)
