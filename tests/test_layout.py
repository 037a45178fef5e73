"""Every byte of a page and of a codebook has one owner, and the sizes are those of the published formula."""

from dataclasses import replace

import pytest
import torch

from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import (
    FORMATS,
    QVG,
    QVG_PRO,
    CentroidType,
    Codec,
    Grid,
    default_num_centroids,
    get_format,
)  # fmt: skip
from qvg_paged.kernels.layout import GRANULE, TILE_TOKENS, PageLayout, PartLayout, code_position, code_rows
from qvg_paged.kernels.rope import RoPELayout

SIZES = [1, 3, 64, 200, 255, 256, 257, 880, 1560]


def build(name: str, tokens: int = 100, head_dim: int = 128, **changes: object) -> PageLayout:
    fmt = get_format(name).with_codecs(**changes)
    return PageLayout.build(
        fmt, num_layers=3, tokens=tokens, heads=2, head_dim=head_dim, dtype=torch.bfloat16, span_tokens=8 * tokens,
        split_pairs=True,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("bits", [2, 4])
def test_every_token_has_a_place_of_its_own_among_the_code_rows(tokens: int, bits: int) -> None:
    row, shift = code_position(tokens, bits)
    assert len(set(zip(row.tolist(), shift.tolist(), strict=True))) == tokens
    assert int(row.max()) == code_rows(tokens, bits) - 1
    assert int(shift.max()) <= 8 - bits
    assert code_rows(tokens, bits) * 8 - tokens * bits < 8


def test_tokens_of_one_byte_lie_a_fixed_stride_apart() -> None:
    row, shift = code_position(TILE_TOKENS + 24, 2)
    assert [int(row[t]) for t in (0, 64, 128, 192)] == [0, 0, 0, 0]
    assert [int(shift[t]) for t in (0, 64, 128, 192)] == [0, 2, 4, 6]
    assert [int(row[TILE_TOKENS + t]) for t in (0, 6, 12, 18)] == [64] * 4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", CentroidType)
def test_planes_are_aligned_and_do_not_overlap(name: str, kind: CentroidType) -> None:
    layout = build(name, tokens=37, centroid_type=kind)
    for part in (layout.key, layout.value):
        for planes, total in ((part.planes, part.nbytes), (part.codebook_planes, part.codebook_nbytes)):
            end = 0
            for plane in planes:
                assert plane.offset % 16 == 0
                assert plane.offset >= end
                end = plane.offset + plane.nbytes
            assert end <= total < end + 16
    assert layout.page_nbytes % GRANULE == 0
    assert layout.codebook_nbytes % GRANULE == 0


def test_parts_of_all_layers_follow_each_other_inside_a_page() -> None:
    layout = build("qvg4-int2")
    starts = [start for layer in range(3) for start in (layout.key_offset(layer), layout.value_offset(layer))]
    sizes = [layout.key.nbytes, layout.value.nbytes] * 3
    assert starts == [sum(sizes[:i]) for i in range(6)]
    assert layout.page_nbytes - sum(sizes) < GRANULE
    assert layout.value_codebook_offset(2) + layout.value.codebook_nbytes <= layout.codebook_nbytes


@pytest.mark.parametrize(("span_tokens", "uniform"), [(1024, False), (64 * 256, True), (37440, True)])
def test_k_and_v_with_as_many_centroids_go_in_the_same_launches(span_tokens: int, uniform: bool) -> None:
    layout = PageLayout.build(
        get_format("best-2bit"), num_layers=1, tokens=64, heads=2, head_dim=128, dtype=torch.bfloat16,
        span_tokens=span_tokens, split_pairs=True,
    )  # fmt: skip
    assert (layout.key.num_centroids == layout.value.num_centroids) == uniform
    assert layout.is_uniform == uniform


def test_payload_follows_the_formula_of_the_paper() -> None:
    for codec, bits in ((QVG, 2), (QVG_PRO, 2), (replace(QVG, grid=Grid.INT4), 4)):
        part = PartLayout(
            codec=codec, tokens=1560, heads=3, head_dim=128, dtype=torch.bfloat16, num_centroids=256
        )  # fmt: skip
        per_token = bits * 128 // 8 + 128 // codec.block_size + codec.stages
        assert part.payload_nbytes == 3 * 1560 * per_token
        assert part.codebook_payload_nbytes == 3 * codec.stages * 256 * 128 * 2


def test_a_plane_view_writes_through_to_the_buffer() -> None:
    part = build("qvg-int2").key
    buffer = torch.zeros(part.nbytes + 64, dtype=torch.uint8)
    part.plane("ids").view(buffer, 32)[1, 0, 99] = 7
    assert buffer.nonzero().flatten().tolist() == [32 + part.plane("ids").offset + part.plane("ids").nbytes - 1]


def test_split_pairs_apply_to_keys_with_interleaved_pairs_only() -> None:
    kwargs = {"num_layers": 1, "tokens": 8, "heads": 1, "head_dim": 64, "dtype": torch.float16, "span_tokens": 64}
    layout = PageLayout.build(get_format("qvg-int2"), split_pairs=True, **kwargs)  # type: ignore[arg-type]
    assert layout.key.split_pairs
    assert not layout.value.split_pairs
    assert layout.key.channel_order.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    half = PageLayout.build(
        get_format("qvg-int2"), split_pairs=True, key_pairing=RoPELayout.HALF_SPLIT, **kwargs  # type: ignore[arg-type]
    )  # fmt: skip
    assert not half.key.split_pairs
    assert (half.key.pairing, half.value.pairing) == (RoPELayout.HALF_SPLIT, None)
    dense = PageLayout.build(get_format("dense"), split_pairs=True, **kwargs)  # type: ignore[arg-type]
    assert not dense.key.split_pairs


@pytest.mark.parametrize(
    ("span", "expected"), [(1, 1), (31, 1), (32, 2), (512, 32), (1023, 32), (4096, 256), (37440, 256)]
)
def test_default_centroids_are_a_sixteenth_of_the_span_at_most(span: int, expected: int) -> None:
    assert default_num_centroids(span) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: Codec(grid=Grid.TERNARY, block_size=48),
        lambda: Codec(grid=Grid.TERNARY, stages=9),
        lambda: Codec(grid=Grid.TERNARY, num_centroids=257),
        lambda: Codec(grid=Grid.TERNARY, iterations=-1),
        lambda: get_format("qvg-int3"),
        lambda: build("qvg-int2", head_dim=96),
        lambda: build("qvg-int2", tokens=0),
        lambda: build("dense").key.plane("codes"),
    ],
)
def test_impossible_codecs_and_layouts_are_argument_errors(make: object) -> None:
    with pytest.raises(ArgumentError, match=r"expected .*got"):
        make()  # type: ignore[operator]


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="qvg4-int2"):
        get_format("int3")
