"""The command line: ``qvg-paged demo``, ``eval``, ``bench``, ``stress``, ``info`` and ``top``.

`demo`, `eval`, `bench` and `stress` run code of a checkout's ``benchmarks`` folder, which is not installed; this is
the only module that imports upward.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.live import Live
from rich.markup import escape

from qvg_paged.config import ModelSpec
from qvg_paged.console import (
    StreamProgress,
    make_console,
    print_bench,
    print_bench_row,
    print_demo,
    print_evaluation,
    table,
)
from qvg_paged.errors import ConfigError, QvgPagedError
from qvg_paged.kernels.attention import AttentionPath
from qvg_paged.kernels.formats import FORMATS
from qvg_paged.machine import describe_formats, describe_machine, describe_paths
from qvg_paged.stress_command import make_app

__all__ = ["app"]

app = typer.Typer(
    help="Paged 2-bit KV cache for autoregressive video generation: one pool, many streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BENCH_PACKAGES = ("safetensors", "PIL", "matplotlib")

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here, too.")]
Weights = Annotated[Path | None, typer.Option(help="Safetensors file of the world model (default: the checkout's).")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda if there is any).")]
Steps = Annotated[int, typer.Option(min=1, help="Euler steps per generated frame.")]


@contextmanager
def _errors() -> Iterator[None]:
    """What went wrong as one line and exit status 2, without a traceback."""
    try:
        yield
    except QvgPagedError as error:
        make_console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def benchmarks_folder() -> Path:
    """The ``benchmarks`` folder next to the package or in the current directory.

    Raises:
        ConfigError: there is none.
    """
    places = [Path(__file__).resolve().parents[1] / "benchmarks", Path.cwd() / "benchmarks"]
    for place in places:
        if (place / "world_streams.py").is_file():
            return place
    raise ConfigError(
        "benchmarks: expected a checkout of the project, whose code this command runs, found none next to the "
        f"package nor in {Path.cwd()}; run it from the root of a checkout"
    )


def _benchmark(name: str) -> Any:
    """A module of the checkout's ``benchmarks`` folder."""
    folder = str(benchmarks_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in BENCH_PACKAGES:
            raise ConfigError(f"{error.name}: expected to be installed; pip install 'qvg-paged[bench]'") from None
        raise


app.add_typer(make_app(_benchmark, _errors), name="stress")


@app.command()
def demo(
    streams: Annotated[int, typer.Option(min=1, help="Streams, in turns of two tenants.")] = 4,
    given: Annotated[int, typer.Option(min=1, help="Frames of each that are given: the way out.")] = 24,
    generated: Annotated[int, typer.Option(min=1, help="Frames of each that are generated: the way back.")] = 24,
    format_: Annotated[str, typer.Option("--format", help=f"Of quantised pages: {', '.join(FORMATS)}.")] = "qvg4-int2",
    memory: Annotated[str | None, typer.Option(help="Budget, as in 100MiB (default: the least that works).")] = None,
    steps: Steps = 2,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Names the noise.")] = 0,
    weights: Weights = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; on a busy machine more than one is slower.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for report, contact sheet, animations, result.json.")] = Path(
        "runs/demo"
    ),
    json_file: Json = None,
) -> None:
    """Streams of a trained world model generate from one pool of 2-bit pages, in too little memory for half of them.

    Exit status 0 only if every stream finished and all were resident at once, the budget holds fewer than half of the
    streams unquantised and was kept, at least 70 % of the history tokens read at the end were 2-bit, and every
    stream has at least 30 dB (PSNR) against its own unquantised run with the same noise.
    """
    console = make_console()
    with _errors():
        module = _benchmark("demo")
        options = module.DemoOptions(
            streams=streams, given=given, generated=generated, format=format_, memory=memory, steps=steps,
            device=device, seed=seed, weights=weights, threads=threads, out=out,
        )  # fmt: skip
        with StreamProgress(console) as progress:
            content = module.run(options, progress)
        if json_file is not None:
            _benchmark("results_file").write(json_file, content)
    print_demo(console, content["results"])
    console.print(f"{content['results']['summary']['seconds']:.0f} s; report: {out / 'report.html'}", soft_wrap=True)
    if not all(check["held"] for check in content["results"]["checks"]):
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    worlds: Annotated[int, typer.Option(min=1, help="Held-out camera paths.")] = 24,
    given: Annotated[int, typer.Option(min=1, help="Frames of the way out; as many are generated.")] = 32,
    steps: Steps = 4,
    span_frames: Annotated[int, typer.Option(min=1, help="Frames quantised together.")] = 16,
    centroids: Annotated[int | None, typer.Option(help="Per span and head (default: the library's rule).")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="plain or outliers; repeatable (default: both).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this row; repeatable (default: all).")] = None,
    same_bytes: Annotated[
        str, typer.Option(help="Row compared with an unquantised window of its bytes, or none; not with --frontier.")
    ] = "qvg4-int2",
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Bits against quality: published codecs, candidates, presets.")
    ] = False,
    also: Annotated[list[Path] | None, typer.Option(help="Another world model, with --frontier; repeatable.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, with --frontier.")] = 1,
    seconds: Annotated[float, typer.Option(help="Begin no batch after so long, with --frontier.")] = 3600.0,
    path: Annotated[
        AttentionPath, typer.Option(help="How attention reads pages; not with --frontier.")
    ] = AttentionPath.AUTO,
    memory: Annotated[str, typer.Option(help="Budget of the manager under test.")] = "6GiB",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Names the noise.")] = 0,
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="Folder for result.json and plot.png.")] = Path("runs/eval"),
    json_file: Json = None,
) -> None:
    """Every format in closed loop against the unquantised cache and against truth, controls included.

    24 worlds are meant for a GPU; on a CPU try --worlds 2 --given 12 --variant plain --memory 512MiB. With --frontier
    the paths are of three kinds, variants are plain, 9x, 13x and 150x, rows and sets of rows those of
    benchmarks/quality/rows.py, and 96 worlds are meant for a GPU.
    """
    console = make_console()
    if frontier:
        with _errors():
            model = _benchmark("demo").DemoOptions(device=device, weights=weights)
            options = _benchmark("quality.frontier").FrontierOptions(
                weights=(model.weights_path, *(also or ())), device=model.torch_device.type, paths=worlds, given=given,
                steps=steps, span_frames=span_frames, jobs=jobs, seconds=seconds,
                **({"variants": tuple(variant)} if variant else {}), **({"rows": tuple(only)} if only else {}),
            )  # fmt: skip
            _benchmark("quality.report").run(
                options, [out / "result.json", *([json_file] if json_file else [])], out / "plot.png",
                lambda line: console.print(line, markup=False, soft_wrap=True),
            )  # fmt: skip
        return
    with _errors():
        module, files, demo_module = (_benchmark(name) for name in ("evaluation", "results_file", "demo"))
        defaults = demo_module.DemoOptions(device=device, weights=weights)
        options = module.EvalOptions(
            weights=defaults.weights_path, device=defaults.torch_device.type, worlds=worlds, given=given, seed=seed,
            steps=steps, span_frames=span_frames, num_centroids=centroids, memory=memory, path=path,
            only=tuple(only or ()), same_bytes=None if same_bytes == "none" else same_bytes,
            **({"variants": tuple(variant)} if variant else {}),
        )  # fmt: skip
        config = {**vars(options), "weights": options.weights.name}

        def save(found: dict[str, Any]) -> None:
            content = files.result(device=options.device, config=config, results=found)
            for file in (out / "result.json", *([json_file] if json_file else [])):
                files.write(file, content)

        results = module.run(options, lambda line: console.print(line, markup=False, soft_wrap=True), save)
        _benchmark("eval_plot").plot(results, out / "plot.png")
    print_evaluation(console, results)
    console.print(f"plot: {out / 'plot.png'}", soft_wrap=True)


@app.command()
def bench(
    what: Annotated[list[str] | None, typer.Argument(help="attention, encode, decode, manager (default: all).")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Measure paths instead, for `auto` to choose by.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name contains this; repeatable.")] = None,
    official: Annotated[Path | None, typer.Option(help="Clone of the released Quant VideoGen code.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows, short timings.")] = False,
    seconds: Annotated[float | None, typer.Option(min=0, help="Start no row after so long.")] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Names the random inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for result.json and plot.png.")] = Path("runs/bench"),
    json_file: Json = None,
) -> None:
    """Speed beside what it competes with, correctness first; bounds are for an H200, a CPU gets small shapes.

    Exit status 0 only if every row that was started has right results from the library. `--tune` writes the table to
    the user's cache folder (and to --json) instead.
    """
    console = make_console()
    with _errors():
        module, files = _benchmark("bench.run"), _benchmark("results_file")
        options = module.BenchOptions(
            parts=tuple(what or module.PARTS), device=_device(device), official=official, only=tuple(only or ()),
            quick=quick, seconds=seconds, seed=seed,
        )  # fmt: skip
        if tune:
            tell = partial(console.print, markup=False, soft_wrap=True)
            _benchmark("bench.tune").write(options, tell, json_file)
            return
        for results in module.run(options):
            content = files.result(device=options.device, config=options, results=results, warnings=results["warnings"])
            for path in (out / "result.json", *([json_file] if json_file else [])):
                files.write(path, content)
            for row in results["rows"][-1:]:
                print_bench_row(console, row)
        _benchmark("bench.plot").plot(content["results"], out / "plot.png")
    print_bench(console, content["results"])
    console.print(f"plot: {out / 'plot.png'}", soft_wrap=True)
    if not results["right"]:
        raise typer.Exit(1)


def _device(name: str | None) -> str:
    """The device asked for, or the best there is.

    Raises:
        ConfigError: it is not there.
    """
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen != "cpu" and not (chosen.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"device: expected cpu, or cuda on a machine that has it, got {name!r}")
    return chosen


@app.command()
def info(
    heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="64, 128 or 256.")] = 128,
    tokens_per_frame: Annotated[int, typer.Option(min=1)] = 1560,
    span_frames: Annotated[int, typer.Option(min=1, help="Frames quantised together.")] = 24,
    json_file: Json = None,
) -> None:
    """What this machine offers, and what the formats cost at a geometry (Wan 1.3B at 480p unless told otherwise)."""
    console = make_console()
    with _errors():
        spec = ModelSpec(
            num_layers=1, num_kv_heads=heads, head_dim=head_dim, tokens_per_frame=tokens_per_frame, frames_per_chunk=1
        )
        found: dict[str, Any] = {
            "machine": describe_machine(),
            "paths": describe_paths(),
            "formats": describe_formats(spec, span_frames),
        }
    facts = [[key, str(value)] for key, value in found["machine"].items()]
    console.print(table("Machine", ["what", "here"], facts, left=2))
    console.print(table("Attention paths", ["path", "here"], [[*item] for item in found["paths"].items()], left=2))
    title = f"Formats: spans of {span_frames} frames of {tokens_per_frame} tokens, {heads} heads of {head_dim}, BF16"
    costs = [
        [name, f"{cost['bits_per_element']:.3f}", f"{cost['ratio']:.2f}", f"{cost['codebook_share']:.1%}"]
        for name, cost in found["formats"].items()
    ]
    console.print(table(title, ["format", "bits per element", "ratio to unquantised", "of it codebooks"], costs))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n")


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="Endpoint of `serve_metrics`.")] = "http://127.0.0.1:9400/metrics",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once; no rates.")] = False,
    count: Annotated[int | None, typer.Option("-n", "--count", min=1, help="Look so many times (default: on).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per look and line, for machines.")] = False,
) -> None:
    """Pool, streams, tenants and rates of a running process, from its metrics; leave it with Ctrl-C."""
    with _errors():
        try:
            view = importlib.import_module("qvg_paged.top")
        except ModuleNotFoundError:
            raise ConfigError("prometheus_client: expected to be installed; pip install 'qvg-paged[metrics]'") from None
        console = make_console()
        before, now = None, view.fetch(url)
        left = 1 if once else count
        with Live(console=console, auto_refresh=False, screen=console.is_terminal and left != 1) as live:
            while True:
                summary = {"url": url, **view.summarise(now, before)}
                if as_json:
                    typer.echo(json.dumps(summary))
                else:
                    live.update(view.render(summary), refresh=True)
                left = None if left is None else left - 1
                if left == 0:
                    return
                try:
                    time.sleep(interval)
                    before, now = now, view.fetch(url)
                except KeyboardInterrupt:
                    return
