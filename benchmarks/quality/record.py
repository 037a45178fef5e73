"""The recorded frontier: models, variants and rows in order of importance, as far as a time limit lets them.

    python benchmarks/quality/record.py --weights V1 --also V0 --seconds 60 --jobs 3 --json frontier.json

The same as ``qvg-paged eval --frontier``, except that what matters most is run first and on the most paths.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file

from quality.frontier import FrontierOptions, run_all

RIVALS = ("QVG int2 Kc=8", "QVG int2 Kc=16", "qvg4-int2 Kc=8")
CONTROLS = ("other noise", "last 25 frames (bytes of best-2bit)")


def plan(first: FrontierOptions, also: Path | None) -> list[FrontierOptions]:
    """Presets and rivals, other models, outlier channels, then everything else."""
    second = [] if also is None else [replace(first, weights=(also,), paths=48, rows=(*FINALS, *RIVALS, *CONTROLS))]
    return [
        replace(first, rows=(*FINALS, *RIVALS)),
        *(replace(o, variants=("plain",)) for o in second),
        replace(first, variants=("150x", "13x", "9x"), rows_at_once=5),
        replace(first, rows=CONTROLS),
        replace(first, rows=("finalists", "baselines", "controls"), without=(*FINALS, *RIVALS, *CONTROLS)),
    ]


FINALS = (
    "2 bits, knee, Kc=32/16",
    "2 bits, knee, Kc=42/10",
    "2 bits, knee, Kc=25/25",
    "2 bits, spread, Kc=32/16",
    "2 bits, knee, V balanced, Kc=32/16",
    "2 bits, knee, query-shaped rounding 2, Kc=32/16",
    "K int4, V 2 bits, Kc=16/21",
    "K 2 bits, V int4, Kc=21/16",
    "4 bits, blocks of 128, Kc=32",
)


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
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    first = FrontierOptions(
        weights=(arguments.weights,), device=arguments.device, paths=arguments.paths, given=arguments.given,
        steps=arguments.steps, span_frames=arguments.span_frames, jobs=arguments.jobs, seconds=arguments.seconds,
    )  # fmt: skip
    start = time.monotonic()
    results = run_all(plan(first, arguments.also), lambda line: print(line, flush=True))
    config = {**vars(arguments), "seconds_taken": time.monotonic() - start}
    config |= {name: getattr(arguments, name).name for name in ("weights", "also") if getattr(arguments, name)}
    results_file.write(arguments.json, results_file.result(device=arguments.device, config=config, results=results))


if __name__ == "__main__":
    main()
