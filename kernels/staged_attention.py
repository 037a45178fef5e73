"""Attention by decoding into bounded scratch, then the best dense kernel; slices merged by log-sum-exp.

On CUDA sequences of equal lengths go through one decode and one attention call per slice, and decoding runs one slice
ahead; on a CPU each sequence goes alone, which keeps the formats of its pages in one slice and needs no merge. In FP8,
quantised pages are decoded to and attended in E4M3, unquantised ones in the queries' dtype.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import torch

from qvg_paged.kernels import fp8_attention, staged_decode
from qvg_paged.kernels.attention_plan import Cohort, Room, Slice, cohorts, remembered
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.dense_attention import dense_attention, fold_queries
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout, align
from qvg_paged.kernels.lookahead import Lookahead, Step, staged
from qvg_paged.kernels.partials import Partials, slot_nbytes
from qvg_paged.kernels.rope import RoPELayout, RoPESpec
from qvg_paged.kernels.staged_decode import Decoder, decoded_page_nbytes

__all__ = ["decoded_page_nbytes", "staged_attention", "staged_nbytes"]

DEFAULT_WORKSPACE = 256 << 20
SLOTS = 4
"""Partial results of FP8 attention that are kept at once, if they fit a quarter of the workspace."""


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
    lookahead: Lookahead | None = None,
    fp8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `qvg_paged.kernels.attention.paged_attention`, already checked."""
    if workspace is None:
        page_nbytes = decoded_page_nbytes(layouts[0].key, q.dtype)
        pages = sum(map(len, map(table.entries, range(table.batch))))
        decoded = min(max(1, pages) * page_nbytes, max(DEFAULT_WORKSPACE, page_nbytes))
        tail = _running_nbytes(q) + SLOTS * slot_nbytes(q.shape[0] * q.shape[1], q.shape[2], q.dtype) * fp8
        workspace = torch.empty(decoded + tail, dtype=torch.uint8, device=q.device)
        lookahead = None
    nbytes, keeps = workspace.numel(), lookahead is not None

    def build() -> _Plan:
        return _plan(q, table, layouts, cu_seqlens_q, rope, nbytes, fp8, keeps)

    plan = remembered(table, ("plan", cu_seqlens_q, q.shape[1], q.dtype, rope, nbytes, fp8, keeps), build)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    decoder = Decoder(buffer, layouts, rope, q.dtype, workspace[: plan.scratch], plan.halves)
    memory = workspace[plan.scratch :]
    batches = []
    for cohort in plan.cohorts:
        rows = slice(cu_seqlens_q[cohort.sequences.start], cu_seqlens_q[cohort.sequences.stop])
        if rows.start < rows.stop:
            batches.append(_Batch(q[rows], cohort, decoder, softmax_scale, memory, out[rows], lse[rows]))
            if not cohort.slices:
                batches[-1].finish()
    work = [(batch, piece) for batch in batches for piece in batch.slices]
    steps = [decoder.step(piece, batch.size, layer) for batch, piece in work]
    follow = _follow(work, decoder, layer, (id(table), cu_seqlens_q, fp8), lookahead)
    with closing(staged(steps, q.device, ahead=plan.halves, lookahead=lookahead, follow=follow)) as turns:
        for i, half in turns:
            batch, piece = work[i]
            batch.attend(piece, half)
            if piece is batch.slices[-1]:
                batch.finish()
    return out, lse


def _follow(
    work: "Sequence[tuple[_Batch, Slice]]",
    decoder: Decoder,
    layer: int,
    call: tuple[object, ...],
    lookahead: Lookahead | None,
) -> Step | None:
    """What the next layer will decode first, if it is the next call and its pages are there already."""
    layers = decoder.layouts[0].num_layers
    if lookahead is None or not lookahead.goes_on((*call, layer), (*call, (layer - 1) % layers)) or not work:
        return None
    batch, piece = work[0]
    if any(decoder.layouts[run.fmt].format.is_dense for run in piece.runs):
        return None
    return decoder.step(piece, batch.size, (layer + 1) % layers)


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
    keeps: bool,
) -> _Plan:
    part, together = layouts[0].key, _together(q.device)
    page_nbytes = decoded_page_nbytes(part, q.dtype)
    longest = q[: max(end - begin for begin, end in pairwise(cu_queries))]
    # Where the outputs of the whole batch find no room, its sequences go one after another.
    for batched, rows in [(True, q)] * together + [(False, longest)] * (together or fp8):
        room, half = _halved_room(rows, table, layouts, nbytes, fp8, keeps, table.batch if batched else 1)
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
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    nbytes: int,
    fp8: bool,
    keeps: bool,
    sequences: int,
) -> tuple[Room | None, int]:
    """Pages of a slice, and bytes of half the scratch, if decoding runs one ahead; None if a half holds no page."""
    part = layouts[0].key
    slot = slot_nbytes(q.shape[0] * q.shape[1], q.shape[2], q.dtype)
    slots = min(SLOTS, nbytes // 4 // slot) if fp8 else 0
    half = max(0, nbytes - _running_nbytes(q) - slots * slot) // 2 // GRANULE * GRANULE
    formats = frozenset(f for f in table.groups if fp8_attention.reads(layouts[f])) if slots else frozenset()
    padding = fp8_attention.scratch_nbytes(sequences * part.heads, 1, part.head_dim, staged_decode.FP8_DTYPE)
    fp8_pages = max(0, half - padding) // decoded_page_nbytes(part, staged_decode.FP8_DTYPE) if formats else 0
    fp8_pages = min(fp8_pages, max(1, sequences * slots * fp8_attention.MOST_KEYS // part.tokens))
    if half < decoded_page_nbytes(part, q.dtype) or (formats and not fp8_pages):
        return None, half
    dense = frozenset(f for f in table.groups if layouts[f].format.is_dense)
    pages, lead = half // decoded_page_nbytes(part, q.dtype), _together(q.device) and not keeps
    return Room(pages, fp8_pages, formats, lead, last=dense), half


def _running_nbytes(q: torch.Tensor) -> int:
    return align(q.numel() * 4, GRANULE)


class _Batch:
    """Queries of a cohort, the partial results of its slices and where the whole goes."""

    def __init__(
        self,
        q: torch.Tensor,
        cohort: Cohort,
        decoder: Decoder,
        scale: float,
        memory: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        self.size, self.slices, self.part = len(cohort.sequences), cohort.slices, decoder.layouts[0].key
        self.tokens, heads = len(q) // self.size, q.shape[1]
        self.q = q.view(self.size, self.tokens, *q.shape[1:])
        self.decoder, self.scale = decoder, scale
        shape = (self.size, self.tokens, self.part.heads, heads // self.part.heads)
        self.partials = Partials(out.view(*shape, -1), lse.view(shape), memory)
        self.folded: torch.Tensor | None = None
        self.quantised: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, piece: Slice, half: int) -> None:
        """Attend to a slice that was decoded into a half of the scratch."""
        if piece.fp8:
            self._attend_fp8(piece, half)
        else:
            self.partials.add(*self._attend_dense(piece, half))

    def finish(self) -> None:
        """Write output and log-sum-exp."""
        self.partials.finish()

    def _attend_dense(self, piece: Slice, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.folded is None:
            self.folded = fold_queries(self.q, self.part.heads)
        decoded = self.decoder.dense(piece, half)
        keys, values = (x.view(self.size, -1, *x.shape[1:]).transpose(1, 2) for x in decoded)
        return dense_attention(self.folded, keys, values, self.scale)

    def _attend_fp8(self, piece: Slice, half: int) -> None:
        scratch = self.decoder.fp8(piece, self.size, half)
        if self.quantised is None:
            rope = self.decoder.rope
            layout = self.decoder.layouts[piece.runs[0].fmt].key
            paired = layout.split_pairs if rope is None else rope.layout is RoPELayout.INTERLEAVED
            self.quantised = fp8_attention.quantise_queries(self.q, self.part.heads, paired, staged_decode.FP8_DTYPE)
        shape = fp8_attention.launch_shape(self.part.head_dim)
        problems, rows, _ = self.quantised[0].shape
        wanted = fp8_attention.num_splits(problems, rows, scratch.num_keys, shape, self.q.device)
        out, lse = self.partials.slots(min(wanted, self.partials.num_slots))
        fp8_attention.attend(
            *self.quantised, scratch, out, lse,
            heads=self.part.heads, softmax_scale=self.scale, shape=shape,
        )  # fmt: skip
