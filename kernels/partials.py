"""Partial results of some sequences: kept until a few can be merged at once, in memory that was set aside."""

import torch

from qvg_paged.kernels.layout import GRANULE, align
from qvg_paged.kernels.merge import Piece, merge_pieces

__all__ = ["PENDING", "Partials", "run_merges", "slot_nbytes"]

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
        running: there is room for that output; without it at most `PENDING` pieces of the same sequences are added.
    """

    def __init__(self, out: torch.Tensor, lse: torch.Tensor, memory: torch.Tensor, *, running: bool = True) -> None:
        self.out, self.lse = out, lse
        self._members = range(len(out))
        self._pieces: list[Piece] = []
        size = slot_nbytes(lse.numel(), out.shape[-1], torch.float32) if running else 0
        self._memory = memory[:size]
        self._running: Piece | None = None
        self._slots = memory[size:]
        self._used = 0

    @property
    def num_slots(self) -> int:
        """Slots for all sequences."""
        return self._slots.numel() // slot_nbytes(self.lse.numel(), self.out.shape[-1], self.out.dtype)

    def slots(self, count: int, members: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for `count` pieces of some sequences, which the caller fills and need not add.

        Returns:
            Outputs ``[count, members * tokens, q_heads, head_dim]`` in the result's dtype, log-sum-exps likewise.
        """
        if self._used + count > self.num_slots:
            self.flush()
        self._make_room(count, members)
        _, tokens, heads, group, dim = self.out.shape
        shape = (count, len(members) * tokens, heads * group, dim)
        size, nbytes = self.lse.numel() * dim * self.out.dtype.itemsize, shape[1] * shape[2] * dim
        nbytes *= self.out.dtype.itemsize * count
        start = self._used * size
        out = self._slots[start : start + nbytes].view(self.out.dtype).view(shape)
        lse = torch.empty(shape[:3], dtype=torch.float32, device=self.lse.device)
        self._used += count
        folded = (len(members), tokens, heads, group)
        self._pieces += [(out[i].view(*folded, dim), lse[i].view(folded)) for i in range(count)]
        return out, lse

    def add(self, out: torch.Tensor, lse: torch.Tensor, members: range) -> None:
        """Add a piece ``[members, kv_heads, tokens * group, head_dim]`` with its log-sum-exp, any strides."""
        self._make_room(1, members)
        folded = (self.out.shape[1], self.out.shape[3])
        self._pieces.append((out.unflatten(2, folded).transpose(1, 2), lse.unflatten(2, folded).transpose(1, 2)))

    def _make_room(self, count: int, members: range) -> None:
        """Pieces that wait are of the same sequences."""
        if members != self._members or len(self._pieces) + count > PENDING:
            self.flush()
        self._members = members

    def flush(self) -> None:
        """Merge what there is into the running result."""
        if not self._pieces:
            return
        some = slice(self._members.start, self._members.stop)
        if self._running is None:
            out = self._memory[: self.lse.numel() * self.out.shape[-1] * 4].view(torch.float32).view(self.out.shape)
            self._running = out, torch.full_like(self.lse, float("-inf"))
        target = self._running[0][some], self._running[1][some]
        merge_pieces([target, *self._pieces], *target)
        self._pieces, self._used = [], 0

    def finish(self) -> None:
        """Write the result: zeros and -inf where there are no pieces."""
        first, last = (self._members.start, self._members.stop) if self._pieces else (0, 0)
        for some in (slice(0, first), slice(first, last), slice(last, len(self.out))):
            if some.start == some.stop:
                continue
            pieces = [] if self._running is None else [(self._running[0][some], self._running[1][some])]
            pieces += self._pieces if some.start == first and last else []
            if pieces:
                merge_pieces(pieces, self.out[some], self.lse[some])
            else:
                self.out[some].zero_()
                self.lse[some].fill_(float("-inf"))


def run_merges(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Launch every kernel that merging results of `dtype` takes, however many there are."""
    tokens = 16
    memory = torch.zeros(slot_nbytes(tokens, head_dim, torch.float32), dtype=torch.uint8, device=device)
    piece = torch.zeros(1, 1, tokens, head_dim, dtype=dtype, device=device)
    sums = torch.zeros(1, 1, tokens, device=device)
    for flushed, count in ((0, 1), (1, 1), (1, 0)):  # into the whole: pieces, with a running result, and it alone
        whole = Partials(piece.view(1, tokens, 1, 1, head_dim).clone(), sums.view(1, tokens, 1, 1).clone(), memory)
        for number in range(flushed + count):
            whole.add(piece, sums, range(1))
            if number < flushed:
                whole.flush()
        whole.finish()
