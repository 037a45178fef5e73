"""Dense attention with log-sum-exp: the best kernel PyTorch has on each device, behind one call."""

from functools import lru_cache

import torch

__all__ = ["CUDNN_QUERIES", "dense_attention", "fold_queries", "unfold_queries"]

CUDNN_QUERIES = 512
"""From this many query rows on cuDNN outruns FlashAttention-2 on an H200; far below it is five times slower."""


@lru_cache
def _widest_cudnn_head(device: torch.device) -> int:
    """Channels of the widest head that cuDNN attends: on Hopper 256, in half the time of FlashAttention-2."""
    return 256 if torch.cuda.get_device_capability(device)[0] == 9 else 128


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full (unmasked) attention of `q` to `k`, `v`.

    Args:
        q: ``[batch, heads, queries, head_dim]`` float32, float16 or bfloat16, last dimension contiguous.
        k, v: ``[batch, heads, keys, head_dim]`` in q's dtype, at least one key, last dimension contiguous.
        scale: factor on the scores.

    Returns:
        Output ``[batch, heads, queries, head_dim]`` in q's dtype and log-sum-exp ``[batch, heads, queries]`` float32
        (natural log).
    """
    ops, rows = torch.ops.aten, q.shape[2]
    if q.device.type != "cuda":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    elif q.dtype is torch.float32:
        out, lse = ops._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)[:2]
    elif rows >= CUDNN_QUERIES and q.shape[3] <= _widest_cudnn_head(q.device) and torch.backends.cudnn.enabled:
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)[:2]
    else:
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    # The memory-efficient kernel pads its rows to 32, cuDNN keeps a trailing dimension of one.
    return out, lse.reshape(*q.shape[:2], -1)[..., :rows]


def fold_queries(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`q` ``[batch, tokens, heads, head_dim]`` as ``[batch, kv_heads, tokens * group, head_dim]``.

    Queries that share a KV head become rows of one problem; a view unless the group is larger than one.
    """
    batch, tokens, heads, dim = q.shape
    if heads == kv_heads:
        return q.transpose(1, 2)
    group = heads // kv_heads
    return q.view(batch, tokens, kv_heads, group, dim).transpose(1, 2).reshape(batch, kv_heads, tokens * group, dim)


def unfold_queries(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Undo `fold_queries` on ``[batch, kv_heads, tokens * group, ...]``: ``[batch, tokens, heads, ...]``."""
    batch, heads, rows = x.shape[:3]
    group = rows // tokens
    if group == 1:
        return x.transpose(1, 2)
    return x.reshape(batch, heads, tokens, group, *x.shape[3:]).transpose(1, 2).flatten(2, 3)
