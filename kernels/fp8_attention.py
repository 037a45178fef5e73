"""Attention to quantised pages in FP8: pages decoded to E4M3 keys and transposed values, E4M3 queries, the attention.

The 2-bit residual is several times coarser than E4M3, which Hopper multiplies at twice the rate of BF16. The number
type of a scratch is a parameter: float16 runs the same code where there are no FP8 products.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from qvg_paged.kernels import reference_fp8
from qvg_paged.kernels.backend import Backend, uses_triton
from qvg_paged.kernels.layout import GRANULE, PageLayout, align
from qvg_paged.kernels.rope import RoPELayout
from qvg_paged.kernels.slices import DecodeRun

__all__ = [
    "Fp8Scratch",
    "Fp8Shape",
    "attend",
    "decode_runs",
    "launch_shape",
    "num_splits",
    "quantise_queries",
    "reads",
    "scratch_nbytes",
]

MOST_SPLITS = 4
SPLIT_KEYS = 512
"""What a program costs beside its keys, in keys: its start and end, its partial result written and merged."""
MOST_BITS = 2
"""Codes of more bits are about as fine as E4M3, which would waste them."""
KEY_ALIGNMENT = 128
"""Keys of a scratch are padded to whole tiles."""


class Fp8Shape(NamedTuple):
    """How the attention kernel is compiled.

    Attributes:
        rows, keys: query rows and keys of a tile.
        num_warps, num_stages: of Triton.
        programs: how many a multiprocessor holds.
        registers: most of a thread, or None for as many as the compiler likes.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int = 2
    registers: int | None = None


def reads(layout: PageLayout) -> bool:
    """Whether pages of `layout` are attended to in FP8: K and V are quantised, to two bits a number at most.

    The tokens of a byte become neighbours, so keys and values need codes of as many bits.
    """
    key, value = layout.key.codec, layout.value.codec
    return not (key.is_dense or value.is_dense) and key.grid.bits == value.grid.bits <= MOST_BITS


def launch_shape(head_dim: int) -> Fp8Shape:
    """What was fastest on an H200; three programs of small heads fit, large heads take two warpgroups' registers."""
    if head_dim <= 64:
        return Fp8Shape(64, 128, 4, 3, programs=3, registers=168)
    return Fp8Shape(64, 128, 4, 3) if head_dim <= 128 else Fp8Shape(64, 64, 8, 3, programs=1)


def num_splits(problems: int, rows: int, num_keys: int, shape: Fp8Shape, device: torch.device) -> int:
    """Shares of the keys with which the machine is done first: whole waves of programs, each with its own costs."""
    programs, slots = -(-rows // shape.rows) * problems, shape.programs
    if device.type == "cuda":
        slots *= torch.cuda.get_device_properties(device).multi_processor_count

    def cost(splits: int) -> float:
        return -(-programs * splits // slots) * (num_keys / splits + SPLIT_KEYS)

    return min(range(1, min(MOST_SPLITS, max(1, num_keys // shape.keys)) + 1), key=cost)


@dataclass(frozen=True)
class Fp8Scratch:
    """Decoded keys and values of some problems; a problem is a KV head of a sequence.

    Attributes:
        keys: ``[problems, pitch, head_dim]``, row ``reference_fp8.key_rows(pitch)[i]`` holding the key of position i.
        values: ``[problems, head_dim, pitch]``, in order of position; anything beyond the last one.
        bounds: ``[problems, 4]`` float32, largest residual and largest sum of centroids of keys, then of values; stored
            numbers are values times 224 over the sum of both.
        num_keys: keys of each problem.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bounds: torch.Tensor
    num_keys: int

    @classmethod
    def carve(
        cls, workspace: torch.Tensor, problems: int, num_keys: int, head_dim: int, dtype: torch.dtype
    ) -> "Fp8Scratch":
        """Lay a scratch out at the start of `workspace`, 1-D uint8 of at least `scratch_nbytes`."""
        pitch = align(num_keys, KEY_ALIGNMENT)
        size = problems * pitch * head_dim * dtype.itemsize
        keys, values, rest = workspace[:size], workspace[size : 2 * size], workspace[2 * size :]
        return cls(
            keys.view(dtype).view(problems, pitch, head_dim),
            values.view(dtype).view(problems, head_dim, pitch),
            rest[: problems * 16].view(torch.float32).view(problems, 4),
            num_keys,
        )


def scratch_nbytes(problems: int, num_keys: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a scratch, a multiple of `GRANULE`."""
    keys = problems * align(num_keys, KEY_ALIGNMENT) * head_dim * dtype.itemsize
    return align(2 * keys + problems * 16, GRANULE)


def _launchers(backend: Backend, device: torch.device) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Modules that bound pages, decode them and attend."""
    if not uses_triton(backend, device):
        return (reference_fp8,) * 3
    from qvg_paged.kernels import (  # noqa: PLC0415 - triton is only loaded where it is used
        _fp8_attention_triton,
        _fp8_bounds_triton,
        _fp8_decode_triton,
    )

    return _fp8_bounds_triton, _fp8_decode_triton, _fp8_attention_triton


def decode_runs(
    scratch: Fp8Scratch,
    buffer: torch.Tensor,
    runs: tuple[DecodeRun, ...],
    layouts: tuple[PageLayout, ...],
    layer: int,
    rope_layout: RoPELayout,
    *,
    backend: Backend = Backend.AUTO,
) -> None:
    """Fill a scratch with all pages of `runs`; more than one run only for a single sequence.

    Args:
        scratch: written whole.
        buffer: 1-D uint8 pool.
        runs: pages of one quantised format each, as many of every sequence, sequence by sequence.
        layouts: page layouts that the runs' formats index.
        layer: layer to read.
        rope_layout: which channels form a pair, where a run rotates.
        backend: Triton or its PyTorch twin.
    """
    bounder, decoder, _ = _launchers(backend, buffer.device)
    bounder.clear_bounds(scratch.bounds)
    for run in runs:
        bounder.bound_pages(buffer, run.pages, run.codebooks, layouts[run.fmt], layer, scratch.bounds)
    first = 0
    for run in runs:
        layout = layouts[run.fmt]
        parts = (
            (layout.key, layout.key_offset(layer), layout.key_codebook_offset(layer), scratch.keys, run.rope),
            (layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer), scratch.values, None),
        )
        for part, offset, book_offset, out, rope in parts:
            decoder.decode_part(
                buffer, run.pages, run.codebooks, part, (offset, book_offset), scratch.bounds, out, first,
                out is scratch.values, rope, rope_layout,
            )  # fmt: skip
        first += run.count * layout.key.tokens


def quantise_queries(
    q: torch.Tensor, heads: int, split: bool, dtype: torch.dtype, *, backend: Backend = Backend.AUTO
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries in a scratch's type, a scale for every row.

    Args:
        q: ``[sequences, tokens, q_heads, head_dim]``, last dimension contiguous.
        heads: KV heads; the query heads that share one become rows of one problem.
        split: channels come as all even ones, then all odd ones, as those of the keys do.
        dtype: of the result.
        backend: Triton or its PyTorch twin.

    Returns:
        ``[sequences * heads, tokens * group, head_dim]`` and scales ``[sequences * heads, tokens * group]`` float32.
    """
    sequences, tokens, q_heads, dim = q.shape
    rows = tokens * (q_heads // heads)
    out = torch.empty((sequences * heads, rows, dim), dtype=dtype, device=q.device)
    scales = torch.empty((sequences * heads, rows), dtype=torch.float32, device=q.device)
    _launchers(backend, q.device)[2].quantise_queries(q, heads, split, out, scales)
    return out, scales


def attend(
    queries: torch.Tensor,
    query_scales: torch.Tensor,
    scratch: Fp8Scratch,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    heads: int,
    softmax_scale: float,
    shape: Fp8Shape,
    backend: Backend = Backend.AUTO,
) -> None:
    """Attend to shares of a scratch's keys.

    Args:
        queries, query_scales: of `quantise_queries`.
        scratch: at least one key.
        out: ``[splits, sequences * tokens, q_heads, head_dim]``, contiguous, written; at most as many splits as there
            are whole tiles of `shape.keys` keys, or one.
        lse: ``[splits, sequences * tokens, q_heads]`` float32, contiguous, natural log, written.
        heads: KV heads.
        softmax_scale: factor on the scores.
        shape: tile sizes.
        backend: Triton or its PyTorch twin.
    """
    _launchers(backend, queries.device)[2].attend(
        queries, query_scales, scratch.keys, scratch.values, scratch.bounds, out, lse, scratch.num_keys,
        softmax_scale, heads, shape,
    )  # fmt: skip
