"""Triton kernel that looks for NaN and infinity and sets a flag, which may lie on the host."""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE

__all__ = ["look"]

BLOCK = 2048
PROGRAMS = 528
"""Programs that share the words of a large stretch: four for each multiprocessor of a Hopper GPU."""
EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F807F80, torch.float16: 0x7C007C00}
"""Bits of a word of four bytes that are all set where a number in it is infinite or NaN."""


@triton.jit(do_not_specialize=["first", "count"])
def _look_kernel(
    words_ptr, flag_ptr, first, count,
    HIGH: tl.constexpr, LOW: tl.constexpr, UNIT: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    words_ptr += first.to(tl.int64) * UNIT
    count = count.to(tl.int64) * UNIT
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, PROGRAMS * BLOCK):
        place = start + tl.arange(0, BLOCK)
        word = tl.load(words_ptr + place, mask=place < count, other=0)
        found |= ((word & HIGH) == HIGH).to(tl.int32)
        if LOW:
            found |= ((word & LOW) == LOW).to(tl.int32)
    if tl.max(found, 0) > 0:
        tl.store(flag_ptr, 1)


def look(buffer: torch.Tensor, dtype: torch.dtype, first: int, count: int, flag: torch.Tensor) -> None:
    """Set `flag` ``[1]`` int32 if a number of `dtype` in ``buffer``, from half granule `first` on, `count` of them, is
    not finite.
    """
    bits = EXPONENTS[dtype]
    unit = GRANULE // 2 // 4
    programs = min(PROGRAMS, triton.cdiv(count * unit, BLOCK))
    launch(
        _look_kernel, (programs,), buffer.view(torch.int32), flag, first, count,
        HIGH=bits & 0x7FFF0000, LOW=bits & 0xFFFF, UNIT=unit, PROGRAMS=PROGRAMS, BLOCK=BLOCK,
    )  # fmt: skip
