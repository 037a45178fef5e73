"""Staged reads on a GPU: checked on fresh random pages, then timed beside cuDNN and FlashAttention on resident BF16.

    python benchmarks/staged_reads.py --json runs/staged_reads.json [--heads 12 --pages 18 --queries 4680] [--tiles]

Whole calls, decoding included, first; with --tiles also the kernels of the FP8 path alone: decoding, and attention with
other tiles and splits. Medians of CUDA graph replays.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import results_file  # noqa: E402
from direct_reads import DEVICE, Pages, exact, timed  # noqa: E402

from qvg_paged.kernels import fp8_attention as fp8  # noqa: E402
from qvg_paged.kernels.attention import AttentionPath, paged_attention  # noqa: E402
from qvg_paged.kernels.rope import RoPELayout  # noqa: E402
from qvg_paged.kernels.slices import Room, cohorts  # noqa: E402

TOKENS, DIM, SAMPLED = 1560, 128, 32
TILES = ((64, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2))
PATHS = (AttentionPath.STAGED, AttentionPath.STAGED_FP8)


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error."""
    return ((out.float() - truth).norm() / truth.norm()).item()


def dense_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """cuDNN and FlashAttention-2 with their log-sum-exp, outputs ``[queries, heads, head_dim]``."""
    ops, scale = torch.ops.aten, DIM**-0.5
    q, k, v = (x.bfloat16().transpose(0, 1)[None] for x in (q, k, v))
    return {
        "cuDNN": lambda: ops._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, False, False, scale=scale
        )[0][0].transpose(0, 1),
        "FlashAttention-2": lambda: ops._scaled_dot_product_flash_attention(
            q, k, v, 0.0, False, False, scale=scale
        )[0][0].transpose(0, 1),
    }  # fmt: skip


def whole_calls(pages: Pages, heads: int, queries: int, scratch: int) -> list[dict[str, Any]]:
    """Rows of both staged paths and the dense kernels."""
    q = torch.randn(queries, heads, DIM, device=DEVICE, dtype=torch.bfloat16)
    k, v = pages.dense(0, 0)
    workspace = torch.empty(scratch, dtype=torch.uint8, device=DEVICE)

    def staged(path: AttentionPath) -> Callable[[], torch.Tensor]:
        return lambda: paged_attention(
            q, pages.buffer, pages.table, [pages.layout], 0, cu_seqlens_q=[0, queries], path=path, workspace=workspace
        )[0]

    calls = dense_calls(q, k, v) | {path.value: staged(path) for path in PATHS}
    rows = torch.randint(0, queries, (SAMPLED,), device=DEVICE)
    truth = exact(q[rows], k, v)
    made: list[dict[str, Any]] = []
    for name, call in calls.items():
        try:
            error, time = relative(call()[rows], truth), timed(call, 1)
        except Exception:
            traceback.print_exc()
            continue
        size = {"heads": heads, "keys": len(k), "queries": queries}
        tflops = 4 * queries * len(k) * heads * DIM / time["ms"] / 1e9
        made.append({"system": name, **size, **time, "tflops": tflops, "error": error})
        made[-1]["against_cudnn"] = made[0]["ms"] / time["ms"]
        print(made[-1], flush=True)
    return made


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
    for heads in options.heads:
        for count in options.pages:
            pages = Pages([count], heads=heads, head_dim=DIM, tokens=TOKENS, layers=1, fmt="qvg4-int2")
            for queries in options.queries:
                rows += whole_calls(pages, heads, queries, options.scratch_mib[-1 if heads > 12 else 0] << 20)
                rows += tiles(pages, heads, queries) if options.tiles else []
    if options.json:
        results_file.write(options.json, results_file.result(device=DEVICE, config=vars(options), results=rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
