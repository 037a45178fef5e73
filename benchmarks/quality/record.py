"""The recorded frontier: models, variants and rows in order of importance, as far as a time limit lets them.

    python benchmarks/quality/record.py --weights V1 --also SMALL --seconds 200 --jobs 4 --json frontier.json

The same as ``qvg-paged eval --frontier``, except that what matters most is run first and on the most paths. The result
file is written anew after every batch.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file

from quality.frontier import Found, FrontierOptions, run_all
from quality.rows import SAME_BYTES_WINDOW

RIVALS = (
    "QVG int2 Kc=8",
    "QVG int2 Kc=16",
    "qvg4-int2 Kc=8",
    "QVG int2 asymmetric B64 Kc=8",
    f"last {SAME_BYTES_WINDOW} frames (bytes of best-2bit)",
)
OUTLIERS = ("9x", "150x", "13x")


def plan(first: FrontierOptions, also: Path | None) -> list[FrontierOptions]:
    """Presets and rivals, finalists, baselines, outlier channels; on half of the paths, limits and candidates."""
    sets = [
        replace(first, rows=("presets", *RIVALS)),
        replace(first, rows=("finalists",)),
        replace(first, rows=("baselines", "controls"), without=RIVALS),
        replace(first, variants=OUTLIERS, rows_at_once=2 * first.rows_at_once),
        *(
            replace(first, rows=(name,), first=first.paths // 2, rows_at_once=2 * first.rows_at_once)
            for name in ("residual", "limits", "beside", "candidates")
        ),
    ]
    models = [*first.weights, *([also] if also else [])]
    return [replace(some, weights=(model,)) for some in sets for model in models]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--also", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paths", type=int, default=96)
    parser.add_argument("--given", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--span-frames", type=int, default=16)
    parser.add_argument("--rows-at-once", type=int, default=2, help="in one batch; twice as many on half of the paths")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    first = FrontierOptions(
        weights=(arguments.weights,), device=arguments.device, paths=arguments.paths, given=arguments.given,
        steps=arguments.steps, span_frames=arguments.span_frames, rows_at_once=arguments.rows_at_once,
        jobs=arguments.jobs, seconds=arguments.seconds,
    )  # fmt: skip
    start = time.monotonic()

    def save(results: Found) -> None:
        config = {**vars(arguments), "seconds_taken": time.monotonic() - start}
        config |= {name: getattr(arguments, name).name for name in ("weights", "also") if getattr(arguments, name)}
        results_file.write(arguments.json, results_file.result(device=arguments.device, config=config, results=results))

    save(run_all(plan(first, arguments.also), lambda line: print(line, flush=True), save))


if __name__ == "__main__":
    main()
