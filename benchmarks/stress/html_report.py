"""The report of a stress run: one HTML file that needs nothing beside itself."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["write_report"]

COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8e6c8a", "#d4a017", "#3d405b", "#6c9a8b", "#a26769", "#999999")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e1e24; background: #fafaf8; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } .note { color: #666; }
.bad { color: #b3261e; font-weight: 600; } pre { overflow-x: auto; font-size: .8rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; }
"""
GIB = 1 << 30


def write_report(path: Path, content: Mapping[str, Any]) -> Path:
    """Write the report of a result file of ``qvg-paged stress``; its path."""
    results = content["results"]
    curves = results["curves"]
    plots = [
        _stack("Pool by format", curves["seconds"], curves["formats"], "GiB", GIB),
        _stack("Pool by tenant, as promised", curves["seconds"], curves["tenants"], "GiB", GIB),
        _lines("Service by tenant", "s", "cost units", curves["seconds"], curves["service"]),
        _lines("Streams", "s", "streams", curves["seconds"],
               {"run": curves["running"], "wait": curves["waiting"]}),
        _distribution("Time to first chunk", results["distributions"]["first_chunk_seconds"]),
        _distribution("Time between chunks", results["distributions"]["chunk_seconds"]),
        _distribution("Lateness of chunks for their viewers", results["distributions"]["lateness_seconds"]),
    ]  # fmt: skip
    if results["load_curve"]:
        plots.append(_load_curve(results["load_curve"], results.get("rated_load")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(content, plots), encoding="utf-8")
    return path


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.5))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _image(figure: Figure, title: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<img src="{source}" alt="{html.escape(title)}">'


def _stack(title: str, seconds: Sequence[float], parts: Mapping[str, Sequence[float]], unit: str, scale: float) -> str:
    figure, axes = _axes(title, "s", unit)
    shown = {name: [value / scale for value in values] for name, values in parts.items() if any(values)}
    if shown:
        axes.stackplot(seconds, *shown.values(), labels=list(shown), colors=COLOURS[: len(shown)], step="post")
        axes.legend(frameon=False, fontsize=7, ncols=2)
    return _image(figure, title)


def _lines(title: str, x: str, y: str, seconds: Sequence[float], parts: Mapping[str, Sequence[float]]) -> str:
    figure, axes = _axes(title, x, y)
    for place, (name, values) in enumerate(parts.items()):
        axes.plot(seconds, values, label=name, color=COLOURS[place % len(COLOURS)], linewidth=1.2)
    if axes.lines:
        axes.legend(frameon=False, fontsize=7, ncols=2)
    return _image(figure, title)


def _distribution(title: str, values: Sequence[float]) -> str:
    """Share of all that took at most so long."""
    figure, axes = _axes(f"{title} (n = {len(values)})", "s", "share")
    ordered = sorted(values)
    if ordered:
        axes.step(ordered, [(place + 1) / len(ordered) for place in range(len(ordered))], color=COLOURS[0])
        for share, colour in ((0.5, COLOURS[2]), (0.99, COLOURS[1])):
            value = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
            axes.axvline(value, color=colour, linestyle="--", linewidth=1, label=f"p{share * 100:.0f} {value:.2f} s")
        axes.legend(frameon=False)
    axes.set_ylim(0, 1.02)
    return _image(figure, title)


def _load_curve(rows: Sequence[Mapping[str, float]], rated: float | None) -> str:
    figure, axes = _axes("Load and goodput", "load (1: all slots work all the time)", "per second")
    loads = [row["load"] for row in rows]
    axes.plot(loads, [row["chunks_per_second_under_load"] for row in rows], "o-", color=COLOURS[0], label="chunks")
    other = axes.twinx()
    other.plot(loads, [row["goodput_streams_per_second"] for row in rows], "s--", color=COLOURS[1])
    other.set_ylabel("streams without a stall (dashed)")
    if rated is not None:
        axes.axvline(rated, color=COLOURS[2], linestyle=":", label=f"rated load {rated:.2f}")
    axes.set_ylim(bottom=0)
    other.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    return _image(figure, "Load and goodput")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _page(content: Mapping[str, Any], plots: Sequence[str]) -> str:
    results = content["results"]
    summary = [
        [name, f"{s['mean']:.4g}", f"{s['low']:.4g}", f"{s['high']:.4g}"] for name, s in results["summary"].items()
    ]
    runs = [
        [str(run["seed"]), run["digest"][:16], str(run["events"]), str(run["steps"]), f"{run['seconds']:.0f}",
         "yes" if run["drained"] else "NO", str(run["violations"])]
        for run in results["runs"]
    ]  # fmt: skip
    failures = "".join(
        f"<p class=bad>seed {f['seed']}, step {f['step']}: {html.escape(f['invariant'])}: {html.escape(f['text'])}</p>"
        for f in results["failures"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    facts = f"{content['device']['name']}; {versions}; commit {content['commit']}; {content['date']}"
    return "".join([
        "<!doctype html><html lang=en><meta charset=utf-8><title>qvg-paged stress</title>",
        f"<style>{STYLE}</style><h1>qvg-paged stress</h1>",
        f"<p>{html.escape(results['headline'])}</p>{failures}",
        "<h2>Figures</h2><p class=note>Means over seeds with 95 % bootstrap intervals; times are seconds of the run's "
        f"clock.</p>{_table(['figure', 'mean', 'low', 'high'], summary)}",
        f"<h2>The first seed</h2><div class=pair>{''.join(f'<figure>{plot}</figure>' for plot in plots)}</div>",
        "<h2>Seeds</h2>"
        + _table(["seed", "decision log", "events", "steps", "seconds", "drained", "violations"], runs),
        f"<h2>Faults by phase</h2><pre>{html.escape(results['coverage_text'])}</pre>",
        f"<h2>Run</h2><p class=note><code>{html.escape(content['command'])}</code><br>{html.escape(facts)}</p>\n",
    ])  # fmt: skip
