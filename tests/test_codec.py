"""Spans encoded and read back: exact values, subsets, RoPE, determinism, accounting, bad input."""

from dataclasses import replace

import pytest
import torch

from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.codec import EncodedSpan, decode_span, encode_span
from qvg_paged.kernels.decode import decode_layer, decode_pages, read_centroids
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import DENSE_CODEC, QVG, QVG_PRO, BalanceRule, CentroidType, Codec, Grid, get_format
from qvg_paged.kernels.layout import GRANULE, PageLayout, code_position
from qvg_paged.kernels.rope import RoPELayout, RoPESpec, rotate

pytestmark = pytest.mark.usefixtures("one_thread")
QVG4 = get_format("qvg4-int2").key
FAST = {"iterations": 2}


def video_like(tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens around a few centres, as K and V of video are."""
    centres = 3 * torch.randn(12, heads, dim)
    return (centres[torch.randint(0, 12, (tokens,))] + torch.randn(tokens, heads, dim)).to(dtype)


def planes(span: EncodedSpan, frame: int) -> dict[str, torch.Tensor]:
    layout = span.layout
    found = {p.name: p.view(span.buffer, span.part_offset(frame)) for p in layout.planes}
    return found | {p.name: p.view(span.buffer, 0) for p in layout.codebook_planes}


def read_formula(span: EncodedSpan, frame: int) -> torch.Tensor:
    """The value of every element of a frame, written out from the definition of the format."""
    layout, codec, p = span.layout, span.layout.codec, planes(span, frame)
    row, shift = code_position(layout.tokens, codec.grid.bits)
    code = (p["codes"][:, row] >> shift[:, None]) & (2**codec.grid.bits - 1)  # [heads, tokens, stored channel]
    value = torch.empty(layout.heads, layout.tokens, layout.head_dim)
    for stored, natural in enumerate(layout.channel_order.tolist()):
        scale = p["scales"][:, natural // codec.block_size].float()
        x = scale * (codec.grid.step * code[..., stored].float() + codec.grid.offset)
        for stage in range(codec.stages):
            for head in range(layout.heads):
                centroid = p["centroids"][stage, head, :, stored].float()
                if "centroid_scales" in p:
                    centroid = centroid * p["centroid_scales"][stage, head]
                x[head] += centroid[p["ids"][head, stage].long()]
        if codec.balanced:
            x *= p["balance"][:, stored, None].float()
        value[..., natural] = x
    return value.transpose(0, 1)


@pytest.mark.parametrize(
    ("codec", "frames", "tokens", "heads", "dim", "split"),
    [
        (QVG, 3, 37, 2, 64, False),
        (replace(QVG, grid=Grid.INT4, centroid_type=CentroidType.FP8), 2, 300, 1, 128, True),
        (replace(QVG_PRO, num_centroids=5), 2, 64, 2, 64, True),
        (replace(QVG4, block_size=128, num_centroids=100), 2, 33, 1, 256, True),
        (Codec(grid=Grid.TERNARY, stages=0, block_size=16), 3, 20, 2, 64, True),
        (replace(QVG4, stages=0, block_size=32), 1, 1, 3, 64, False),
    ],
)
def test_decoded_values_are_those_of_the_stored_planes(
    codec: Codec, frames: int, tokens: int, heads: int, dim: int, split: bool
) -> None:
    x = video_like(frames * tokens, heads, dim)
    span = encode_span(x, replace(codec, **FAST), tokens_per_frame=tokens, split_pairs=split)
    expected = torch.cat([read_formula(span, frame) for frame in range(frames)])
    assert torch.equal(decode_span(span, torch.float32), expected)
    assert torch.equal(decode_span(span, torch.bfloat16), expected.bfloat16())
    assert torch.equal(decode_span(span, torch.float16), expected.half())


def test_frames_are_read_in_any_order_and_number() -> None:
    span = encode_span(video_like(5 * 24, 2, 64), replace(QVG, **FAST), tokens_per_frame=24)
    whole = decode_span(span, torch.float32).view(5, 24, 2, 64)
    assert torch.equal(decode_span(span, torch.float32, frames=[3, 0, 3]), whole[[3, 0, 3]].flatten(0, 1))
    assert decode_span(span, torch.float32, frames=[]).shape == (0, 2, 64)


@pytest.mark.parametrize("codec", [QVG, QVG4, DENSE_CODEC])
@pytest.mark.parametrize("layout", RoPELayout)
@pytest.mark.parametrize("split", [False, True])
def test_keys_are_rotated_to_the_positions_of_their_frames(codec: Codec, layout: RoPELayout, split: bool) -> None:
    spec = RoPESpec(head_dim=64, grid=(3, 7), layout=layout)
    x = video_like(4 * 21, 2, 64)
    span = encode_span(x, replace(codec, **FAST), tokens_per_frame=21, split_pairs=split, pairing=layout)
    plain = decode_span(span, torch.float32, frames=[2, 1])
    for positions, where in ((None, [2, 1]), ([90, 3], [90, 3])):
        expected = rotate(plain, *spec.tables(where).expand(), layout)
        for dtype in (torch.float32, torch.bfloat16):
            turned = decode_span(span, dtype, frames=[2, 1], rope=spec, positions=positions)
            assert torch.equal(turned, expected.to(dtype))


def test_pages_of_several_codebooks_decode_into_a_strided_output() -> None:
    codec = replace(QVG4, **FAST)
    spans = [encode_span(video_like(2 * 20, 2, 64), codec, tokens_per_frame=20) for _ in range(2)]
    pool = torch.cat([span.buffer for span in spans])
    start = [0, spans[0].nbytes // GRANULE]
    order = [(1, 0), (0, 1), (1, 1), (0, 0)]
    pages = torch.tensor([start[s] + spans[s].part_offset(f) // GRANULE for s, f in order], dtype=torch.int32)
    books = torch.tensor([start[s] for s, _ in order], dtype=torch.int32)
    out = torch.zeros(4 * 20, 5, 96)
    decode_pages(pool, pages, books, spans[0].layout, 0, 0, out[:, 1:3, 16:80])
    expected = torch.cat([decode_span(spans[s], torch.float32, frames=[f]) for s, f in order])
    assert torch.equal(out[:, 1:3, 16:80], expected)
    assert int(out.count_nonzero()) == int(expected.count_nonzero())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_frames_come_back_as_they_were(dtype: torch.dtype) -> None:
    x = video_like(3 * 10, 2, 64, dtype)
    assert torch.equal(decode_span(encode_span(x, DENSE_CODEC, tokens_per_frame=10), dtype), x)


def error_db(x: torch.Tensor, codec: Codec, pairing: RoPELayout | None = None) -> float:
    read = decode_span(encode_span(x, codec, pairing=pairing), torch.float32)
    return float(10 * torch.log10(x.var() / (read - x).square().mean()))


def test_formats_rank_as_their_bits_and_stages_promise() -> None:
    x = video_like(600, 1, 64)
    ternary, four, pro, int4 = (error_db(x, c) for c in (QVG, QVG4, QVG_PRO, replace(QVG, grid=Grid.INT4)))
    plain = error_db(x, replace(QVG, stages=0))
    assert plain + 3 < ternary < four - 3 < int4 - 6
    assert ternary < pro


def test_balancing_keeps_quality_where_a_few_channels_are_large() -> None:
    x = video_like(600, 8, 64)
    gain = torch.ones(64)
    gain[10:14] = 20.0
    lost = {}
    for name, codec in (("plain", QVG), ("balanced", QVG4)):
        read = [
            decode_span(encode_span(y, codec, pairing=RoPELayout.INTERLEAVED), torch.float32) for y in (x, x * gain)
        ]
        error = [(read[0] - x).square().mean(), ((read[1] / gain) - x).square().mean()]
        lost[name] = float(10 * torch.log10(error[1] / error[0]))
    assert lost["balanced"] < 1
    assert lost["plain"] > 3


@pytest.mark.parametrize("pairing", [None, *RoPELayout])
@pytest.mark.parametrize("rule", [BalanceRule.SPREAD, BalanceRule.ROOT])
def test_balance_is_the_spread_of_the_channel_or_of_its_pair(pairing: RoPELayout | None, rule: BalanceRule) -> None:
    x = video_like(400, 2, 64) * torch.logspace(-1, 1, 64) + 5
    x[:, :, 20:22] = x[:, :, 52:54] = 3.0
    span = encode_span(x, replace(QVG4, balance_rule=rule, **FAST), pairing=pairing)
    variance = x.double().var(0, correction=0)
    if pairing is RoPELayout.INTERLEAVED:
        variance = variance.view(2, 32, 1, 2).mean(-1).expand(2, 32, 2).flatten(1)
    elif pairing is RoPELayout.HALF_SPLIT:
        variance = ((variance[:, :32] + variance[:, 32:]) / 2).repeat(1, 2)
    expected = variance.sqrt()
    if rule is BalanceRule.ROOT:
        middle = expected.sort(-1).values[:, 31:32]
        expected = torch.maximum((expected * middle).sqrt(), expected / 2)
    expected = expected.bfloat16()
    expected[expected < 1e-6] = 1.0
    assert torch.equal(planes(span, 0)["balance"], expected)
    assert int((expected == 1).sum()) >= 4


@pytest.mark.parametrize("pairing", [None, *RoPELayout])
def test_balance_by_the_residual_brings_what_smoothing_leaves_of_every_channel_to_one(
    pairing: RoPELayout | None,
) -> None:
    x = video_like(800, 2, 64)
    x = (x + torch.randn(x.shape) * torch.logspace(-1, 1, 32).repeat_interleave(2)) * torch.logspace(1, -1, 64)
    x[:, 1, 40:42] *= 150.0
    codec = replace(QVG4, balance_rule=BalanceRule.RESIDUAL, num_centroids=20)
    span = encode_span(x, codec, pairing=pairing)
    found = planes(span, 0)
    chosen = read_centroids(span.buffer, span.layout, 0)[0]  # as stored: of balanced values
    ids = found["ids"][:, 0].long()
    for head in range(2):
        left = x[:, head] / found["balance"][head].float() - chosen[head][ids[head]]
        size = left.square().mean(0)
        if pairing is RoPELayout.INTERLEAVED:
            size = size.view(32, 2).mean(-1)
        elif pairing is RoPELayout.HALF_SPLIT:
            size = (size[:32] + size[32:]) / 2
        assert float(size.min()) > 0.9
        assert float(size.max()) < 1.1


def test_balance_by_the_residual_keeps_quality_where_a_few_channels_are_large() -> None:
    x = video_like(900, 2, 64)
    codec = replace(QVG4, balance_rule=BalanceRule.RESIDUAL, centroid_type=CentroidType.FP8)
    error = []
    for factor in (1.0, 9.0, 150.0):
        gain = torch.ones(64)
        gain[10:14] = factor
        read = decode_span(encode_span(x * gain, codec, pairing=RoPELayout.INTERLEAVED), torch.float32) / gain
        error.append(float(10 * torch.log10((read - x).square().mean())))
    assert max(error) - error[0] < 0.6


def test_channels_that_hardly_differ_from_their_centroids_do_not_lose_to_fp8() -> None:
    """Balanced by a hair's breadth, rounding a centroid anew would leave more than was there."""
    x = video_like(600, 1, 64)
    x[:, :, 8:10] = 40.0 + 0.01 * torch.randn(600, 1, 2)
    rules = [BalanceRule.RESIDUAL, BalanceRule.SPREAD]
    errors = [error_of(x, replace(QVG4, balance_rule=rule, centroid_type=CentroidType.FP8)) for rule in rules]
    assert errors[0] < errors[1]


def error_of(x: torch.Tensor, codec: Codec) -> float:
    return float((decode_span(encode_span(x, codec), torch.float32) - x).square().mean())


@pytest.mark.parametrize("codec", [QVG, QVG_PRO, QVG4])
def test_the_same_span_gives_the_same_bytes_wherever_it_lies(codec: Codec) -> None:
    codec = replace(codec, **FAST)
    x = video_like(3 * 50, 2, 64, torch.bfloat16)
    before = torch.get_rng_state()
    alone = encode_span(x, codec, tokens_per_frame=50)
    assert torch.equal(before, torch.get_rng_state())
    layout = alone.layout
    pool = torch.full((1 << 17,), 0xAB, dtype=torch.uint8)
    offsets = [70 * GRANULE, 10 * GRANULE, 120 * GRANULE + 16]
    strided = torch.zeros(150, 4, 130, dtype=torch.bfloat16)
    strided[:, 1:3, 2:66] = x
    encode_part(strided[:, 1:3, 2:66], layout, pool, offsets, 200 * GRANULE)
    for frame, offset in enumerate(offsets):
        start = alone.part_offset(frame)
        assert torch.equal(pool[offset : offset + layout.nbytes], alone.buffer[start : start + layout.nbytes])
    book = slice(200 * GRANULE, 200 * GRANULE + layout.codebook_nbytes)
    assert torch.equal(pool[book], alone.buffer[: layout.codebook_nbytes])
    touched = torch.zeros(len(pool), dtype=torch.bool)
    touched[book] = True
    for offset in offsets:
        touched[offset : offset + layout.nbytes] = True
    assert bool((pool[~touched] == 0xAB).all())


def test_without_centroids_it_does_not_matter_how_a_span_is_cut_into_frames() -> None:
    x = video_like(256, 1, 64)
    codec = replace(QVG4, stages=0)
    whole, cut = (decode_span(encode_span(x, codec, tokens_per_frame=n), torch.float32) for n in (256, 64))
    assert torch.equal(whole, cut)


def test_given_centroids_and_ids_are_stored_as_given() -> None:
    codec = replace(QVG_PRO, stages=2, num_centroids=6)
    x = video_like(40, 2, 64)
    centroids = torch.randn(2, 2, 6, 64).bfloat16().float()
    ids = torch.randint(0, 6, (2, 2, 40), dtype=torch.uint8)
    span = encode_span(x, codec, initial_centroids=centroids, ids=ids, split_pairs=True)
    assert torch.equal(planes(span, 0)["ids"], ids.transpose(0, 1))
    assert torch.equal(read_centroids(span.buffer, span.layout, 0), centroids)
    rest = x
    for stage in range(2):
        rest = rest - torch.stack([centroids[stage, h][ids[stage, h].long()] for h in range(2)], 1)
    bare = encode_span(rest, replace(codec, stages=0), split_pairs=True)
    assert torch.equal(planes(span, 0)["codes"], planes(bare, 0)["codes"])


@pytest.mark.parametrize("kind", CentroidType)
def test_a_warm_start_begins_where_the_last_span_ended(kind: CentroidType) -> None:
    codec = replace(QVG, centroid_type=kind, num_centroids=12, iterations=8)
    x = video_like(300, 1, 64)
    first = encode_span(x, codec)
    start = read_centroids(first.buffer, first.layout, 0)
    at_once = replace(codec, iterations=0)
    warm, cold = encode_span(x, at_once, initial_centroids=start), encode_span(x, at_once)
    assert torch.equal(read_centroids(warm.buffer, warm.layout, 0), start)
    errors = [float((decode_span(span, torch.float32) - x).square().mean()) for span in (first, warm, cold)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert errors[1] < errors[2]


def test_fp8_centroids_hold_values_far_beyond_their_own_range() -> None:
    x = video_like(300, 2, 64, torch.bfloat16)
    x[:, 0] *= 1440 / float(x[:, 0].abs().max())
    x[:, 1] *= 0.01
    read = decode_span(encode_span(x, replace(QVG, centroid_type=CentroidType.FP8)), torch.float32)
    assert bool(read.isfinite().all())
    for head in range(2):
        error = (read[:, head] - x[:, head].float()).square().mean() / x[:, head].float().square().mean()
        assert float(error) < 0.2


@pytest.mark.parametrize(
    "codec",
    [
        QVG, QVG4, replace(QVG, num_centroids=200), replace(QVG_PRO, num_centroids=3),
        replace(QVG4, balance_rule=BalanceRule.RESIDUAL),
        replace(QVG4, balance_rule=BalanceRule.RESIDUAL, centroid_type=CentroidType.FP8),
    ],
)  # fmt: skip
def test_zeros_and_constants_come_back_exactly(codec: Codec) -> None:
    zeros = torch.zeros(50, 2, 64)
    assert torch.equal(decode_span(encode_span(zeros, codec), torch.float32), zeros)
    same = torch.full((50, 2, 64), 2.5)
    assert torch.equal(decode_span(encode_span(same, codec), torch.float32), same)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(40, 2, 32)},
        {"x": torch.zeros(39, 2, 64)},
        {"x": torch.zeros(40, 2, 64, dtype=torch.float16)},
        {"x": torch.zeros(40, 2, 64, requires_grad=True)},
        {"buffer": torch.zeros(1 << 16)},
        {"part_offsets": [0, 8]},
        {"part_offsets": [0, 1 << 16]},
        {"part_offsets": [0, -16]},
        {"codebook_offset": None},
        {"codebook_offset": 1 << 16},
        {"initial_centroids": torch.zeros(1, 2, 3, 64)},
        {"ids": torch.zeros(1, 2, 40, dtype=torch.uint8)},
    ],
)
def test_bad_arguments_of_encoding_are_named_and_nothing_is_written(change: dict[str, object]) -> None:
    layout = encode_span(torch.zeros(40, 2, 64), QVG, tokens_per_frame=20).layout
    buffer = torch.full((1 << 16,), 7, dtype=torch.uint8)
    arguments: dict[str, object] = {
        "x": torch.zeros(40, 2, 64), "buffer": buffer, "part_offsets": [0, 8192], "codebook_offset": 16384
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=rf"^{next(iter(change))}: expected .* got"):
        encode_part(layout=layout, **(arguments | change))  # type: ignore[arg-type]
    assert bool((buffer == 7).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pages", torch.zeros(2, dtype=torch.int64)),
        ("codebooks", torch.zeros(3, dtype=torch.int32)),
        ("part_offset", 8),
        ("out", torch.zeros(40, 2, 32)),
        ("out", torch.zeros(40, 2, 64, dtype=torch.float64)),
        ("out", torch.zeros(40, 64, 2).transpose(1, 2)),
        ("rope", RoPESpec(head_dim=64, grid=(4, 5)).tables([0])),
        ("rope", RoPESpec(head_dim=64, grid=(4, 4)).tables([0, 1])),
        ("backend", Backend.TRITON),
    ],
)
def test_bad_arguments_of_decoding_are_named(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    span = encode_span(torch.zeros(40, 2, 64), QVG, tokens_per_frame=20)
    ids = torch.zeros(2, dtype=torch.int32)
    arguments: dict[str, object] = {
        "buffer": span.buffer, "pages": ids, "codebooks": ids, "layout": span.layout, "part_offset": 0,
        "codebook_part_offset": 0, "out": torch.zeros(40, 2, 64),
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .* got"):
        decode_pages(**(arguments | {name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer", 2),
        ("layer", -1),
        ("pages", torch.zeros(1, dtype=torch.int64)),
        ("keys", torch.zeros(20, 2, 32)),
        ("values", torch.zeros(20, 2, 64, dtype=torch.float64)),
        ("rope", RoPESpec(head_dim=64, grid=(4, 4)).tables([0])),
    ],
)
def test_bad_arguments_of_decoding_a_layer_are_named(name: str, value: object) -> None:
    layout = PageLayout.build(
        get_format("qvg4-int2"), num_layers=2, tokens=20, heads=2, head_dim=64, dtype=torch.float32, span_tokens=20
    )  # fmt: skip
    ids, keys, values = torch.zeros(1, dtype=torch.int32), torch.zeros(20, 2, 64), torch.zeros(20, 2, 64)
    arguments: dict[str, object] = {
        "buffer": torch.zeros(layout.page_nbytes + layout.codebook_nbytes, dtype=torch.uint8), "pages": ids,
        "codebooks": ids, "layout": layout, "layer": 1, "keys": keys, "values": values,
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .* got"):
        decode_layer(**(arguments | {name: value}))  # type: ignore[arg-type]


def test_a_head_shorter_than_a_block_is_one_block() -> None:
    x = video_like(40, 2, 64)
    short, exact = (encode_span(x, replace(QVG4, block_size=block, **FAST)) for block in (128, 64))
    assert short.layout.codec.block_size == 64
    assert torch.equal(short.buffer, exact.buffer)


def test_bad_arguments_of_spans_are_named() -> None:
    x = torch.zeros(40, 2, 64)
    span = encode_span(x, QVG)
    for name, call in {
        "tokens_per_frame": lambda: encode_span(x, QVG, tokens_per_frame=7),
        "x": lambda: encode_span(x[0], QVG),
        "frames": lambda: decode_span(span, torch.float32, frames=[1]),
        "dtype": lambda: decode_span(span, torch.float64),
        "positions": lambda: decode_span(span, torch.float32, positions=[3]),
        "block_size": lambda: encode_span(torch.zeros(40, 2, 96), QVG),
    }.items():
        with pytest.raises(ArgumentError, match=f"^{name}: expected .* got"):
            call()
