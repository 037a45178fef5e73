"""The run: ceilings first, then one row after another until the time is up; judged at the end."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.attention import attention_cases
from bench.bounds import judge
from bench.chunk_loop import chunk_loop_cases
from bench.decode import decode_cases
from bench.encode import encode_cases
from bench.manager import manager_cases
from bench.presets import preset_cases
from bench.ragged import ragged_cases
from bench.roofline import Ceilings
from bench.rows import Case, run_case
from bench.settings import PARTS, Bench, BenchOptions
from bench.timing import Clock
from qvg_paged import ArgumentError

__all__ = ["PARTS", "BenchOptions", "cases", "run"]

QUICK_SECONDS, SMALL_SECONDS = 0.015, 0.005


def cases(bench: Bench) -> Iterator[Case]:
    """All rows of the parts asked for, cheapest parts first."""
    made = {
        "manager": (manager_cases,), "encode": (encode_cases,), "decode": (decode_cases,),
        "attention": (preset_cases, ragged_cases, chunk_loop_cases, attention_cases),
    }  # fmt: skip
    for part, makers in made.items():
        if part in bench.options.parts:
            for maker in makers:
                yield from maker(bench)


def clock_for(bench: Bench) -> Clock:
    """How long one measurement takes."""
    if bench.is_small:
        return Clock(bench.device, SMALL_SECONDS, least=3)
    return Clock(bench.device, QUICK_SECONDS) if bench.options.quick else Clock(bench.device)


def run(options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Measure; yields the results so far after every row, at least once.

    They hold ceilings, rows, bounds, and the names of rows that were not started.

    Raises:
        ArgumentError: an unknown part, `only` names no row, or there is no released code where it was said to be.
    """
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        raise ArgumentError(f"what: expected any of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    start = time.monotonic()
    torch.manual_seed(options.seed)
    bench = Bench(options)
    _ = bench.released  # a wrong path is told before anything is measured
    wanted = [case for case in cases(bench) if not options.only or any(word in case.name for word in options.only)]
    if bench.is_small:  # bounds are promises about an H200, but the host's bookkeeping is the same everywhere
        wanted = [case if case.part == "manager" else replace(case, bounds=()) for case in wanted]
    if not wanted:
        raise ArgumentError(f"only: expected part of a row's name, got {', '.join(options.only)}")
    clock = clock_for(bench)
    ceilings = Ceilings.measure(clock)
    rows: list[dict[str, Any]] = []

    def so_far() -> dict[str, Any]:
        left = [f"{case.part}: {case.name}" for case in wanted[len(rows) :]]
        return {
            "ceilings": ceilings, "rows": rows, "bounds": judge(rows), "not_started": left,
            "seconds": round(time.monotonic() - start, 1), "right": all(map(_is_right, rows)),
            "warnings": _warnings(rows),
        }  # fmt: skip

    for case in wanted:
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            break
        rows.append(run_case(case, clock, ceilings))
        yield so_far()
    if not rows:
        yield so_far()


def _is_right(row: dict[str, Any]) -> bool:
    """Whether all systems of ours in a row were measured: right, and without an error."""
    return not row["error"] and not any(found["error"] for found in row["systems"].values() if found["ours"])


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    found = [f"{row['part']}: {row['name']}: {row['error']}" for row in rows if row["error"]]
    for row in rows:
        errors = {name: system["error"] for name, system in row["systems"].items() if system["error"]}
        found += [f"{row['part']}: {row['name']}: {name}: {error}" for name, error in errors.items()]
    return found
