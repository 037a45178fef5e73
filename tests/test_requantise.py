"""Requantising pages under the codebook they have, and digests of many ranges at once."""

from dataclasses import replace

import pytest
import torch

from qvg_paged import FORMATS, ArgumentError
from qvg_paged.kernels._blocks import quantise_blocks
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.codec import EncodedSpan, decode_span, encode_span
from qvg_paged.kernels.decode import read_centroids
from qvg_paged.kernels.digest import digest_bytes, digest_ranges
from qvg_paged.kernels.formats import DENSE_CODEC, Codec, Grid, ScaleRule
from qvg_paged.kernels.layout import GRANULE, align
from qvg_paged.kernels.requantise import requantise_part, requantise_workspace_nbytes

pytestmark = pytest.mark.usefixtures("one_thread")

QVG4 = FORMATS["qvg4-int2"].key
PAIRS = {
    "as in the paper": (FORMATS["qvg-int4"].key, FORMATS["qvg-int2"].key),
    "balanced": (replace(QVG4, grid=Grid.INT4), QVG4),
    "other blocks": (replace(QVG4, grid=Grid.INT4, block_size=16), replace(QVG4, scale_rule=ScaleRule.LEAST_SQUARES)),
    "two stages": (replace(QVG4, grid=Grid.INT4, stages=2), replace(QVG4, stages=2)),
    "no stages": (replace(QVG4, grid=Grid.INT4, stages=0), replace(QVG4, stages=0)),
}
FRAMES, TOKENS, HEADS, DIM = 3, 15, 2, 64


def requantised(source: EncodedSpan, codec: Codec, backend: Backend) -> EncodedSpan:
    """The span in another codec: its own codebook, and pages written by `requantise_part`."""
    layout = replace(source.layout, codec=codec)
    book = align(source.layout.codebook_nbytes, GRANULE)
    room = source.frames * align(layout.nbytes, GRANULE)
    buffer = torch.cat([source.buffer, torch.full((room,), 0xFF, dtype=torch.uint8)])
    places = [source.buffer.numel() + i * align(layout.nbytes, GRANULE) for i in range(source.frames)]
    pages = [source.part_offset(frame) // GRANULE for frame in range(source.frames)]
    requantise_part(buffer, source.layout, layout, pages, 0, places, backend=backend)
    assert buffer[: source.buffer.numel()].equal(source.buffer), "what was read is not touched"
    moved = torch.cat([source.buffer[:book], buffer[source.buffer.numel() :]])
    return EncodedSpan(moved, layout, source.frames)


TRITON_TOO = [("as in the paper", False, Backend.TRITON), ("balanced", True, Backend.TRITON)]


@pytest.mark.parametrize(
    ("pair", "split", "backend"),
    [(pair, split, Backend.TORCH) for pair in PAIRS for split in (False, True)] + TRITON_TOO,
)
def test_only_the_residual_is_quantised_anew(pair: str, split: bool, backend: Backend) -> None:
    source_codec, target_codec = PAIRS[pair]
    x = torch.randn(FRAMES * TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    source = encode_span(x, source_codec, tokens_per_frame=TOKENS, split_pairs=split, backend=Backend.TORCH)
    moved = requantised(source, target_codec, backend)
    plain = replace(source.layout, codec=replace(source_codec, stages=0, balanced=False), num_centroids=0)
    residual = decode_span(EncodedSpan(_pages(source), plain, FRAMES), torch.float32)
    scales, codes = quantise_blocks(residual.unflatten(-1, (-1, target_codec.block_size)), target_codec)
    values = scales.view(torch.float8_e4m3fn).float()[..., None] * (
        codes.float() * target_codec.grid.step + target_codec.grid.offset
    )
    full = decode_span(source, torch.float32) - decode_span(moved, torch.float32)
    expected = residual - values.flatten(-2)
    if source_codec.balanced:
        expected = expected * _balance(source, split)
    torch.testing.assert_close(full, expected, rtol=1e-5, atol=1e-5)
    for name in ("ids",) if source_codec.stages else ():
        for frame in range(FRAMES):
            before = source.layout.plane(name).view(source.buffer, source.part_offset(frame))
            assert moved.layout.plane(name).view(moved.buffer, moved.part_offset(frame)).equal(before)
    if source_codec.stages:
        assert read_centroids(moved.buffer, moved.layout, 0).equal(read_centroids(source.buffer, source.layout, 0))


def _pages(span: EncodedSpan) -> torch.Tensor:
    """Pages without a codebook before them, spaced as a layout without stages would space them."""
    layout = replace(span.layout, codec=replace(span.layout.codec, stages=0, balanced=False), num_centroids=0)
    size = align(layout.nbytes, GRANULE)
    starts = [span.part_offset(frame) for frame in range(span.frames)]
    return torch.cat(
        [torch.nn.functional.pad(span.buffer[s : s + layout.nbytes], (0, size - layout.nbytes)) for s in starts]
    )


def _balance(span: EncodedSpan, split: bool) -> torch.Tensor:
    stored = span.layout.plane("balance").view(span.buffer, 0).float()
    return torch.stack(stored.chunk(2, -1), -1).flatten(-2) if split else stored


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.TRITON])
def test_padding_of_new_pages_is_zero_and_both_backends_write_the_same(backend: Backend) -> None:
    source_codec, target_codec = PAIRS["balanced"]
    x = torch.randn(FRAMES * TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(4))
    source = encode_span(x, source_codec, tokens_per_frame=TOKENS, backend=Backend.TORCH)
    one, other = requantised(source, target_codec, Backend.TORCH), requantised(source, target_codec, backend)
    for frame in range(FRAMES):
        start = one.part_offset(frame)
        part = slice(start, start + one.layout.nbytes)
        assert one.buffer[part].equal(other.buffer[part])
        for plane in one.layout.planes:
            gap = slice(start + plane.offset + plane.nbytes, start + align(plane.offset + plane.nbytes, 16))
            assert not other.buffer[gap].any()


def test_dense_parts_are_copied() -> None:
    x = torch.randn(2 * TOKENS, HEADS, DIM)
    source = encode_span(x, DENSE_CODEC, tokens_per_frame=TOKENS)
    assert decode_span(requantised(source, DENSE_CODEC, Backend.TORCH), torch.float32).equal(x)
    assert requantise_workspace_nbytes(source.layout, 4) == GRANULE


def test_codecs_with_other_codebooks_are_refused() -> None:
    x = torch.randn(TOKENS, HEADS, DIM)
    source = encode_span(x, FORMATS["qvg-int4"].key)
    with pytest.raises(ArgumentError, match=r"target: expected .* but for grid"):
        requantised(source, QVG4, Backend.TORCH)
    with pytest.raises(ArgumentError, match=r"one place per page"):
        requantise_part(source.buffer, source.layout, source.layout, [1], 0, [])


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.TRITON])
def test_digests_of_many_ranges_are_those_of_each_range(backend: Backend) -> None:
    buffer = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    starts, sizes = [0, 256, 8, 1 << 17], [256, 0, 4096, 1 << 17]
    expected = [digest_bytes(buffer, start, size) for start, size in zip(starts, sizes, strict=True)]
    assert digest_ranges(buffer, starts, sizes, backend=backend) == expected
    buffer[starts[3] + 77] ^= 1
    assert digest_ranges(buffer, starts, sizes, backend=backend)[3] != expected[3]
    assert digest_ranges(buffer, [], []) == []
    uneven = buffer[:1021].clone()
    assert digest_ranges(uneven, [8], [1008], backend=backend) == [digest_bytes(buffer, 8, 1008)]
    for start, size in ((4, 8), (8, 4), (-8, 8), (1 << 18, 8)):
        with pytest.raises(ArgumentError, match="starts, sizes"):
            digest_ranges(buffer, [start], [size], backend=backend)
