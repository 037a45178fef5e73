"""Memory of block tables on the device, and what fills it: one copy a table."""

from bisect import bisect_left
from collections.abc import Callable
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple

import torch

__all__ = ["FormatGroup", "TableMemory", "Upload", "keep"]

WORD = 4
ALIGNMENT = 4
"""Numbers of four bytes: every plane of an upload starts at a multiple of 16 bytes, as a tensor of its own would."""
PLANES = "iifi"
"""Pages, codebooks, positions, ends of sequences."""
SHAPES = 64
"""Shapes of which uploads are kept for tables to come."""
KEPT = 16
"""Uploads of a shape that are kept."""


class FormatGroup(NamedTuple):
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


class Upload:
    """The entries of a table by format, on the device; all but their numbers, which `send` brings there.

    Args:
        formats: format of each entry.
        indptr: where sequences begin and end.

    Attributes:
        groups: the entries by format.
    """

    __slots__ = ("_bytes", "_on_device", "_on_host", "_parts", "_struct", "groups")

    def __init__(self, formats: tuple[int, ...], indptr: tuple[int, ...], device: torch.device) -> None:
        orders = {fmt: _places(formats, fmt) for fmt in sorted(set(formats))}
        ends_of = [tuple([bisect_left(order, end) for end in indptr]) for order in orders.values()]
        self._parts = list(zip(map(_picker, orders.values()), ends_of, strict=True))
        lengths = [length for order in orders.values() for length in (*[len(order)] * 3, len(indptr))]
        pads = [-length % ALIGNMENT for length in lengths]
        kinds = PLANES * len(orders)
        code = [f"{length}{kind}{pad * WORD}x" for length, kind, pad in zip(lengths, kinds, pads, strict=True)]
        self._struct = Struct("=" + "".join(code))
        self._bytes = bytearray(self._struct.size)
        self.groups: dict[int, FormatGroup] = {}
        if not orders:
            return
        self._on_host = torch.frombuffer(self._bytes, dtype=torch.int32)
        on_cpu = device.type == "cpu"
        self._on_device = self._on_host if on_cpu else torch.empty_like(self._on_host, device=device)
        pieces = self._on_device.split_with_sizes([n for pair in zip(lengths, pads, strict=True) for n in pair])[::2]
        views = iter([x.view(torch.float32) if kind == "f" else x for x, kind in zip(pieces, kinds, strict=True)])
        for (fmt, order), ends in zip(orders.items(), ends_of, strict=True):
            self.groups[fmt] = FormatGroup(next(views), next(views), next(views), next(views), ends, order)

    def send(self, pages: tuple[int, ...], codebooks: tuple[int, ...], positions: tuple[float, ...]) -> None:
        """Fill the groups with numbers of all entries, behind what was launched on the current stream."""
        numbers: list[float] = []
        for pick, ends in self._parts:
            numbers += pick(pages)
            numbers += pick(codebooks)
            numbers += pick(positions)
            numbers += ends
        self._struct.pack_into(self._bytes, 0, *numbers)
        if self.groups and self._on_device is not self._on_host:
            self._on_device.copy_(self._on_host, non_blocking=True)


def _places(formats: tuple[int, ...], fmt: int) -> tuple[int, ...]:
    return tuple([place for place, other in enumerate(formats) if other == fmt])


def _picker(order: tuple[int, ...]) -> Callable[[tuple[float, ...]], Any]:
    """What takes these places of a tuple: neighbours, as they mostly are, as a slice."""
    first, last = order[0], order[-1]
    return itemgetter(slice(first, last + 1)) if last - first == len(order) - 1 else itemgetter(*order)


class TableMemory:
    """Uploads of tables that are done with. Making one costs more than filling one, and windows repeat their shapes.

    Attributes:
        device: where the tables lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[tuple[tuple[int, ...], int], list[Upload]] = {}

    def take(self, formats: tuple[int, ...]) -> tuple[Upload, list[Upload]]:
        """One for entries of one sequence, of the current stream, and where it goes when the device is done: `keep`."""
        key = formats, _stream(self.device)
        free = self._free.get(key)
        if free is None:
            if len(self._free) >= SHAPES:
                self._free.clear()
            free = self._free[key] = []
        try:
            return free.pop(), free
        except IndexError:
            return Upload(formats, (0, len(formats)), self.device), free


def _stream(device: torch.device) -> int:
    """The current stream: memory goes back to the one it was allocated on, whoever reads it by then."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def keep(upload: Upload, free: list[Upload]) -> None:
    """Let another table of that shape have it."""
    if len(free) < KEPT:
        free.append(upload)
