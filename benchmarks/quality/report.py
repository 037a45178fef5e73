"""What the frontier says: the result file, one table, one plot, and the bounds that a format is held to.

    python benchmarks/quality/report.py benchmarks/results/nvidia-h200/frontier.json

prints the tables of docs/quality.md and draws the plot again from a result file.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file

from quality import frontier
from quality.metrics import paired_interval
from quality.plot import plot

__all__ = ["compare", "main", "run", "table"]

Rows = dict[str, dict[str, Any]]


def run(
    options: "frontier.FrontierOptions", files: Sequence[Path], picture: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run the frontier, write the result files (anew after every batch) and the plot, print the tables."""
    config = {**vars(options), "weights": [path.name for path in options.weights]}

    def save(found: "frontier.Found") -> None:
        content = results_file.result(device=options.device, config=config, results=found)
        for path in files:
            results_file.write(path, content)

    results = frontier.run(options, progress, save)
    plot(results, picture)
    for line in lines(results):
        progress(line)
    return results


def by_name(rows: Sequence[dict[str, Any]]) -> Rows:
    """Rows that were run."""
    return {row["name"]: row for row in rows if "skipped" not in row}


def compare(ours: dict[str, Any], theirs: dict[str, Any], against: str = "dense") -> tuple[float, float, float]:
    """Mean difference of PSNR and its 95 % interval over paths; `against` is "dense", "truth" or "revisits"."""
    mine, other = (row["revisits"] if against == "revisits" else row[against] for row in (ours, theirs))
    return paired_interval(torch.tensor(mine["paths"]), torch.tensor(other["paths"]))


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: bits at the toy's and at Self-Forcing's geometry, quality, cheapest first within a group."""
    found = [
        "| cache | bits here | bits at Self-Forcing's geometry | onset | first 8 | last 8 | mean, dB | SSIM | GMSD "
        "| truth, dB | top key changes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = {"control": 0, "baseline": 1, "library": 2, "finalist": 3, "candidate": 4}
    done = [row for row in rows if "skipped" not in row]
    for row in sorted(done, key=lambda row: (groups[row["group"]], row["bits"])):
        dense, truth = row["dense"], row["truth"]
        found.append(
            f"| {row['name']} | {row['bits']:.3f} | {row['real_bits']['Self-Forcing']:.3f} | {dense['onset']:.2f} "
            f"| {dense['short']:.2f} | {dense['long']:.2f} | {dense['mean']:.2f} | {dense['ssim']:.4f} "
            f"| {dense['gmsd']:.4f} | {truth['mean']:.2f} | {row['attention']['top_key_changes']:.1%} |"
        )
    return found


def lines(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """All tables."""
    found = []
    for model, variants in results.items():
        for variant, rows in variants.items():
            found += [f"### {model}, {variant}", "", *table(rows), ""]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--ours", help="row to compare with every other one")
    arguments = parser.parse_args()
    results = json.loads(arguments.result.read_text())["results"]
    plot(results, arguments.result.with_suffix(".png"))
    print("\n".join(lines(results)))
    for model, variants in results.items() if arguments.ours else ():
        for variant, rows in variants.items():
            known = by_name(rows)
            for name in known if arguments.ours in known else ():
                mean, low, high = compare(known[arguments.ours], known[name])
                print(f"{model} {variant}: {arguments.ours} - {name}: {mean:+.2f} [{low:+.2f}, {high:+.2f}] dB")


if __name__ == "__main__":
    main()
