"""FP8 attention: twins against float64, kernels against twins (float16 in Triton's interpreter, E4M3 on a GPU)."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_case import LAYER, Case, build_case
from tolerance import exact_attention

from qvg_paged.kernels import fp8_attention, merge, staged_decode, staged_plan
from qvg_paged.kernels.attention import AttentionPath, attention_workspace_nbytes, paged_attention
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.formats import DENSE, DENSE_CODEC, FORMATS, CentroidType, PageFormat
from qvg_paged.kernels.fp8_attention import (
    Fp8Scratch,
    Fp8Shape,
    attend,
    decode_runs,
    launch_shape,
    num_splits,
    quantise_queries,
    scratch_nbytes,
)
from qvg_paged.kernels.reference_fp8 import key_rows, units
from qvg_paged.kernels.rope import RoPELayout, RoPESpec
from qvg_paged.kernels.slices import Room, cohorts

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KERNEL_DTYPE = torch.float8_e4m3fn if CUDA else torch.float16
SMALL = Fp8Shape(64, 64, 4, 2) if CUDA else Fp8Shape(16, 16, 4, 2)
OURS = FORMATS["qvg4-int2"]
FP8_CENTROIDS = replace(OURS.with_codecs(centroid_type=CentroidType.FP8), name="fp8-centroids")
PLAIN = replace(FORMATS["qvg-int2"].with_codecs(stages=0), name="no-stages")
DENSE_VALUES = replace(OURS, name="dense-values", value=DENSE_CODEC)
QUANTISED = [OURS, FORMATS["qvg-int2"], FORMATS["qvg-int4"], FORMATS["qvg-pro-int2"], FP8_CENTROIDS, PLAIN]


def fill(case: Case, dtype: torch.dtype, backend: Backend, sequences: int = 1) -> Fp8Scratch:
    """A poisoned scratch with all pages of the case."""
    part = case.layouts[0].key
    queries = tuple(range(sequences + 1))
    (cohort,) = cohorts(case.table, queries, case.rope, Room(100), sequences > 1)
    (piece,) = cohort.slices
    keys = piece.count * part.tokens // sequences
    problems = sequences * part.heads
    workspace = torch.full(
        (scratch_nbytes(problems, keys, part.head_dim, dtype),), 0xFF, dtype=torch.uint8, device=DEVICE
    )
    scratch = Fp8Scratch.carve(workspace, problems, keys, part.head_dim, dtype)
    layout = RoPELayout.INTERLEAVED if case.rope is None else case.rope.layout
    decode_runs(scratch, case.buffer, piece.runs, tuple(case.layouts), LAYER, layout, backend=backend)
    return scratch


def run(
    case: Case, q: torch.Tensor, dtype: torch.dtype, backend: Backend, splits: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``[sequences, tokens, q_heads, head_dim]`` queries to all pages: every split's output and sum."""
    sequences, tokens, q_heads, dim = q.shape
    scratch = fill(case, dtype, backend, sequences)
    part = case.layouts[0].key
    pairs = part.split_pairs if case.rope is None else case.rope.layout is RoPELayout.INTERLEAVED
    queries, scales = quantise_queries(q, part.heads, pairs, dtype, backend=backend)
    out = torch.full((splits, sequences * tokens, q_heads, dim), float("nan"), device=DEVICE)
    lse = torch.full(out.shape[:3], float("nan"), device=DEVICE)
    attend(
        queries, scales, scratch, out, lse,
        heads=part.heads, softmax_scale=dim**-0.5, shape=SMALL, backend=backend,
    )  # fmt: skip
    return out, lse


def merged(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(lse.double(), 0)[..., None]
    return (out.double() * weights).sum(0)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("layout", [None, *RoPELayout])
@pytest.mark.parametrize("fmt", QUANTISED, ids=[fmt.name for fmt in QUANTISED])
def test_the_kernel_fills_a_scratch_as_its_twin_does(fmt: PageFormat, layout: RoPELayout | None) -> None:
    rope = None if layout is None else RoPESpec(head_dim=64, grid=(4, 11), layout=layout)
    case = build_case([fmt], [[0, 0, 0]], tokens=44, rope=rope, positions=[3.0, 9.5, 4.0], device=DEVICE)
    twin, kernel = (fill(case, torch.float16, backend) for backend in (Backend.TORCH, Backend.TRITON))
    torch.testing.assert_close(kernel.bounds, twin.bounds, rtol=1e-6, atol=0)
    rows = key_rows(twin.num_keys)
    turned = 0.02 if rope is None else 0.2  # half-precision cosines of numbers up to 224
    torch.testing.assert_close(kernel.keys[:, rows], twin.keys[:, rows], rtol=2e-3, atol=turned)
    torch.testing.assert_close(
        kernel.values[:, :, : twin.num_keys], twin.values[:, :, : twin.num_keys], rtol=2e-3, atol=2e-2
    )


@pytest.mark.parametrize("fmt", QUANTISED, ids=[fmt.name for fmt in QUANTISED])
def test_a_scratch_holds_what_the_pages_decode_to(fmt: PageFormat) -> None:
    rope = RoPESpec(head_dim=64, grid=(5, 7), layout=RoPELayout.HALF_SPLIT)
    case = build_case([fmt], [[0, 0]], tokens=35, rope=rope, device=DEVICE)
    scratch = fill(case, torch.float16, Backend.TORCH)
    keys, values = case.history(0)
    worth = units(scratch.bounds)
    decoded = scratch.keys[:, key_rows(scratch.num_keys)].float() * worth[:, 0, None, None]
    assert (scratch.keys[:, key_rows(scratch.num_keys)].abs() <= 320).all()
    assert (scratch.values[:, :, : scratch.num_keys].abs() <= 224).all()
    # The order of keys is free: compare sums over all of them, weighted by what travels with them.
    other = scratch.values[:, :, : scratch.num_keys].float() * worth[:, 1, None, None]
    torch.testing.assert_close(
        torch.bmm(other, decoded), torch.einsum("nhd,nhe->hde", values, keys), rtol=1e-2, atol=0.5
    )


@pytest.mark.parametrize("tokens", [1, 3, 30, 300])
def test_pages_that_leave_bytes_or_tiles_unfilled_are_filled_in(tokens: int) -> None:
    case = build_case([OURS, FORMATS["qvg-int4"]], [[0, 1]], tokens=tokens, heads=1, device=DEVICE)
    q = torch.randn(1, 5, 2, 64, device=DEVICE)
    exact, exact_lse = exact_attention(q[0], *case.history(0), 0.125)
    out, lse = run(case, q, torch.float16, Backend.TRITON)
    assert error(out[0], exact) < 4e-3
    torch.testing.assert_close(lse[0].double(), exact_lse, rtol=0, atol=2e-2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_kernel_attends_as_its_twin_does(head_dim: int, splits: int) -> None:
    tokens = 2 * SMALL.keys - 4  # three whole tiles and a part of one
    case = build_case([OURS], [[0, 0], [0, 0]], tokens=tokens, head_dim=head_dim, device=DEVICE)
    q = 2 * torch.randn(2, 9, 4, head_dim, device=DEVICE)
    exact = torch.cat([exact_attention(q[b], *case.history(b), head_dim**-0.5)[0] for b in range(2)])
    twin, twin_lse = run(case, q, KERNEL_DTYPE, Backend.TORCH, splits)
    out, lse = run(case, q, KERNEL_DTYPE, Backend.TRITON, splits)
    assert error(merged(out, lse), exact) <= 1.3 * error(merged(twin, twin_lse), exact) + 1e-3
    torch.testing.assert_close(lse, twin_lse, rtol=0, atol=0.05)


def test_queries_and_keys_of_zeros_give_the_mean_of_the_values() -> None:
    case = build_case([PLAIN], [[0]], tokens=20, device=DEVICE)
    layout = case.layouts[0]
    scales = layout.key.plane("scales").view(case.buffer, case.table.pages[0] * 256 + layout.key_offset(LAYER))
    scales.view(torch.uint8).zero_()
    out, lse = run(case, torch.zeros(1, 3, 2, 64, device=DEVICE), KERNEL_DTYPE, Backend.TRITON)
    mean = case.history(0)[1].mean(0)
    assert error(out[0], mean.double()[None].expand(3, -1, -1)) < (2**-4 if CUDA else 0.05)
    assert (lse - math.log(20)).abs().max() < 1e-3


def test_e4m3_costs_what_its_three_mantissa_bits_explain() -> None:
    torch.manual_seed(0)  # of 150 seeds one ends at 0.081
    case = build_case([OURS], [[0] * 4], tokens=64, device=DEVICE)
    q = torch.randn(1, 32, 2, 64, device=DEVICE)
    exact, exact_lse = exact_attention(q[0], *case.history(0), 0.125)
    out, lse = run(case, q, torch.float8_e4m3fn, Backend.TORCH)
    assert 0.005 < error(out[0], exact) < 0.08
    assert (lse[0].double() - exact_lse).abs().max() < 0.15


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path with the cohorts and slices of a GPU, the twins on a CPU."""
    monkeypatch.setattr(staged_plan, "_together", lambda _: True)


def mixed_errors(pages: int, layout: RoPELayout | None, head_dim: int, dtype: torch.dtype) -> dict[int, float]:
    """Relative error of every sequence of a ragged batch of mixed pages; `pages` fit the scratch."""
    rope = None if layout is None else RoPESpec(head_dim=head_dim, grid=(4, 8), layout=layout)
    formats = [DENSE, OURS, FORMATS["qvg-pro-int2"], DENSE_VALUES]
    sequences = [[1] * 9 + [2, 0], [1, 1, 0], [1, 1, 0], [0, 0], [], [3, 1]]
    case = build_case(formats, sequences, tokens=32, head_dim=head_dim, dtype=dtype, rope=rope, device=DEVICE)
    cu = [0, 20, 25, 30, 37, 40, 41]
    q = torch.randn(41, 4, head_dim, device=DEVICE).to(dtype)
    tail = 41 * 4 * head_dim * (4 + 2 * staged_plan.SLOTS)
    nbytes = 2 * pages * 32 * 2 * head_dim * 4 + tail + 70000
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, LAYER, cu_seqlens_q=cu, rope=rope, path=AttentionPath.STAGED_FP8,
        workspace=torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=DEVICE),
    )  # fmt: skip
    assert (out[37:40] == 0).all()
    assert (lse[37:40] == float("-inf")).all()
    errors = {}
    for b in (0, 1, 2, 3, 5):
        rows = slice(cu[b], cu[b + 1])
        exact, exact_lse = exact_attention(q[rows], *case.history(b), head_dim**-0.5)
        assert (lse[rows].double() - exact_lse).abs().max() < 0.25, b
        errors[b] = error(out[rows], exact)
    return errors


@pytest.mark.parametrize("layout", [None, *RoPELayout])
@pytest.mark.parametrize("pages", [3, 40])
def test_mixed_pages_of_a_ragged_batch_are_attended(
    monkeypatch: pytest.MonkeyPatch, pages: int, layout: RoPELayout | None
) -> None:
    as_on_a_gpu(monkeypatch)
    errors = mixed_errors(pages, layout, 64, torch.float16)
    assert errors.pop(3) < 2e-3  # unquantised pages keep their dtype
    assert max(errors.values()) < 0.1, errors


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_mixed_pages_are_attended_on_a_gpu_with_any_head(head_dim: int) -> None:
    errors = mixed_errors(40, RoPELayout.INTERLEAVED, head_dim, torch.bfloat16)
    assert errors.pop(3) < 0.02
    assert max(errors.values()) < 0.1, errors


@pytest.mark.skipif(CUDA, reason="there the path runs its kernels anyway")
def test_the_path_holds_together_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(staged_decode, "FP8_DTYPE", KERNEL_DTYPE)
    for module in (fp8_attention, merge):
        monkeypatch.setattr(module, "uses_triton", lambda *_: True)
    rope = RoPESpec(head_dim=64, grid=(2, 6))
    case = build_case([DENSE, OURS], [[1] * 9 + [0]], tokens=12, dtype=torch.float16, rope=rope)
    q = torch.randn(7, 4, 64).half()
    workspace = torch.full((5 * 12 * 2 * 64 * 4 * 2 + 7 * 4 * 64 * 12 + 140000,), 0xFF, dtype=torch.uint8)
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, LAYER,
        cu_seqlens_q=[0, 7], rope=rope, path=AttentionPath.STAGED_FP8, workspace=workspace,
    )  # fmt: skip
    exact, exact_lse = exact_attention(q, *case.history(0), 0.125)
    assert error(out, exact) < 4e-3
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("queries", "cohorts"), [(8, 1), (256, 3)])
def test_sequences_with_many_queries_go_through_fp8_one_after_another(
    monkeypatch: pytest.MonkeyPatch, queries: int, cohorts: int
) -> None:
    as_on_a_gpu(monkeypatch)
    case = build_case([OURS], [[0] * 3, [0], [0] * 2], tokens=32, device=DEVICE)
    cu = [0, queries, 2 * queries, 3 * queries]
    q = torch.randn(3 * queries, 4, 64, device=DEVICE)  # two query heads a KV head
    out, _ = paged_attention(
        q, case.buffer, case.table, case.layouts, LAYER, cu_seqlens_q=cu, path=AttentionPath.STAGED_FP8
    )
    for b in range(3):
        rows = slice(cu[b], cu[b + 1])
        assert error(out[rows], exact_attention(q[rows], *case.history(b), 0.125)[0]) < 0.1
    (plan,) = [made for key, made in case.table.cache.items() if key[0] == "plan"]
    assert len(plan.cohorts) == cohorts


@pytest.mark.parametrize("values", ["qvg-int2", "qvg-int4"])
def test_pages_of_more_than_two_bits_are_not_read_in_fp8(monkeypatch: pytest.MonkeyPatch, values: str) -> None:
    as_on_a_gpu(monkeypatch)
    wide = replace(FORMATS[values], name="wide", key=FORMATS["qvg-int4"].key)
    case = build_case([wide], [[0] * 16], tokens=32, dtype=torch.float16, device=DEVICE)
    q = 3 * torch.randn(9, 2, 64, device=DEVICE).half()
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, LAYER, cu_seqlens_q=[0, 9], path=AttentionPath.STAGED_FP8
    )
    case.check(q, [0, 9], out, lse, 0.125)


def thirteen_bits(x: torch.Tensor) -> torch.Tensor:
    """Towards zero, as Hopper keeps the sums of FP8 products."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2**13) / 2**13, exponent)


def hopper_sums(weights: torch.Tensor, values: torch.Tensor, tile: int) -> torch.Tensor:
    """``weights @ values`` in steps of 32 keys that are added to 13 bits, and in float32 from tile to tile."""
    total = torch.zeros(len(weights), values.shape[1])
    for start in range(0, len(values), tile):
        partial = torch.zeros_like(total)
        for i in range(start, start + tile, 32):
            partial = thirteen_bits(partial + weights[:, i : i + 32] @ values[i : i + 32])
        total += partial
    return total


def test_sums_of_thirteen_bits_do_no_harm_within_a_tile_and_much_beyond() -> None:
    torch.manual_seed(0)
    keys, tile = 16384, launch_shape(128).keys
    weights = torch.exp(torch.randn(16, keys)).to(torch.float8_e4m3fn).float()
    values = torch.randn(keys, 64).to(torch.float8_e4m3fn).float()
    exact = weights.double() @ values.double()
    assert error(hopper_sums(weights, values, tile), exact) < 2e-3  # an eighth of what rounding the weights costs
    assert error(hopper_sums(weights, values, keys), exact) > 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_error_does_not_grow_with_the_keys(head_dim: int) -> None:
    errors = []
    for num_keys in (4096, 65536):
        keys, values = torch.randn(2, 1, num_keys, head_dim, device="cuda").to(torch.float8_e4m3fn)
        bounds = torch.full((1, 4), 112.0, device="cuda")  # a stored 1.0 is worth 1
        stored = torch.empty_like(keys)
        stored[:, key_rows(num_keys)] = keys
        scratch = Fp8Scratch(stored, values.transpose(1, 2).contiguous(), bounds, num_keys)
        q = torch.randn(1, 64, 1, head_dim, device="cuda")
        queries, scales = quantise_queries(q, 1, False, torch.float8_e4m3fn)
        out, lse = torch.empty(1, 64, 1, head_dim, device="cuda"), torch.empty(1, 64, 1, device="cuda")
        attend(
            queries, scales, scratch, out, lse, heads=1, softmax_scale=head_dim**-0.5, shape=launch_shape(head_dim)
        )
        rounded = queries[0].float() * scales[0, :, None]
        exact, _ = exact_attention(
            rounded[:, None], keys[0].float()[:, None], values[0].float()[:, None], head_dim**-0.5
        )
        errors.append(error(out[0], exact))
    assert errors[1] < 1.5 * errors[0] < 0.06, errors


@pytest.mark.parametrize(("problems", "rows", "keys"), [(12, 4680, 28080), (12, 1560, 28080), (40, 9360, 82680)])
def test_shares_fill_whole_waves_of_programs(problems: int, rows: int, keys: int) -> None:
    shape = launch_shape(128)
    splits = num_splits(problems, rows, keys, shape, torch.device("cpu"))
    waves = -(-rows // shape.rows) * problems * splits / shape.programs
    assert 1 <= splits <= fp8_attention.MOST_SPLITS
    assert math.ceil(waves) / waves < 1.1


def test_a_short_history_is_not_cut() -> None:
    assert num_splits(1, 1, 100, launch_shape(128), torch.device("cpu")) == 1


def test_a_workspace_without_room_for_partial_results_is_used_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    case = build_case([OURS], [[0] * 4], tokens=32, dtype=torch.float16, device=DEVICE)
    q = torch.randn(200, 2, 64, device=DEVICE).half()
    workspace = torch.empty(attention_workspace_nbytes(case.layouts, 2, 200, q.dtype), dtype=torch.uint8, device=DEVICE)
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, LAYER,
        cu_seqlens_q=[0, 200], path=AttentionPath.STAGED_FP8, workspace=workspace,
    )  # fmt: skip
    case.check(q, [0, 200], out, lse, 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize("path", [AttentionPath.STAGED, AttentionPath.STAGED_FP8])
def test_a_call_can_be_captured_and_replayed(path: AttentionPath) -> None:
    case = build_case([DENSE, OURS], [[1] * 12 + [0] * 2], tokens=300, heads=4, head_dim=128, dtype=torch.bfloat16,
                      device="cuda")  # fmt: skip
    q = torch.randn(600, 4, 128, device="cuda", dtype=torch.bfloat16)
    workspace = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")

    def attend_once() -> tuple[torch.Tensor, torch.Tensor]:
        return paged_attention(
            q, case.buffer, case.table, case.layouts, LAYER, cu_seqlens_q=[0, 600], path=path, workspace=workspace
        )

    expected, _ = attend_once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend_once()
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
    exact, exact_lse = exact_attention(q, *case.history(0), 128**-0.5)
    assert error(out, exact) < (0.1 if path is AttentionPath.STAGED_FP8 else 0.01)
    assert (lse.double() - exact_lse).abs().max() < 0.1


def test_shipped_shapes_fit_every_head() -> None:
    for head_dim in (64, 128, 256):
        shape = launch_shape(head_dim)
        assert 128 % shape.keys == 0
        assert shape.keys % 16 == 0


def test_kernels_compile_for_hopper_and_use_its_matrix_units() -> None:
    script = Path(__file__).with_name("compile_fp8.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for row in rows:
        programs = launch_shape(int(row["kernel"].split()[1])).programs if row["fp8_products"] else 2
        assert row["shared"] <= (227 << 10) // programs, row
        assert row["from_zero"], row  # no sum of products goes on from tile to tile
        assert row["fp8_products"] == row["kernel"].startswith("attention"), row
