"""Triton kernels that bound what quantised pages hold; from a bound follows the unit of an FP8 scratch.

Every problem (a KV head of a sequence) has one unit per tensor: stored = value / unit.
"""

import torch
import triton
import triton.language as tl

from qvg_paged.kernels._page_tiles import part_bytes, part_code
from qvg_paged.kernels.launch import launch
from qvg_paged.kernels.layout import GRANULE, PageLayout

__all__ = ["bound_pages", "clear_bounds", "read_unit"]

ROOM = tl.constexpr(224.0)
"""The bound in stored units: half of E4M3's range, because turning a pair may enlarge a channel."""
UNIT = tl.constexpr(GRANULE)
ANYWHERE = ["pages", "codebooks", "pages_each", "tokens"]
"""Whatever changes with the length of a history must not decide what is compiled."""


@triton.jit
def read_unit(bounds, problem, PART: tl.constexpr):
    """Worth of a stored 1.0 of keys (`PART` 0) or values (1)."""
    at = bounds + problem * 4 + PART * 2
    return tl.maximum(tl.load(at) + tl.load(at + 1), 1e-30) / ROOM


@triton.jit
def _raise_bound(target, bound):
    # Non-negative floats are ordered like their bits.
    tl.atomic_max(target.to(tl.pointer_type(tl.int32)), bound.to(tl.int32, bitcast=True))


@triton.jit
def _bound_part(
    buffer, page, book, fresh, bounds, head, tokens, heads, part, CODE: tl.constexpr, D: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Raise ``bounds[0]`` to the largest residual of a page, ``bounds[1]`` to the largest sum of centroids."""
    channel = tl.arange(0, D)
    base = book.to(tl.int64) * UNIT
    factors = tl.full([D], 1.0, tl.float32)
    if CODE.balanced:
        start = (buffer + (base + part.balance)).to(tl.pointer_type(tl.bfloat16))
        factors = tl.abs(tl.load(start + head * D + channel).to(tl.float32))
    size = (D // CODE.block) * tokens
    start = buffer + (page.to(tl.int64) * UNIT + part.scales) + head * size
    largest = tl.zeros([N], tl.int32)
    for i in range(0, size, N):
        at = i + tl.arange(0, N)
        largest = tl.maximum(largest, tl.load(start + at, mask=at < size, other=0).to(tl.int32))
    byte = tl.max(largest, 0)  # scales are positive: their bytes are ordered like their values
    scale = tl.exp2(tl.maximum((byte >> 3) - 10, -9).to(tl.float32)) * tl.where(byte >= 8, (byte & 7) + 8, byte & 7).to(
        tl.float32
    )
    _raise_bound(bounds, scale * (-CODE.offset) * tl.max(factors, 0))
    if (CODE.stages > 0) & fresh:
        total = tl.zeros([D], tl.float32)
        stages: tl.constexpr = CODE.stages
        for stage in tl.static_range(stages):
            row = (stage * heads + head) * part.num_centroids
            most = tl.zeros([N // D, D], tl.float32)
            for first in range(0, part.num_centroids, N // D):
                at = first + tl.arange(0, N // D)
                here = (row + at)[:, None] * D + channel[None, :]
                inside = (at < part.num_centroids)[:, None]
                if CODE.fp8_centroids:
                    table = (buffer + (base + part.centroids)).to(tl.pointer_type(tl.float8e4nv))
                    block = tl.load(table + here, mask=inside, other=0.0).to(tl.float32)
                else:
                    table = (buffer + (base + part.centroids)).to(tl.pointer_type(tl.bfloat16))
                    block = tl.load(table + here, mask=inside, other=0.0).to(tl.float32)
                most = tl.maximum(most, tl.abs(block))
            column = tl.max(most, 0)
            if CODE.fp8_centroids:
                scales = (buffer + (base + part.centroid_scales)).to(tl.pointer_type(tl.float32))
                column *= tl.load(scales + stage * heads + head)
            total += column
        _raise_bound(bounds + 1, tl.max(total * factors, 0))


@triton.jit(do_not_specialize=["count"])
def _clear_kernel(bounds, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(bounds + at, tl.zeros([N], tl.float32), mask=at < count)


@triton.jit(do_not_specialize=ANYWHERE)
def _bound_kernel(
    bounds, buffer, pages, codebooks, tokens, heads, pages_each, key_part, value_part,
    KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    index, head = tl.program_id(0), tl.program_id(1)
    page, book = tl.load(pages + index), tl.load(codebooks + index)
    fresh = (index % pages_each == 0) | (book != tl.load(codebooks + tl.maximum(index - 1, 0)))
    problem = (index // pages_each * heads + head).to(tl.int64)
    if tl.program_id(2) == 0:
        _bound_part(buffer, page, book, fresh, bounds + problem * 4, head, tokens, heads, key_part, KEY, D, N)
    else:
        _bound_part(buffer, page, book, fresh, bounds + problem * 4 + 2, head, tokens, heads, value_part, VALUE, D, N)


def clear_bounds(bounds: torch.Tensor) -> None:
    """Launch; arguments as in `qvg_paged.kernels.reference_fp8.clear_bounds`."""
    launch(_clear_kernel, (triton.cdiv(bounds.numel(), 256),), bounds, bounds.numel(), N=256)


def bound_pages(
    buffer: torch.Tensor,
    pages: torch.Tensor,
    codebooks: torch.Tensor,
    layout: PageLayout,
    layer: int,
    bounds: torch.Tensor,
) -> None:
    """Launch; arguments as in `qvg_paged.kernels.reference_fp8.bound_pages`."""
    key, value = layout.key, layout.value
    launch(
        _bound_kernel, (len(pages), key.heads, 2),
        bounds, buffer, pages, codebooks, key.tokens, key.heads, len(pages) * key.heads // len(bounds),
        part_bytes(key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
        part_bytes(value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
        KEY=part_code(key), VALUE=part_code(value), D=key.head_dim, N=16384, num_warps=8,
    )  # fmt: skip
