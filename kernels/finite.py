"""NaN and infinity in stretches of a buffer, told to the host by flags that a kernel sets: one launch a stretch."""

from collections.abc import Hashable, MutableMapping
from typing import Any

import torch

from qvg_paged.kernels.layout import GRANULE

__all__ = ["FLAGS", "HALF", "FiniteFlags"]

FLAGS = 256
KEPT = 4096
"""Launches that are remembered: a steady stream comes back to its places."""
HALF = GRANULE // 2
"""Stretches start at multiples of as many bytes, and are as long."""


class FiniteFlags:
    """`FLAGS` flags that are set by number and read at once.

    Args:
        buffer: uint8, on a GPU, or anywhere if kernels are interpreted.
        dtype: what it holds, float16, bfloat16 or float32.
        kept: launches are kept there, to be repeated at less cost; whoever gives it empties it when the buffer's memory
            is another.
    """

    def __init__(self, buffer: torch.Tensor, dtype: torch.dtype, kept: MutableMapping[Hashable, Any]) -> None:
        self._buffer = buffer
        self._dtype = dtype
        self._kept = kept
        self._on_gpu = buffer.device.type == "cuda"
        self._flags = torch.zeros(FLAGS, dtype=torch.int32, pin_memory=self._on_gpu)
        self._on_host: Any = self._flags.numpy()
        self._place = self._flags.data_ptr()
        self._streams: dict[int, torch.cuda.Stream] = {}

    def look(self, start: int, stop: int, number: int) -> None:
        """Set a flag, behind what was launched so far on the current stream, if bytes `start` to `stop` hold NaN or
        infinity.
        """
        key = "look", self._place, start, stop, number
        launches = self._kept.get(key)
        if launches is None:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = self._first_look(start, stop, number)
            return
        stream = self._current_stream()
        for launch in launches:
            launch(stream)

    def _first_look(self, start: int, stop: int, number: int) -> Any:
        from qvg_paged.kernels._finite_triton import look  # noqa: PLC0415 - triton is only loaded where it is used
        from qvg_paged.kernels.launch import recorded  # noqa: PLC0415

        flag = self._flags[number : number + 1]
        with recorded() as launches:
            look(self._buffer, self._dtype, start // HALF, (stop - start) // HALF, flag)
        return launches

    def found(self, count: int) -> list[bool]:
        """The first flags, which are taken back; the host waits for the current stream."""
        if self._on_gpu:
            raw = self._current_stream()
            stream = self._streams.get(raw)
            if stream is None:
                stream = self._streams[raw] = torch.cuda.current_stream(self._buffer.device)
            stream.synchronize()
        flags = self._on_host[:count].tolist()
        if any(flags):
            self._on_host[:] = 0
        return [flag != 0 for flag in flags]

    def _current_stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._buffer.device.index) if self._on_gpu else 0
