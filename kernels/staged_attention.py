"""Attention by decoding into bounded scratch, then the best dense kernel; slices merged by log-sum-exp.

On CUDA sequences of equal lengths go through one decode and one attention call per slice, and decoding runs one slice
ahead; on a CPU each sequence goes alone, which keeps the formats of its pages in one slice and needs no merge. In FP8,
quantised pages are decoded to and attended in E4M3, unquantised ones in the queries' dtype.
"""

from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise

import torch

from qvg_paged.kernels import fp8_attention, staged_decode
from qvg_paged.kernels.attention_plan import remembered
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.dense_attention import dense_attention, fold_queries
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout, align
from qvg_paged.kernels.lookahead import Lookahead, Step, staged
from qvg_paged.kernels.partials import Partials, slot_nbytes
from qvg_paged.kernels.rope import RoPELayout, RoPESpec
from qvg_paged.kernels.slices import Cohort, Slice
from qvg_paged.kernels.staged_decode import Decoder, decoded_page_nbytes
from qvg_paged.kernels.staged_plan import SLOTS, Plan, make_plan, running_nbytes

__all__ = ["decoded_page_nbytes", "staged_attention", "staged_nbytes"]

DEFAULT_WORKSPACE = 256 << 20


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
        tail = running_nbytes(q) + SLOTS * slot_nbytes(q.shape[0] * q.shape[1], q.shape[2], q.dtype) * fp8
        workspace = torch.empty(decoded + tail, dtype=torch.uint8, device=q.device)
        lookahead = None
    nbytes, keeps = workspace.numel(), lookahead is not None

    def build() -> Plan:
        return make_plan(q, table, layouts, cu_seqlens_q, rope, nbytes, fp8, keeps)

    plan = remembered(table, ("plan", cu_seqlens_q, q.shape[1], q.dtype, rope, nbytes, fp8, keeps), build)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    scratch, memory = workspace[: plan.scratch], workspace[plan.scratch :]
    decoder = Decoder(buffer, layouts, rope, q.dtype, scratch, plan.halves, plan.capacity, plan.widest, plan.narrow)
    queries = _Fp8Queries(q, cu_seqlens_q, decoder)
    batches = [
        _Batch(q, cohort, cu_seqlens_q, decoder, queries, softmax_scale, memory, plan.running, out, lse)
        for cohort in plan.cohorts
        if cu_seqlens_q[cohort.sequences[0]] < cu_seqlens_q[cohort.sequences[0] + 1]
    ]
    for batch in batches:
        if not batch.slices:
            batch.finish()
    work = [(batch, piece) for batch in batches for piece in batch.slices]
    steps = [decoder.step(piece, layer, written=i > 0) for i, (_, piece) in enumerate(work)]
    follow = _follow(work, decoder, layer, (id(table), cu_seqlens_q, fp8), lookahead)
    ahead, first = plan.halves, plan.narrow > 0
    with closing(staged(steps, q.device, ahead=ahead, first=first, lookahead=lookahead, follow=follow)) as turns:
        for i, half in turns:
            batch, piece = work[i]
            batch.attend(piece, half)
            if piece is batch.slices[-1]:
                batch.finish()
    whole = batches[0].whole if len(batches) == 1 else None
    return (out, lse) if whole is None else whole


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
    _, piece = work[0]
    if not decoder.capacity and any(decoder.layouts[run.fmt].format.is_dense for run in piece.runs):
        return None
    return decoder.step(piece, (layer + 1) % layers, written=False)


class _Fp8Queries:
    """E4M3 queries of a call: those of all sequences at once, if they have as many and cohorts take them in order."""

    def __init__(self, q: torch.Tensor, cu_queries: tuple[int, ...], decoder: Decoder) -> None:
        counts = {end - begin for begin, end in pairwise(cu_queries)}
        self.every = q.view(len(cu_queries) - 1, -1, *q.shape[1:]) if len(counts) == 1 else None
        self.decoder = decoder
        self._made: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(
        self, q: torch.Tensor, sequences: tuple[int, ...], layout: PartLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those ``[sequences, tokens, q_heads, head_dim]`` of some sequences, for keys of a layout."""
        rope, heads, dtype = self.decoder.rope, layout.heads, staged_decode.FP8_DTYPE
        paired = layout.split_pairs if rope is None else rope.layout is RoPELayout.INTERLEAVED
        first, count = sequences[0], len(sequences)
        if self.every is None or sequences != tuple(range(first, first + count)):
            return fp8_attention.quantise_queries(q, heads, paired, dtype)
        if paired not in self._made:
            self._made[paired] = fp8_attention.quantise_queries(self.every, heads, paired, dtype)
        some = slice(first * heads, (first + count) * heads)
        queries, scales = self._made[paired]
        return queries[some], scales[some]


def _is_in_order(out: torch.Tensor) -> bool:
    """Whether an output ``[batch, heads, tokens, head_dim]`` lies token by token."""
    return out.transpose(1, 2).is_contiguous()


class _Batch:
    """Queries of a cohort, the partial results of its slices and where the whole goes."""

    def __init__(
        self,
        q: torch.Tensor,
        cohort: Cohort,
        cu_queries: tuple[int, ...],
        decoder: Decoder,
        fp8_queries: "_Fp8Queries",
        scale: float,
        memory: torch.Tensor,
        running: bool,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        self.slices, self.part = cohort.slices, decoder.layouts[0].key
        first, size = cohort.sequences[0], len(cohort.sequences)
        tokens = cu_queries[first + 1] - cu_queries[first]
        self.rows, self.target = cohort.rows, (out, lse)
        self.decoder, self.scale = decoder, scale
        self.sequences, self.fp8_queries = cohort.sequences, fp8_queries
        self.q = q[self.rows].view(size, tokens, *q.shape[1:])
        if isinstance(self.rows, torch.Tensor):
            out, lse = (x.new_empty((len(self.rows), *x.shape[1:])) for x in self.target)
        else:
            out, lse = out[self.rows], lse[self.rows]
        self.result = out, lse
        self.whole: tuple[torch.Tensor, torch.Tensor] | None = None
        """The result of the call, if a dense kernel left it as it has to be."""
        self.is_written = False
        shape = (size, tokens, self.part.heads, q.shape[1] // self.part.heads)
        self.partials = Partials(out.view(*shape, -1), lse.view(shape), memory, running=running)
        self.folded: torch.Tensor | None = None
        self.quantised: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, piece: Slice, half: int) -> None:
        """Attend to a slice that was decoded into a half of the scratch."""
        if piece.fp8:
            self._attend_fp8(piece, half)
            return
        out, lse = self._attend_dense(piece, half)
        if len(self.slices) == 1 and out.transpose(1, 2).shape[1:] == self.target[0].shape and _is_in_order(out):
            self.whole, self.is_written = (out[0].transpose(0, 1), lse[0].T), True
        else:
            self.partials.add(out, lse, piece.members)

    def finish(self) -> None:
        """Write output and log-sum-exp."""
        if not self.is_written:
            self.partials.finish()
        if isinstance(self.rows, torch.Tensor):
            for target, mine in zip(self.target, self.result, strict=True):
                target.index_copy_(0, self.rows, mine)

    def _attend_dense(self, piece: Slice, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.folded is None:
            self.folded = fold_queries(self.q, self.part.heads)
        some, size = slice(piece.members.start, piece.members.stop), len(piece.members)
        decoded = self.decoder.dense(piece, half)
        keys, values = (x.view(size, -1, *x.shape[1:]).transpose(1, 2) for x in decoded)
        return dense_attention(self.folded[some], keys, values, self.scale)

    def _attend_fp8(self, piece: Slice, half: int) -> None:
        scratch = self.decoder.fp8(piece, half)
        if self.quantised is None:
            self.quantised = self.fp8_queries.of(self.q, self.sequences, self.decoder.layouts[piece.runs[0].fmt].key)
        shape, heads = fp8_attention.launch_shape(self.part.head_dim), self.part.heads
        some = slice(piece.members.start * heads, piece.members.stop * heads)
        queries, scales = (x[some] for x in self.quantised)
        wanted = fp8_attention.num_splits(len(queries), queries.shape[1], scratch.num_keys, shape, queries.device)
        if wanted == len(self.slices) == 1:
            (out, lse), self.is_written = (x[None] for x in self.result), True
        else:
            out, lse = self.partials.slots(min(wanted, self.partials.num_slots), piece.members)
        fp8_attention.attend(
            queries, scales, scratch, out, lse, heads=heads, softmax_scale=self.scale, shape=shape
        )  # fmt: skip
