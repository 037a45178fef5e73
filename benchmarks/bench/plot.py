"""Bars of how much faster than its baseline every system of a row is."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.rows import median_ms

__all__ = ["plot", "speedups"]

ROW_INCHES, COLUMN_INCHES, COLUMNS = 0.2, 7.0, 3
COLOURS = mpl.colormaps["tab20"].colors


def speedups(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Baseline's median time over each system's: by its median, its 90th and its 10th percentile."""
    baseline = median_ms(row, row["baseline"])
    if baseline is None:
        return {}
    timed = {name: found["timing"] for name, found in row["systems"].items() if found["timing"]}
    return {
        name: (baseline / time["median_ms"], baseline / time["p90_ms"], baseline / time["p10_ms"])
        for name, time in timed.items()
    }


def plot(results: dict[str, Any], path: Path) -> Path:
    """Write a PNG with a panel for every row of `results` that compares systems; as `bench.run.run` returns them."""
    shown = [row for row in results["rows"] if row["part"] != "manager"]
    rows = [(row, found) for row in shown if len(found := speedups(row)) > 1]
    lines = [rows[start : start + COLUMNS] for start in range(0, len(rows), COLUMNS)] or [[]]
    heights = [max((len(found) for _, found in line), default=0) + 3 for line in lines]
    figure, axes = plt.subplots(
        len(lines), COLUMNS, figsize=(COLUMN_INCHES * COLUMNS, ROW_INCHES * sum(heights)), squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    for number, axis in enumerate(axes.flat):
        if number < len(rows):
            _panel(axis, *rows[number], names)
        else:
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _panel(axis: Axes, row: dict[str, Any], found: dict[str, tuple[float, float, float]], names: list[str]) -> None:
    medians = [value[0] for value in found.values()]
    below = [max(0.0, m - low) for m, low, _ in found.values()]
    above = [max(0.0, high - m) for m, _, high in found.values()]
    colours = [COLOURS[names.index(name) % len(COLOURS)] for name in found]
    bars = axis.barh(list(found), medians, xerr=[below, above], color=colours, error_kw={"lw": 0.7})
    axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=3)
    axis.axvline(1, color="black", lw=0.7)
    axis.invert_yaxis()
    axis.set_title(f"{row['part']}: {row['name']}\n(times faster than {row['baseline']})", fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
    axis.margins(x=0.08)
