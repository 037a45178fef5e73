"""Quantising blocks of channels and packing their codes, in PyTorch: the arithmetic the kernels repeat bit for bit.

Reciprocals are correctly rounded, products are not contracted into sums, and the sums that choose a scale are sums of
integers, so that neither device nor order of summation changes a byte.
"""

import torch

from qvg_paged.kernels.formats import Codec, Grid, ScaleRule
from qvg_paged.kernels.layout import TILE_TOKENS, code_rows

__all__ = [
    "FP8_MAX",
    "PRODUCT_BITS",
    "SEARCH_STEPS",
    "pack_codes",
    "quantise_blocks",
    "search_bits",
    "search_stride",
    "search_weight",
    "thresholds",
    "unpack_codes",
]

SEARCH_STEPS = 12
"""FP8 scales tried by `ScaleRule.SEARCH`: eight of them span a factor of two."""
FP8_MAX = 448.0
PRODUCT_BITS = 18
"""Fraction bits of a channel relative to the block's absmax; 2**10 of them times a level fit 31 bits."""


def search_bits(block_size: int) -> int:
    """Fraction bits of a magnitude relative to the block's absmax: a block of them sums exactly."""
    return 23 - (block_size.bit_length() - 1)


def search_stride(grid: Grid) -> int:
    """`ScaleRule.SEARCH` first looks at one in so many scales; with many levels the error has several minima."""
    return 1 if grid is Grid.INT4 else 3


def thresholds(grid: Grid) -> tuple[int, float, int]:
    """How many magnitudes of `grid` part a level from the next, the first of them, and the smallest level.

    In units of the scale. The others follow at distances of one; levels are ``grid.step`` apart.
    """
    lowest = grid.max_level % grid.step
    return (grid.max_level - lowest) // grid.step, lowest + grid.step / 2, lowest


def search_weight(grid: Grid, block_size: int) -> float:
    """What the square of a scale counts in the error that `ScaleRule.SEARCH` minimises."""
    return float(block_size * thresholds(grid)[2] ** 2)


def quantise_blocks(blocks: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 scale bytes ``[...]`` and codes like `blocks` ``[..., block_size]`` (float32), both uint8."""
    grid = codec.grid
    table = fp8_values(blocks.device)
    absmax = blocks.abs().amax(-1)
    scales = fp8_bytes(absmax * reciprocal(float(grid.max_level), absmax))
    if codec.scale_rule is ScaleRule.LEAST_SQUARES:
        scales = _least_squares(blocks, absmax, scales, grid)
    elif codec.scale_rule is ScaleRule.SEARCH:
        scales = _search(blocks, absmax, scales, grid)
    return scales, _codes(blocks, table[scales.int()][..., None], grid)


def fp8_values(device: torch.device) -> torch.Tensor:
    """The value of every E4M3 byte, ``[256]`` float32."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def fp8_bytes(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 bytes of non-negative `x`, saturating."""
    return x.clamp(max=FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def reciprocal(value: float, like: torch.Tensor) -> torch.Tensor:
    """Correctly rounded float32 ``1 / value`` beside `like`."""
    return 1.0 / torch.full((), value, dtype=torch.float32, device=like.device)


def _codes(blocks: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    zero = scale == 0
    inverse = torch.where(zero, 0.0, 1.0 / scale)
    if grid is Grid.QUATERNARY:
        return (blocks * inverse).mul_(0.5).add_(2.0).floor_().clamp_(0, 3).to(torch.uint8)
    # The released quantiser divides by a scale that FP8 rounded to zero: infinite and undefined quotients end at the
    # largest level, zeros (of either sign) at the positive one. Halves round away from zero.
    top = grid.max_level
    size = (blocks.abs() * inverse).masked_fill_(zero, top).clamp_(max=top)
    whole = size.floor()
    whole += size.sub_(whole) >= 0.5
    return torch.where(blocks < 0, -whole, whole).add_(top).to(torch.uint8)


def _levels(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    return codes.float().mul_(grid.step).add_(grid.offset)


def _inverse_absmax(absmax: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales > 0, 1.0 / absmax, 0.0)[..., None]


def _search(blocks: torch.Tensor, absmax: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scale of least squared error, up to what all scales have in common, from sums that do not depend on their order.

    First among one in `search_stride` scales, from the second on, then between the best of them and its neighbours;
    with a stride of one, among all.

    With a magnitude a, levels l0 < l1 < ... and thresholds m1, m2, ... half way between them, the squared error is
    ``(a - l0 s)**2 - 2 s * sum over k of (l_k - l_(k-1)) * max(a - m_k s, 0)``: one difference per scale and threshold.
    Magnitudes are multiples of ``absmax / 2**bits``, scales even ones.
    """
    bits, lowest = search_bits(blocks.shape[-1]), thresholds(grid)[2]
    unit = _inverse_absmax(absmax, scales)
    magnitude = _on_grid(blocks.abs() * unit, bits)
    total = magnitude.sum(-1) * (2 * lowest)
    best, best_error = scales, torch.full_like(total, torch.inf)

    def look(tried: torch.Tensor) -> None:
        nonlocal best, best_error
        error = _search_error(magnitude, total, unit[..., 0], tried, grid, bits)
        best, best_error = torch.where(error < best_error, tried, best), torch.minimum(error, best_error)

    lowest_scale = scales.clamp(max=1)
    stride = search_stride(grid)
    for step in range(min(1, stride - 1), SEARCH_STEPS, stride):
        look(torch.where(scales > step, scales - step, lowest_scale))
    if stride > 1:
        middle = best
        look(torch.maximum(middle, lowest_scale + 1) - 1)
        look(torch.minimum(middle + 1, scales))
    return best


def _search_error(
    magnitude: torch.Tensor, total: torch.Tensor, unit: torch.Tensor, tried: torch.Tensor, grid: Grid, bits: int
) -> torch.Tensor:
    count, first, _ = thresholds(grid)
    scale = _on_grid(fp8_values(magnitude.device)[tried.int()] * unit, bits - 1)
    over = sum((magnitude - (scale * (first + place))[..., None]).clamp_(min=0).sum(-1) for place in range(count))
    return scale * (scale * search_weight(grid, magnitude.shape[-1]) - (over * (2 * grid.step) + total))


def _on_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest multiples of ``2**-bits`` of float32 values from 0 to 1."""
    large = 2.0 ** (23 - bits)
    return (x + large) - large


def _least_squares(blocks: torch.Tensor, absmax: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    level = _levels(_codes(blocks, fp8_values(blocks.device)[scales.int()][..., None], grid), grid).int()
    share = (blocks * _inverse_absmax(absmax, scales)).mul_(2.0**PRODUCT_BITS).int()
    product = (share * level).sum(-1, dtype=torch.int32).float()
    energy = level.square().sum(-1, dtype=torch.int32).float()
    fitted = fp8_bytes(product * (absmax * 2.0**-PRODUCT_BITS) / energy.clamp(min=1.0))
    return torch.where((scales > 0) & (fitted > 0), fitted, scales)


def _segments(tokens: int, bits: int) -> list[tuple[int, int, int, int]]:
    """Tile runs of a frame: first token, first row, tiles, tokens of each tile."""
    full, rest = divmod(tokens, TILE_TOKENS)
    runs = [(0, 0, full, TILE_TOKENS)] if full else []
    if rest:
        runs.append((full * TILE_TOKENS, code_rows(full * TILE_TOKENS, bits), 1, rest))
    return runs


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of the `codes` plane ``[..., rows, head_dim]`` from codes ``[..., tokens, head_dim]``, both uint8."""
    *lead, tokens, dim = codes.shape
    packed = codes.new_zeros(*lead, code_rows(tokens, bits), dim)
    per_byte = 8 // bits
    for token, row, tiles, size in _segments(tokens, bits):
        stride = -(-size // per_byte)
        source = codes[..., token : token + tiles * size, :].unflatten(-2, (tiles, size))
        target = packed[..., row : row + tiles * stride, :].unflatten(-2, (tiles, stride))
        for place in range(per_byte):
            piece = source[..., place * stride : (place + 1) * stride, :]
            target[..., : piece.shape[-2], :] |= piece << (bits * place)
    return packed


def unpack_codes(packed: torch.Tensor, tokens: int, bits: int, out: torch.Tensor) -> None:
    """Codes of `tokens` tokens from the rows of a `codes` plane, into `out` ``[..., tokens, head_dim]`` (any dtype)."""
    per_byte = 8 // bits
    for token, row, tiles, size in _segments(tokens, bits):
        stride = -(-size // per_byte)
        source = packed[..., row : row + tiles * stride, :].unflatten(-2, (tiles, stride))
        target = out[..., token : token + tiles * size, :].unflatten(-2, (tiles, size))
        for place in range(per_byte):
            piece = target[..., place * stride : (place + 1) * stride, :]
            piece.copy_((source[..., : piece.shape[-2], :] >> (bits * place)) & (2**bits - 1))
