"""Quantising blocks of channels in Triton: the arithmetic of `_blocks`, bit for bit.

For kernels launched without contraction of products into sums.
"""

import triton
import triton.language as tl

from qvg_paged.kernels._blocks import (
    PRODUCT_BITS,
    SEARCH_STEPS,
    search_bits,
    search_stride,
    search_weight,
    thresholds,
)
from qvg_paged.kernels.formats import Codec, ScaleRule

__all__ = ["fp8_byte", "fp8_value", "quantise", "quantise_constants"]

RULES = {ScaleRule.ABSMAX: 0, ScaleRule.LEAST_SQUARES: 1, ScaleRule.SEARCH: 2}


def quantise_constants(codec: Codec) -> dict[str, int | float]:
    """Compile-time arguments of `quantise`."""
    count, first, lowest = thresholds(codec.grid)
    weight = search_weight(codec.grid, codec.block_size)
    return {
        "B": codec.block_size, "TOP": codec.grid.max_level, "STEP": codec.grid.step, "RULE": RULES[codec.scale_rule],
        "MIDS": count, "FIRST": first, "LOWEST": lowest, "WEIGHT": weight, "STEPS": SEARCH_STEPS,
        "STRIDE": search_stride(codec.grid), "SEARCH": search_bits(codec.block_size),
        "PRODUCT": PRODUCT_BITS,
    }  # fmt: skip


@triton.jit
def fp8_value(byte):
    """Float32 value of a non-negative E4M3 byte (int32)."""
    # As the bits of a float32, subnormal where E4M3 is: only the exponent's bias differs, by 120.
    return (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def fp8_byte(x):
    """Nearest E4M3 byte (int32) of non-negative float32, ties to even, saturating: as the hardware, and portable."""
    x = tl.minimum(x, 448.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Adding 2**14 leaves multiples of 2**-9, the spacing of subnormals, in the last places of the significand.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def _codes(x, scale, TOP: tl.constexpr, STEP: tl.constexpr):
    """Codes (int32) of `x` under `scale`."""
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0))
    inverse = tl.where(scale > 0, inverse, 0.0)
    if STEP == 2:
        codes = tl.minimum(tl.maximum(x * (inverse * 0.5) + 2.0, 0.0), 3.0).to(tl.int32)
    elif TOP == 1:
        large = (tl.abs(x) * inverse >= 0.5) | (scale <= 0)
        codes = tl.where(large, tl.where(x < 0, 0, 2), 1)
    else:
        size = tl.minimum(tl.where(scale > 0, tl.abs(x) * inverse, TOP), TOP)
        whole = size.to(tl.int32)
        whole += tl.where(size - whole.to(tl.float32) >= 0.5, 1, 0)
        codes = tl.where(x < 0, -whole, whole) + TOP
    return codes


@triton.jit
def _on_grid(x, BITS: tl.constexpr):
    """Nearest multiples of ``2**-BITS`` of float32 values from 0 to 1."""
    return (x + 2.0 ** (23 - BITS)) - 2.0 ** (23 - BITS)


@triton.jit
def _search_error(magnitude, total, unit, tried, STEP: tl.constexpr, MIDS: tl.constexpr, FIRST: tl.constexpr,
                  WEIGHT: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Squared error under a scale byte, up to what all scales have in common."""
    scale = _on_grid(fp8_value(tried) * unit, BITS - 1)  # [rows, blocks, 1]
    # Clipping to one changes nothing, but makes subtraction and maximum one instruction.
    over = tl.sum(tl.minimum(tl.maximum(magnitude - scale * FIRST, 0.0), 1.0), 2, keep_dims=True)
    for place in tl.static_range(1, MIDS):
        over += tl.sum(tl.minimum(tl.maximum(magnitude - scale * (FIRST + place), 0.0), 1.0), 2, keep_dims=True)
    return scale * (scale * WEIGHT - (over * (2 * STEP) + total))


@triton.jit
def _search(x, byte, unit, STEP: tl.constexpr, MIDS: tl.constexpr, FIRST: tl.constexpr, LOWEST: tl.constexpr,
            WEIGHT: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    magnitude = _on_grid(tl.abs(x) * unit, BITS)  # [rows, blocks, B]
    total = tl.sum(magnitude, 2, keep_dims=True) * (2 * LOWEST)
    best = byte
    best_error = tl.full(byte.shape, float("inf"), tl.float32)
    for step in tl.static_range(0 if STRIDE == 1 else 1, STEPS, STRIDE):
        tried = tl.where(byte > step, byte - step, tl.minimum(byte, 1))
        error = _search_error(magnitude, total, unit, tried, STEP, MIDS, FIRST, WEIGHT, BITS)
        best = tl.where(error < best_error, tried, best)
        best_error = tl.minimum(error, best_error)
    middle = best
    for side in tl.static_range(2 if STRIDE > 1 else 0):
        tried = tl.minimum(middle + 1, byte) if side else tl.maximum(middle - 1, tl.minimum(byte, 1))
        error = _search_error(magnitude, total, unit, tried, STEP, MIDS, FIRST, WEIGHT, BITS)
        best = tl.where(error < best_error, tried, best)
        best_error = tl.minimum(error, best_error)
    return best


@triton.jit
def _least_squares(x, byte, unit, absmax, TOP: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    level = _codes(x, fp8_value(byte), TOP, STEP) * STEP - TOP
    share = (x * unit * (1 << BITS)).to(tl.int32)
    product = tl.sum(share * level, 2, keep_dims=True).to(tl.float32)
    energy = tl.maximum(tl.sum(level * level, 2, keep_dims=True).to(tl.float32), 1.0)
    fitted = fp8_byte(tl.div_rn(product * (absmax * (1.0 / (1 << BITS))), energy))
    return tl.where((byte > 0) & (fitted > 0), fitted, byte)


@triton.jit
def quantise(x, inverse_top, TOP: tl.constexpr, STEP: tl.constexpr, RULE: tl.constexpr,
             MIDS: tl.constexpr, FIRST: tl.constexpr, LOWEST: tl.constexpr, WEIGHT: tl.constexpr, STEPS: tl.constexpr,
             STRIDE: tl.constexpr, SEARCH: tl.constexpr, PRODUCT: tl.constexpr):  # fmt: skip
    """Codes like `x` ``[rows, blocks, B]`` (float32) and scale bytes ``[rows, blocks, 1]``, both int32."""
    absmax = tl.max(tl.abs(x), 2, keep_dims=True)
    byte = fp8_byte(absmax * inverse_top)
    if RULE != 0:
        unit = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.where(byte > 0, absmax, 1.0))
        unit = tl.where(byte > 0, unit, 0.0)
        if RULE == 1:
            byte = _least_squares(x, byte, unit, absmax, TOP, STEP, PRODUCT)
        else:
            byte = _search(x, byte, unit, STEP, MIDS, FIRST, LOWEST, WEIGHT, STEPS, STRIDE, SEARCH)
    return _codes(x, fp8_value(byte), TOP, STEP), byte
