"""The block quantiser against exact rational arithmetic, and the packing of codes bit by bit."""

from fractions import Fraction

import pytest
import torch

from qvg_paged.kernels._blocks import SEARCH_STEPS, pack_codes, quantise_blocks, search_stride, unpack_codes
from qvg_paged.kernels.formats import Codec, Grid, ScaleRule
from qvg_paged.kernels.layout import code_position, code_rows

FP8 = [Fraction(float(v)) for v in torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()]
pytestmark = pytest.mark.usefixtures("one_thread")


def nearest_fp8(x: Fraction) -> set[int]:
    """Bytes an exact rounding may give: the even one of two at a tie is not insisted on for inexact quotients."""
    x = min(x, FP8[-1])
    distance = [abs(x - value) for value in FP8]
    return {byte for byte, d in enumerate(distance) if d == min(distance)}


def decode(blocks_codes: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    level = grid.step * blocks_codes.float() + grid.offset
    return level * scales.view(torch.float8_e4m3fn).float()[..., None]


def awkward_blocks(count: int, size: int, top: int) -> torch.Tensor:
    """BF16 blocks of every magnitude, with zeros of both signs, subnormals and halves of the scale."""
    x = (torch.randn(count, size) * torch.logspace(-6, 4, count)[:, None]).bfloat16()
    x[::7, : size // 2] = 0.0
    x[1::7, ::3] = -0.0
    x[2::17] = 0.0
    x[3::17] = 1e-39 * torch.randn(size)
    x[4::17] = 2.0**-10
    x[5::17] *= 2.0**-12
    for row in range(6, count, 5):
        scale = 2.0 ** int(torch.randint(-5, 8, ())) * (1 + int(torch.randint(0, 8, ())) / 8)  # an E4M3 value
        x[row] = scale * torch.tensor([0.5, -0.5, top - 0.5, -0.25]).repeat(size // 4)
        x[row, 0] = top * scale
    return x


@pytest.mark.parametrize("grid", [Grid.TERNARY, Grid.INT4])
def test_released_grids_round_as_exact_arithmetic_does_except_at_ties(grid: Grid) -> None:
    blocks = awkward_blocks(200, 16, grid.max_level)
    scales, codes = quantise_blocks(blocks.float(), Codec(grid=grid, block_size=16))
    top, ties = grid.max_level, 0
    for block, byte, code in zip(blocks.tolist(), scales.tolist(), codes.tolist(), strict=True):
        exact = [Fraction(x) for x in block]
        assert byte in nearest_fp8(max(abs(x) for x in exact) / top)
        for x, got in zip(exact, code, strict=True):
            if byte == 0:  # x / 0 is infinite, 0 / 0 ends at the largest level
                assert got == (0 if x < 0 else 2 * top)
                continue
            size = abs(x) / FP8[byte]
            whole, rest = divmod(size, 1)
            tie = rest == Fraction(1, 2)
            allowed = {int(whole), int(whole) + 1} if tie else {int(whole) + (rest > Fraction(1, 2))}
            ties += tie
            assert got - top in {(-1 if x < 0 else 1) * min(level, top) for level in allowed}
    assert ties > 20


def test_a_tie_between_scales_goes_to_the_even_one_and_a_tie_between_levels_away_from_zero() -> None:
    block = torch.zeros(3, 16)
    block[0, :3] = torch.tensor([1.0625, 0.5, -0.5])  # half way between 1 and 1.125
    block[1, 0] = 1.1875  # half way between 1.125 and 1.25
    block[2, 0] = 2.0**-10  # half of the smallest scale
    scales, codes = quantise_blocks(block, Codec(grid=Grid.TERNARY, block_size=16))
    assert scales.view(torch.float8_e4m3fn).float().tolist() == [1.0, 1.25, 0.0]
    assert codes[0, :4].tolist() == [2, 2, 0, 1]


def test_scales_saturate_instead_of_overflowing() -> None:
    scales, codes = quantise_blocks(torch.full((1, 16), -3e38), Codec(grid=Grid.QUATERNARY, block_size=16))
    assert scales.view(torch.float8_e4m3fn).float().item() == 448.0
    assert codes.eq(0).all()


def test_quaternary_levels_are_the_nearest_of_four() -> None:
    blocks = torch.randn(50, 64)
    scales, codes = quantise_blocks(blocks, Codec(grid=Grid.QUATERNARY))
    levels = torch.tensor([-3.0, -1.0, 1.0, 3.0]) * scales.view(torch.float8_e4m3fn).float()[:, None]
    best = (blocks[..., None] - levels[:, None]).abs().amin(-1)
    torch.testing.assert_close((decode(codes, scales, Grid.QUATERNARY) - blocks).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [Grid.TERNARY, Grid.QUATERNARY, Grid.INT4])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_searched_scales_are_the_best_of_those_they_may_choose_from(grid: Grid, size: int) -> None:
    blocks = torch.randn(40, size) * torch.logspace(-2, 2, 40)[:, None]
    errors = {}
    for rule in ScaleRule:
        scales, codes = quantise_blocks(blocks, Codec(grid=grid, block_size=16, scale_rule=rule))
        errors[rule] = (decode(codes, scales, grid) - blocks).square().sum(-1)
    widest, _ = quantise_blocks(blocks, Codec(grid=grid, block_size=16))
    tried = []
    for step in range(SEARCH_STEPS):
        scale = (widest.int() - step).clamp(min=1).to(torch.uint8).view(torch.float8_e4m3fn).float()
        levels = torch.stack([level * scale for level in range(-grid.max_level, grid.max_level + 1, grid.step)], -1)
        tried.append((blocks[..., None] - levels[:, None]).square().amin(-1).sum(-1))
    every, found = torch.stack(tried), errors[ScaleRule.SEARCH]
    best = every.amin(0)
    if search_stride(grid) == 1:
        torch.testing.assert_close(found, best, rtol=1e-4, atol=0)
    else:  # the best of some, or one of its neighbours
        some = every[1 :: search_stride(grid)]
        matches = torch.zeros_like(found, dtype=torch.bool)
        for place, step in enumerate(range(1, SEARCH_STEPS, search_stride(grid))):
            around = every[step - 1 : step + 2].amin(0)
            matches |= (some[place] <= some.amin(0) * (1 + 1e-4)) & ((found - around).abs() <= 1e-4 * around)
        assert matches.all()
        assert float((found / best).mean()) < 1.01
    assert float(errors[ScaleRule.SEARCH].sum()) < float(errors[ScaleRule.ABSMAX].sum())
    if grid is not Grid.INT4:
        assert float(errors[ScaleRule.LEAST_SQUARES].sum()) < float(errors[ScaleRule.ABSMAX].sum())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 64, 255, 256, 257, 600])
def test_packing_is_undone_exactly_and_follows_code_position(bits: int, tokens: int) -> None:
    codes = torch.randint(0, 2**bits, (2, tokens, 8), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, code_rows(tokens, bits), 8)
    out = torch.empty(2, tokens, 8)
    unpack_codes(packed, tokens, bits, out)
    assert torch.equal(out, codes.float())
    row, shift = code_position(tokens, bits)
    assert torch.equal((packed[:, row] >> shift[:, None]) & (2**bits - 1), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_byte_survives_unpacking_and_packing(bits: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(1, 8, 32)
    tokens = 8 * (8 // bits)
    codes = torch.empty(1, tokens, 32, dtype=torch.uint8)
    unpack_codes(packed, tokens, bits, codes)
    assert torch.equal(pack_codes(codes, bits), packed)
