"""Attention by decoding into bounded scratch, then the best dense kernel; slices merged by log-sum-exp.

On CUDA sequences of equal lengths go through one decode and one attention call per slice; on a CPU each sequence goes
alone, which keeps the formats of its pages in one slice and needs no merge.
"""

from collections.abc import Sequence

import torch

from qvg_paged.kernels.attention_plan import Cohort, Slice, cohorts
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.dense_attention import dense_attention, fold_queries, unfold_queries
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout, align
from qvg_paged.kernels.merge import merge_into
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

__all__ = ["decoded_page_nbytes", "staged_attention", "staged_nbytes"]

DEFAULT_WORKSPACE = 64 << 20


def decoded_page_nbytes(part: PartLayout, dtype: torch.dtype) -> int:
    """Bytes of K and V of one page of one layer, decoded."""
    return 2 * part.tokens * part.heads * part.head_dim * dtype.itemsize


def staged_nbytes(part: PartLayout, q_heads: int, max_queries: int, dtype: torch.dtype) -> int:
    """Bytes the staged path needs at least: one decoded page and, for merging, running outputs in float32."""
    return align(max_queries * q_heads * part.head_dim * 4, GRANULE) + decoded_page_nbytes(part, dtype)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of `qvg_paged.kernels.attention.paged_attention`, already checked."""
    if workspace is None:
        page_nbytes = decoded_page_nbytes(layouts[0].key, q.dtype)
        pages = sum(map(len, map(table.entries, range(table.batch))))
        decoded = min(max(1, pages) * page_nbytes, max(DEFAULT_WORKSPACE, page_nbytes))
        workspace = torch.empty(decoded + _running_nbytes(q), dtype=torch.uint8, device=q.device)
    plan = _plan(q, table, layouts, cu_seqlens_q, rope, workspace.numel())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for cohort in plan:
        rows = slice(cu_seqlens_q[cohort.sequences.start], cu_seqlens_q[cohort.sequences.stop])
        if rows.start == rows.stop:
            continue
        batch = _Batch(q[rows], cohort, buffer, layouts, layer, softmax_scale, rope, workspace)
        batch.attend(out[rows], lse[rows])
    return out, lse


def _plan(
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    cu_queries: tuple[int, ...],
    rope: RoPESpec | None,
    nbytes: int,
) -> tuple[Cohort, ...]:
    part, together = layouts[0].key, q.device.type == "cuda"
    page_nbytes = decoded_page_nbytes(part, q.dtype)
    needed = page_nbytes
    if nbytes >= needed:
        plan = cohorts(table, cu_queries, rope, nbytes // page_nbytes, together)
        if all(len(cohort.slices) <= 1 for cohort in plan):
            return plan
        needed += _running_nbytes(q)
    if nbytes < needed:
        raise ArgumentError(
            f"workspace: expected at least {needed} bytes (K and V of one decoded page, running outputs), got {nbytes}"
        )
    return cohorts(table, cu_queries, rope, (nbytes - _running_nbytes(q)) // page_nbytes, together)


def _running_nbytes(q: torch.Tensor) -> int:
    return align(q.numel() * 4, GRANULE)


class _Batch:
    """Queries of a cohort and where its decoded keys go."""

    def __init__(
        self,
        q: torch.Tensor,
        cohort: Cohort,
        buffer: torch.Tensor,
        layouts: Sequence[PageLayout],
        layer: int,
        scale: float,
        rope: RoPESpec | None,
        workspace: torch.Tensor,
    ) -> None:
        self.size, self.slices = len(cohort.sequences), cohort.slices
        self.tokens = len(q) // self.size
        self.folded = fold_queries(q.view(self.size, self.tokens, *q.shape[1:]), layouts[0].key.heads)
        self.buffer, self.layouts, self.layer, self.scale = buffer, layouts, layer, scale
        self.rope_layout = RoPELayout.INTERLEAVED if rope is None else rope.layout
        self.workspace = workspace

    def attend(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write output ``[size * tokens, q_heads, head_dim]`` and log-sum-exp."""
        if not self.slices:
            out.zero_()
            lse.fill_(float("-inf"))
            return
        whole, whole_lse = self._attend_slice(self.slices[0])
        if len(self.slices) > 1:
            whole = self._running(whole)
            whole_lse = whole_lse.contiguous()
            for piece in self.slices[1:]:
                merge_into(whole, whole_lse, *self._attend_slice(piece))
        out.view(self.size, self.tokens, *out.shape[1:]).copy_(unfold_queries(whole, self.tokens))
        lse.view(self.size, self.tokens, -1).copy_(unfold_queries(whole_lse, self.tokens))

    def _running(self, first: torch.Tensor) -> torch.Tensor:
        tail = self.workspace[self.workspace.numel() - first.numel() * 4 & -GRANULE :]
        return tail[: first.numel() * 4].view(torch.float32).view(first.shape).copy_(first)

    def _attend_slice(self, piece: Slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.layouts[0].key
        shape = (2, piece.count * part.tokens, part.heads, part.head_dim)
        nbytes = piece.count * decoded_page_nbytes(part, self.folded.dtype)
        keys, values = self.workspace[:nbytes].view(self.folded.dtype).view(shape)
        begin = 0
        for run in piece.runs:
            layout, tokens = self.layouts[run.fmt], slice(begin, begin + run.count * part.tokens)
            decode_pages(
                self.buffer, run.pages, run.codebooks, layout.key, layout.key_offset(self.layer),
                layout.key_codebook_offset(self.layer), keys[tokens], rope=run.rope, rope_layout=self.rope_layout,
            )  # fmt: skip
            decode_pages(
                self.buffer, run.pages, run.codebooks, layout.value, layout.value_offset(self.layer),
                layout.value_codebook_offset(self.layer), values[tokens],
            )  # fmt: skip
            begin = tokens.stop
        keys, values = (x.view(self.size, -1, *x.shape[1:]).transpose(1, 2) for x in (keys, values))
        return dense_attention(self.folded, keys, values, self.scale)
