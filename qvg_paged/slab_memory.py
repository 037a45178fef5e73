"""The bytes of a pool: one tensor, and what is made of it again and again."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from qvg_paged.config import FreeFill
from qvg_paged.kernels.layout import GRANULE

__all__ = ["SlabMemory"]

KEPT = 4096
"""Stretches of memory that are remembered: a steady stream comes back to its places."""


class SlabMemory:
    """One preallocated uint8 tensor, overwritten from the start.

    Attributes:
        buffer: the bytes, ``[nbytes]`` uint8; the same tensor for good, even if its memory is another one day.
        made: what others have made of its memory; empty again when that is another.
    """

    def __init__(self, nbytes: int, device: torch.device, fill: FreeFill) -> None:
        self._device = torch.device(device)
        self._fill = 0xFF if fill is FreeFill.POISON else 0
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.buffer.fill_(self._fill)
        self.made: dict[Hashable, Any] = {}
        self._look()

    def _look(self) -> None:
        """Forget what was made of other memory."""
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self._stretches: dict[tuple[torch.dtype, int, int], torch.Tensor] = {}
        self.made.clear()
        self._fills: dict[tuple[int, int], Callable[[int], object]] = {}
        self._bytes: Any = self.buffer.numpy() if self._device.type == "cpu" else None

    def _overwrite(self, runs: Iterable[tuple[int, int]]) -> None:
        """Overwrite stretches of memory, in granules."""
        for run in runs:
            fill = self._fills.get(run)
            if fill is None:
                fill = self._filler(*run)
            fill(self._fill)

    def _filler(self, start: int, stop: int) -> Callable[[int], object]:
        if len(self._fills) >= KEPT:
            self._fills.clear()
        part = slice(start * GRANULE, stop * GRANULE)
        fill = self._fills[start, stop] = self.buffer[part].fill_ if self._bytes is None else self._bytes[part].fill
        return fill

    def viewed(self, dtype: torch.dtype) -> torch.Tensor:
        """All bytes in another dtype."""
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self.buffer.view(dtype)
        return view

    def stretch(self, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of that."""
        key = dtype, start, stop
        part = self._stretches.get(key)
        if part is None:
            if len(self._stretches) >= KEPT:
                self._stretches.clear()
            part = self._stretches[key] = self.viewed(dtype)[start:stop]
        return part

    def _resize_buffer(self, nbytes: int) -> None:
        """Cut the end off, or add to it; nothing may be in flight."""
        other = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        kept = min(nbytes, self.buffer.numel())
        other[:kept] = self.buffer[:kept]
        other[kept:] = self._fill
        self.buffer.set_(other.untyped_storage(), 0, other.shape, other.stride())
        self._look()
