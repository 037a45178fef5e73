"""Fill the README's tables from result files.

    python benchmarks/readme_tables.py            # rewrite README.md
    python benchmarks/readme_tables.py --check    # fail if it would change

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and shows every ``benchmarks/results/*/FILE.json``
of its kind, one below the other. Nothing else in the README holds a measured number.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["fill", "main"]

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = Mapping[str, Any]


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f}"


def _source(content: Result) -> str:
    """What was measured on what, in one line."""
    versions = content["versions"]
    device = content["device"]
    cores = f", {device['cpu_cores']} cores" if device["type"] == "cpu" else ""
    packages = f"torch {versions['torch']}, Python {versions['python']}"
    commit = (content["commit"] or "unknown commit")[:12]
    return f"**{device['name']}{cores}**, {packages}, {commit}, {content['date'][:10]}, `{content['command']}`"


def _demo(content: Result) -> str:
    results = content["results"]
    columns = ["stream", "tenant", "unquantised MB", "used MB", "ratio", "read in 2 bits", "generated frames/s",
               "PSNR to own unquantised run, dB"]  # fmt: skip
    rows = [
        [row["stream"], row["tenant"], _mb(row["dense_nbytes"]), _mb(row["nbytes"]), f"{row['ratio']:.2f}",
         f"{row['quantised_share']:.0%}", f"{row['frames_per_second']:.2f}", f"{row['psnr']:.2f}"]
        for row in results["rows"] if row["finished"]
    ]  # fmt: skip
    summary = results["summary"]
    below = (
        f"Memory of the manager, everything included: {_mb(summary['memory_nbytes'])} MB, which hold "
        f"{summary['dense_streams_in_memory']:.2f} of these caches unquantised; peak {_mb(summary['peak_nbytes'])} MB. "
        f"{summary['seconds']:.0f} s in all, the unquantised runs included."
    )
    return f"{_grid(columns, rows)}\n\n{below}"


def _eval(content: Result) -> str:
    variants = content["results"]
    columns = ["cache", "bits"]
    for variant in variants:
        columns += [f"{variant}: first", "mean", "to truth"]
    found = {variant: {row["name"]: row for row in outcome["rows"]} for variant, outcome in variants.items()}
    rows = []
    for name, row in next(iter(found.values())).items():
        cells = [name, "" if row["bits"] is None else f"{row['bits']:.2f}"]
        for of_variant in found.values():
            scores = of_variant.get(name)
            cells += _scores(scores) if scores else ["", "", ""]
        rows.append(cells)
    config = content["config"]
    below = (
        f"{config['worlds']} worlds, {config['given']} frames given and as many generated, {config['steps']} steps, "
        f"spans of {config['span_frames']} frames. *First* and *mean*: dB against the unquantised cache with the same "
        "noise; *to truth*: mean dB against the renderer; *bits*: per element of a closed span, codebooks included."
    )
    return f"{_grid(columns, rows)}\n\n{below}"


def _scores(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['dense']['first']:.2f}", f"{row['dense']['mean']:.2f}", f"{row['truth']['mean']:.2f}"]


def _same_bytes(content: Result) -> str:
    columns = ["model", "peak of a stream, MB", "frames an unquantised window has for it", "window, dB to truth",
               "all history in 2 bits, dB to truth", "all history unquantised, dB to truth", "gain, dB"]  # fmt: skip
    rows = []
    for variant, outcome in content["results"].items():
        if not outcome["same_bytes"]:
            continue
        same, scores = outcome["same_bytes"], outcome["same_bytes"]["scores"]
        truths = [f"{scores[name]['truth']:.2f}" for name in ("window", "quantised", "unquantised")]
        sizes = [_mb(same["peak_nbytes"]), str(same["window_frames"])]
        rows.append([variant, *sizes, *truths, f"{same['gain_truth']:+.2f}"])
    return _grid(columns, rows)


def _bench(content: Result) -> str:
    results = content["results"]
    ceilings = results["ceilings"]
    products = ", ".join(
        f"{name.upper()} product {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings["products"].items()
    )
    about = f"Ceilings of the same run: copy {ceilings['copy'] / 1e12:.2f} TB/s, {products}."
    rows = [_speed(row) for row in results["rows"] if row["part"] != "manager"]
    columns = ["row", "baseline, ms", "ours, ms", "10 % to 90 %", "path", "times faster", "TFLOP/s", "of roofline"]
    parts = [about, _grid(columns, [row for row in rows if row])]
    if results["bounds"]:
        parts.insert(1, _bounds(results["bounds"]))
    return "\n\n".join(parts)


def _bounds(bounds: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for bound in bounds:
        sign = ">=" if bound["at_least"] else "<="
        value = "not measured" if bound["value"] is None else f"{bound['value']:.{3 if bound['value'] < 10 else 1}f}"
        stretch = "" if bound["stretch"] is None else f"{bound['stretch']:g}"
        verdict = "held" if bound["held"] else "" if bound["value"] is None else "**missed**"
        rows.append([bound["bound"], f"{sign} {bound['required']:.2f} {bound['unit']}", value, stretch, verdict])
    return _grid(["bound", "required", "measured", "stretch", ""], rows)


def _speed(row: Mapping[str, Any]) -> list[str]:
    """Our fastest system of a row beside the row's baseline; empty if there is none."""
    timed = {name: found for name, found in row["systems"].items() if found["timing"]}
    ours = {name: found for name, found in timed.items() if found["ours"]}
    if not ours:
        return []
    name, best = min(ours.items(), key=lambda item: item[1]["timing"]["median_ms"])
    timing, base = best["timing"], timed.get(row["baseline"])
    against = [f"{row['baseline']}, {base['timing']['median_ms']:.3f}" if base else ""]
    faster = f"{base['timing']['median_ms'] / timing['median_ms']:.2f}" if base else ""
    rates = [f"{best['tflops']:.0f}" if best.get("flops") else "", f"{best['roofline_share']:.0%}"]
    spread = f"{timing['p10_ms']:.3f} to {timing['p90_ms']:.3f}"
    return [f"{row['part']}: {row['name']}", *against, f"{timing['median_ms']:.3f}", spread, name, faster, *rates]


def _scheduler(content: Result) -> str:
    rows = [
        [row["name"], row["bound"], row["value"], "held" if row["held"] else "**missed**"]
        for row in content["results"]["rows"]
    ]
    costs = [[cost["name"], cost["value"]] for cost in content["results"].get("costs", [])]
    shown = f"\n\n{_grid(['what the ladder costs in pictures', 'change'], costs)}" if costs else ""
    return _grid(["promise", "bound", "found", ""], rows) + shown


TABLES: dict[str, tuple[str, str, Callable[[Result], str]]] = {
    "demo": ("demo.json", "make demo", _demo),
    "eval": ("eval.json", "qvg-paged eval", _eval),
    "same-bytes": ("eval.json", "qvg-paged eval", _same_bytes),
    "bench": ("bench.json", "qvg-paged bench", _bench),
    "scheduler": ("scheduler.json", "make bounds", _scheduler),
}
"""Result file, command and layout of each table."""


def fill(text: str, folder: Path) -> str:
    """`text` with its tables filled from ``folder/<device>/*.json``.

    Raises:
        ValueError: a marker names no table; the message lists the known ones.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {name!r}")
        file, command, layout = TABLES[name]
        parts = []
        found = [(path, json.loads(path.read_text())) for path in folder.glob(f"*/{file}")]
        for path, content in sorted(found, key=lambda item: (item[1]["device"]["type"] == "cpu", item[0])):
            link = path.relative_to(folder.parents[1])
            parts.append(f"{_source(content)} ([result file]({link.as_posix()}))\n\n{layout(content)}\n")
        body = "\n".join(parts) or f"No result recorded yet; `{command}` makes one.\n"
        return f"{match[1]}\n{body}\n{match[3]}"

    return MARKED.sub(replace, text)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a table is out of date")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before, ROOT / "benchmarks" / "results")
    if parser.parse_args().check:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
