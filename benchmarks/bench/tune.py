"""`qvg-paged bench --tune`: times of every path over a grid of workloads, as the table that `auto` chooses by."""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from results_file import device_name

from bench.attention import paged_call, path_check, scratch
from bench.gate import AttentionGate
from bench.history import HistorySpec
from bench.settings import Bench, BenchOptions
from bench.timing import Clock
from qvg_paged.kernels import AttentionPath, Lookahead
from qvg_paged.kernels.dispatch import DispatchRow, DispatchTable, Workload, cache_file

__all__ = ["TUNED", "tune", "write"]

TUNED = tuple(path for path in AttentionPath if path not in (AttentionPath.REFERENCE, AttentionPath.AUTO))
CALL_SECONDS = 0.02
Tell = Callable[[DispatchRow], None]
Point = tuple[HistorySpec, int, int]


def grid(bench: Bench) -> Iterator[Point]:
    """Histories, query heads, and queries; those that share a history next to each other, the likeliest first."""
    if bench.is_small:
        yield from (
            (HistorySpec((4,), 64, 2, 64, rope=rope), 2, queries) for rope in (False, True) for queries in (1, 16)
        )
        return
    default = HistorySpec((18,), 1560, 12)
    specs = [
        (HistorySpec((frames,), 1560, heads, rope=rope), heads)
        for frames in (18, 53, 5) for rope in (False, True) for heads in (12, 40)
    ]  # fmt: skip
    specs += [(HistorySpec((18,), 1560, 12, format=name), 12) for name in ("qvg-int2", "qvg-int4", "qvg-pro-int2")]
    specs += [(HistorySpec((18,), 1560, heads, dim), heads) for heads, dim in ((24, 64), (6, 256))]
    specs += [(HistorySpec((32,) * 8, 1024, heads), heads) for heads in (8, 32)]
    for spec, heads in specs:
        short = len(spec.frames) > 1
        full = spec.head_dim == default.head_dim and spec.format == default.format
        sizes = (1, 4, 16) if short else (1, 16, 64, 256, 512, 1560, 4680, 9360) if full else (16, 256, 1560, 4680)
        yield from ((spec, heads, queries) for queries in sizes)


def tune(options: BenchOptions, tell: Tell) -> DispatchTable:
    """Measure the grid; paths that are wrong or do not run are left out of a row, rows without any out of the table.

    Args:
        options: device, seed, and ``seconds`` after which no workload is started.
        tell: gets every row.
    """
    start = time.monotonic()
    torch.manual_seed(options.seed)
    bench = Bench(options)
    rows = []
    for spec, heads, queries in grid(bench):
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            break
        row = _measure(bench, spec, heads, queries)
        if row.milliseconds:
            rows.append(row)
            tell(row)
    return DispatchTable(device=device_name(bench.device) if bench.device.type == "cuda" else "cpu", rows=tuple(rows))


def write(options: BenchOptions, tell: Callable[[str], None], json_file: Path | None) -> DispatchTable:
    """Tune, and write the table to the user's cache folder and to `json_file`; `tell` gets a line for every row."""

    def line(row: DispatchRow) -> None:
        load = row.workload
        times = ", ".join(f"{path.value} {milliseconds:.3f} ms" for path, milliseconds in row.milliseconds)
        rope = ", RoPE on read" if load.rope else ""
        tell(f"{load.queries} rows, {load.keys} keys, {load.heads} x {load.head_dim}, {load.format}{rope}: {times}")

    made = tune(options, line)
    for path in (cache_file(made.device), *([json_file] if json_file else [])):
        tell(f"table: {made.save(path)}")
    return made


def _measure(bench: Bench, spec: HistorySpec, heads: int, queries: int) -> DispatchRow:
    history, batch = bench.history(spec), len(spec.frames)
    q = torch.randn(queries * batch, heads, spec.head_dim, device=bench.device).bfloat16()
    cu = tuple(range(0, len(q) + 1, queries))
    gate = AttentionGate(q, cu, spec.heads, history.truth)
    workspace, lookahead = scratch(spec, bench.device), Lookahead()
    clock = Clock(bench.device, CALL_SECONDS, least=3)
    times = []
    for path in TUNED:
        if bench.is_small and path is not AttentionPath.STAGED:
            continue
        run = paged_call(q, history, cu, path, workspace, lookahead=lookahead)
        try:
            if path_check(gate, path)(run(0)).passed:
                times.append((path, clock.device_time(run, history.sets).median_ms))
        except Exception:  # a path that cannot run here has no time
            gc.collect()
    workload = Workload(
        queries=queries * (heads // spec.heads), keys=spec.keys[0], heads=spec.heads * batch, head_dim=spec.head_dim,
        format=spec.format, rope=spec.rope,
    )  # fmt: skip
    return DispatchRow(workload=workload, milliseconds=tuple(times))
