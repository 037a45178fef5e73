"""Partial results of one call: kept until a few can be merged at once, in memory that was set aside."""

import torch

from qvg_paged.kernels.layout import GRANULE, align
from qvg_paged.kernels.merge import Piece, merge_pieces

__all__ = ["Partials", "run_merges", "slot_nbytes"]

PENDING = 4
"""Pieces that are merged at once; each launch reads all of them and writes one result."""


def slot_nbytes(rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one partial output of `rows` query heads."""
    return align(rows * head_dim * dtype.itemsize, GRANULE)


class Partials:
    """Merges what attention to parts of the keys leaves.

    Args:
        out: ``[sequences, tokens, kv_heads, group, head_dim]``, contiguous: where the result goes.
        lse: ``[sequences, tokens, kv_heads, group]`` float32, contiguous: its log-sum-exp.
        memory: 1-D uint8; room for a float32 output, then for slots. May be empty if there is one piece only.
    """

    def __init__(self, out: torch.Tensor, lse: torch.Tensor, memory: torch.Tensor) -> None:
        self.out, self.lse = out, lse
        self._pieces: list[Piece] = []
        size = slot_nbytes(lse.numel(), out.shape[-1], torch.float32)
        self._running = memory[:size]
        self._slots = memory[size:]
        self._used = 0

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return self._slots.numel() // slot_nbytes(self.lse.numel(), self.out.shape[-1], self.out.dtype)

    def slots(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for `count` pieces, which the caller fills and need not add.

        Returns:
            Outputs ``[count, sequences * tokens, q_heads, head_dim]`` in the result's dtype, log-sum-exps likewise.
        """
        if self._used + count > self.num_slots or len(self._pieces) + count > PENDING:
            self.flush()
        sequences, tokens, heads, group, dim = self.out.shape
        shape = (count, sequences * tokens, heads * group, dim)
        size = self.lse.numel() * dim * self.out.dtype.itemsize
        out = self._slots[self._used * size : (self._used + count) * size].view(self.out.dtype).view(shape)
        lse = torch.empty(shape[:3], dtype=torch.float32, device=self.lse.device)
        self._used += count
        self._pieces += [(out[i].view(self.out.shape), lse[i].view(self.lse.shape)) for i in range(count)]
        return out, lse

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Add a piece ``[sequences, kv_heads, tokens * group, head_dim]`` with its log-sum-exp, any strides."""
        if len(self._pieces) == PENDING:
            self.flush()
        folded = (self.out.shape[1], self.out.shape[3])
        self._pieces.append((out.unflatten(2, folded).transpose(1, 2), lse.unflatten(2, folded).transpose(1, 2)))

    def flush(self) -> None:
        """Merge what there is into the running result."""
        if not self._pieces:
            return
        out = self._running[: self.lse.numel() * self.out.shape[-1] * 4].view(torch.float32).view(self.out.shape)
        lse = torch.empty_like(self.lse)
        merge_pieces(self._pieces, out, lse)
        self._pieces, self._used = [(out, lse)], 0

    def finish(self) -> None:
        """Write the result: zeros and -inf without pieces."""
        if not self._pieces:
            self.out.zero_()
            self.lse.fill_(float("-inf"))
            return
        merge_pieces(self._pieces, self.out, self.lse)


def run_merges(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Launch every kernel that merging results of `dtype` takes, however many there are."""
    tokens = 16
    memory = torch.zeros(slot_nbytes(tokens, head_dim, torch.float32), dtype=torch.uint8, device=device)
    piece = torch.zeros(1, 1, tokens, head_dim, dtype=dtype, device=device)
    sums = torch.zeros(1, 1, tokens, device=device)
    for count in (1, 2 * PENDING):  # merged at once; into a running result, with it, and with it into the whole
        whole = Partials(piece.view(1, tokens, 1, 1, head_dim).clone(), sums.view(1, tokens, 1, 1).clone(), memory)
        for _ in range(count):
            whole.add(piece, sums)
        whole.finish()
