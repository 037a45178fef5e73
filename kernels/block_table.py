"""Block tables in CSR form: which pages each sequence of a ragged batch attends to, in order."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch

__all__ = ["BlockTable", "FormatGroup"]

NO_CODEBOOK = -1


@dataclass(frozen=True)
class FormatGroup:
    """Entries of a block table that share a page format, on the device.

    Attributes:
        pages: ``[entries]`` int32 page ids (units of `GRANULE` bytes).
        codebooks: ``[entries]`` int32 codebook ids, -1 where there is none.
        positions: ``[entries]`` float32 frame position of each page, for RoPE.
        indptr: ``[batch + 1]`` int32; sequence b owns entries ``indptr[b]:indptr[b + 1]``.
        host_indptr: the same on the host.
        order: for each entry its place among all entries of the table.
    """

    pages: torch.Tensor
    codebooks: torch.Tensor
    positions: torch.Tensor
    indptr: torch.Tensor
    host_indptr: tuple[int, ...]
    order: tuple[int, ...]


ALIGNMENT = 4
"""Numbers of four bytes: every plane of an upload starts at a multiple of 16 bytes, as a tensor of its own would."""
N = TypeVar("N", int, float)


def _padded(values: list[N]) -> list[N]:
    return values + [values[0]] * (-len(values) % ALIGNMENT)


def _taken(plane: torch.Tensor, sizes: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tensors of so many elements from the front of `plane`, and what is left of it."""
    taken = []
    for size in sizes:
        taken.append(plane[:size])
        plane = plane[size + -size % ALIGNMENT :]
    return taken, plane


@dataclass(frozen=True)
class BlockTable:
    """Pages of each sequence in attention order; a value, immutable while a chunk is open.

    Attributes:
        pages: page id of each entry (the page starts at byte ``GRANULE * id`` of the pool).
        codebooks: codebook id of each entry, or -1.
        formats: index of each entry's layout in the list of page layouts.
        positions: frame position of each entry, used by RoPE on read.
        indptr: sequence b owns entries ``indptr[b]:indptr[b + 1]``.
        device: where the kernels run.
        cache: what attention derives from the table once and reuses in every layer and step.
    """

    pages: tuple[int, ...]
    codebooks: tuple[int, ...]
    formats: tuple[int, ...]
    positions: tuple[float, ...]
    indptr: tuple[int, ...]
    device: torch.device
    cache: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.indptr) - 1

    def entries(self, sequence: int) -> range:
        """Indices of the entries of one sequence."""
        return range(self.indptr[sequence], self.indptr[sequence + 1])

    @classmethod
    def concat(cls, tables: "Sequence[BlockTable]") -> "BlockTable":
        """One table over the sequences of all `tables`, in order."""
        indptr = [0]
        for table in tables:
            indptr.extend(indptr[-1] + end for end in table.indptr[1:])
        return cls(
            pages=sum((t.pages for t in tables), ()),
            codebooks=sum((t.codebooks for t in tables), ()),
            formats=sum((t.formats for t in tables), ()),
            positions=sum((t.positions for t in tables), ()),
            indptr=tuple(indptr),
            device=tables[0].device,
        )

    @cached_property
    def groups(self) -> dict[int, FormatGroup]:
        """The entries by format index, uploaded once and together."""
        orders = {fmt: tuple(i for i, f in enumerate(self.formats) if f == fmt) for fmt in sorted(set(self.formats))}
        indptrs = {fmt: self._indptr(fmt, order) for fmt, order in orders.items()}
        ints: list[int] = []
        floats: list[float] = []
        for fmt, order in orders.items():
            for values in ([self.pages[i] for i in order], [self.codebooks[i] for i in order], indptrs[fmt]):
                ints += _padded(values)
            floats += _padded([self.positions[i] for i in order])
        planes = torch.tensor(ints, dtype=torch.int32), torch.tensor(floats, dtype=torch.float32)
        on_host = torch.cat([planes[0], planes[1].view(torch.int32)])
        uploaded = on_host.to(self.device, non_blocking=True)
        rest, positions = uploaded[: len(ints)], uploaded[len(ints) :].view(torch.float32)
        groups = {}
        for fmt, order in orders.items():
            sizes = (len(order), len(order), len(indptrs[fmt]))
            (pages, codebooks, indptr), rest = _taken(rest, sizes)
            (where,), positions = _taken(positions, (len(order),))
            groups[fmt] = FormatGroup(pages, codebooks, where, indptr, tuple(indptrs[fmt]), order)
        return groups

    def _indptr(self, fmt: int, order: tuple[int, ...]) -> list[int]:
        if self.batch == 1:
            return [0, len(order)]
        return list(accumulate((self.formats[a:b].count(fmt) for a, b in pairwise(self.indptr)), initial=0))

    def dense(self, fill: int = -1) -> torch.Tensor:
        """Page ids as ``[batch, longest]`` int32 on the host, padded with `fill`: the form LLM engines use."""
        longest = max((len(self.entries(b)) for b in range(self.batch)), default=0)
        out = torch.full((self.batch, longest), fill, dtype=torch.int32)
        for b in range(self.batch):
            pages = self.pages[self.indptr[b] : self.indptr[b + 1]]
            out[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return out
