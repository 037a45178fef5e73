"""The Triton launchers and their PyTorch twins write and read the same bits.

In the interpreter with float16 and float32; on a GPU with bfloat16 too, and the CPU's bytes against the GPU's.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvg_paged.kernels import _span_plan
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.codec import EncodedSpan, decode_span, encode_span
from qvg_paged.kernels.decode import decode_layer, decode_pages
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import (
    DENSE_CODEC,
    QVG,
    BalanceRule,
    CentroidType,
    Codec,
    Grid,
    PageFormat,
    ScaleRule,
    get_format,
)
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.kernels.rope import RoPELayout, RoPESpec
from qvg_paged.kernels.span import SpanEncoding

pytestmark = pytest.mark.usefixtures("one_thread")
QVG4 = get_format("qvg4-int2").key
BEST = get_format("best-2bit")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # codec, tokens per frame, frames, heads, head_dim, split
    (QVG, 37, 2, 2, 64, True),
    (replace(QVG, grid=Grid.INT4, block_size=16, stages=2, centroid_type=CentroidType.FP8), 20, 2, 1, 64, False),
    (replace(QVG4, num_centroids=5, block_size=128), 24, 1, 1, 256, True),
    (replace(QVG4, scale_rule=ScaleRule.LEAST_SQUARES, stages=0), 290, 1, 1, 64, False),
    (replace(QVG4, grid=Grid.INT4, stages=4, num_centroids=20), 9, 1, 1, 64, True),
    (
        replace(QVG4, balance_rule=BalanceRule.ROOT, centroid_type=CentroidType.FP8, tokens_per_centroid=5),
        19,
        2,
        2,
        64,
        True,
    ),
    (
        replace(QVG4, balance_rule=BalanceRule.RESIDUAL, centroid_type=CentroidType.FP8, tokens_per_centroid=5),
        19,
        2,
        2,
        64,
        True,
    ),
    (replace(QVG4, balance_rule=BalanceRule.RESIDUAL, stages=2, num_centroids=20), 1030, 1, 1, 64, True),
    (replace(QVG4, balance_rule=BalanceRule.RESIDUAL, stages=0), 19, 2, 2, 64, True),
    (Codec(grid=Grid.TERNARY, stages=0, block_size=32, scale_rule=ScaleRule.LEAST_SQUARES), 7, 3, 2, 64, True),
    (DENSE_CODEC, 37, 2, 2, 64, False),
]


def awkward(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, heads, dim) * torch.logspace(-4, 2, tokens)[:, None, None]
    x[0], x[1, :, ::2] = 0.0, -0.0
    x[2] = 1e-7 * torch.randn(heads, dim)
    x[3, :, 1::2] = x[3].abs().amax() * 0.5
    return x.to(dtype)


def given(x: torch.Tensor, codec: Codec) -> dict[str, torch.Tensor]:
    """Centroids and ids for every stage, from the data."""
    count = codec.centroids_for(len(x))
    if not count:
        return {}
    rows = torch.randint(0, len(x), (codec.stages, count))
    centroids = x[rows].transpose(1, 2).float() * 0.3
    ids = torch.randint(0, count, (codec.stages, x.shape[1], len(x))).to(torch.uint8)
    return {"initial_centroids": centroids, "ids": ids}


def decoded(span: EncodedSpan, backend: Backend, dtype: torch.dtype) -> list[torch.Tensor]:
    tokens, dim = span.layout.tokens, span.layout.head_dim
    ropes = [None, *(RoPESpec(head_dim=dim, grid=(1, tokens), layout=layout) for layout in RoPELayout)]
    return [decode_span(span, dtype, rope=rope, backend=backend).cpu() for rope in ropes]


def agree(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_launchers_and_twins_agree_bit_for_bit(case: int, dtype: torch.dtype) -> None:
    codec, tokens, frames, heads, dim, split = CASES[case]
    x = awkward(tokens * frames, heads, dim, dtype).to(DEVICE)
    extra = {name: value.to(DEVICE) for name, value in given(x.cpu(), codec).items()}
    shape = {"tokens_per_frame": tokens, "split_pairs": split, "pairing": RoPELayout.INTERLEAVED}
    twin, launched = (
        encode_span(x, codec, backend=backend, **shape, **extra)  # type: ignore[arg-type]
        for backend in (Backend.TORCH, Backend.TRITON)
    )
    assert torch.equal(twin.buffer, launched.buffer)
    assert agree(decoded(twin, Backend.TORCH, dtype), decoded(twin, Backend.TRITON, dtype))


def test_both_paths_take_the_same_sample_of_a_long_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_span_plan, "SAMPLE_TOKENS", 20)
    x = awkward(3 * 37, 2, 64, torch.float16).to(DEVICE)
    codec = replace(BEST.key, num_centroids=5)
    extra = {name: value.to(DEVICE) for name, value in given(x.cpu(), codec).items()}
    spans = [
        encode_span(x, codec, tokens_per_frame=37, pairing=RoPELayout.INTERLEAVED, backend=backend, **extra)  # type: ignore[arg-type]
        for backend in (Backend.TORCH, Backend.TRITON)
    ]
    assert _span_plan.sample_stride(3 * 37) == 5
    assert torch.equal(spans[0].buffer, spans[1].buffer)


def test_the_kernels_compile_for_hopper_once_per_codec() -> None:
    """Neither the group of heads, nor the first page of a run, nor the layer makes another variant."""
    script = Path(__file__).parent / "compile_codec.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert all(row["shared"] <= 227 * 1024 and max(row["grid"][1:], default=1) < 1 << 16 for row in compiled)
    variants = Counter((row["kernel"], row["codec"], row["dtype"], row["head_dim"]) for row in compiled)
    assert {kernel for kernel, *_ in variants} == {
        "_moments_kernel", "_sampled_moments_kernel", "_spread_kernel", "_seed_kernel", "_assign_kernel",
        "_sum_kernel", "sum_kernel", "assign_kernel", "_mean_kernel", "_left_kernel", "_rebalance_kernel",
        "_multiply_kernel", "_round_kernel", "_book_kernel", "_pack_kernel", "_decode_kernel", "_dense_kernel",
    }  # fmt: skip
    for (kernel, codec, dtype, dim), count in variants.items():
        every_stage = codec == "qvg-pro" and kernel in ("_seed_kernel", "_assign_kernel", "_sum_kernel")
        rotated_or_not = kernel in ("_decode_kernel", "_dense_kernel")
        one_or_both = kernel == "_decode_kernel" and (codec, dtype, dim) == ("qvg4", "torch.bfloat16", 128)
        assert count == (4 if one_or_both else 2 if rotated_or_not or every_stage else 1)


def check_layer_decodes(fmt: str, heads: int, dim: int, dtype: torch.dtype) -> None:
    tokens = 270  # the last ones of a page fill part of a tile
    layout = PageLayout.build(
        get_format(fmt), num_layers=2, tokens=tokens, heads=heads, head_dim=dim, dtype=dtype, span_tokens=2 * tokens,
        split_pairs=True,
    )  # fmt: skip
    unit = -(-max(layout.page_nbytes, layout.codebook_nbytes) // GRANULE)
    pool = torch.randint(0, 5, (4 * unit * GRANULE,), dtype=torch.uint8, device=DEVICE)  # ids that are there
    pages, books = (torch.tensor(ids, dtype=torch.int32, device=DEVICE) * unit for ids in ([2, 0], [3, 3]))
    tables = RoPESpec(head_dim=dim, grid=(27, 10)).tables([4.0, 1.0], DEVICE)
    for rope in (None, tables):
        found, twins = torch.zeros(2, 2, 2 * tokens, heads, dim, dtype=dtype, device=DEVICE)
        decode_layer(pool, pages, books, layout, 1, *found, rope=rope, backend=Backend.TRITON)
        for part, out, turn, offsets in (
            (layout.key, twins[0], rope, (layout.key_offset(1), layout.key_codebook_offset(1))),
            (layout.value, twins[1], None, (layout.value_offset(1), layout.value_codebook_offset(1))),
        ):
            decode_pages(pool, pages, books, part, *offsets, out, rope=turn, backend=Backend.TORCH)
        assert torch.equal(found, twins)


@pytest.mark.parametrize("fmt", ["qvg4-int2", "best-2bit", "dense"])
def test_a_layer_decodes_to_what_its_tensors_do_by_themselves(fmt: str) -> None:
    """K and V in one launch, keys turned."""
    check_layer_decodes(fmt, 2, 64, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["qvg4-int2", "qvg-pro-int2", "qvg-int4", "near-lossless", "dense"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_layer_decodes_on_a_gpu_to_what_the_twin_reads(fmt: str, dim: int) -> None:
    check_layer_decodes(fmt, 7, dim, torch.bfloat16)  # the last program has fewer heads


def test_triton_refuses_head_dims_it_has_no_tile_for() -> None:
    x = torch.randn(20, 1, 96, device=DEVICE)
    codec = Codec(grid=Grid.TERNARY, stages=0, block_size=32)
    with pytest.raises(ArgumentError, match="head_dim: expected a power of two >= 16 for Triton, got 96"):
        encode_span(x, codec, backend=Backend.TRITON)
    span = encode_span(x, codec, backend=Backend.TORCH)
    assert bool(decode_span(span, torch.float32, backend=Backend.TORCH).isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [Grid.TERNARY, Grid.QUATERNARY, Grid.INT4])
@pytest.mark.parametrize(
    ("rule", "dim", "balanced"),
    [(ScaleRule.ABSMAX, 128, False), (ScaleRule.LEAST_SQUARES, 256, True), (ScaleRule.SEARCH, 64, True)],
)
def test_cpu_and_gpu_agree_bit_for_bit_in_bfloat16(grid: Grid, rule: ScaleRule, dim: int, balanced: bool) -> None:
    codec = Codec(grid=grid, scale_rule=rule, stages=2, balanced=balanced, num_centroids=48)
    x = awkward(4 * 280, 2, dim, torch.bfloat16)
    extra = given(x, codec)
    shape = {"tokens_per_frame": 280, "split_pairs": True, "pairing": RoPELayout.INTERLEAVED}
    cpu = encode_span(x, codec, **shape, **extra)  # type: ignore[arg-type]
    gpu = encode_span(x.cuda(), codec, **shape, **{name: value.cuda() for name, value in extra.items()})  # type: ignore[arg-type]
    assert torch.equal(cpu.buffer, gpu.buffer.cpu())
    assert agree(decoded(cpu, Backend.AUTO, torch.bfloat16), decoded(gpu, Backend.AUTO, torch.bfloat16))


@pytest.mark.parametrize(
    "codec",
    [
        replace(QVG, num_centroids=20),
        replace(QVG4, num_centroids=40),
        replace(QVG4, num_centroids=18, stages=2),
        replace(QVG4, num_centroids=16, centroid_type=CentroidType.FP8),
    ],
)
def test_both_paths_cluster_equally_well(codec: Codec) -> None:
    """They may differ where a token is as near to two centroids, and in the last place of a mean."""
    codec = replace(codec, iterations=2)
    x = (torch.randn(160, 2, 64) + 3 * torch.randn(12, 2, 64)[torch.arange(160) % 12]).to(DEVICE).half()
    errors = []
    for backend in (Backend.TORCH, Backend.TRITON):
        span = encode_span(x, codec, tokens_per_frame=80, pairing=RoPELayout.INTERLEAVED, backend=backend)
        errors.append(float((decode_span(span, torch.float32, backend=Backend.TORCH) - x).square().mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


AS_MANY = PageFormat(
    name="as many", key=replace(BEST.key, num_centroids=8), value=replace(BEST.value, tokens_per_centroid=10)
)


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.TRITON])
def test_channels_are_balanced_by_a_sample_of_a_long_span(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of every four tokens of a frame decides, on every device; the others are stored all the same."""
    monkeypatch.setattr(_span_plan, "SEEN_PER_CENTROID", 8)
    frames, tokens = 2, 262
    codec = Codec(grid=Grid.INT4, block_size=16, num_centroids=16, balanced=True, iterations=2)
    x = torch.randn(frames * tokens, 1, 16, device=DEVICE).half()
    outside = torch.arange(frames * tokens, device=DEVICE) % tokens
    outside = (outside % 4 > 0) | (outside >= 260)
    other = torch.where(outside[:, None, None], x * 3, x)
    balance = []
    for y in (x, other):
        span = encode_span(y, codec, tokens_per_frame=tokens, backend=backend)
        balance.append(span.layout.plane("balance").view(span.buffer, 0))
        error = (decode_span(span, torch.float32, backend=Backend.TORCH) - y).square().mean() / y.square().mean()
        assert float(error) < 0.01
    assert torch.equal(*balance)
    spread = x.unflatten(0, (frames, tokens))[:, :260:4].flatten(0, 1).double().std(0, correction=0)
    torch.testing.assert_close(balance[0].double(), spread, rtol=2**-8, atol=0)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("fmt", ["qvg4-int2", "qvg-int2", "best-2bit", AS_MANY])
def test_a_layer_of_a_span_is_what_its_tensors_are_by_themselves(fmt: str | PageFormat, again: bool) -> None:
    """K and V in the same launches, out of the pool and into it: the bytes of `encode_part`, and no others change.

    Also if the launches were those of another span before.
    """
    frames, heads, dim = 2, 2, 64
    shape = {"num_layers": 2, "tokens": 40, "heads": heads, "head_dim": dim, "dtype": torch.float16,
             "span_tokens": 80, "split_pairs": True}  # fmt: skip
    quick = get_format(fmt).with_codecs(iterations=1)
    source, target = (PageLayout.build(f, **shape) for f in (get_format("dense"), quick))  # type: ignore[arg-type]
    sizes = [*[source.page_nbytes // GRANULE] * frames, *[target.page_nbytes // GRANULE] * frames]
    starts = [sum(sizes[:i]) + 3 for i in range(2 * frames + 1)]
    dense, pages, book = starts[:frames], starts[frames : 2 * frames], starts[-1]
    pool = torch.randn(((book + 2) * GRANULE + target.codebook_nbytes) // 2, device=DEVICE).half().view(torch.uint8)
    pools = [pool.clone() for _ in range(2)]
    program = None
    if again:
        before = SpanEncoding(pools[0], source, target, dense[::-1], pages, book, backend=Backend.TRITON)
        before.encode(1)
        program = before.program
    SpanEncoding(pools[0], source, target, dense, pages, book, backend=Backend.TRITON, program=program).encode(1)
    plane = source.key.plane("values")
    for layout, start, end, inside in (
        (target.key, source.key_offset(1), target.key_offset(1), target.key_codebook_offset(1)),
        (target.value, source.value_offset(1), target.value_offset(1), target.value_codebook_offset(1)),
    ):
        x = torch.cat([plane.view(pool, page * GRANULE + start) for page in dense])
        offsets = [page * GRANULE + end for page in pages]
        encode_part(x, layout, pools[1], offsets, book * GRANULE + inside, backend=Backend.TRITON)
    assert torch.equal(*pools)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", [QVG, QVG4])
def test_encoding_on_a_gpu_repeats_itself_and_reads_back_as_well_as_on_the_cpu(codec: Codec) -> None:
    x = (torch.randn(6 * 400, 3, 128) + 3 * torch.randn(30, 3, 128)[torch.arange(2400) % 30]).bfloat16()
    spans = [encode_span(x.cuda(), codec, tokens_per_frame=400) for _ in range(2)]
    assert torch.equal(spans[0].buffer, spans[1].buffer)
    errors = [
        float((decode_span(span, torch.float32).cpu() - x.float()).square().mean())
        for span in (spans[0], encode_span(x, codec, tokens_per_frame=400))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)
