"""Every launch of the library on small shapes under compute-sanitizer: no read or write out of bounds, no race.

    python benchmarks/sanitize.py --json runs/sanitize.json [--tool memcheck --tool racecheck] [--jobs 6]

A tool runs this file again for every run, several side by side, as the program to watch: streams of a small model on a
CUDA device commit spans in every preset and attend by every path, with few queries and many, pages that end inside a
tile, and keys turned on read. PyTorch's caching of memory is off, so that every tensor has bounds of its own. Results
are compared with the reference path. Races are looked for in the smaller runs: that tool is slow. Exit status 0 only if
every tool found nothing; 77 where compute-sanitizer is not installed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import results_file
import torch

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, RoPESpec, Window, kernels
from qvg_paged.kernels import AttentionPath

SECONDS = 400
FOREIGN = ("flash_fwd", "cudnn")
"""Kernels that are not watched. PyTorch 2.11's FlashAttention-2 writes log-sum-exps of whole groups of 8 rows: past its
tensor, though not past what PyTorch's caching allocator rounds it to. racecheck does not follow how cuDNN's warps wait
for each other."""
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
ACCESS = r"\w+ access at \S+ in (\S+):(\d+)"
RACE = re.compile(rf"Race reported between {ACCESS}.*\n.*and {ACCESS}")
FOUND, NOT_INSTALLED = 3, 77
PATHS = (AttentionPath.STAGED, AttentionPath.STAGED_FP8, AttentionPath.DIRECT)
LOOSE, LOOSE_FP8 = 0.05, 0.2
"""Relative distance from the reference path that says an address was wrong; accuracy is the tests' concern."""


@dataclass(frozen=True)
class Watched:
    """One small run.

    Attributes:
        format: preset of closed spans.
        tokens: of a frame; not a multiple of a tile.
        head_dim: channels.
        rope: whether keys are turned on read.
    """

    format: str
    tokens: int
    head_dim: int
    rope: bool

    @property
    def model(self) -> ModelSpec:
        """Two layers of two heads."""
        rope = RoPESpec(head_dim=self.head_dim, grid=(1, self.tokens)) if self.rope else None
        return ModelSpec(
            num_layers=2, num_kv_heads=2, head_dim=self.head_dim, tokens_per_frame=self.tokens, frames_per_chunk=1,
            dtype=torch.bfloat16, rope="on_read" if self.rope else "applied", rope_spec=rope,
        )  # fmt: skip


RUNS = (
    Watched("qvg4-int2", 300, 128, rope=False),
    Watched("qvg4-int2", 300, 128, rope=True),
    Watched("qvg4-int2", 40, 128, rope=False),
    Watched("best-2bit", 61, 64, rope=False),
    Watched("qvg-int4", 1, 64, rope=True),
    Watched("qvg-pro-int2", 33, 128, rope=False),
    Watched("qvg4-int2", 13, 128, rope=False),
)

WATCHED = {"memcheck": RUNS, "racecheck": RUNS[2:]}
"""Runs by tool."""


def distances(run: Watched, device: str = "cuda") -> Iterator[tuple[AttentionPath, int, float]]:
    """Relative distance of every path from the reference, with the chunk's queries and with a few of them."""
    config = CacheConfig(memory="96MiB", format=run.format, span_frames=3, device=device, path=AttentionPath.REFERENCE)
    cache = KVCacheManager(run.model, config)
    streams = [cache.open(name, window=Window(sink_frames=1, recent_frames=4 + i)) for i, name in enumerate("ab")]
    for number in range(7):
        chunks = cache.begin_chunks(streams[: 1 + (number > 2)])
        tensors = torch.randn(3, sum(c.num_tokens for c in chunks), 2, run.head_dim, device=device).bfloat16()
        truth = [cache.attend(layer, chunks, *tensors) for layer in range(run.model.num_layers)]
        for path in PATHS if number in (3, 6) else ():
            cache.config = replace(config, path=path)
            found = [cache.attend(layer, chunks, *tensors) for layer in range(run.model.num_layers)]
            yield path, len(tensors[0]), max(map(_relative, found, truth))
        cache.config = config
        cache.commit(chunks)
    streams[0].read(0, list(streams[0].pages))
    cache.check_integrity()


def _relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.float() - truth.float()).norm() / truth.float().norm()).item()


def watched(run: Watched) -> int:
    """What a tool watches; exit status 0 if every path agrees with the reference."""
    torch.manual_seed(int(time.time()))
    held = True
    for path, queries, distance in distances(run):
        right = distance <= (LOOSE_FP8 if path is AttentionPath.STAGED_FP8 else LOOSE)
        held &= right
        print(f"{run} {path.value} {queries} queries: {distance:.4f}{'' if right else ' WRONG'}", flush=True)
    return 0 if held else 1


def watch(program: str, seconds: int, tool: str, run: Watched) -> dict[str, Any]:
    """One run under `tool`, for `seconds` at most: what it found."""
    command = ["timeout", str(seconds), program, "--tool", tool, "--error-exitcode", str(FOUND)]
    for name in FOREIGN:
        command += ["--kernel-name-exclude", f"kns={name}"]
    command += [sys.executable, __file__, "--watched", str(RUNS.index(run))]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        print(f"{tool}: {line}", end="", flush=True)
    process.wait()
    report = "".join(lines)
    found, handed = [int(count) for count in SUMMARY.findall(report)], _handed_over(report)
    compared = sum("queries:" in line for line in lines)
    return {
        "tool": tool, "run": run, "found": sum(found) - handed if found else None, "handed_over": handed,
        "compared": compared, "exit_status": process.returncode,
        "held": process.returncode in ((0, FOUND) if handed else (0,)) and found == [handed] and compared > 0,
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _handed_over(report: str) -> int:
    """Races reported between instructions of no line of a kernel's body.

    They are what Triton adds where a kernel gives warps different work: one warp group writes the others' arguments to
    shared memory, and all meet at named barrier 1 before they are read. racecheck misses that barrier; it is in SASS.
    """
    return sum(_is_definition(*race[:2]) and _is_definition(*race[2:]) for race in RACE.findall(report))


def _is_definition(file: str, line: str) -> bool:
    source = Path(kernels.__file__).parent / Path(file).name
    return source.is_file() and source.read_text().splitlines()[int(line) - 1].startswith("def ")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tool", action="append", choices=list(WATCHED))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a run")
    parser.add_argument("--watched", type=int, metavar="RUN", help="be the program that is watched")
    arguments = parser.parse_args()
    if arguments.watched is not None:
        return watched(RUNS[arguments.watched])
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        print("compute-sanitizer: expected on the PATH, found nothing; it comes with the CUDA toolkit")
        return NOT_INSTALLED
    work = [(tool, run) for tool in arguments.tool or WATCHED for run in WATCHED[tool]]
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        rows = list(jobs.map(lambda task: watch(program, arguments.seconds, *task), work))
    if arguments.json:
        results_file.write(arguments.json, results_file.result(device="cuda", config={"runs": WATCHED}, results=rows))
    for row in rows:
        print(row)
    return 0 if all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
