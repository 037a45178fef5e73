"""``qvg-paged stress`` and ``qvg-paged stress compare``; what they run is handed in by `qvg_paged.cli`."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qvg_paged.console import make_console, table

__all__ = ["make_app"]

SHOWN = (
    "first_chunk_p50_seconds", "first_chunk_p99_seconds", "chunk_p50_seconds", "chunk_p99_seconds",
    "lateness_p99_seconds", "continuous_play_ratio", "stall_ratio", "goodput_streams_per_second",
    "goodput_chunks_per_second", "jain", "largest_gap_over_unit", "waste_ratio", "parks_per_chunk",
    "moved_bytes_per_chunk", "pool_used_mean_ratio", "pool_used_peak_ratio", "lost_streams",
    "decision_p50_seconds", "decision_p99_seconds",
)  # fmt: skip
Benchmark = Callable[[str], Any]
Guard = Callable[[], AbstractContextManager[None]]


def make_app(benchmark: Benchmark, errors: Guard) -> typer.Typer:
    """The command and its subcommand.

    Args:
        benchmark: imports a module of the checkout's ``benchmarks`` folder.
        errors: context in which the library's errors become a line and an exit status.
    """
    app = typer.Typer(invoke_without_command=True, add_completion=False)

    @app.callback()
    def stress(
        context: typer.Context,
        scenario: Annotated[str, typer.Option(help="A preset, an attack, or swarm: everything is drawn.")] = "steady",
        seed: Annotated[int, typer.Option(help="The first; the same seed makes the same decisions.")] = 0,
        seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
        streams: Annotated[int | None, typer.Option(help="1 to 1000.")] = None,
        tenants: Annotated[int | None, typer.Option(help="1 to 100.")] = None,
        arrivals: Annotated[str | None, typer.Option(help="poisson, bursts-3, bursts-13, diurnal or herd.")] = None,
        frames: Annotated[str | None, typer.Option(help="Shortest and longest stream, as in 6-60.")] = None,
        ladder: Annotated[
            str | None,
            typer.Option(help="Before streams are parked: tails are quantised, or spans demoted, too; none of it."),
        ] = None,
        trace: Annotated[Path | None, typer.Option(help="CSV file: time,tenant,frames[,patience].")] = None,
        load: Annotated[float | None, typer.Option(help="1: all slots work all the time.")] = None,
        model: Annotated[
            str | None,
            typer.Option(help="Geometry: self-forcing, longcat, hy-worldplay, lingbot-v2; or world-model, which runs."),
        ] = None,
        pool_streams: Annotated[float | None, typer.Option(help="Pool, in longest streams at their worst.")] = None,
        oversubscription: Annotated[float | None, typer.Option(help="Worst cases of all slots, by the pool.")] = None,
        policy: Annotated[
            str | None,
            typer.Option(help="fcfs, priority, fair-share, earliest-deadline, module:Class, or a hostile one."),
        ] = None,
        max_running: Annotated[int | None, typer.Option(min=1, help="Slots.")] = None,
        fps: Annotated[float | None, typer.Option(help="Latent frames per second that viewers play.")] = None,
        costs: Annotated[
            Path | None, typer.Option(help="Result file of qvg-paged bench: what it measured is what things cost.")
        ] = None,
        chunk_seconds: Annotated[float | None, typer.Option(help="Cost of a chunk of one stream.")] = None,
        chunk_more_seconds: Annotated[float | None, typer.Option(help="Cost of each further stream.")] = None,
        faults: Annotated[list[str] | None, typer.Option(help="NAME[=RATE] or all; repeatable.")] = None,
        least_events: Annotated[int, typer.Option(min=0, help="Streams keep coming until so much happened.")] = 0,
        load_curve: Annotated[bool, typer.Option(help="Goodput at ten loads, for the report.")] = True,
        rated: Annotated[bool, typer.Option(help="Search the largest load that holds the service level.")] = False,
        backend: Annotated[
            str, typer.Option(help="simulator, or manager: the real cache does the work.")
        ] = "simulator",
        geometry: Annotated[str, typer.Option(help="Of the manager: reduced (few small layers) or real.")] = "reduced",
        device: Annotated[str | None, typer.Option(help="Of the manager: cpu or cuda.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for report.html, result.json, events.jsonl.")] = Path(
            "runs/stress"
        ),
        json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="The result here, too.")] = None,
    ) -> None:
        """Many streams on one pool, with faults if wanted, under an independent checker.

        Exit status 0 only if every log keeps every invariant and every stream came to its end. What fails is shrunk
        and told with its seed and step.
        """
        if context.invoked_subcommand is not None:
            return
        console = make_console()
        if policy and ":" in policy and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # a policy of one's own lies where one works
        with errors():
            module, files = benchmark("stress.command"), benchmark("results_file")
            options = module.StressOptions(
                scenario=scenario, seed=seed, seeds=seeds, streams=streams, tenants=tenants, arrivals=arrivals,
                frames=frames, ladder=ladder, trace=trace, load=load, model=model, pool_streams=pool_streams,
                oversubscription=oversubscription, policy=policy, max_running=max_running, fps=fps, costs=costs,
                chunk_seconds=chunk_seconds, chunk_more_seconds=chunk_more_seconds, faults=tuple(faults or ()),
                least_events=least_events, load_curve=load_curve, rated=rated, backend=backend, geometry=geometry,
                device=device or ("cuda" if backend == "manager" and torch.cuda.is_available() else "cpu"), out=out,
            )  # fmt: skip
            with _Bars(console) as bars:
                results = module.execute(options, bars.tell)
            content = files.result(device=options.device, config=options, results=results)
            for path in (out / "result.json", *([json_file] if json_file else [])):
                files.write(path, content)
            benchmark("stress.html_report").write_report(out / "report.html", content)
        _print(console, content["results"])
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)
        if content["results"]["failures"]:
            raise typer.Exit(1)

    @app.command()
    def compare(
        before: Annotated[Path, typer.Argument(help="result.json")],
        after: Annotated[Path, typer.Argument(help="result.json of the same scenario and seeds")],
    ) -> None:
        """Figures of two results, seed by seed: better, worse, or no difference beyond the noise."""
        console = make_console()
        with errors():
            module = benchmark("stress.compare")
            found = module.compare(module.read_result(before), module.read_result(after))
        rows = [
            [d.name, f"{d.before:.5g}", f"{d.after:.5g}", f"{d.low:+.4g} to {d.high:+.4g}", d.verdict] for d in found
        ]
        title = "Means, and the 95 % interval of their difference (bootstrap over paired seeds)"
        console.print(table(title, ["figure", "before", "after", "difference", "verdict"], rows))

    return app


class _Bars:
    """Progress on a terminal; a line per part elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *what: object) -> None:
        self._progress.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        """So much is done of it."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
            if not self._console.is_terminal:
                self._console.print(f"{what}: {total}", markup=False)
        self._progress.update(self._tasks[what], completed=done)


def _print(console: Console, results: Any) -> None:
    console.print(results["headline"], markup=False, soft_wrap=True)
    rows = [
        [name, f"{s['mean']:.4g}", f"{s['low']:.4g} to {s['high']:.4g}"]
        for name, s in results["summary"].items()
        if name in SHOWN
    ]
    console.print(table("Means over seeds, 95 % intervals", ["figure", "mean", "interval"], rows))
    if "rated_load" in results:
        console.print(f"rated load {results['rated_load']:.3f} (1: all slots work all the time)")
    for run in results["runs"]:
        console.print(f"seed {run['seed']}: decision log {run['digest']}", soft_wrap=True)
    if results["coverage"]:
        console.print(results["coverage_text"], markup=False, soft_wrap=True)
    for failure in results["failures"]:
        console.print("[bold red]FAILED[/]", end=" ")
        text = f"seed {failure['seed']}, step {failure['step']}: {failure['invariant']}: {failure['text']}"
        console.print(f"{text}\n  smallest scenario that fails so: {failure['scenario']}", markup=False, soft_wrap=True)
