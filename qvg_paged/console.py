"""What the command line prints: progress bars on a terminal, plain lines elsewhere, tables on both."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = [
    "StreamProgress", "make_console", "print_bench", "print_bench_row", "print_demo", "print_evaluation", "table",
]  # fmt: skip

PLAIN_WIDTH = 140
PLAIN_LINES = 4
BENCH_COLUMNS = ("system", "ms", "10 % to 90 %", "host us", "faster", "TFLOP/s", "GB/s", "of roofline")
DEMO_COLUMNS = (
    "stream", "tenant", "unquantised\nMB", "used\nMB", "ratio", "history read\nin 2 bits", "generated\nframes/s",
    "waits", "PSNR to own\nunquantised run", "to truth", "unquantised\nto truth",
)  # fmt: skip


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not wrap tables where output goes to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


class StreamProgress:
    """One bar per stream; without a terminal, a line per stream each quarter of the way. Use it in a ``with`` block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}
        self._frames = 1

    def __enter__(self) -> "StreamProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def phase(self, title: str, streams: Sequence[str], frames: int) -> None:
        """A part begins in which each of `streams` goes from 0 to `frames`."""
        self._stop()
        self._frames, self._told = max(frames, 1), {}
        self._console.print(title, markup=False)
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("  {task.description:<10}"),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TextColumn("frames"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._tasks = {name: self._bars.add_task(name, total=frames, note="") for name in streams}
            self._bars.start()

    def stream(self, name: str, frames: int, note: str) -> None:
        """A stream has so many frames; `note` says what it is doing."""
        if self._bars is not None:
            self._bars.update(self._tasks[name], completed=frames, note=note)
            return
        state = f"{frames * PLAIN_LINES // self._frames}" if frames else note
        if self._told.get(name) != state and (not frames or frames * PLAIN_LINES % self._frames < PLAIN_LINES):
            self._console.print(f"  {name}: {frames} of {self._frames} frames, {note}", markup=False)
            self._told[name] = state


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        grid.add_column(column, justify="left" if place < left else "right", no_wrap=place == 0)
    for row in rows:
        grid.add_row(*row)
    return grid


def print_demo(console: Console, results: Mapping[str, Any]) -> None:
    """The demo's table, then its promises."""
    summary = results["summary"]
    rows = [_demo_row(row) for row in results["rows"]]
    used, dense = summary["nbytes"], summary["dense_nbytes"]
    total = ["all", "", _mb(dense), _mb(used), f"{dense / used:.2f}" if used else "-",
             f"{summary['quantised_share']:.0%}", f"{summary['frames_per_second']:.2f}", "",
             f"{summary['psnr']:.2f}", "", ""]  # fmt: skip
    console.print(table("Streams", DEMO_COLUMNS, [*rows, total], left=2))
    budget = summary["budget"]
    console.print(
        f"memory {_mb(summary['memory_nbytes'])} MB (pool {_mb(budget['pool'])}, staging {_mb(budget['staging'])}, "
        f"encode workspace {_mb(budget['encode'])}, tables {_mb(budget['overhead'])}), "
        f"peak {_mb(summary['peak_nbytes'])} MB; unquantised, one cache takes "
        f"{_mb(summary['dense_stream_nbytes'])} MB and all of them {_mb(dense)} MB",
        soft_wrap=True,
    )
    for check in results["checks"]:
        mark = "[green]held[/]    " if check["held"] else "[bold red]NOT HELD[/]"
        console.print(f"{mark}  {check['name']}: {check['text']}", soft_wrap=True)


def _demo_row(row: Mapping[str, Any]) -> list[str]:
    if not row["finished"]:
        dashes = ["-"] * (len(DEMO_COLUMNS) - 4)
        return [row["stream"], row["tenant"], _mb(row["dense_nbytes"]), *dashes[:4], str(row["waits"]), *dashes[4:]]
    return [
        row["stream"], row["tenant"], _mb(row["dense_nbytes"]), _mb(row["nbytes"]), f"{row['ratio']:.2f}",
        f"{row['quantised_share']:.0%}", f"{row['frames_per_second']:.2f}", str(row["waits"]),
        *(f"{row[key]:.2f}" for key in ("psnr", "psnr_truth", "psnr_truth_dense")),
    ]  # fmt: skip


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def print_evaluation(console: Console, results: Mapping[str, Any]) -> None:
    """A table per variant, and what the same bytes buy."""
    columns = ["cache", "bits", "first", "mean", "SSIM", "mean", "last"]
    for variant, outcome in results.items():
        rows = [_evaluation_row(row) for row in outcome["rows"]]
        title = f"{variant}: dB against the unquantised cache (first, mean, SSIM), against truth (mean, last)"
        console.print(table(title, columns, rows))
        if same := outcome["same_bytes"]:
            scores = same["scores"]
            console.print(
                f"same bytes ({_mb(same['peak_nbytes'])} MB a stream), frames whose source left the window of "
                f"{same['window_frames']}: {same['format']} with all history {scores['quantised']['truth']:.2f} dB "
                f"to truth, unquantised window {scores['window']['truth']:.2f} dB, gain {same['gain_truth']:+.2f} dB",
                soft_wrap=True,
            )


def _evaluation_row(row: Mapping[str, Any]) -> list[str]:
    dense, truth = row["dense"], row["truth"]
    bits = "-" if row["bits"] is None else f"{row['bits']:.3f}"
    first = [f"{dense[key]:.2f}" for key in ("first", "mean")]
    return [row["name"], bits, *first, f"{dense['ssim']:.4f}", f"{truth['mean']:.2f}", f"{truth['last']:.2f}"]


def print_bench_row(console: Console, row: Mapping[str, Any]) -> None:
    """A finished row of the benchmark: every system beside the others."""
    base = row["systems"].get(row["baseline"], {}).get("timing")
    lines = [[name, *_system_cells(found, base)] for name, found in row["systems"].items()]
    title = f"{row['part']}: {row['name']}"
    console.print(table(title, BENCH_COLUMNS, lines))
    for name, found in {"": row, **row["systems"]}.items():
        if found["error"]:
            console.print(f"  {name}{': ' if name else ''}{found['error']}", markup=False, soft_wrap=True)


def _system_cells(found: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    timing = found["timing"]
    if not timing:
        return ["-"] * 7
    milliseconds = timing["median_ms"]
    faster = f"{base['median_ms'] / milliseconds:.2f}" if base else "-"
    rates = ["-", "-", "-"]
    if "least_ms" in found:
        flops = f"{found['tflops']:.3g}" if found["flops"] else "-"
        rates = [flops, f"{found['gbytes_per_s']:.4g}", f"{found['roofline_share']:.0%}"]
    host = "-" if timing["host_us"] is None else f"{timing['host_us']:.0f}"
    return [f"{milliseconds:.4f}", f"{timing['p10_ms']:.4f} to {timing['p90_ms']:.4f}", host, faster, *rates]


def print_bench(console: Console, results: Mapping[str, Any]) -> None:
    """Ceilings and bounds of a benchmark."""
    ceilings = results["ceilings"]
    products = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings["products"].items())
    console.print(f"ceilings: copy {ceilings['copy'] / 1e9:.0f} GB/s, products {products}", soft_wrap=True)
    rows = [
        [bound["bound"], _bound_text(bound), "-" if bound["value"] is None else f"{bound['value']:.2f}",
         "-" if bound["stretch"] is None else f"{bound['stretch']:g}", _verdict(bound)]
        for bound in results["bounds"]
    ]  # fmt: skip
    if rows:
        console.print(table("Bounds", ["bound", "required", "measured", "stretch", ""], rows))
    for name in results["not_started"]:
        console.print(f"not started: {name}", markup=False, soft_wrap=True)


def _bound_text(bound: Mapping[str, Any]) -> str:
    sign = ">=" if bound["at_least"] else "<="
    return f"{sign} {bound['required']:.2f} {bound['unit']}"


def _verdict(bound: Mapping[str, Any]) -> str:
    if bound["value"] is None:
        return "not measured"
    return "[green]held[/]" if bound["held"] else "[bold red]missed[/]"
