"""How the Triton path divides a span: runs whose sums are added in order, groups of rows, bytes they need. A leaf."""

from qvg_paged.kernels.layout import PartLayout

__all__ = [
    "MOMENT_TOKENS",
    "SAMPLE_RUN",
    "SEEN_RUN",
    "SUM_TILE",
    "SUM_TOKENS",
    "cdiv",
    "group_rows",
    "moment_runs",
    "moment_tile",
    "padded",
    "sample_size",
    "sample_stride",
    "scratch_nbytes",
    "seen_stride",
    "sum_runs",
    "workspace_nbytes",
]

SUM_TILE = 64
"""Tokens of a frame that are added up in one product."""
SUM_TOKENS = 56 * SUM_TILE
"""Tokens whose sums per centroid are kept apart. Which tokens are added first depends on nothing else."""
SEEN_RUN = 36 * SUM_TILE
"""Likewise where a sample of the tokens is added up."""
SEEN_STRIDE = 4
SEEN_PER_CENTROID = 32
"""Tokens that a sample has for every centroid, at least."""
MOMENT_TOKENS = 512
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


def sum_runs(frames: int, frame_tokens: int, run: int = SUM_TOKENS) -> int:
    """Runs of a span; a frame's last tile may be a partial one."""
    return cdiv(frames * cdiv(frame_tokens, SUM_TILE) * SUM_TILE, run)


def seen_stride(frames: int, frame_tokens: int, num_centroids: int) -> int:
    """Of so many tokens of a frame one is looked at where a sample of the span will do; 1 if the span is short.

    Without centroids all are: nothing then says how large a sample must be.
    """
    each = frame_tokens // SEEN_STRIDE
    enough = num_centroids > 0 and each >= SUM_TILE and frames * each >= SEEN_PER_CENTROID * num_centroids
    return SEEN_STRIDE if enough else 1


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
    frames, tokens, count = cdiv(span_tokens, layout.tokens), layout.tokens, layout.num_centroids
    stride = seen_stride(frames, tokens, count)
    runs = max(sum_runs(frames, tokens), sum_runs(frames, tokens // stride, SEEN_RUN) if stride > 1 else 0)
    return runs * count * (layout.head_dim + 1) * 4


def moment_tile(head_dim: int) -> int:
    """Tokens that are looked at together where channels are summed."""
    return max(1, 2048 // head_dim)


def moment_runs(frames: int, frame_tokens: int, head_dim: int) -> int:
    """Runs of a span whose sums per channel are kept apart."""
    tile = moment_tile(head_dim)
    return cdiv(frames * cdiv(frame_tokens, tile), max(1, MOMENT_TOKENS // tile))


def scratch_nbytes(span_tokens: int, layout: PartLayout) -> int:
    """Bytes of a row's sums, of centroids or of channels."""
    frames, dim, codec = cdiv(span_tokens, layout.tokens), layout.head_dim, layout.codec
    runs = cdiv(sample_size(span_tokens), SAMPLE_RUN) if codec.is_rebalanced else moment_runs(
        frames, layout.tokens, dim
    )  # fmt: skip
    return max(_sum_nbytes(span_tokens, layout), runs * 3 * dim * 8 if codec.balanced else 0)


def workspace_nbytes(layout: PartLayout, span_tokens: int) -> int:
    """Upper bound of the temporary bytes of encoding K and V of a span."""
    codec, dim, count = layout.codec, layout.head_dim, layout.num_centroids
    rows = group_rows(2 * layout.heads, span_tokens, layout)
    kept = span_tokens + codec.stages * (span_tokens + count * (dim * 3 + 4)) + count * (dim * 24 + 4) + dim * 4
    return rows * (scratch_nbytes(span_tokens, layout) + kept + 4096)
