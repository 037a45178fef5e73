"""Block tables in CSR form: which pages each sequence of a ragged batch attends to, in order."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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


def _upload(planes: Sequence[NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """All `planes` in one copy to `device`."""
    starts = list(accumulate((len(plane) + -len(plane) % ALIGNMENT for plane in planes), initial=0))
    on_host = np.zeros(starts[-1], dtype=np.int32)
    for plane, start in zip(planes, starts, strict=False):
        on_host[start : start + len(plane)] = plane
    uploaded = torch.from_numpy(on_host).to(device, non_blocking=True)
    return [uploaded[start : start + len(plane)] for plane, start in zip(planes, starts, strict=False)]


@dataclass(frozen=True)
class BlockTable:
    """Pages of each sequence in attention order; a value, immutable while a chunk is open.

    Attributes:
        pages: page id of each entry (the page starts at byte ``GRANULE * id`` of the pool).
        codebooks: codebook id of each entry, or -1.
        formats: index of each entry's layout in the list of page layouts.
        positions: frame position of each entry, used by RoPE on read.
        indptr: sequence b owns entries ``indptr[b]:indptr[b + 1]``.
        device: where the kernels run; CUDA without an index is the current device.
        cache: what attention derives from the table once and reuses in every layer and step.
    """

    pages: tuple[int, ...]
    codebooks: tuple[int, ...]
    formats: tuple[int, ...]
    positions: tuple[float, ...]
    indptr: tuple[int, ...]
    device: torch.device
    cache: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        object.__setattr__(self, "device", torch.device("cpu") if device.type == "cpu" else device)

    @classmethod
    def of_one(
        cls,
        pages: tuple[int, ...],
        codebooks: tuple[int, ...],
        formats: tuple[int, ...],
        positions: tuple[float, ...],
        device: torch.device,
    ) -> "BlockTable":
        """A table of one sequence; `device` is a tensor's, that is with its index. Made for every chunk, so it goes
        around the checks and the fields of a frozen class.
        """
        table = cls.__new__(cls)
        table.__dict__.update(
            pages=pages, codebooks=codebooks, formats=formats, positions=positions, indptr=(0, len(pages)),
            device=device, cache={},
        )  # fmt: skip
        return table

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
        formats, positions = np.array(self.formats), np.array(self.positions, dtype=np.float32)
        columns = np.array((self.pages, self.codebooks, positions.view(np.int32)), dtype=np.int32)
        orders = {fmt: np.flatnonzero(formats == fmt) for fmt in sorted(set(self.formats))}
        indptrs = {fmt: np.searchsorted(order, self.indptr).astype(np.int32) for fmt, order in orders.items()}
        planes = [plane for fmt, order in orders.items() for plane in (*columns[:, order], indptrs[fmt])]
        uploaded = iter(_upload(planes, self.device))
        groups = {}
        for fmt, order in orders.items():
            pages, codebooks, where, indptr = (next(uploaded) for _ in range(4))
            host_indptr = tuple(indptrs[fmt].tolist())
            positions_of = where.view(torch.float32)
            groups[fmt] = FormatGroup(pages, codebooks, positions_of, indptr, host_indptr, tuple(order.tolist()))
        return groups

    def dense(self, fill: int = -1) -> torch.Tensor:
        """Page ids as ``[batch, longest]`` int32 on the host, padded with `fill`: the form LLM engines use."""
        longest = max((len(self.entries(b)) for b in range(self.batch)), default=0)
        out = torch.full((self.batch, longest), fill, dtype=torch.int32)
        for b in range(self.batch):
            pages = self.pages[self.indptr[b] : self.indptr[b + 1]]
            out[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return out
