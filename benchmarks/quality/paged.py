"""The paged cache itself on many paths: attention in BF16 and in FP8, and an unquantised window of the same bytes.

    python benchmarks/quality/paged.py --weights V1 --worlds 96 --jobs 4 --json eval_paged.json

The same as ``qvg-paged eval``, with a score for every path, so that differences come with intervals. Paths are shared
out among processes, since the manager's bookkeeping takes most of the time.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluation
import results_file
import torch
from eval_rows import FORMAT_ROWS, Row
from torch import Tensor
from world_model.evaluate import psnr
from world_model.model import load_model
from world_streams import return_shots

from quality.metrics import paired_interval
from qvg_paged.kernels.formats import DENSE

ROWS = ("best-2bit, staged", "best-2bit, staged-fp8")
SAME_BYTES = "best-2bit"
SPAN_FRAMES = 8
"""Of the comparison at the same bytes: the unquantised tail weighs more in longer spans."""


def shard(options: evaluation.EvalOptions) -> dict[str, Any]:
    """Rows of some paths: bits, and PSNR per path against the unquantised cache and against truth."""
    torch.set_num_threads(1)
    model = load_model(options.weights, options.device)
    shots = return_shots(
        options.worlds, given=options.given, generated=options.given, resolution=model.config.resolution,
        seed=options.seed, world_seed=options.world_seed, device=options.device,
    )  # fmt: skip
    bench = evaluation._Bench(model, shots, options)
    dense, named = bench.videos(Row(name="unquantised", format=DENSE)), {row.name: row for row in FORMAT_ROWS}
    found = {"unquantised": {"bits": 16.0, **_scores(bench, dense, dense, slice(None))}}
    for name in ROWS:
        found[name] = {"bits": bench.bits(named[name]), **_scores(bench, bench.videos(named[name]), dense, slice(None))}
    for name, bits, video, frames in _same_bytes(bench, named[SAME_BYTES], dense):
        found[name] = {"bits": bits, **_scores(bench, video, dense, frames)}
    return found


def _same_bytes(
    bench: Any, row: Row, dense: Tensor
) -> Iterator[tuple[str, float, Tensor, slice]]:
    """The row, a window of its bytes and the unquantised cache, on frames whose source has left the window."""
    config = bench.config(row.format, span_frames=SPAN_FRAMES)
    given = bench.options.given
    window = evaluation.same_bytes_window(bench.spec, config, 2 * given)[1]
    # generated frame i shows again what frame 2 * given - 1 - i showed
    outside = slice((window + 1) // 2, None)
    yield f"revisits: {row.name}, all history", bench.bits(row), bench.videos(row, SPAN_FRAMES), outside
    unquantised = Row(name="window", format=DENSE, window=window)
    yield f"revisits: unquantised window of {window} frames", 16.0, bench.videos(unquantised), outside
    yield "revisits: unquantised, all history", 16.0, dense, outside


def _scores(bench: Any, video: Tensor, dense: Tensor, frames: slice) -> dict[str, Any]:
    scores = {}
    for name, other in (("dense", dense), ("truth", bench.truth)):
        curves = psnr(video[:, frames], other[:, frames]).clamp_max(evaluation.MAX_PSNR)
        scores[name] = {"onset": curves[:, 0].tolist(), "paths": curves.mean(1).tolist()}
    return scores


def pooled(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows over the paths of all shards, and differences between rows with their intervals."""
    rows: dict[str, Any] = {}
    for name in shards[0]:
        rows[name] = {"bits": shards[0][name]["bits"]}
        for against in ("dense", "truth"):
            onset, paths = ([x for some in shards for x in some[name][against][key]] for key in ("onset", "paths"))
            rows[name][against] = {
                "onset": sum(onset) / len(onset), "mean": sum(paths) / len(paths),
                "paths": [round(x, 3) for x in paths],
            }  # fmt: skip
    bf16, fp8 = ROWS
    window = next(name for name in rows if "window" in name)
    pairs = [(fp8, bf16, "dense"), (fp8, bf16, "truth"), (f"revisits: {SAME_BYTES}, all history", window, "truth")]
    return {"rows": rows, "pairs": [_pair(rows, *pair) for pair in pairs]}


def _pair(rows: dict[str, Any], ours: str, theirs: str, against: str) -> dict[str, Any]:
    scores = (torch.tensor(rows[name][against]["paths"]) for name in (ours, theirs))
    mean, low, high = paired_interval(*scores)
    return {"ours": ours, "theirs": theirs, "against": against, "mean": mean, "low": low, "high": high}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--worlds", type=int, default=96)
    parser.add_argument("--given", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--memory", default="6GiB", help="of each process")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    start, each = time.monotonic(), -(-arguments.worlds // arguments.jobs)
    options = [
        evaluation.EvalOptions(
            weights=arguments.weights, device=arguments.device, worlds=each, given=arguments.given,
            steps=arguments.steps, memory=arguments.memory, world_seed=7 + job,
        )
        for job in range(arguments.jobs)
    ]  # fmt: skip
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pooled(list(pool.map(shard, options)))
    for name, row in results["rows"].items():
        dense, truth = row["dense"], row["truth"]
        print(f"{name:50s} {row['bits']:6.3f} b {dense['onset']:6.2f} {dense['mean']:6.2f} truth {truth['mean']:6.2f}")
    for pair in results["pairs"]:
        print(f"{pair['ours']} - {pair['theirs']}, {pair['against']}: {pair['mean']:+.2f} "
              f"[{pair['low']:+.2f}, {pair['high']:+.2f}] dB")
    config = {**vars(arguments), "weights": arguments.weights.name, "seconds_taken": time.monotonic() - start}
    del config["json"]
    results_file.write(arguments.json, results_file.result(device=arguments.device, config=config, results=results))


if __name__ == "__main__":
    main()
