"""Block tables in CSR form: which pages each sequence of a ragged batch attends to, in order."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from qvg_paged.kernels.table_memory import FormatGroup, TableMemory, Upload, keep

__all__ = ["BlockTable", "FormatGroup"]

NO_CODEBOOK = -1


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
        memory: TableMemory,
    ) -> "BlockTable":
        """A table of one sequence, to be retired when nothing reads it any more. Made for every chunk, so it goes
        around the checks and the fields of a frozen class.
        """
        table = cls.__new__(cls)
        fields = {
            "pages": pages, "codebooks": codebooks, "formats": formats, "positions": positions,
            "indptr": (0, len(pages)), "device": memory.device, "cache": {}, "_memory": memory,
        }  # fmt: skip
        object.__setattr__(table, "__dict__", fields)
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
        memory: TableMemory | None = self.__dict__.get("_memory")
        if memory is None:
            upload = Upload(self.formats, self.indptr, self.device)
        else:
            upload, _ = self.__dict__["_taken"] = memory.take(self.formats)
        upload.send(self.pages, self.codebooks, self.positions)
        return upload.groups

    def retire(self, *, idle: bool) -> None:
        """Let go of device memory: the table is not used any more. If the device is done with it, too (`idle`), the
        next table takes the memory of this one, and `groups` that somebody has kept change.
        """
        self.cache.clear()
        taken = self.__dict__.pop("_taken", None)
        if taken is not None:
            self.__dict__.pop("groups", None)
            if idle:
                keep(*taken)

    def dense(self, fill: int = -1) -> torch.Tensor:
        """Page ids as ``[batch, longest]`` int32 on the host, padded with `fill`: the form LLM engines use."""
        longest = max((len(self.entries(b)) for b in range(self.batch)), default=0)
        out = torch.full((self.batch, longest), fill, dtype=torch.int32)
        for b in range(self.batch):
            pages = self.pages[self.indptr[b] : self.indptr[b + 1]]
            out[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return out
