"""The scheduler's promises, one by one, held or missed.

    python benchmarks/scheduler_bounds.py --json benchmarks/results/<device>/scheduler.json

Exit status 0 only if all of them held; what the ladder costs in pictures is shown besides. Costs are round figures but
in the part "measured", which takes them from ``nvidia-h200/bench.json``, and is left out without it. Times are those of
the fastest of several tries.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from results_file import result, write
from stress.bounds import Row, attacks, fairness, goodput, oversubscription, starvation
from stress.bounds_ladder import ladder, measured, quality, rungs
from stress.bounds_time import decision_time, simulator_speed

__all__ = ["PARTS", "main"]

COSTS = Path(__file__).resolve().parent / "results" / "nvidia-h200" / "bench.json"
"""What a GPU has measured; the costs of one part."""


def _tell(text: str) -> None:
    print(f"    {text}", file=sys.stderr)


PARTS: dict[str, Callable[[], list[Row]]] = {
    "fairness": lambda: fairness(range(4)),
    "goodput": lambda: goodput(range(6), _tell),
    "attacks": lambda: attacks(range(4), _tell),
    "starvation": lambda: starvation(range(4)),
    "oversubscription": lambda: oversubscription(range(3)),
    "ladder": ladder,
    "rungs": lambda: rungs(range(4)),
    "measured": lambda: measured(COSTS, range(2), _tell),
    "time": decision_time,
    "speed": lambda: simulator_speed(range(5)),
}
"""What is measured, by name."""


def run(parts: list[str]) -> dict[str, Any]:
    """Rows of these parts."""
    rows: list[Row] = []
    for part in parts:
        began = time.perf_counter()
        found = PARTS[part]()
        for row in found:
            print(
                f"{'held  ' if row.held else 'MISSED'}  {row.name}: {row.value} ({row.bound}); {row.text}", flush=True
            )
        rows += found
        _tell(f"{part}: {time.perf_counter() - began:.0f} s")
    costs = quality(COSTS.parent) if "ladder" in parts else []
    for cost in costs:
        print(f"shown   {cost['name']}: {cost['value']}; {cost['text']}", flush=True)
    return {"rows": [asdict(row) for row in rows], "costs": costs}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write a result file")
    options = parser.parse_args()
    found = run(options.only)
    if options.json:
        write(options.json, result(device="cpu", config={"parts": options.only}, results=found))
    return int(not all(row["held"] for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
