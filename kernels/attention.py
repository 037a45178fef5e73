"""Attention over a block table of mixed page formats: checks, choice of path, workspace."""

import math
import os
from collections.abc import Sequence

import torch

from qvg_paged.kernels.attention_plan import remembered
from qvg_paged.kernels.backend import has_fp8_attention, kernel_scope
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.direct_path import direct_path, partial_nbytes
from qvg_paged.kernels.dispatch import AttentionPath, Workload, dispatch_table
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.kernels.lookahead import Lookahead
from qvg_paged.kernels.reference_attention import reference_attention
from qvg_paged.kernels.rope import RoPESpec
from qvg_paged.kernels.staged_attention import staged_attention, staged_nbytes

__all__ = ["AttentionPath", "attention_workspace_nbytes", "paged_attention"]

QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def paged_attention(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    *,
    cu_seqlens_q: Sequence[int],
    softmax_scale: float | None = None,
    rope: RoPESpec | None = None,
    path: AttentionPath = AttentionPath.AUTO,
    allow_fp8: bool = True,
    workspace: torch.Tensor | None = None,
    lookahead: Lookahead | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention of each sequence's queries to all tokens of its pages.

    Nothing is masked: the tokens of the chunk being generated are pages of the table like any others.

    Args:
        q: ``[total_q, q_heads, head_dim]`` float32, float16 or bfloat16, already rotated, last dimension contiguous;
            query head h reads KV head ``h // (q_heads / kv_heads)``.
        buffer: 1-D uint8 pool.
        table: pages of each sequence; ``table.formats`` index `layouts`.
        layouts: page layouts of the same model, at least one.
        layer: layer to read.
        cu_seqlens_q: ``batch + 1`` host integers; sequence b owns queries ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``.
        softmax_scale: positive factor on the scores; ``head_dim ** -0.5`` if None.
        rope: rotate keys to ``table.positions`` when read; None if they were stored rotated.
        path: how pages are read.
        allow_fp8: whether `AttentionPath.AUTO` may choose `AttentionPath.STAGED_FP8`.
        workspace: 1-D uint8 scratch on the pool's device for decoded keys or partial results; allocated if None.
        lookahead: kept from call to call with one `workspace`, so that decoding for the next layer runs beside this
            one; quantised pages of the table must stay as they are until it is settled.

    Returns:
        Output ``[total_q, q_heads, head_dim]`` in q's dtype and log-sum-exp ``[total_q, q_heads]`` float32 (natural
        log). A sequence without pages gets zeros and -inf.

    Raises:
        ArgumentError: an argument does not fit the others, or `workspace` is too small (the message says how many
            bytes are needed); nothing was computed.
    """
    cu_queries = tuple(cu_seqlens_q)
    _check_queries(q, buffer, table, layouts, layer, cu_queries)
    _check_table(table, layouts, rope, q.device)
    _check_workspace(workspace, q.device)
    if q.stride(-1) != 1:
        q = q.contiguous()
    scale = layouts[0].key.head_dim ** -0.5 if softmax_scale is None else softmax_scale
    if not 0 < scale < math.inf:
        raise ArgumentError(f"softmax_scale: expected a positive number, got {scale}")
    path = _choose(path, q, table, layouts, cu_queries, rope, allow_fp8)
    if len(q) == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    with kernel_scope(q.device):
        given = (q, buffer, table, layouts, layer)
        if path in {AttentionPath.STAGED, AttentionPath.STAGED_FP8}:
            return staged_attention(
                *given, cu_seqlens_q=cu_queries, softmax_scale=scale, rope=rope, workspace=workspace,
                lookahead=lookahead, fp8=path is AttentionPath.STAGED_FP8,
            )  # fmt: skip
        if lookahead is not None:
            lookahead.settle()
        if path is AttentionPath.REFERENCE:
            return reference_attention(*given, cu_seqlens_q=cu_queries, softmax_scale=scale, rope=rope)
        return direct_path(*given, cu_seqlens_q=cu_queries, softmax_scale=scale, rope=rope, workspace=workspace)


def attention_workspace_nbytes(
    layouts: Sequence[PageLayout], q_heads: int, max_queries: int, dtype: torch.dtype
) -> int:
    """Least workspace with which every path attends `max_queries` queries of one sequence at once.

    Larger batches work with it too, some sequences at a time; more bytes mean longer slices and more splits.

    Args:
        layouts: the page layouts that tables may name.
        q_heads: query heads.
        max_queries: queries of one sequence.
        dtype: the widest dtype of queries.
    """
    part = layouts[0].key
    direct = len(layouts) * partial_nbytes(max_queries * q_heads, part.head_dim)
    return max(direct, staged_nbytes(part, q_heads, max_queries, dtype))


def _choose(
    path: AttentionPath,
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    cu_queries: tuple[int, ...],
    rope: RoPESpec | None,
    allow_fp8: bool,
) -> AttentionPath:
    if path is AttentionPath.DIRECT and q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ArgumentError(f"path: expected staged, reference or auto for tensors on {q.device}, got direct")
    fp8 = has_fp8_attention(q.device)
    if path is AttentionPath.STAGED_FP8 and not fp8:
        return AttentionPath.STAGED
    if path is not AttentionPath.AUTO:
        return path
    quantised = [fmt for fmt in table.groups if not layouts[fmt].format.is_dense]
    if q.device.type != "cuda" or q.dtype is torch.float32 or not quantised:
        return AttentionPath.STAGED
    allowed = [AttentionPath.STAGED, AttentionPath.DIRECT, *[AttentionPath.STAGED_FP8] * (fp8 and allow_fp8)]

    def choose() -> AttentionPath:
        part = layouts[0].key
        sequences = range(table.batch)
        workload = Workload(
            queries=max(cu_queries[b + 1] - cu_queries[b] for b in sequences) * (q.shape[1] // part.heads),
            keys=max(len(table.entries(b)) for b in sequences) * part.tokens,
            heads=part.heads * sum(cu_queries[b + 1] > cu_queries[b] for b in sequences),
            head_dim=part.head_dim,
            format=layouts[quantised[0]].format.name,
            rope=rope is not None,
        )
        return dispatch_table(q.device).choose(workload, allowed)

    return remembered(table, ("path", cu_queries, q.shape[1], tuple(allowed), rope is not None), choose)


def _check_queries(
    q: torch.Tensor,
    buffer: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    layer: int,
    cu_queries: tuple[int, ...],
) -> None:
    if not layouts:
        raise ArgumentError("layouts: expected at least one page layout, got none")
    part = layouts[0].key
    if buffer.dtype is not torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
        raise ArgumentError(f"buffer: expected a contiguous 1-D uint8 tensor, got {buffer.dtype} {tuple(buffer.shape)}")
    if q.ndim != 3 or q.shape[2] != part.head_dim or q.shape[1] == 0 or q.shape[1] % part.heads:
        raise ArgumentError(
            f"q: expected [total_q, a multiple of {part.heads} heads, {part.head_dim}], got {tuple(q.shape)}"
        )
    if q.dtype not in QUERY_DTYPES or q.device != buffer.device:
        raise ArgumentError(f"q: expected float32, float16 or bfloat16 on {buffer.device}, got {q.dtype} on {q.device}")
    if q.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("q: expected a tensor that needs no gradient (inference only); detach it or use no_grad")
    if not 0 <= layer < layouts[0].num_layers:
        raise ArgumentError(f"layer: expected 0 to {layouts[0].num_layers - 1}, got {layer}")
    ordered = sorted((0, *cu_queries, len(q))) == [0, *cu_queries, len(q)]
    if len(cu_queries) != table.batch + 1 or cu_queries[0] or not ordered or cu_queries[-1] != len(q):
        raise ArgumentError(
            f"cu_seqlens_q: expected {table.batch + 1} non-decreasing integers from 0 to {len(q)}, got {cu_queries}"
        )


def _check_table(table: BlockTable, layouts: Sequence[PageLayout], rope: RoPESpec | None, device: torch.device) -> None:
    if table.device != device:
        raise ArgumentError(f"table: expected a block table on {device}, where the pool is, got {table.device}")
    part = layouts[0].key
    bad = set(table.formats) - set(range(len(layouts)))
    if bad:
        raise ArgumentError(f"table: expected formats 0 to {len(layouts) - 1}, got {sorted(bad)}")
    if rope is not None and (rope.head_dim != part.head_dim or rope.tokens_per_frame != part.tokens):
        raise ArgumentError(
            f"rope: expected head_dim {part.head_dim} and {part.tokens} tokens a frame, "
            f"got {rope.head_dim} and {rope.tokens_per_frame}"
        )


def _check_workspace(workspace: torch.Tensor | None, device: torch.device) -> None:
    if workspace is None:
        return
    if workspace.dtype is not torch.uint8 or workspace.ndim != 1 or not workspace.is_contiguous():
        raise ArgumentError(
            f"workspace: expected a contiguous 1-D uint8 tensor, got {workspace.dtype} {tuple(workspace.shape)}"
        )
    if workspace.device != device:
        raise ArgumentError(f"workspace: expected memory on {device}, where the pool is, got {workspace.device}")
    if workspace.data_ptr() % 16:
        raise ArgumentError(f"workspace: expected memory aligned to 16 bytes, got address {workspace.data_ptr():#x}")
