"""Staged reads on a GPU: checked on fresh random pages, then timed beside cuDNN and FlashAttention on resident BF16.

    python benchmarks/staged_reads.py --json runs/staged_reads.json [--heads 12 --pages 18 --queries 4680] [--tiles]

Whole calls, decoding included, and batches of sequences of different lengths: systems take turns, layers follow one
another as in a model. With --tiles also the kernels of the FP8 path alone: decoding, and attention with other tiles and
splits, by CUDA graph replays. Medians.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import results_file  # noqa: E402
from bench.history import sub_table  # noqa: E402
from bench.timing import Clock, Samples  # noqa: E402
from direct_reads import DEVICE, Pages, exact, timed  # noqa: E402

from qvg_paged.kernels import AttentionPath, BlockTable, Lookahead, paged_attention  # noqa: E402
from qvg_paged.kernels import fp8_attention as fp8  # noqa: E402
from qvg_paged.kernels.rope import RoPELayout  # noqa: E402
from qvg_paged.kernels.slices import Room, cohorts  # noqa: E402

TOKENS, DIM, SAMPLED = 1560, 128, 32
TILES = ((64, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2))
PATHS = (AttentionPath.STAGED, AttentionPath.STAGED_FP8)
ALLOWED = {AttentionPath.STAGED: 0.01, AttentionPath.STAGED_FP8: 0.05}
UNEQUAL, EQUAL = [6, 9, 12, 15, 19, 22, 25, 28], [17] * 8
TURNS = 4
MANY_NUMBERS = 500
"""Heads times pages whose codes, in two layers, no cache holds."""
CLOCK = Clock(torch.device(DEVICE), 0.02)
Call = Callable[[int], torch.Tensor]
Pair = tuple[torch.Tensor, ...]


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error."""
    return ((out.float() - truth).norm() / truth.norm()).item()


def dense_calls(q: torch.Tensor, dense: list[Pair]) -> dict[str, Call]:
    """cuDNN and FlashAttention-2 with their log-sum-exp, outputs ``[queries, heads, head_dim]``."""
    ops, scale = torch.ops.aten, DIM**-0.5
    q = q.transpose(0, 1)[None].contiguous()
    return {
        "cuDNN": lambda layer: ops._scaled_dot_product_cudnn_attention(
            q, *dense[layer], None, True, 0.0, False, False, scale=scale
        )[0][0].transpose(0, 1),
        "FlashAttention-2": lambda layer: ops._scaled_dot_product_flash_attention(
            q, *dense[layer], 0.0, False, False, scale=scale
        )[0][0].transpose(0, 1),
    }  # fmt: skip


def staged_call(
    pages: Pages, q: torch.Tensor, cu: list[int], path: AttentionPath, workspace: torch.Tensor,
    table: BlockTable, lookahead: Lookahead | None,
) -> Call:  # fmt: skip
    """A call that takes the layer; with a lookahead, layers follow one another."""
    return lambda layer: paged_attention(
        q, pages.buffer, table, [pages.layout], layer, cu_seqlens_q=cu, path=path, workspace=workspace,
        lookahead=lookahead,
    )[0]  # fmt: skip


def in_turns(calls: dict[str, Call], layers: int, size: dict[str, Any], base: str) -> list[dict[str, Any]]:
    """Rows of systems that take turns, each with its median by that of `base`."""
    samples: dict[str, list[Samples]] = {name: [] for name in calls}
    for name in [*calls] * TURNS:
        samples[name].append(CLOCK.device_samples(calls[name], layers))
    times = {name: reduce(add, found).timing() for name, found in samples.items()}
    made = [
        {"system": name, **size, **asdict(time), "against": base, "ratio": times[base].median_ms / time.median_ms}
        for name, time in times.items()
    ]
    for row in made:
        print(row, flush=True)
    return made


def right(call: Call, some: torch.Tensor, truth: torch.Tensor, most: float) -> float:
    """Relative error of some rows of layer 0.

    Raises:
        ArithmeticError: it is larger than `most`.
    """
    error = relative(call(0)[some], truth)
    if not error <= most:
        raise ArithmeticError(f"relative error {error:.4f}, allowed {most}")
    return error


def whole_calls(pages: Pages, heads: int, queries: int, scratch: int) -> list[dict[str, Any]]:
    """Rows of both staged paths, decoding ahead from layer to layer and not, and the dense kernels."""
    q = torch.randn(queries, heads, DIM, device=DEVICE, dtype=torch.bfloat16)
    layers = [pages.dense(layer, 0) for layer in range(pages.layers)]
    calls = dense_calls(q, [tuple(x.bfloat16().transpose(0, 1)[None].contiguous() for x in kv) for kv in layers])
    some = torch.randint(0, queries, (SAMPLED,), device=DEVICE)
    truth = exact(q[some], *layers[0])
    workspace = torch.empty(scratch, dtype=torch.uint8, device=DEVICE)
    errors: dict[str, float] = {}
    for path in PATHS:
        for name, lookahead in ((path.value, Lookahead()), (f"{path.value}, not ahead", None)):
            calls[name] = staged_call(pages, q, [0, queries], path, workspace, sub_table(pages.table, 0), lookahead)
            errors[name] = right(calls[name], some, truth, ALLOWED[path])
    size = {"heads": heads, "keys": len(layers[0][0]), "queries": queries, "scratch": scratch}
    rows = in_turns(calls, pages.layers, size, "cuDNN")
    return [{**row, "error": errors.get(row["system"])} for row in rows]


def one_by_one(pages: Pages, q: torch.Tensor, queries: int, path: AttentionPath, workspace: torch.Tensor) -> Call:
    """A call for each sequence."""
    calls = [
        staged_call(pages, some, [0, queries], path, workspace, sub_table(pages.table, b), None)
        for b, some in enumerate(q.split(queries))
    ]
    return lambda layer: torch.cat([call(layer) for call in calls])


def batches(scratch: int) -> list[dict[str, Any]]:
    """Rows of sequences of different lengths in one call, in a call each, and of as many equal ones."""
    workspace = torch.empty(scratch, dtype=torch.uint8, device=DEVICE)
    pools = [
        Pages(frames, heads=12, head_dim=DIM, tokens=TOKENS, layers=2, fmt="qvg4-int2") for frames in (UNEQUAL, EQUAL)
    ]
    rows = []
    for queries in (1560, 4680):
        cu = list(range(0, queries * len(UNEQUAL) + 1, queries))
        q = torch.randn(cu[-1], 12, DIM, device=DEVICE, dtype=torch.bfloat16)
        some = torch.randint(cu[3], cu[4], (SAMPLED,), device=DEVICE)
        truth = exact(q[some], *pools[0].dense(0, 3))
        for path in PATHS:
            together, equal = (staged_call(pool, q, cu, path, workspace, pool.table, Lookahead()) for pool in pools)
            each = one_by_one(pools[0], q, queries, path, workspace)
            error = right(together, some, truth, ALLOWED[path])
            calls = {"one call": together, "a call each": each, "equal sequences": equal}
            size = {"path": path.value, "queries": queries, "frames": UNEQUAL, "scratch": scratch, "error": error}
            rows += in_turns(calls, 2, size, "a call each")
    return rows


def tiles(pages: Pages, heads: int, queries: int) -> list[dict[str, Any]]:
    """Rows of the FP8 kernels alone."""
    (cohort,) = cohorts(pages.table, (0, queries), None, Room(1 << 30), False)
    (piece,) = cohort.slices
    keys, dtype = piece.count * TOKENS, torch.float8_e4m3fn
    memory = torch.empty(fp8.scratch_nbytes(heads, keys, DIM, dtype), dtype=torch.uint8, device=DEVICE)
    scratch = fp8.Fp8Scratch.carve(memory, heads, keys, DIM, dtype)
    q = torch.randn(1, queries, heads, DIM, device=DEVICE, dtype=torch.bfloat16)
    q8, scales = fp8.quantise_queries(q, heads, False, dtype)
    size = {"heads": heads, "keys": keys, "queries": queries}

    def decode() -> None:
        fp8.decode_runs(scratch, pages.buffer, piece.runs, (pages.layout,), 0, RoPELayout.INTERLEAVED)

    made = [{"kernel": "decode K and V to E4M3", **size, **timed(decode, 1)}]
    made.append(
        {"kernel": "quantise queries", **size, **timed(lambda: fp8.quantise_queries(q, heads, False, dtype), 1)}
    )
    for tile in TILES:
        for splits in (1, 2, 3):
            out = torch.empty(splits, queries, heads, DIM, device=DEVICE, dtype=torch.bfloat16)
            lse = torch.empty(out.shape[:3], device=DEVICE)
            shape = fp8.Fp8Shape(*tile)

            def attend(out: torch.Tensor = out, lse: torch.Tensor = lse, shape: fp8.Fp8Shape = shape) -> None:
                fp8.attend(q8, scales, scratch, out, lse, heads=heads, softmax_scale=DIM**-0.5, shape=shape)

            time = timed(attend, 1)
            tflops = 4 * queries * keys * heads * DIM / time["ms"] / 1e9
            made.append({"kernel": "attention", "tile": tile, "splits": splits, **size, **time, "tflops": tflops})
    for row in made:
        print(row, flush=True)
    return made


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--heads", type=int, nargs="+", default=[12, 40])
    parser.add_argument("--pages", type=int, nargs="+", default=[18, 53], help="frames of history, 1,560 tokens each")
    parser.add_argument("--queries", type=int, nargs="+", default=[1560, 4680, 9360])
    parser.add_argument("--scratch-mib", type=int, nargs="+", default=[256, 1024], help="up to 12 heads, and beyond")
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def measure(make: Callable[..., list[dict[str, Any]]], *arguments: Any) -> None:
        try:
            rows.extend(make(*arguments))
        except Exception:
            traceback.print_exc()
        if options.json:
            results_file.write(options.json, results_file.result(device=DEVICE, config=vars(options), results=rows))

    measure(batches, options.scratch_mib[0] << 20)
    for heads in options.heads:
        for count in options.pages:
            layers = 5 if heads * count < MANY_NUMBERS else 2
            pages = Pages([count], heads=heads, head_dim=DIM, tokens=TOKENS, layers=layers, fmt="qvg4-int2")
            for queries in options.queries:
                measure(whole_calls, pages, heads, queries, options.scratch_mib[-1 if heads > 12 else 0] << 20)
                if options.tiles:
                    measure(tiles, pages, heads, queries)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
