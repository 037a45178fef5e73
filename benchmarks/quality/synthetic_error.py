"""Errors of the formats on synthetic K and V at the geometry of real spans.

    python benchmarks/quality/synthetic_error.py --json synthetic_error.json

Spans of 37,440 (Self-Forcing) and 29,640 tokens (LongCat), 128 channels. Errors only: nothing here has queries.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file

from quality.codecs import Library
from quality.synthetic import STATISTICS, Statistics, synthesise
from qvg_paged import FORMATS, QVG, Codec

__all__ = ["errors", "run"]

NAMES = ("qvg-int2", "qvg-pro-int2", "qvg4-int2", "best-2bit", "balanced", "near-lossless", "qvg-int4")
FOUR_FRAMES = 6240
"""Tokens of the longest span of whole frames whose keys 256 centroids serve as `best-2bit` wants it."""


def cases(tensor: str) -> Iterator[tuple[str, Codec, int | None]]:
    """Formats of one tensor: name, codec, tokens of a span (None for all of them)."""
    for name in NAMES:
        fmt = FORMATS[name]
        yield name, fmt.key if tensor == "K" else fmt.value, None
    best = FORMATS["best-2bit"]
    yield "best-2bit, spans of 4 frames", best.key if tensor == "K" else best.value, FOUR_FRAMES
    yield "qvg-int2 without smoothing", replace(QVG, stages=0), None


def errors(x: Tensor, codec: Codec, *, key: bool, span: int | None = None) -> dict[str, float]:
    """Bits per number and relative error of `x` ``[heads, tokens, dim]``, cut into spans of `span` tokens.

    `quiet` is the error of the half of the channels that vary least, relative to their own energy around the mean.
    """
    ours = Library(codec, key=key)
    span = span or x.shape[1]
    parts = [part.contiguous() for part in x.split(span, 1)]
    read = torch.cat([ours.code(part).float() for part in parts], 1)
    bits = sum(ours.bits(part.shape[1], x.shape[2]) * part.shape[1] for part in parts) / x.shape[1]
    lost = (read - x.float()).square()
    around = (x.float() - x.float().mean(1, keepdim=True)).square().mean(1)  # [heads, dim]
    quiet = around <= around.median(-1, keepdim=True).values
    return {
        "bits": bits,
        "error": (lost.sum() / x.float().square().sum()).sqrt().item(),
        "around_mean": (lost.mean(1).sum() / around.sum()).sqrt().item(),
        "quiet": ((lost.mean(1) * quiet).sum() / (around * quiet).sum()).sqrt().item(),
    }


def run(heads: int, seed: int, statistics: tuple[Statistics, ...] = STATISTICS) -> Iterator[dict[str, Any]]:
    """A row per tensor and format."""
    for one in statistics:
        x = synthesise(one, heads, seed=seed).bfloat16()
        for name, codec, span in cases(one.tensor):
            began = time.perf_counter()
            found = errors(x, codec, key=one.tensor == "K", span=span)
            yield {
                "model": one.model, "tensor": one.tensor, "tokens": one.tokens, "format": name, **found,
                "published_qvg": list(one.published) if name == "qvg-int2" else None,
                "seconds": round(time.perf_counter() - began, 2),
            }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for row in run(arguments.heads, arguments.seed):
        rows.append(row)
        print(
            f"{row['model']:14s} {row['tensor']} {row['format']:30s} {row['bits']:6.3f} bits   error {row['error']:.3f}"
            f"   around the mean {row['around_mean']:.3f}   quiet channels {row['quiet']:.3f}   {row['seconds']:.1f} s",
            flush=True,
        )
    results = {"rows": rows}
    results_file.write(arguments.json, results_file.result(device="cpu", config=vars(arguments), results=results))


if __name__ == "__main__":
    main()
