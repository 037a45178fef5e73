"""What a span weighs, what encoding it needs beside it, and the digest of its bytes."""

from dataclasses import replace

import pytest
import torch

from qvg_paged.kernels.codec import encode_span
from qvg_paged.kernels.digest import digest_bytes
from qvg_paged.kernels.encode import encode_part, encode_workspace_nbytes
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import QVG, QVG_PRO, CentroidType, Codec, Grid, ScaleRule, get_format
from qvg_paged.kernels.layout import GRANULE, PartLayout, align

QVG4 = get_format("qvg4-int2").key
MODELS = {  # frames, tokens per frame, heads, head_dim, published ratio
    "self-forcing": (24, 1560, 12, 128, 6.966),
    "longcat": (19, 1560, 32, 128, 6.880),
    "hy-worldplay": (8, 880, 24, 256, 5.84),
}


@pytest.mark.parametrize(("model", "balanced"), [*((model, False) for model in MODELS), ("hy-worldplay", True)])
def test_a_span_of_a_real_model_weighs_what_the_formula_says(model: str, balanced: bool) -> None:
    """One head is encoded; bytes of all heads follow, planes being per head."""
    frames, tokens, heads, dim, ratio = MODELS[model]
    codec = replace(QVG, balanced=balanced)
    given = {
        "initial_centroids": torch.randn(1, 1, 256, dim),
        "ids": torch.randint(0, 256, (1, 1, frames * tokens), dtype=torch.uint8),
    }
    span = encode_span(torch.randn(frames * tokens, 1, dim).bfloat16(), codec, tokens_per_frame=tokens, **given)
    dense = frames * tokens * dim * 2
    formula = frames * tokens * (2 * dim // 8 + dim // 64 + 1) + 256 * dim * 2 + (2 * dim if balanced else 0)
    assert span.payload_nbytes == formula
    assert span.nbytes <= 1.05 * span.payload_nbytes
    if not balanced:
        assert dense / span.payload_nbytes == pytest.approx(ratio, abs=0.0051 if ratio == 5.84 else 0.00051)
    every = replace(span.layout, heads=heads)
    assert frames * every.payload_nbytes + every.codebook_payload_nbytes == heads * span.payload_nbytes
    stored = frames * align(every.nbytes, GRANULE) + align(every.codebook_nbytes, GRANULE)
    assert stored <= 1.05 * heads * formula


@pytest.mark.parametrize(
    ("codec", "tokens", "frames", "heads", "dim", "dtype"),
    [
        (QVG, 64, 8, 3, 64, torch.float32),
        (QVG4, 64, 8, 3, 64, torch.bfloat16),
        (replace(QVG_PRO, centroid_type=CentroidType.FP8), 300, 2, 8, 64, torch.float32),
        (replace(QVG4, grid=Grid.INT4, scale_rule=ScaleRule.LEAST_SQUARES), 1560, 2, 2, 128, torch.bfloat16),
        (replace(QVG4, num_centroids=256), 16, 2, 4, 256, torch.float32),
        (Codec(grid=Grid.TERNARY, stages=0), 880, 2, 4, 128, torch.float16),
    ],
)
def test_encoding_stays_within_the_workspace_it_announces(
    codec: Codec, tokens: int, frames: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    codec = replace(codec, iterations=1)
    layout = PartLayout(
        codec=codec, tokens=tokens, heads=heads, head_dim=dim, dtype=dtype,
        num_centroids=codec.centroids_for(frames * tokens),
    )  # fmt: skip
    size = align(layout.nbytes, GRANULE)
    pool = torch.zeros((frames + 1) * size + align(layout.codebook_nbytes, GRANULE), dtype=torch.uint8)
    x = torch.randn(frames * tokens, heads, dim).to(dtype)
    offsets = [frame * size for frame in range(frames)]
    with torch.profiler.profile(profile_memory=True) as profile:
        encode_part(x, layout, pool, offsets, frames * size if layout.codebook_planes else None)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = used = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    announced = encode_workspace_nbytes(layout, frames * tokens)
    assert 0 < peak <= announced
    assert announced < 6 * peak + (1 << 20)


def test_workspace_does_not_grow_with_the_number_of_heads_of_long_spans() -> None:
    def workspace(heads: int) -> int:
        layout = PartLayout(
            codec=QVG, tokens=1560, heads=heads, head_dim=128, dtype=torch.bfloat16, num_centroids=256
        )  # fmt: skip
        return encode_workspace_nbytes(layout, 24 * 1560)

    assert workspace(40) == workspace(12) < 24 * 1560 * 12 * 128 * 2


def test_digest_tells_bytes_and_their_places_apart() -> None:
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    whole = digest_bytes(data, 0, 5000)
    assert 0 <= whole < 2**64
    assert digest_bytes(data.clone(), 0, 5000) == whole
    for place in torch.randint(0, 5000, (50,)).tolist():
        changed = data.clone()
        changed[place] ^= 1 << (place % 8)
        assert digest_bytes(changed, 0, 5000) != whole
    swapped = data.clone()
    swapped[:8], swapped[8:16] = data[8:16], data[:8]
    assert digest_bytes(swapped, 0, 5000) != whole
    zeros = torch.zeros(64, dtype=torch.uint8)
    assert len({digest_bytes(zeros, 0, n) for n in range(65)}) == 65


@pytest.mark.parametrize("start", [0, 1, 7, 8, 300])
@pytest.mark.parametrize("nbytes", [0, 1, 8, 1000, 3 << 20])
def test_digest_depends_on_the_bytes_alone(start: int, nbytes: int) -> None:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    pool = torch.randint(0, 256, (start + nbytes + 50,), dtype=torch.uint8)
    pool[start : start + nbytes] = data
    assert digest_bytes(pool, start, nbytes) == digest_bytes(data, 0, nbytes)


def test_digest_of_bytes_outside_the_buffer_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="start, nbytes: expected a range inside 10 bytes, got 8"):
        digest_bytes(torch.zeros(10, dtype=torch.uint8), 8, 3)
    with pytest.raises(ArgumentError, match="buffer"):
        digest_bytes(torch.zeros(10), 0, 3)


@pytest.mark.parametrize(
    ("tokens_per_centroid", "span_tokens", "expected"),
    [(40, 1024, 25), (40, 10240, 256), (40, 37440, 256), (40, 39, 1), (None, 1024, 64), (None, 37440, 256)],
)
def test_a_codebook_grows_with_its_span_up_to_one_byte_ids(
    tokens_per_centroid: int | None, span_tokens: int, expected: int
) -> None:
    codec = replace(QVG, tokens_per_centroid=tokens_per_centroid)
    assert codec.centroids_for(span_tokens) == expected
    assert replace(codec, num_centroids=7).centroids_for(span_tokens) == 7
    assert replace(codec, stages=0).centroids_for(span_tokens) == 0


def test_a_centroid_needs_a_token() -> None:
    with pytest.raises(ArgumentError, match="tokens_per_centroid: expected >= 1, got 0"):
        Codec(grid=Grid.TERNARY, tokens_per_centroid=0)
