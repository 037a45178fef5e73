"""How the Triton path divides a span: runs whose sums are added in order, groups of rows, bytes they need. A leaf."""

from qvg_paged.kernels.layout import PartLayout

__all__ = [
    "MOMENT_TOKENS",
    "SAMPLE_RUN",
    "SUM_TILE",
    "SUM_TOKENS",
    "cdiv",
    "group_rows",
    "padded",
    "sample_size",
    "sample_stride",
    "sum_runs",
    "workspace_nbytes",
]

SUM_TILE = 64
"""Tokens of a frame that are added up in one product."""
SUM_TOKENS = 56 * SUM_TILE
"""Tokens whose sums per centroid are kept apart. Which tokens are added first depends on nothing else."""
MOMENT_TOKENS = 1024
"""Tokens whose sums per channel are kept apart."""
SAMPLE_TOKENS = 4096
"""Tokens, at least, from which `BalanceRule.RESIDUAL` takes its spreads: a hundredth is what that may miss them by."""
SAMPLE_RUN = 256
"""Of these, how many have sums of their own."""
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


def sample_stride(span_tokens: int) -> int:
    """Every so many-th token of a span is looked at for the spreads of `BalanceRule.RESIDUAL`."""
    return max(1, span_tokens // SAMPLE_TOKENS)


def sample_size(span_tokens: int) -> int:
    """How many that are."""
    return cdiv(span_tokens, sample_stride(span_tokens))


def _sum_nbytes(span_tokens: int, layout: PartLayout) -> int:
    return sum_runs(cdiv(span_tokens, layout.tokens), layout.tokens) * layout.num_centroids * (layout.head_dim + 1) * 4


def workspace_nbytes(layout: PartLayout, span_tokens: int) -> int:
    """Upper bound of the temporary bytes of encoding K and V of a span."""
    codec, dim, count = layout.codec, layout.head_dim, layout.num_centroids
    rows = group_rows(2 * layout.heads, span_tokens, layout)
    moments = (cdiv(2 * span_tokens, MOMENT_TOKENS) + 1) * 3 * dim * 8 if codec.balanced else 0
    if codec.is_rebalanced:
        moments = (cdiv(min(span_tokens, 2 * SAMPLE_TOKENS), SAMPLE_RUN) * 5 * 8 + count * 4 + 4) * dim
    kept = codec.stages * (span_tokens + count * (dim * 3 + 4)) + count * (dim * 24 + 4) + dim * 4
    return rows * (max(_sum_nbytes(span_tokens, layout), moments) + kept + 2048)
