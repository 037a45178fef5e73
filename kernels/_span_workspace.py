"""Temporary memory of encoding a span: one block, carved in order."""

import math

import torch

__all__ = ["Workspace"]

ALIGNMENT = 256


class Workspace:
    """Carves tensors from a block of memory, the same ones for the same requests wherever the block lies.

    Args:
        nbytes: size of the block.
        device: where it lies.

    Attributes:
        block: ``[nbytes]`` uint8.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.block = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, uninitialised."""
        nbytes = math.prod(shape) * dtype.itemsize
        begin, self._used = self._used, self._used + nbytes + -nbytes % ALIGNMENT
        assert begin + nbytes <= len(self.block), f"workspace of {len(self.block)} bytes, {begin + nbytes} are needed"
        return self.block[begin : begin + nbytes].view(dtype).view(shape)

    def clear(self) -> None:
        """Take back all that was carved."""
        self._used = 0
