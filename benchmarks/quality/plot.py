"""The frontier as a picture: stored bits against closed-loop quality, one panel per model and variant."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["plot"]

COLOURS = {"baseline": "tab:blue", "library": "tab:red", "finalist": "tab:orange", "candidate": "lightgrey"}


def plot(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> Path:
    """Write a PNG; `results` as `frontier.run` returns them."""
    panels = [(model, variant, rows) for model, variants in results.items() for variant, rows in variants.items()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(13, 6 * len(panels)), squeeze=False)
    for axis, (model, variant, rows) in zip(axes[:, 0], panels, strict=True):
        for row in rows:
            if "skipped" in row or row["group"] == "control":
                continue
            bits, decibels = row["bits"], row["dense"]["mean"]
            named = row["group"] != "candidate"
            axis.scatter(bits, decibels, color=COLOURS[row["group"]], s=None if named else 8, zorder=2 if named else 1)
            if named:
                axis.annotate(row["name"], (bits, decibels), fontsize=6, xytext=(4, 2), textcoords="offset points")
        for group, colour in COLOURS.items():
            axis.scatter([], [], color=colour, label=group)
        axis.set(xlabel="stored bits per number, everything counted", title=f"{model}, {variant}")
        axis.set_ylabel("PSNR against the unquantised cache, dB")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
