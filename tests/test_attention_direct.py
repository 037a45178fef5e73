"""The Triton kernel: tiny shapes in Triton's interpreter without a GPU, BF16 at real sizes with one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_case import Case, build_case

from qvg_paged.kernels.attention import AttentionPath, attention_workspace_nbytes, paged_attention
from qvg_paged.kernels.attention_plan import query_blocks, rope_tables
from qvg_paged.kernels.few_queries import FEW_ROWS, WARPS
from qvg_paged.kernels.formats import DENSE, DENSE_CODEC, FORMATS, CentroidType, PageFormat
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.kernels.merge import merge_partials
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FP8_BALANCED = replace(FORMATS["qvg4-int2"].with_codecs(centroid_type=CentroidType.FP8), name="fp8-centroids")
PLAIN = replace(FORMATS["qvg-int2"].with_codecs(stages=0), name="no-stages")
WIDE_KEYS = replace(FORMATS["qvg4-int2"], name="int4-keys", key=FORMATS["qvg-int4"].key)
DENSE_VALUES = replace(FORMATS["qvg4-int2"], name="dense-values", value=DENSE_CODEC)
ALL = [*FORMATS.values(), FP8_BALANCED, PLAIN, WIDE_KEYS, DENSE_VALUES]


def attend(case: Case, q: torch.Tensor, cu: list[int], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(
        q, case.buffer, case.table, case.layouts, 1,
        cu_seqlens_q=cu, rope=case.rope, path=AttentionPath.DIRECT, **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fmt", ALL, ids=[fmt.name for fmt in ALL])
def test_every_format_is_read_as_well_as_pytorch_attends_decoded_pages(fmt: PageFormat, dtype: torch.dtype) -> None:
    tokens = int(torch.randint(1, 40, ()))
    case = build_case([fmt], [[0, 0]], tokens=tokens, dtype=dtype, device=DEVICE)
    q = torch.randn(5, 2, 64, dtype=dtype, device=DEVICE)
    out, lse = attend(case, q, [0, 5])
    case.check(q, [0, 5], out, lse, 0.125)


@pytest.mark.parametrize("layout", list(RoPELayout))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_are_rotated_to_overridden_positions_while_they_are_read(head_dim: int, layout: RoPELayout) -> None:
    rope = RoPESpec(head_dim=head_dim, grid=(3, 7), layout=layout)
    formats = [DENSE, FORMATS["qvg4-int2"]]
    case = build_case(
        formats, [[1, 1, 0]], tokens=21, head_dim=head_dim, rope=rope, positions=[40.0, 3.5, 7.0], device=DEVICE
    )
    q = torch.randn(4, 2, head_dim, device=DEVICE)
    out, lse = attend(case, q, [0, 4])
    case.check(q, [0, 4], out, lse, head_dim**-0.5)


def test_pages_beyond_one_tile_and_with_a_partial_last_tile_are_read_whole() -> None:
    tokens = 256 + int(torch.randint(1, 200, ()))
    formats = [FORMATS["qvg-int2"], FORMATS["qvg-int4"], WIDE_KEYS]
    case = build_case(formats, [[0, 1, 2]], tokens=tokens, heads=1, device=DEVICE)
    q = torch.randn(3, 1, 64, device=DEVICE)
    out, lse = attend(case, q, [0, 3])
    case.check(q, [0, 3], out, lse, 0.125)


def test_codebooks_that_change_inside_a_sequence_carry_their_own_balance() -> None:
    formats = [FORMATS["qvg4-int2"], DENSE]
    case = build_case(formats, [[0, 1, 0, 0, 1, 0]], tokens=17, heads=1, device=DEVICE)
    assert len(set(case.table.codebooks)) == 4
    q = torch.randn(40, 1, 64, device=DEVICE)
    out, lse = attend(case, q, [0, 40])
    case.check(q, [0, 40], out, lse, 0.125)


def ragged_case() -> tuple[Case, torch.Tensor, list[int]]:
    """Four sequences, one without pages and one without queries; grouped heads; strided queries."""
    formats = [DENSE, FORMATS["qvg4-int2"], FORMATS["qvg-int4"]]
    case = build_case(formats, [[1, 1, 0], [], [2], [0, 2, 1]], tokens=int(torch.randint(1, 30, ())), device=DEVICE)
    wide = torch.randn(40, 3, 7, 64, device=DEVICE)
    return case, wide[:, 1, 1:], [0, 20, 23, 23, 40]


def test_a_ragged_batch_with_grouped_heads_and_strided_queries_is_attended() -> None:
    case, q, cu = ragged_case()
    out, lse = attend(case, q, cu)
    case.check(q, cu, out, lse, 0.125)


def test_the_least_workspace_is_enough_for_a_batch() -> None:
    case, q, cu = ragged_case()
    least = attention_workspace_nbytes(case.layouts, 6, 20, torch.float32)
    workspace = torch.full((least,), 0xFF, dtype=torch.uint8, device=DEVICE)
    out, lse = attend(case, q, cu, workspace=workspace)
    case.check(q, cu, out, lse, 0.125)


def test_one_token_pages_are_read() -> None:
    case = build_case(ALL, [list(range(len(ALL)))], tokens=1, device=DEVICE)
    q = torch.randn(2, 2, 64, device=DEVICE)
    out, lse = attend(case, q, [0, 2])
    case.check(q, [0, 2], out, lse, 0.125)


def test_the_kernel_and_its_twin_merge_to_the_same_result() -> None:
    from qvg_paged.kernels.direct_attention import direct_attention, launch_shape  # noqa: PLC0415
    from qvg_paged.kernels.reference_attention import direct_attention_reference  # noqa: PLC0415

    rope = RoPESpec(head_dim=64, grid=(3, 5))
    case = build_case([FORMATS["qvg4-int2"]], [[0, 0, 0], [0]], tokens=15, rope=rope, device=DEVICE)
    q = torch.randn(9, 4, 64, device=DEVICE)
    shape = launch_shape(case.layouts[0], q.dtype, 12, True)
    blocks = query_blocks(case.table, (0, 6, 9), range(2), 2, shape.rows)
    results = []
    for run in (direct_attention, direct_attention_reference):
        partials = torch.full((3, 9, 4, 64), float("nan"), device=DEVICE)
        partial_lse = torch.full((3, 9, 4), float("-inf"), device=DEVICE)
        run(
            partials, partial_lse, q, case.buffer, case.layouts[0], 1, case.table.groups[0], blocks,
            softmax_scale=0.125, num_splits=2, first_partial=1, rope=rope_tables(case.table, 0, rope),
            rope_layout=rope.layout, shape=shape,
        )  # fmt: skip
        out, lse = torch.empty(9, 4, 64, device=DEVICE), torch.empty(9, 4, device=DEVICE)
        merge_partials(partials, partial_lse, out, lse)
        results.append((out, lse))
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)


def test_the_kernel_compiles_for_hopper_without_a_gpu() -> None:
    script = Path(__file__).parent / "compile_direct.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert {row["head_dim"] for row in compiled} == {64, 128, 256}
    assert all(row["shared"] <= 227 * 1024 for row in compiled)
    few = [row for row in compiled if "rows" in row]
    assert few
    regions = [4 * 256 * row["rows"] * (WARPS + 1) for row in few]
    assert [row["shared"] for row in few] == regions, "the compiler should move nothing between warps"
    many = [row for row in compiled if "blocks" in row]
    book = 256 * 128 * 2
    assert all(at == book or at >= 2 * book for row in many for at in row["buffers"]), "codebooks should lie first"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [None, *RoPELayout])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("path", [AttentionPath.DIRECT, AttentionPath.STAGED])
def test_bf16_attention_of_ragged_streams_is_as_good_as_pytorch(
    path: AttentionPath, head_dim: int, layout: RoPELayout | None
) -> None:
    rope = None if layout is None else RoPESpec(head_dim=head_dim, grid=(30, 52), layout=layout)
    sequences = [[1] * 6 + [0] * 3, [2, 2, 3, 0], [], [4] * 3 + [0]]
    case = build_case(
        [DENSE, *ALL[1:5]], sequences, tokens=1560, head_dim=head_dim, dtype=torch.bfloat16, rope=rope, device="cuda"
    )
    cu = [0, 4680, 4680 + 64, 4680 + 70, 4680 + 70 + 1560]
    q = torch.randn(cu[-1], 4, head_dim, dtype=torch.bfloat16, device="cuda")
    out, lse = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, rope=rope, path=path)
    case.check(q, cu, out, lse, head_dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 16, 64, 200])
@pytest.mark.parametrize("path", [AttentionPath.DIRECT, AttentionPath.STAGED])
def test_bf16_streams_of_equal_lengths_are_as_good_as_pytorch(path: AttentionPath, queries: int) -> None:
    formats = [DENSE, FORMATS["qvg4-int2"]]
    case = build_case(formats, [[1, 1, 1, 0]] * 24, tokens=64, dtype=torch.bfloat16, device="cuda")
    cu = [queries * b for b in range(25)]
    q = torch.randn(cu[-1], 6, 64, dtype=torch.bfloat16, device="cuda")
    out, lse = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, path=path)
    case.check(q, cu, out, lse, 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize("path", [AttentionPath.DIRECT, AttentionPath.STAGED])
def test_pages_beyond_two_to_the_31_bytes_are_read(path: AttentionPath) -> None:
    far = (2**32 + 2**31) // GRANULE * GRANULE
    case = build_case(ALL[:5], [[0, 1, 2, 3, 4]], tokens=300, dtype=torch.bfloat16, device="cuda", first_byte=far)
    q = torch.randn(50, 2, 64, dtype=torch.bfloat16, device="cuda")
    out, lse = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=[0, 50], path=path)
    case.check(q, [0, 50], out, lse, 0.125)


@pytest.mark.gpu
def test_growing_histories_compile_nothing_new() -> None:
    from qvg_paged.kernels.direct_attention import _direct_kernel  # noqa: PLC0415

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _direct_kernel.device_caches.values())

    counts = []
    for pages in (2, 3, 17, 32):
        fmt = FORMATS["qvg4-int2"].with_codecs(num_centroids=16)
        case = build_case([fmt], [[0] * pages, [0]], tokens=64, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(FEW_ROWS + 2, 2, 64, dtype=torch.bfloat16, device="cuda")
        attend(case, q, [0, FEW_ROWS + 1, FEW_ROWS + 2])
        counts.append(compiled())
    assert counts[0] > 0
    assert counts[-1] == counts[0]
