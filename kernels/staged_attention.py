"""Attention by decoding into bounded scratch, then the best dense kernel; slices merged by log-sum-exp.

On CUDA sequences of equal lengths go through one decode and one attention call per slice, and decoding runs one slice
ahead; on a CPU each sequence goes alone, which keeps the formats of its pages in one slice and needs no merge. In FP8,
quantised pages are decoded to and attended in E4M3, unquantised ones in the queries' dtype.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from qvg_paged.kernels import fp8_attention
from qvg_paged.kernels.attention_plan import Cohort, Room, Slice, cohorts
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.dense_attention import dense_attention, fold_queries
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout, align
from qvg_paged.kernels.lookahead import staged
from qvg_paged.kernels.partials import Partials, slot_nbytes
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

__all__ = ["decoded_page_nbytes", "staged_attention", "staged_nbytes"]

DEFAULT_WORKSPACE = 256 << 20
SLOTS = 4
"""Partial results of FP8 attention that are kept at once, if they fit a quarter of the workspace."""
FP8_DTYPE = torch.float8_e4m3fn


def decoded_page_nbytes(part: PartLayout, dtype: torch.dtype) -> int:
    """Bytes of K and V of one page of one layer, decoded."""
    return 2 * part.tokens * part.heads * part.head_dim * dtype.itemsize


def staged_nbytes(part: PartLayout, q_heads: int, max_queries: int, dtype: torch.dtype) -> int:
    """Bytes the staged path needs at least: one decoded page and, for merging, running outputs in float32."""
    return align(max_queries * q_heads * part.head_dim * 4, GRANULE) + align(decoded_page_nbytes(part, dtype), GRANULE)


def staged_attention(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    *,
    cu_seqlens_q: tuple[int, ...],
    softmax_scale: float,
    rope: RoPESpec | None,
    workspace: torch.Tensor | None,
    fp8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `qvg_paged.kernels.attention.paged_attention`, already checked."""
    if workspace is None:
        page_nbytes = decoded_page_nbytes(layouts[0].key, q.dtype)
        pages = sum(map(len, map(table.entries, range(table.batch))))
        decoded = min(max(1, pages) * page_nbytes, max(DEFAULT_WORKSPACE, page_nbytes))
        tail = _running_nbytes(q) + SLOTS * slot_nbytes(q.shape[0] * q.shape[1], q.shape[2], q.dtype) * fp8
        workspace = torch.empty(decoded + tail, dtype=torch.uint8, device=q.device)
    plan = _plan(q, table, layouts, cu_seqlens_q, rope, workspace.numel(), fp8)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for cohort in plan.cohorts:
        rows = slice(cu_seqlens_q[cohort.sequences.start], cu_seqlens_q[cohort.sequences.stop])
        if rows.start == rows.stop:
            continue
        batch = _Batch(q[rows], cohort, plan, buffer, tuple(layouts), layer, softmax_scale, rope, workspace)
        batch.attend(out[rows], lse[rows])
    return out, lse


@dataclass(frozen=True)
class _Plan:
    """Slices of every cohort and where they go.

    Attributes:
        cohorts: the slices.
        scratch: bytes of the workspace for decoded pages; what follows them is for partial results.
        halves: slices take the halves of the scratch in turns, so that one is decoded while another is attended to.
    """

    cohorts: tuple[Cohort, ...]
    scratch: int
    halves: bool = False


def _plan(
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    cu_queries: tuple[int, ...],
    rope: RoPESpec | None,
    nbytes: int,
    fp8: bool,
) -> _Plan:
    part, together = layouts[0].key, _together(q.device)
    page_nbytes = decoded_page_nbytes(part, q.dtype)
    longest = q[: max(end - begin for begin, end in pairwise(cu_queries))]
    # Where the outputs of the whole batch find no room, its sequences go one after another.
    for batched, rows in [(True, q)] * together + [(False, longest)] * (together or fp8):
        room, half = _halved_room(rows, table, layouts, nbytes, fp8, table.batch if batched else 1)
        if room is not None:
            return _Plan(cohorts(table, cu_queries, rope, room, batched), 2 * half, halves=True)
    if nbytes >= page_nbytes:
        plan = _Plan(cohorts(table, cu_queries, rope, Room(nbytes // page_nbytes), together), nbytes)
        if all(len(cohort.slices) <= 1 for cohort in plan.cohorts):
            return plan
    scratch = (nbytes - _running_nbytes(longest)) // GRANULE * GRANULE
    if scratch < page_nbytes:
        raise ArgumentError(
            f"workspace: expected at least {align(page_nbytes, GRANULE) + _running_nbytes(longest)} bytes (K and V of "
            f"one decoded page, running outputs of one sequence), got {nbytes}"
        )
    return _Plan(cohorts(table, cu_queries, rope, Room(scratch // page_nbytes), False), scratch)


def _together(device: torch.device) -> bool:
    """Whether equal sequences go through one call, and decoding runs ahead."""
    return device.type == "cuda"


def _halved_room(
    q: torch.Tensor, table: BlockTable, layouts: Sequence[PageLayout], nbytes: int, fp8: bool, sequences: int
) -> tuple[Room | None, int]:
    """Pages of a slice, and bytes of half the scratch, if decoding runs one ahead; None if a half holds no page."""
    part = layouts[0].key
    slot = slot_nbytes(q.shape[0] * q.shape[1], q.shape[2], q.dtype)
    slots = min(SLOTS, nbytes // 4 // slot) if fp8 else 0
    half = max(0, nbytes - _running_nbytes(q) - slots * slot) // 2 // GRANULE * GRANULE
    formats = frozenset(f for f in table.groups if fp8_attention.reads(layouts[f])) if slots else frozenset()
    padding = fp8_attention.scratch_nbytes(sequences * part.heads, 1, part.head_dim, FP8_DTYPE)
    fp8_pages = max(0, half - padding) // decoded_page_nbytes(part, FP8_DTYPE) if formats else 0
    fp8_pages = min(fp8_pages, max(1, sequences * slots * fp8_attention.MOST_KEYS // part.tokens))
    if half < decoded_page_nbytes(part, q.dtype) or (formats and not fp8_pages):
        return None, half
    return Room(half // decoded_page_nbytes(part, q.dtype), fp8_pages, formats, lead=_together(q.device)), half


def _running_nbytes(q: torch.Tensor) -> int:
    return align(q.numel() * 4, GRANULE)


class _Batch:
    """Queries of a cohort and where its decoded keys go."""

    def __init__(
        self,
        q: torch.Tensor,
        cohort: Cohort,
        plan: _Plan,
        buffer: torch.Tensor,
        layouts: tuple[PageLayout, ...],
        layer: int,
        scale: float,
        rope: RoPESpec | None,
        workspace: torch.Tensor,
    ) -> None:
        self.size, self.slices, self.part, self.plan = len(cohort.sequences), cohort.slices, layouts[0].key, plan
        self.tokens = len(q) // self.size
        self.q = q.view(self.size, self.tokens, *q.shape[1:])
        self.buffer, self.layouts, self.layer, self.scale = buffer, layouts, layer, scale
        self.rope, self.workspace = rope, workspace
        self.folded: torch.Tensor | None = None
        self.quantised: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write output ``[size * tokens, q_heads, head_dim]`` and log-sum-exp."""
        shape = (self.size, self.tokens, self.part.heads, out.shape[1] // self.part.heads)
        partials = Partials(out.view(*shape, -1), lse.view(shape), self.workspace[self.plan.scratch :])
        halves = [self._half(i) for i in range(len(self.slices))]
        decode = [partial(self._decode, piece, half) for piece, half in zip(self.slices, halves, strict=True)]
        with closing(staged(decode, out.device, ahead=self.plan.halves)) as steps:
            for i in steps:
                if self.slices[i].fp8:
                    self._attend_fp8(self.slices[i], halves[i], partials)
                else:
                    partials.add(*self._attend_dense(self.slices[i], halves[i]))
        partials.finish()

    def _half(self, index: int) -> torch.Tensor:
        if not self.plan.halves or len(self.slices) == 1:
            return self.workspace[: self.plan.scratch]
        half = self.plan.scratch // 2
        return self.workspace[half * (index % 2) : half * (index % 2 + 1)]

    def _decode(self, piece: Slice, memory: torch.Tensor) -> None:
        rope_layout = RoPELayout.INTERLEAVED if self.rope is None else self.rope.layout
        if piece.fp8:
            scratch = self._fp8_scratch(piece, memory)
            fp8_attention.decode_runs(scratch, self.buffer, piece.runs, self.layouts, self.layer, rope_layout)
            return
        keys, values = self._dense_scratch(piece, memory)
        begin = 0
        for run in piece.runs:
            layout, tokens = self.layouts[run.fmt], slice(begin, begin + run.count * self.part.tokens)
            decode_pages(
                self.buffer, run.pages, run.codebooks, layout.key, layout.key_offset(self.layer),
                layout.key_codebook_offset(self.layer), keys[tokens], rope=run.rope, rope_layout=rope_layout,
            )  # fmt: skip
            decode_pages(
                self.buffer, run.pages, run.codebooks, layout.value, layout.value_offset(self.layer),
                layout.value_codebook_offset(self.layer), values[tokens],
            )  # fmt: skip
            begin = tokens.stop

    def _dense_scratch(self, piece: Slice, memory: torch.Tensor) -> torch.Tensor:
        shape = (2, piece.count * self.part.tokens, self.part.heads, self.part.head_dim)
        nbytes = piece.count * decoded_page_nbytes(self.part, self.q.dtype)
        return memory[:nbytes].view(self.q.dtype).view(shape)

    def _attend_dense(self, piece: Slice, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.folded is None:
            self.folded = fold_queries(self.q, self.part.heads)
        keys, values = (x.view(self.size, -1, *x.shape[1:]).transpose(1, 2) for x in self._dense_scratch(piece, memory))
        return dense_attention(self.folded, keys, values, self.scale)

    def _fp8_scratch(self, piece: Slice, memory: torch.Tensor) -> fp8_attention.Fp8Scratch:
        keys = piece.count // self.size * self.part.tokens
        return fp8_attention.Fp8Scratch.carve(memory, self.size * self.part.heads, keys, self.part.head_dim, FP8_DTYPE)

    def _attend_fp8(self, piece: Slice, memory: torch.Tensor, partials: Partials) -> None:
        scratch = self._fp8_scratch(piece, memory)
        if self.quantised is None:
            layout = self.layouts[piece.runs[0].fmt].key
            paired = layout.split_pairs if self.rope is None else self.rope.layout is RoPELayout.INTERLEAVED
            self.quantised = fp8_attention.quantise_queries(self.q, self.part.heads, paired, FP8_DTYPE)
        shape = fp8_attention.launch_shape(self.part.head_dim)
        problems, rows, _ = self.quantised[0].shape
        wanted = fp8_attention.num_splits(problems, rows, scratch.num_keys, shape, self.q.device)
        out, lse = partials.slots(min(wanted, partials.num_slots))
        fp8_attention.attend(
            *self.quantised, scratch, out, lse,
            heads=self.part.heads, softmax_scale=self.scale, shape=shape,
        )  # fmt: skip
