"""Plots of a closed-loop evaluation: quality against bits, along the path, and at the same bytes."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["plot"]

SHOWN = ("qvg-int2", "qvg-pro-int2", "qvg4-int2", "qvg-int4", "qvg-int2, no smoothing", "last 4 frames only")


def plot(results: dict[str, Any], path: Path) -> Path:
    """Write a PNG with one row of plots per variant of the model; `results` as `evaluation.run` returns them."""
    figure, axes = plt.subplots(len(results), 3, figsize=(16, 4.6 * len(results)), squeeze=False)
    for row, (variant, result) in zip(axes, results.items(), strict=True):
        _bits(row[0], result["rows"], variant)
        _curves(row[1], result["rows"])
        if result["same_bytes"]:
            _same_bytes(row[2], result["same_bytes"])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bits(axes: Axes, rows: list[dict[str, Any]], variant: str) -> None:
    for row in rows:
        bits, decibels = row["bits"], row["dense"]["mean"]
        if bits is None or bits > 8:
            continue
        ours = row["name"].startswith("qvg4")
        axes.scatter(bits, decibels, color="tab:red" if ours else "tab:blue")
        axes.annotate(row["name"], (bits, decibels), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel="stored bits per number, everything counted", ylabel="PSNR against the unquantised cache, dB")
    axes.set_title(f"model: {variant}")
    axes.grid(alpha=0.3)


def _curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["name"] in SHOWN:
            axes.plot(row["dense"]["curve"], label=row["name"])
    axes.set(xlabel="generated frame", ylabel="PSNR against the unquantised cache, dB")
    axes.set_title("along the way back")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _same_bytes(axes: Axes, result: dict[str, Any]) -> None:
    names = list(result["scores"])
    bars = axes.bar(names, [result["scores"][name]["truth"] for name in names], color=["tab:red", "tab:blue", "gray"])
    axes.bar_label(bars, fmt="%.2f")
    axes.set(ylabel="PSNR against truth on revisited frames, dB")
    axes.set_title(
        f"{result['peak_nbytes'] / 1e6:.1f} MB a stream: {result['format']} with all history,\n"
        f"or a window of {result['window_frames']} unquantised frames"
    )
