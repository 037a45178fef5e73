"""How the Triton path divides a span: runs whose sums are added in order, groups of rows, bytes they need. A leaf."""

from qvg_paged.kernels.layout import PartLayout

__all__ = ["MOMENT_TOKENS", "SUM_TILE", "SUM_TOKENS", "cdiv", "group_rows", "padded", "sum_runs", "workspace_nbytes"]

SUM_TILE = 64
"""Tokens of a frame that are added up in one product."""
SUM_TOKENS = 56 * SUM_TILE
"""Tokens whose sums per centroid are kept apart. Which tokens are added first depends on nothing else."""
MOMENT_TOKENS = 1024
"""Tokens whose sums per channel are kept apart."""
GROUP_BYTES = 34 << 20
"""Sums of centroids kept apart at once (at least those of one row)."""


def cdiv(a: int, b: int) -> int:
    """`a` over `b`, rounded up. Triton's own takes as long as a launch."""
    return -(-a // b)


def padded(count: int) -> int:
    """The power of two from 16 on that holds `count`."""
    return max(16, 1 << (count - 1).bit_length())


def sum_runs(frames: int, frame_tokens: int) -> int:
    """Runs of a span; a frame's last tile may be a partial one."""
    return cdiv(frames * cdiv(frame_tokens, SUM_TILE) * SUM_TILE, SUM_TOKENS)


def group_rows(total: int, span_tokens: int, layout: PartLayout) -> int:
    """Rows (heads of K and V) that are encoded together, of `total`."""
    return max(1, min(total, GROUP_BYTES // max(_sum_nbytes(span_tokens, layout), 1)))


def _sum_nbytes(span_tokens: int, layout: PartLayout) -> int:
    return sum_runs(cdiv(span_tokens, layout.tokens), layout.tokens) * layout.num_centroids * (layout.head_dim + 1) * 4


def workspace_nbytes(layout: PartLayout, span_tokens: int) -> int:
    """Upper bound of the temporary bytes of encoding K and V of a span."""
    codec, dim, count = layout.codec, layout.head_dim, layout.num_centroids
    rows = group_rows(2 * layout.heads, span_tokens, layout)
    moments = (cdiv(2 * span_tokens, MOMENT_TOKENS) + 1) * 3 * dim * 8 if codec.balanced else 0
    moments += (cdiv(span_tokens, MOMENT_TOKENS) * 2 * 8 + count * 4 + 4) * dim if codec.is_rebalanced else 0
    kept = codec.stages * (span_tokens + count * (dim * 3 + 4)) + count * (dim * 24 + 4) + dim * 4
    return rows * (max(_sum_nbytes(span_tokens, layout), moments) + kept + 2048)
