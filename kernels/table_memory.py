"""Memory of block tables on the device, and what fills it: one copy a table."""

from collections.abc import Sequence
from functools import lru_cache
from struct import Struct

import torch

__all__ = ["TableMemory", "Upload"]

WORD = 4
ALIGNMENT = 4
"""Numbers of four bytes: every plane of an upload starts at a multiple of 16 bytes, as a tensor of its own would."""
SHAPES = 64
"""Shapes of which uploads are kept for tables to come."""
KEPT = 16
"""Uploads of a shape that are kept."""


@lru_cache(maxsize=1024)
def _packing(entries: tuple[int, ...], ends: int) -> tuple[Struct, list[int], list[tuple[int, torch.dtype]]]:
    """How an upload is packed that has three planes for each count of `entries`, positions last, and a plane of `ends`
    numbers after these: the numbers, the lengths of its pieces, and which of these are planes, not what fills them up.
    """
    code = ""
    lengths: list[int] = []
    planes: list[tuple[int, torch.dtype]] = []
    for count in entries:
        for length, kind in ((count, "i"), (count, "i"), (count, "f"), (ends, "i")):
            pad = -length % ALIGNMENT
            code += f"{length}{kind}{pad * WORD}x"
            planes.append((len(lengths), torch.float32 if kind == "f" else torch.int32))
            lengths += [length, pad] if pad else [length]
    return Struct(f"={code}"), lengths, planes


class Upload:
    """A table's numbers on the host, and as tensors on the device.

    Args:
        entries: how many entries of each format.
        ends: how many ends of sequences.

    Attributes:
        planes: for each format pages, codebooks, positions and ends of sequences, as `send` leaves them.
    """

    __slots__ = ("_bytes", "_on_device", "_on_host", "_struct", "planes")

    def __init__(self, entries: tuple[int, ...], ends: int, device: torch.device) -> None:
        self._struct, lengths, planes = _packing(entries, ends)
        self._bytes = bytearray(self._struct.size)
        self._on_host = torch.frombuffer(self._bytes, dtype=torch.int32)
        self._on_device = self._on_host
        if device.type != "cpu":
            self._on_device = torch.empty_like(self._on_host, device=device)
        pieces = self._on_device.split_with_sizes(lengths)
        views = iter([pieces[piece].view(dtype) for piece, dtype in planes])
        self.planes = list(zip(views, views, views, views, strict=True))

    def send(self, numbers: Sequence[float]) -> None:
        """Fill the planes, in order, behind what was launched on the current stream."""
        self._struct.pack_into(self._bytes, 0, *numbers)
        if self._on_device is not self._on_host:
            self._on_device.copy_(self._on_host, non_blocking=True)


class TableMemory:
    """Uploads of tables that are done with. Making one costs more than filling one, and windows repeat their shapes.

    Attributes:
        device: where the tables lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[tuple[tuple[int, ...], int], list[Upload]] = {}

    def take(self, entries: tuple[int, ...], ends: int) -> tuple[Upload, list[Upload]]:
        """One of that shape, and where to put it when the device is done with it: see `keep`."""
        free = self._free.get((entries, ends))
        if free is None:
            if len(self._free) == SHAPES:
                self._free.clear()
            free = self._free[entries, ends] = []
        return free.pop() if free else Upload(entries, ends, self.device), free


def keep(upload: Upload, free: list[Upload]) -> None:
    """Let another table of that shape have it."""
    if len(free) < KEPT:
        free.append(upload)
